"""The probe judge: a linear map of a hidden state of the target, trained to tell right prefixes from wrong ones.

A relative of Judge Decoding (arXiv 2501.19309), whose head accepts tokens, and SemanticSpec (arXiv 2602.03708), which
probes for meanings. Here it scores whole prefixes, from one of two places:

    suffix   the last row of a verification suffix, as for the label judge
    cut      the last token of the prefix itself: the pass is then a plain prefill, with no mask and no further rows

    s = sigmoid(w . h + b)      h the hidden state [H] of one layer

`experiments/train_probe.py` trains the probes of several layers and writes them as one folder:

    config.json          what they were trained on, and the layer, biases and thresholds of each position (`ProbeCard`)
    probe.safetensors    weights [H] by position and layer, as "suffix.9"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from parsedec.errors import ConfigError, IncompatibleStack, JudgeError
from parsedec.judge.seam import JudgeNeeds, PassJudge, Reading, check_here, check_path, choose_path
from parsedec.models.checkpoints import find_file, read_tensors
from parsedec.models.language_model import LanguageModel
from parsedec.text.chat import suffix_text
from parsedec.types import JudgePath

CARD, WEIGHTS = "config.json", "probe.safetensors"
POSITIONS = ("suffix", "cut")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted judge: base of those below, with the thresholds found for its scores."""

    threshold: float
    full_threshold: float

    def __post_init__(self) -> None:
        if not all(0 <= value <= 1 for value in (self.threshold, self.full_threshold)):
            raise ValueError(f"thresholds {self.threshold}, {self.full_threshold} are not numbers from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class LinearProbes(Fit):
    """The probes of one position.

    layer  the layer to use, which the thresholds are for
    bias   by layer; here rather than with the weights, which are stored in bfloat16
    """

    layer: int
    bias: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Mixture(Fit):
    """A logistic regression over the log-odds of other judges, by their names."""

    bias: float
    weights: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ProbeCard:
    """The contents of config.json in a folder of probes.

    target                   name of the model they were trained on
    hidden_size, num_layers  of that model
    question                 the user turn of the suffix; for probes at position suffix
    probes                   by position
    combined                 weights for judge=combined, if they were fitted
    problems                 digests of the prompts of all problems that anything here was fitted or chosen on; None on
                             cards of earlier versions
    """

    target: str
    hidden_size: int
    num_layers: int
    question: str
    probes: Mapping[str, LinearProbes]
    combined: Mixture | None = None
    problems: Sequence[str] | None = None

    @classmethod
    def of(cls, data: dict[str, Any]) -> ProbeCard:
        """The card in parsed JSON; raises ValueError, TypeError or KeyError if it holds none."""
        probes = {position: LinearProbes(**fit) for position, fit in data["probes"].items()}
        combined = data.get("combined")
        return cls(
            target=str(data["target"]),
            hidden_size=int(data["hidden_size"]),
            num_layers=int(data["num_layers"]),
            question=str(data["question"]),
            probes=probes,
            combined=Mixture(**combined) if combined else None,
            problems=None if data.get("problems") is None else tuple(map(str, data["problems"])),
        )


def read_card(source: str | Path) -> tuple[ProbeCard, Path]:
    """The card of a folder, hub id or `zoo:NAME`, and the path of its weights."""
    card, weights = (find_file(source, name) for name in (CARD, WEIGHTS))
    if card is None or weights is None:
        missing = CARD if card is None else WEIGHTS
        raise IncompatibleStack(
            f"'{source}' has no {missing}; expected a folder, hub id or zoo:NAME with {CARD} and {WEIGHTS}, as "
            "experiments/train_probe.py writes them. Check judge.weights."
        )
    try:
        return ProbeCard.of(json.loads(card.read_text())), weights
    except (ValueError, TypeError, KeyError) as error:
        raise IncompatibleStack(
            f"{card} is not a card of trained probes: {type(error).__name__}: {error}. Write it again with "
            "experiments/train_probe.py."
        ) from error


def weights_of(judge: object) -> set[str]:
    """Folders of trained weights that an unbound judge, or any judge within it, will read."""
    found: set[str] = set()
    for name in (one.name for one in fields(judge)) if is_dataclass(judge) else ():
        value = getattr(judge, name)
        if name == "weights" and isinstance(value, str):
            found.add(value)
        for inside in value.values() if isinstance(value, Mapping) else [value]:
            found |= weights_of(inside)
    return found


@dataclass(frozen=True, kw_only=True)
class ProbeJudge(PassJudge):
    """A trained linear probe.

    weights   folder, hub id or `zoo:NAME` written by experiments/train_probe.py
    position  "suffix": after a question, as for the label judge; "cut": at the cut's own row, which costs nothing
    layer     layer whose probe to use; None: the one the card names
    path      for position=suffix: as for the label judge
    """

    weights: str
    position: str = "suffix"
    layer: int | None = None
    path: str = "auto"
    # Set by `bind`:
    weight: Tensor | None = field(default=None, compare=False)  # [H] float32
    bias: float = 0.0

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.position not in POSITIONS:
            raise ConfigError(f"judge.position='{self.position}'; expected one of {', '.join(POSITIONS)}.")

    def bind(self, target: LanguageModel) -> Self:
        check_here(target, "probe", "hidden states of the target")
        card, file = read_card(self.weights)
        if (card.hidden_size, card.num_layers) != (target.hidden_size, target.num_layers):
            raise IncompatibleStack(
                f"the probes of '{self.weights}' were trained on {card.target}, width {card.hidden_size} and "
                f"{card.num_layers} layers, but {target.name} has width {target.hidden_size} and {target.num_layers} "
                "layers. Train some for it: python experiments/train_probe.py target=…"
            )
        if self.position not in card.probes:
            raise IncompatibleStack(
                f"'{self.weights}' holds probes only for judge.position={' and '.join(card.probes)}, but position is "
                f"{self.position}. Change it, or train more: train_probe.py 'positions=[{self.position}]'."
            )
        fit, tensors = card.probes[self.position], read_tensors(file, f"{self.position}.")
        layer = fit.layer if self.layer is None else self.layer
        weight, bias = tensors.get(f"{self.position}.{layer}"), fit.bias.get(str(layer))
        if weight is None or bias is None or weight.shape != (target.hidden_size,):
            raise IncompatibleStack(
                f"'{self.weights}' holds no probe for position {self.position}, layer {layer}; expected a bias and a "
                f"weight [{target.hidden_size}] for a layer of {sorted(fit.bias)}. Check judge.position "
                "and judge.layer."
            )
        suffix: tuple[int, ...] = ()
        chosen, reason = JudgePath.CAUSAL, None
        if self.position == "suffix":
            suffix = tuple(target.encode(suffix_text(target, card.question)))
            chosen, reason = choose_path(target, suffix, self.path)
        return replace(
            self,
            layer=layer,
            suffix=suffix,
            chosen=chosen,
            reason=reason,
            card=fit if fit.layer == layer else None,
            weight=weight.float().to(target.device),
            bias=float(bias),
        )

    @property
    def needs(self) -> JudgeNeeds:
        return JudgeNeeds(() if self.layer is None else (self.layer,))

    def read(self, reading: Reading) -> Tensor:
        if self.weight is None or self.layer is None:
            raise JudgeError("the judge was not bound to a target; call bind(target) first.")
        at_cut = self.position == "cut"
        states = reading.cut_states(self.layer) if at_cut else reading.probe_states(self.layer)  # [K, H]
        return torch.sigmoid(states @ self.weight + self.bias)
