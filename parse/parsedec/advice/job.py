"""The run behind `experiments/advise.py`: measure, predict, rehearse the best arm's loops, conclude, check.

Measurements are saved as they come in; `resume=true` continues a run. Loops are rehearsed, not predicted: a second
draft depends on what the target has written before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from parsedec.advice.measuring import Composed, Prober, chosen
from parsedec.advice.prediction import ArmChoice, Expected, Predictor, observed
from parsedec.advice.trial import Trial
from parsedec.advice.verdict import Demands, Verdict, best_parse, conclude, falls, headline, luck_of_choice, separations
from parsedec.boundary import DEFAULT_THRESHOLD
from parsedec.calibration.decisions import Pair
from parsedec.errors import ConfigError, require_number, require_texts
from parsedec.experiment.build import build_engine, build_sampling, plain
from parsedec.experiment.cli import progress
from parsedec.experiment.growing import GrowingRecord
from parsedec.experiment.problems import digests, read_now, refuse_other_problems
from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, to_json
from parsedec.experiment.runner import Arm, Settings, run_arms
from parsedec.experiment.summary import compare, summarise
from parsedec.tasks.base import Problem, Task, first_turn, require_extra
from parsedec.types import Limits

log = logging.getLogger(__name__)
PARTS = ("rehearsal", "check")  # the parts of the record for which arms are run
ALONE = "inner alone"
Requests = dict[str, list[dict[str, Any]]]  # by arm


class Notes(GrowingRecord):
    """What has been measured, rehearsed and checked so far."""

    def __init__(self, head: dict[str, Any], path: Path, earlier: dict[str, Any] | None) -> None:
        super().__init__(head, path)
        before = earlier or {}
        trials = (Trial.of_data(data) for data in before.get("trials", ()))
        self.trials = {trial.id: trial for trial in trials if not trial.error}  # the others are tried again
        self.requests = {part: _answered(before.get(part, {})) for part in PARTS}
        # trials that are tried again may change which arm is best, so that a name now means another arm
        self.overrides: dict[str, dict[str, list[str]]] = {part: {} for part in PARTS} | before.get("arm_overrides", {})
        self.results: dict[str, Any] = {}

    def requests_of(self, part: str, arms: Mapping[str, Sequence[str]]) -> Requests:
        """The answers of a part so far, by arm. Drops those of arms that are no longer wanted, or whose name now means
        another arm.

        arms  overrides by name
        """
        kept = {name: own for name, own in self.requests[part].items()
                if name in arms and self.overrides[part].get(name) == list(arms[name])}  # fmt: skip
        if gone := sorted({name for name, own in self.requests[part].items() if own} - set(kept)):
            log.warning("%s: the answers of %s are dropped: they belong to other arms than are wanted now", part, gone)
        self.requests[part] = {name: kept.get(name, []) for name in arms}
        self.overrides[part] = {name: list(own) for name, own in arms.items()}
        return self.requests[part]

    def done(self) -> str:
        return f"{len(self.trials)} measured prompts"

    def contents(self, status: str) -> dict[str, Any]:
        return {
            "trials": [trial.as_data() for trial in self.trials.values()],
            **self.requests,
            "arm_overrides": self.overrides,
            **self.results,
        }


def run_advice(cfg: DictConfig, folder: Path, composed: Composed) -> dict[str, Any]:
    """Advise (or finish advising) in `folder`; returns the record, which is saved to disk every few seconds.

    composed  gives the configuration of the command with further overrides
    When resuming, a record that is finished without errors is returned as it is: no model is loaded.
    Raises OutputExistsError, before a model is loaded, if the folder holds a record that this run does not resume, or
    if a problem measured there is no longer asked or has changed.
    """
    config = plain(cfg)
    earlier = earlier_record(folder / "record.json", config, cfg.resume)
    path = folder / "record.json"
    if earlier and _complete(earlier):
        asked = read_now(path, lambda: divided(cfg, instantiate(cfg.task).problems()))
        if asked is not None:
            _check_asked(earlier, digests_of(*asked), path)
        log.info("%s is finished already, with the same configuration: skipped", path)
        return earlier
    require_extra("sklearn", "advice")
    task: Task = instantiate(cfg.task)
    problems, held_out = divided(cfg, task.problems())
    asked_now = digests_of(problems, held_out)
    if earlier:
        _check_asked(earlier, asked_now, path)
    head = {
        "schema_version": SCHEMA_VERSION,
        "kind": "advice",
        "title": cfg.title or f"Advice: {cfg.target.source} with {cfg.draft.model.source if cfg.draft.model else None}",
        "config": config,
        "provenance": provenance(),
        "resumed_from": earlier["provenance"] if earlier else None,
        "problems": asked_now,
    }
    prober = Prober(cfg, composed, task)
    notes = Notes(head, path, earlier)
    with notes.saved_at_end():
        measure_all(prober, problems, cfg.short, notes)
        advisor = Advisor(cfg, prober, task, notes, composed)
        verdict = advisor.advise(problems[: cfg.rehearse])
        notes.results = advisor.results(verdict)
        if held_out:
            notes.results["checked"] = advisor.check(verdict, held_out)
    return notes.record


def divided(cfg: DictConfig, problems: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """The problems to measure, and those after them for the check. Raises ConfigError if there are too few."""
    require_number("n", cfg.n, whole=True, low=1)
    require_number("short", cfg.short, whole=True, low=1, high=cfg.n)
    if cfg.rehearse is not None:
        require_number("rehearse", cfg.rehearse, whole=True, low=1, high=cfg.n)
    require_number("check.n", cfg.check.n, whole=True, low=0)
    for name in ("segmenters", "inners", "loops"):
        require_texts(name, cfg[name])
    if cfg.n + cfg.check.n > len(problems):
        raise ConfigError(
            f"n={cfg.n} and check.n={cfg.check.n} ask for more than the {len(problems)} problems of the task; lower "
            "one of them, or raise task.n."
        )
    return list(problems[: cfg.n]), list(problems[cfg.n : cfg.n + cfg.check.n])


def measure_all(prober: Prober, problems: Sequence[Problem], short: int, notes: Notes) -> None:
    """Measure what is not measured yet. The first problem is measured twice: the first time is a warm-up.

    Raises ConfigError if no problem could be measured.
    """
    left = [(i, problem) for i, problem in enumerate(problems) if problem.id not in notes.trials]
    if left:
        prober.measure(left[0][1], left[0][0], inners=True)
    with progress(len(left)) as step:
        for i, problem in left:
            notes.trials[problem.id] = prober.measure(problem, i, inners=i < short)
            step("measured")
            notes.tick()
    notes.trials = {problem.id: notes.trials[problem.id] for problem in problems}
    if all(trial.error for trial in notes.trials.values()):
        first = next(iter(notes.trials.values()))
        raise ConfigError(f"no prompt could be measured; the first one: {first.error}")


class Advisor:
    """Turns measurements into a verdict, and checks it."""

    def __init__(self, cfg: DictConfig, prober: Prober, task: Task, notes: Notes, composed: Composed) -> None:
        self.cfg = cfg
        self.prober = prober
        self.task = task
        self.notes = notes
        self.composed = composed
        self.demands = Demands(cfg.gain, cfg.spoilt)
        self.predictor = Predictor(list(notes.trials.values()), prober.outer.boundary, cfg.max_new_tokens, cfg.seed)
        inners = [name for name in prober.inners if name in self.predictor.paces]
        if not inners:
            raise ConfigError(
                f"none of the first {cfg.short} problems could be run, so the inner levels' paces are not known; the "
                "log says why. Raise short, or leave those problems out."
            )
        self.alone = [self.predictor.alone(name) for name in inners]
        pairs = self._pairs()
        self.arms = [arm for name in prober.segmenters for arm in self.predictor.parse(name, pairs, inners)]
        self.luck = 1.0
        self.looped: list[Expected] = []
        self.rehearsed: dict[str, Any] | None = None
        self.separates = separations(self.predictor, list(prober.segmenters), cfg.seed)

    def advise(self, problems: Sequence[Problem]) -> Verdict:
        """Run the best arm, its loops and the best inner level alone on the measured problems; returns the verdict."""
        first = best_parse(self.arms, self.demands)
        self.luck = luck_of_choice(self.arms, self.predictor, self.demands)
        alone = max(self.alone, key=lambda one: one.speedup)
        arms = {"once": first.arm} | {loop: replace(first.arm, loop=loop) for loop in self.cfg.loops}
        asked = {"target": ArmChoice(inner="none"), **arms}
        if alone.arm.inner != "none":
            asked[ALONE] = alone.arm
        done = self._run("rehearsal", asked, problems)
        self.looped = [observed(first, arm, done["target"], done[name], self.luck) for name, arm in arms.items()]
        if ALONE in done:
            ran = observed(alone, alone.arm, done["target"], done[ALONE])
            self.alone = [ran if one is alone else one for one in self.alone]
            alone = ran
        changes = {name: accuracy_change(done["target"], done[name]) for name in arms}
        if rehearsed := self._seen_in_rehearsal(first, done):
            self.rehearsed = rehearsed | {"accuracy": changes}
        right = [one for one in self.looped if not falls(changes[one.arm.loop], self.demands)]
        # to be worth a second draft, a loop must be faster than "once" by more than noise
        best = max(right or self.looped, key=lambda one: one.speedup * (1.0 if one.arm.loop == "once" else 0.98))
        assert first.arm.segmenter is not None
        separates = self.separates[first.arm.segmenter]
        # inner levels spoil nothing, and so do not count
        settings = len({(one.arm.segmenter, one.arm.thresholds) for one in self.arms})
        return conclude(self.predictor, best, alone, separates, self.demands, changes[best.arm.loop], settings)

    def _seen_in_rehearsal(self, first: Expected, done: Requests) -> dict[str, Any] | None:
        """The speed-up of the best arm as it ran beside the target, and as predicted from costs on the same problems;
        None if both answered no problem in common."""
        found = compare(done["target"], done["once"])
        answered = {r["id"] for r in done["target"] if r["result"]} & {r["id"] for r in done["once"] if r["result"]}
        both = [i for i, trial in enumerate(self.predictor.trials) if trial.id in answered]
        if found is None or found["time_ratio"] is None or not both:
            return None
        taken = sum(first.seconds[i] for i in both)
        return {
            "problems": len(both),
            "measured": found["time_ratio"],
            "predicted": float(self.predictor.target[both].sum() / taken),
            "luck": self.luck,
        }

    def check(self, verdict: Verdict, problems: Sequence[Problem]) -> dict[str, Any]:
        """Run the verdict's arms on unseen problems; returns what was predicted beside what is measured.

        Raises ConfigError if the target and an arm answered no problem in common.
        """
        expected = {"parse": verdict.parse}
        if not verdict.helps and verdict.recommended.arm.inner != "none":
            expected["advised"] = verdict.recommended
        arms = {"target": ArmChoice(inner="none"), **{name: one.arm for name, one in expected.items()}}
        done, rows = self._run("check", arms, problems), []
        for name, one in expected.items():
            measured = compare(done["target"], done[name])
            if measured is None or measured["time_ratio"] is None:
                raise ConfigError(f"no problem of the check was answered by both the target and {one.arm.label}.")
            rows.append({
                "arm": one.arm.label, "advised": one is verdict.recommended, "predicted": one.speedup,
                "predicted_interval": list(one.interval), "measured": measured["time_ratio"],
                "measured_interval": [measured["time_ratio_low"], measured["time_ratio_high"]],
                "error": one.speedup / measured["time_ratio"] - 1, "tokens_speedup": measured["speedup"],
                "accuracy_change": measured["accuracy_change"], "kept_share": summarise(done[name])["kept_share"],
            })  # fmt: skip
        return {"problems": len(problems), "accuracy": summarise(done["target"])["accuracy"], "rows": rows}

    def results(self, verdict: Verdict) -> dict[str, Any]:
        """The results that go into the record."""
        predictor = self.predictor
        slim = [_slim(one) for one in (*self.alone, *self.arms)]
        return {
            "verdict": {
                "helps": verdict.helps,
                "text": headline(verdict),
                "findings": to_json(list(verdict.findings)),
                "recommended": _slim(verdict.recommended),
                "parse": _slim(verdict.parse),
                "alone": _slim(verdict.alone),
                "overrides": overrides_of(verdict.recommended.arm),
                "agreement": any(trial.agreement for trial in predictor.trials),
                "prefixes": predictor.prefixes,
                "settings": verdict.settings,
                "spoilt_at_most": verdict.spoilt_at_most,
            },
            "costs": {
                "problems": len(predictor.trials),
                "left_out": sum(trial.error is not None for trial in self.notes.trials.values()),
                "target_token_s": float(predictor.token_s.mean()),
                "draft_token_s": float(predictor.token_s.mean() / predictor.ceiling()),
                "answer_tokens": float(predictor.own.mean()),
                "draft_tokens": float(predictor.drafted.mean()),
                "ceiling": predictor.ceiling(),
                "remaining_factor": predictor.factor,
                "accuracy": _mean([t.own_correct for t in predictor.trials]),
                "draft_accuracy": _mean([t.draft_correct for t in predictor.trials]),
                "inners": {name: to_json(pace) for name, pace in predictor.paces.items()},
                "left_out_inners": self.prober.left_out,
                "judges": {name: self._judge_costs(name) for name in self.prober.segmenters},
            },
            "arms": slim,
            "looped": [_slim(one) for one in self.looped],
            "rehearsed": self.rehearsed,
        }

    def _judge_costs(self, segmenter: str) -> dict[str, Any]:
        seen = [trial.judged[segmenter] for trial in self.predictor.trials]
        seconds, rows = sum(one.seconds for one in seen), sum(one.rows for one in seen)
        separates = {key: value for key, value in self.separates[segmenter].items() if key != "curve"}
        return {
            "pass_s": seconds / len(seen),
            "rows": rows / len(seen),
            "row_s": seconds / max(1, rows),
            "cuts": sum(len(one.cuts) for one in seen) / len(seen),
            "ideal": self.predictor.ideal(segmenter),
            **separates,
        }

    def _pairs(self) -> list[Pair]:
        rule = self.prober.outer.boundary
        full = DEFAULT_THRESHOLD if rule.full_threshold is None else rule.full_threshold
        own: Pair = (rule.floor, full)
        return list(dict.fromkeys(own if t is None else (float(t), float(t)) for t in self.cfg.thresholds))

    def _run(self, part: str, arms: Mapping[str, ArmChoice], problems: Sequence[Problem]) -> Requests:
        """Run arms in turn on each problem; what an interrupted run has answered is not asked again."""
        own = {name: overrides_of(arm) for name, arm in arms.items()}
        done = self.notes.requests_of(part, own)
        runs = [Arm(name, build_engine(self.composed(own[name])), requests=done[name]) for name in arms]
        limits = Limits(max_new_tokens=self.cfg.max_new_tokens, stop=self.cfg.stop)
        sampling = build_sampling(self.cfg)
        settings = Settings(limits=limits, sampling=sampling, seed=self.cfg.seed, warmup=1)
        with progress(len(arms) * len(problems) - sum(map(len, done.values()))) as step:
            run_arms(runs, self.task, problems, settings, _both(step, self.notes))
        return done


def accuracy_change(target: Sequence[dict[str, Any]], arm: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The arm's share of right answers minus the target's, on requests scored for both, with its 95 % interval; None if
    there are none. A request that got no answer counts as wrong."""
    found = compare(target, arm)
    if found is None or not found["scored"]:
        return None
    low, high = found["accuracy_change_low"], found["accuracy_change_high"]
    return {"requests": found["scored"], "change": found["accuracy_change"], "interval": [low, high]}


def _complete(record: dict[str, Any]) -> bool:
    """Whether a run has nothing left to do; what failed is still to be tried again."""
    runs = [one for part in PARTS for requests in record[part].values() for one in requests]
    return record["status"] == "finished" and not any(one["error"] for one in (*record["trials"], *runs))


def digests_of(problems: Sequence[Problem], held_out: Sequence[Problem]) -> dict[str, str]:
    """Digests of all problems asked, by id."""
    return digests({problem.id: problem for problem in (*problems, *held_out)})


def _check_asked(earlier: dict[str, Any], asked: dict[str, str], path: Path) -> None:
    """Raise OutputExistsError if an earlier run measured or checked other problems than are asked now."""
    measured = {trial["id"] for trial in earlier["trials"] if not trial["error"]}
    checked = {first_turn(one["id"]) for runs in _answered(earlier["check"]).values() for one in runs}
    refuse_other_problems(path, earlier.get("problems") or {}, asked, measured | checked)


def _answered(requests: Requests) -> Requests:
    """The requests of an interrupted run that have an answer; the others are tried again."""
    return {name: [one for one in runs if not one["error"]] for name, runs in requests.items()}


def _both(step: Callable[[str], None], notes: Notes) -> Callable[[str], None]:
    def after_each(name: str) -> None:
        step(name)
        notes.tick()

    return after_each


def overrides_of(arm: ArmChoice) -> list[str]:
    """The command-line overrides that choose an arm."""
    if arm.segmenter is None or arm.thresholds is None:
        return ["outer=none", *chosen("inner", arm.inner)]
    threshold, full = arm.thresholds
    return [
        *chosen("inner", arm.inner),
        *chosen("segmenter", arm.segmenter),
        f"boundary.threshold={threshold!r}",
        f"boundary.full_threshold={full!r}",
        *chosen("loop", arm.loop),
    ]


def _slim(one: Expected) -> dict[str, Any]:
    """An expectation without its values by problem, which follow from the trials."""
    data: dict[str, Any] = to_json(one)
    del data["seconds"], data["spoils"]
    return data | {"label": one.arm.label, "spoilt": one.spoilt}


def _mean(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)
