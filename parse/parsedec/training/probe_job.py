"""`experiments/train_probe.py` from configuration to record: drafts, hidden states, probes, weights, figures.

output/probe/           the probes and the combined judge's weights: `judge.weights` of judge=probe and judge=combined
output/drafts_*.json    the drafts to label, saved as they come; an interrupted run continues from them
output/record.json      configuration, provenance, and areas under the ROC curve: of every probe on the problems that
                        chose it (`probes`), and of each position's best layer on problems that did not (`elsewhere`)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from parsedec.calibration.sources import Answers, Question, Source, Steps, asked_of, prompt_digests
from parsedec.errors import ConfigError, require_texts
from parsedec.experiment.build import apply_runtime, build_model, build_target, plain
from parsedec.experiment.cli import progress
from parsedec.experiment.problems import read_now, refuse_other_problems
from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, to_json, write_record
from parsedec.judge import how_to_ask
from parsedec.judge.probe import ProbeCard
from parsedec.models.language_model import LanguageModel
from parsedec.training import probes
from parsedec.training.drafts import load_or_sample
from parsedec.training.prefixes import Marked, from_solutions, from_task, with_logprobs

log = logging.getLogger(__name__)

Told = Callable[[str], None]
PARTS = {"train": "fit", "calibration": "check"}  # our name for a part: its name in `labels`


def train_probes(cfg: DictConfig) -> dict[str, Any]:
    """Train, export and measure; returns the record, which is written at the end.

    When resuming, a finished record is returned as it is.
    """
    folder = Path(cfg.output)
    if cfg.get("combined"):
        cfg.combined.weights = str(folder / "probe")  # where the probe among its judges will be written
    config = plain(cfg)
    earlier = earlier_record(folder / "record.json", config, cfg.resume)
    if earlier is not None:
        now = read_now(folder / "record.json", lambda: asked_of(instantiate(cfg.labels).questions(cfg.seed)))
        if now is not None and (known := earlier.get("problems")):
            refuse_other_problems(folder / "record.json", known, now, known)
        log.info("%s is finished already", folder)
        return earlier
    apply_runtime(cfg)
    head = {"schema_version": SCHEMA_VERSION, "title": "judge probes", "config": config, "provenance": provenance()}
    require_texts("positions", cfg.positions)
    questions = instantiate(cfg.labels).questions(cfg.seed)
    asked, known = asked_of(questions), prompt_digests(question.problem for question in questions)
    started = time.monotonic()
    target = build_target(cfg)
    layers = probes.grid_of_layers(target, cfg.layers)  # fails before drafts are written, which takes long
    draft = build_model(cfg.draft.model) if cfg.draft.model is not None else None
    train, unseen = labelled(cfg, target, draft, folder)
    steps = len(train) + len(unseen) * (2 if cfg.get("combined") else 1) + len(cfg.positions) * len(layers)
    with progress(steps) as step:
        card, found, elsewhere = _fit(cfg, target, (train, unseen), known, layers, folder / "probe", step)
    rows = probes.layer_table(found)
    for row in sorted(rows, key=lambda row: (row["position"], row["layer"])):
        log.info("%s, layer %d: AUC %.4f where it was chosen", row["position"], row["layer"], row["auc"])
    for position, auc in elsewhere.items():
        log.info("%s, best layer: AUC %s on problems that did not choose it", position, auc and f"{auc:.4f}")
    record = head | {
        "status": "finished",
        "problems": asked,
        "card": to_json(card),
        "probes": rows,
        "elsewhere": elsewhere,
        "data": {name: _counts(part) for name, part in (("train", train), ("calibration", unseen))},
        "seconds": time.monotonic() - started,
    }
    write_record(record, folder / "record.json")
    return record


def _fit(
    cfg: DictConfig,
    target: LanguageModel,
    data: tuple[Sequence[Marked], Sequence[Marked]],
    known: Sequence[str],
    layers: tuple[int, ...],
    folder: Path,
    step: Told,
) -> tuple[ProbeCard, dict[tuple[str, int], probes.Linear], dict[str, float | None]]:
    """Fit probes and, if wanted, the combined judge's weights, and write them to `folder`.

    Returns the card, the probes, and their areas on problems that did not choose them (`probes.elsewhere`).
    """
    question = cfg.question or how_to_ask(target)[0]
    positions = tuple(cfg.positions)
    seen, unseen = (probes.collect(target, question, positions, layers, part, step) for part in data)
    found = probes.fit_probes(seen, unseen, list(cfg.strengths), step)
    card = replace(probes.card_of(target, question, found, unseen, cfg.false_accepts), problems=tuple(known))
    probes.write_probes(folder, card, found)
    if cfg.get("combined"):
        mixture = probes.fit_mixture(target, instantiate(cfg.combined), data[1], cfg.false_accepts, step)
        card = replace(card, combined=mixture)
        probes.write_probes(folder, card, found)
    return card, found, probes.elsewhere(found, unseen)


def labelled(
    cfg: DictConfig, target: LanguageModel, draft: LanguageModel | None, folder: Path
) -> tuple[list[Marked], list[Marked]]:
    """Drafts to train on, and drafts of other problems to choose and calibrate on. Raises ConfigError without both."""
    source: Source = instantiate(cfg.labels)
    if source.drafts and draft is None:
        raise ConfigError("draft=none, so nobody writes what is labelled; set draft, or labels=steps labels.path=FILE.")
    questions = source.questions(cfg.seed)
    parts = []
    for name, part in PARTS.items():
        asked = [question for question in questions if question.part == part]
        if isinstance(source, Steps):
            marked = from_solutions(target, draft, [question.problem for question in asked], source.separator)
        else:
            assert isinstance(source, Answers)
            assert draft is not None
            marked = _drafts(cfg, target, draft, source, asked, folder / f"drafts_{name}.json")
        # combined judges may read the draft model's probabilities; probes do not
        parts.append(with_logprobs(marked, draft) if draft is not None and cfg.get("combined") else marked)
    train, unseen = parts
    if not train or not unseen:
        raise ConfigError(f"{len(train)} drafts to train on and {len(unseen)} others; expected some of both.")
    return train, unseen


def _drafts(
    cfg: DictConfig,
    target: LanguageModel,
    draft: LanguageModel,
    source: Answers,
    questions: Sequence[Question],
    path: Path,
) -> list[Marked]:
    """The labelled drafts that the draft model writes for these questions; they are kept at `path`."""
    pool = load_or_sample(
        path,
        draft,
        [question.problem for question in questions],
        [instantiate(one) for one in cfg.passes],
        max_new_tokens=cfg.max_new_tokens,
        batch=cfg.batch,
        seed=cfg.seed,
    )
    return from_task(target, draft, source, questions, pool, instantiate(cfg.segmenter))


def _counts(marked: Sequence[Marked]) -> dict[str, int]:
    right = probes.rights(marked)
    return {"drafts": len(marked), "prefixes": len(right), "wrong_prefixes": int((~right).sum())}
