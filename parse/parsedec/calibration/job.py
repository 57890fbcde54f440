"""A calibration from configuration to record. Samples are saved as they come: a killed run loses only some seconds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from parsedec.calibration.decisions import Decisions
from parsedec.calibration.fitting import (
    LossesOf,
    fit_thresholds,
    prefix_losses_of,
    report,
    require_possible,
    require_usable,
)
from parsedec.calibration.outcomes import Known, Outcomes
from parsedec.calibration.risk import Goal, Losses
from parsedec.calibration.samples import PARTS, Sample
from parsedec.calibration.scoring import Scorer
from parsedec.calibration.sources import Question, Source, asked_of, groups, refuse_known
from parsedec.experiment.build import plain
from parsedec.experiment.cli import progress
from parsedec.experiment.growing import GrowingRecord
from parsedec.experiment.problems import read_now, refuse_other_problems
from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance

log = logging.getLogger(__name__)


class Store(GrowingRecord):
    """Samples by id, and whether answers behind kept prefixes are right, as far as known."""

    def __init__(self, head: dict[str, Any], path: Path, earlier: dict[str, Any] | None) -> None:
        super().__init__(head, path)
        self.samples: dict[str, Sample] = {}
        self.answers: Known = {}
        self.results: dict[str, Any] = {}
        if earlier:
            found = (Sample.of_data(data) for data in earlier["samples"])
            self.samples = {sample.id: sample for sample in found if not sample.error}  # the others are tried again
            self.answers = {
                name: {int(tokens): right for tokens, right in known.items()}
                for name, known in earlier["answers"].items()
            }

    def done(self) -> str:
        return f"{len(self.samples)} judged drafts"

    def contents(self, status: str) -> dict[str, Any]:
        return {
            "samples": [sample.as_data() for sample in self.samples.values()],
            # sorted, since the order in which they were asked for means nothing
            "answers": {name: dict(sorted(self.answers[name].items())) for name in sorted(self.answers)},
            **self.results,
        }


def run_calibration(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Fit (or finish fitting) thresholds in `folder`; returns the record, which is saved to disk every few seconds.

    When resuming, a record that is finished without errors is returned as it is: no model is loaded.
    Raises, before a model is loaded, OutputExistsError if the folder holds a record that this run does not resume, or
    if a problem judged there is no longer asked or has changed; and ConfigError if there are too few problems to show
    the goal.
    KeyboardInterrupt passes through once the record says `interrupted`.
    """
    config = plain(cfg)
    earlier = earlier_record(folder / "record.json", config, cfg.resume)
    path = folder / "record.json"
    if earlier and earlier["status"] == "finished" and not any(sample["error"] for sample in earlier["samples"]):
        asked = read_now(path, lambda: asked_of(instantiate(cfg.labels).questions(cfg.seed)))
        if asked is None or not left_over(earlier, asked, path):
            log.info("%s is finished already, with the same configuration: skipped", path)
            return earlier
    goal: Goal = instantiate(cfg.goal)
    source: Source = instantiate(cfg.labels)
    questions = source.questions(cfg.seed)
    asked = asked_of(questions)
    if earlier:
        left_over(earlier, asked, path)
    refuse_known(getattr(instantiate(cfg.outer), "judge", None), questions)
    require_possible(goal, questions, cfg.seed, prefixes=source.prefixes)
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": "calibration",
        "title": cfg.title or f"Calibration of {cfg.target.source}",
        "config": config,
        "provenance": provenance(),
        "resumed_from": earlier["provenance"] if earlier else None,
        "controls": source.controls,
        "problems": asked,
    }
    scorer = Scorer(cfg, source)
    store = Store(head, path, earlier)
    with store.saved_at_end():
        judge_all(scorer, questions, store)
        parts = {name: [s for s in store.samples.values() if s.part == name and not s.error] for name in PARTS}
        require_usable(parts)
        outcomes = None if source.prefixes else asking(scorer, questions, store)
        losses_of = prefix_losses_of(goal) if outcomes is None else counted_outcomes(outcomes, goal)
        rule = scorer.outer.boundary
        fitted = fit_thresholds(goal, rule, parts["fit"], losses_of, cfg.seed)
        results = report(goal, rule, fitted, parts, losses_of, outcomes, cfg.seed)
        results["counts"]["left_out"] = sum(sample.error is not None for sample in store.samples.values())
        store.results = {"calibration": results}
    return store.record


def left_over(earlier: dict[str, Any], asked: dict[str, str], path: Path) -> bool:
    """Whether some questions have not been judged by the earlier run. Raises OutputExistsError if one that it judged is
    no longer asked, or has changed."""
    judged = {sample["id"] for sample in earlier["samples"] if not sample["error"]}
    refuse_other_problems(path, earlier.get("problems") or {}, asked, judged)
    return not set(asked) <= judged


def judge_all(scorer: Scorer, questions: Sequence[Question], store: Store) -> None:
    """Judge what is not judged yet. Afterwards the store holds all samples in the order of their questions, each with
    its problem, which records of an earlier version do not name."""
    known = dict(store.samples)
    left = sum(question.problem.id not in known for question in questions)
    with progress(left) as step:
        for index, question in enumerate(questions):
            if (name := question.problem.id) not in known:
                store.samples[name] = known[name] = scorer.sample(question, index)
                step(f"judged, {question.part}")
                store.tick()
    names = groups([question.problem for question in questions])
    store.samples = {
        question.problem.id: replace(known[question.problem.id], problem=name)
        for question, name in zip(questions, names, strict=True)
    }


def asking(scorer: Scorer, questions: Sequence[Question], store: Store) -> Outcomes:
    """Outcomes of kept prefixes, from the store or else from the target."""
    by_id = {question.problem.id: question for question in questions}

    def ask(sample: Sample, tokens: int) -> bool:
        right = scorer.answer(by_id[sample.id], sample.tokens[:tokens])
        store.tick()
        return right

    return Outcomes(store.answers, ask)


def counted_outcomes(outcomes: Outcomes, goal: Goal) -> LossesOf:
    """`Outcomes.losses`, with a progress bar over the answers to be asked for."""

    def losses(samples: Sequence[Sample], decisions: Decisions) -> Losses:
        with progress(outcomes.missing(samples, decisions)) as step:
            outcomes.asked = lambda: step("answers behind kept prefixes")
            return outcomes.losses(samples, decisions, goal.of)

    return losses
