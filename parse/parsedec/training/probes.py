"""Train the linear probes of judge=probe, and the weights of judge=combined, for one target.

Hidden states come from the same passes that the judge will make. A probe is a logistic regression on standardised
states; its strength of regularisation, and the layer to use, are those that do best on problems it was not trained on.

Shapes in this file:  P prefixes, H hidden, L layers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parsedec.errors import ConfigError, require_number, require_numbers
from parsedec.experiment.record import to_json, write_text
from parsedec.experiment.summary import auc
from parsedec.judge import CombinedJudge, Reading, judging_session
from parsedec.judge.probe import CARD, POSITIONS, WEIGHTS, LinearProbes, Mixture, ProbeCard
from parsedec.judge.seam import choose_path
from parsedec.models.checkpoints import write_tensors
from parsedec.models.language_model import LanguageModel
from parsedec.sessions.backends import open_session
from parsedec.text.chat import suffix_text
from parsedec.training.prefixes import Marked
from parsedec.types import JudgePath

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Told = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class States:
    """Hidden states of the passes over some drafts, and labels.

    by        (position, layer) -> hidden states [P, H] float32
    right     [P] whether the prefix is free of errors
    complete  [P] whether it is a whole draft
    first     [P] whether its problem is in the first half of the problems
    """

    by: Mapping[tuple[str, int], Tensor]
    right: Bools
    complete: Bools
    first: Bools


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A fitted probe of the best strength tried; its weight [H] is rounded as it will be stored.

    auc    area under the ROC curve on the problems that chose the strength: the best of several, so optimistic
    tried  [S, P] log-odds that the probes of all S strengths give the prefixes of those problems
    """

    weight: Tensor
    bias: float
    strength: float
    auc: float
    tried: Floats


def grid_of_layers(target: LanguageModel, wanted: int | Sequence[int]) -> tuple[int, ...]:
    """Layers to fit probes on: those given or, if `wanted` is a number, so many, evenly spread up to the last.

    Raises ConfigError for layers that the target does not have.
    """
    if not isinstance(wanted, int):
        require_numbers("layers", wanted)
        layers = tuple(sorted(set(wanted)))
    else:
        require_number("layers", wanted, whole=True)
        count = min(wanted, target.num_layers)
        layers = tuple(round(target.num_layers * (i + 1) / count) for i in range(count)) if count > 0 else ()
    if not layers or not 0 <= layers[0] <= layers[-1] <= target.num_layers:
        raise ConfigError(f"layers={wanted}; expected how many, or indices from 0 to {target.num_layers}.")
    return layers


def collect(
    target: LanguageModel,
    question: str,
    positions: tuple[str, ...],
    layers: tuple[int, ...],
    marked: Sequence[Marked],
    after_each: Told,
) -> States:
    """Hidden states after the question ("suffix") or at the cuts ("cut"), or both, from one judge pass for each draft.

    Without position "suffix" that is a plain pass over the draft, which is several times cheaper.
    Raises ConfigError for an unknown position.
    """
    if not positions or not set(positions) <= set(POSITIONS):
        raise ConfigError(f"positions={list(positions)}; expected some of {', '.join(POSITIONS)}.")
    suffix: tuple[int, ...] = ()
    path = JudgePath.CAUSAL
    if "suffix" in positions:
        suffix = tuple(target.encode(suffix_text(target, question)))
        path, _ = choose_path(target, suffix, "auto")
    parts: dict[tuple[str, int], list[Tensor]] = {(p, layer): [] for p in positions for layer in layers}
    for one in marked:
        session = open_session(target, layers)
        session.feed(one.prompt)
        reading = Reading.take(session, one.draft, one.cuts, one.cuts, suffix=suffix, path=path)
        for position, layer in parts:
            states = reading.probe_states(layer) if position == "suffix" else reading.cut_states(layer)
            parts[position, layer].append(states.cpu())
        after_each("hidden states")
    return States(
        by={key: torch.cat(rows) for key, rows in parts.items()},
        right=rights(marked),
        complete=wholes(marked),
        first=first_half(marked),
    )


def fit_probe(train: tuple[Tensor, Bools], unseen: tuple[Tensor, Bools], strengths: Sequence[float]) -> Linear:
    """The probe with the largest area under the ROC curve on `unseen`, among those fitted on `train`.

    train, unseen  states [P, H] and verdicts [P]
    strengths      inverse strengths of L2 regularisation to try
    """
    from sklearn.linear_model import LogisticRegression

    mean, scale = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    best, tried = None, []
    for strength in strengths:
        model = LogisticRegression(C=strength, max_iter=1000)
        model.fit(((train[0] - mean) / scale).numpy(), train[1])
        weight = (torch.from_numpy(model.coef_[0]).float() / scale).bfloat16()  # standardisation folded in, as stored
        bias = float(model.intercept_[0]) - float(weight.float() @ mean)
        tried.append(np.asarray(unseen[0] @ weight.float() + bias, dtype=float))
        found = auc(tried[-1], unseen[1])
        if best is None or found > best.auc:
            best = Linear(weight=weight, bias=bias, strength=strength, auc=found, tried=tried[-1][None])
    if best is None:
        raise ConfigError("strengths=[]; expected at least one.")
    return replace(best, tried=np.stack(tried))


def fit_probes(
    train: States, unseen: States, strengths: Sequence[float], after_each: Told
) -> dict[tuple[str, int], Linear]:
    """A probe for every position and layer. Raises ConfigError unless both parts have right and wrong prefixes."""
    for name, states in (("train", train), ("calibration", unseen)):
        if len(set(states.right.tolist())) < 2:
            raise ConfigError(
                f"the {len(states.right)} prefixes of {name} are all right or all wrong, so there is nothing to tell "
                "apart. Give more problems, or a draft model that errs now and then."
            )
    found = {}
    for key, rows in train.by.items():
        found[key] = fit_probe((rows, train.right), (unseen.by[key], unseen.right), strengths)
        after_each("probes")
    return found


def elsewhere(found: Mapping[tuple[str, int], Linear], unseen: States) -> dict[str, float | None]:
    """By position, the area under the ROC curve of the best layer and strength, on problems that did not choose them.

    The largest of many areas is too good on the problems that choose it: with pure noise it is well above one half. So
    one half of the problems chooses, the other half gives the area, and both ways round are averaged. None if a half
    has only right or only wrong prefixes.
    """
    areas: dict[str, float | None] = {}
    halves = (unseen.first, ~unseen.first)
    for position in dict.fromkeys(at for at, _ in found):
        odds = np.concatenate([fit.tried for (at, _), fit in found.items() if at == position])  # [layers * S, P]
        if any(len(set(unseen.right[half].tolist())) < 2 for half in halves):
            areas[position] = None
            continue
        both = []
        for chooses, tells in (halves, halves[::-1]):
            best = max(odds, key=lambda row: auc(row[chooses], unseen.right[chooses]))
            both.append(auc(best[tells], unseen.right[tells]))
        areas[position] = float(np.mean(both))
    return areas


def card_of(
    target: LanguageModel, question: str, found: Mapping[tuple[str, int], Linear], unseen: States, allowed: float
) -> ProbeCard:
    """The best layer of each position, with thresholds at which a share `allowed` of the wrong prefixes pass."""
    probes = {}
    for position in dict.fromkeys(at for at, _ in found):
        layers = {layer: fit for (at, layer), fit in found.items() if at == position}
        layer = max(layers, key=lambda layer: layers[layer].auc)
        odds = unseen.by[position, layer] @ layers[layer].weight.float() + layers[layer].bias
        threshold, whole = thresholds(np.asarray(odds.sigmoid(), dtype=float), unseen.right, unseen.complete, allowed)
        bias = {str(layer): fit.bias for layer, fit in layers.items()}
        probes[position] = LinearProbes(threshold=threshold, full_threshold=whole, layer=layer, bias=bias)
    return ProbeCard(
        target=target.name,
        hidden_size=target.hidden_size,
        num_layers=target.num_layers,
        question=question,
        probes=probes,
    )


def fit_mixture(
    target: LanguageModel, judge: CombinedJudge, marked: Sequence[Marked], allowed: float, after_each: Told
) -> Mixture:
    """Weights for the judges of `judge`, fitted on drafts that none of them was trained on."""
    from sklearn.linear_model import LogisticRegression

    names = list(judge.judges)
    bound = replace(judge, weights=dict.fromkeys(names, 1.0)).bind(target)
    rows: list[Tensor] = []
    for one in marked:
        session = judging_session(target, bound)
        session.feed(one.prompt)
        odds, _ = bound.odds(session, one.draft, one.cuts, one.cuts)
        rows.append(torch.stack([odds[name] for name in names], dim=1))
        after_each("combined judges")
    features, right = torch.cat(rows).double().numpy(), rights(marked)
    model = LogisticRegression(max_iter=1000).fit(features, right)
    scores: Floats = model.predict_proba(features)[:, 1]
    threshold, whole = thresholds(scores, right, wholes(marked), allowed)
    weights = dict(zip(names, map(float, model.coef_[0]), strict=True))
    return Mixture(threshold=threshold, full_threshold=whole, bias=float(model.intercept_[0]), weights=weights)


def write_probes(folder: Path, card: ProbeCard, found: Mapping[tuple[str, int], Linear]) -> Path:
    """Write the folder that judge=probe and judge=combined read as `judge.weights`, and return it."""
    write_tensors({f"{position}.{layer}": fit.weight for (position, layer), fit in found.items()}, folder / WEIGHTS)
    write_text(json.dumps({"model_type": "parsedec_probe", **to_json(card)}, indent=1), folder / CARD)
    return folder


def thresholds(scores: Floats, right: Bools, complete: Bools, allowed: float) -> tuple[float, float]:
    """The lowest thresholds, for prefixes and for whole drafts, at which at most a share `allowed` of wrong ones pass.

    A starting point: `experiments/calibrate.py` finds thresholds that keep a stated goal with a stated confidence.
    """
    return lowest(scores[~right], allowed), lowest(scores[~right & complete], allowed)


def lowest(wrong: Floats, allowed: float) -> float:
    """The lowest threshold that at most a share `allowed` of the scores `wrong` reach; at most 1, even if more do."""
    count = math.floor(allowed * len(wrong))
    if count >= len(wrong):
        return 0.0
    return min(1.0, float(np.nextafter(np.sort(wrong)[::-1][count], 2.0)))


def rights(marked: Sequence[Marked]) -> Bools:
    return np.array([right for one in marked for right in one.right], dtype=bool)


def first_half(marked: Sequence[Marked]) -> Bools:
    """Whether each prefix belongs to the first half of the problems; all drafts of a problem are in the same half."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(one.prompt for one in marked))}
    return np.array([2 * order[one.prompt] < len(order) for one in marked for _ in one.cuts], dtype=bool)


def wholes(marked: Sequence[Marked]) -> Bools:
    return np.array([cut == len(one.draft.tokens) for one in marked for cut in one.cuts], dtype=bool)


def layer_table(found: Mapping[tuple[str, int], Linear]) -> list[dict[str, Any]]:
    """Rows of the record, one for each probe; `auc` is on the problems that chose its strength (see `elsewhere`)."""
    return [
        {"position": position, "layer": layer, "auc": fit.auc, "strength": fit.strength}
        for (position, layer), fit in found.items()
    ]
