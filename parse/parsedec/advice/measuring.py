"""Measure a pair of models on a user's own problems: each cost once, all of them in turn on one problem after another.

Segmenters that cut a draft differently each get a judge pass of their own, since a score may depend on the text between
two cuts. What thresholds, boundary rules and inner levels change is computed later, from these measurements.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from parsedec.advice.trial import Decoding, Pass, Trial
from parsedec.calibration.samples import right_prefixes
from parsedec.engine import Parse
from parsedec.errors import ConfigError, IncompatibleStack, ParsedecError
from parsedec.experiment.build import build_engine, build_sampling
from parsedec.judge import judging_session
from parsedec.meter import Meter
from parsedec.outer import PrefixVerification
from parsedec.peers.equivalence import Equivalence
from parsedec.sampling import Sampler, request_generator
from parsedec.segmenters import Segmenter
from parsedec.tasks.base import Problem, Task
from parsedec.text.spelling import Draft
from parsedec.types import Limits, Result

log = logging.getLogger(__name__)

Composed = Callable[[Sequence[str]], DictConfig]  # the user's configuration with further overrides
Labels = Callable[[Sequence[int]], tuple[bool, ...] | None]  # cuts -> whether the prefixes up to them are right


def chosen(group: str, entry: str) -> list[str]:
    """The overrides that choose a member of a group; `entry` is its name and settings, e.g. 'pard inner.length=4'."""
    name, *own = shlex.split(entry)
    return [f"{group}={name}", *own]


class Prober:
    """Makes all measurements. Raises ConfigError or IncompatibleStack for a pair that cannot run at all.

    inners     entry -> the target with that inner level alone
    left_out   entry -> why that inner level does not fit the target
    """

    def __init__(self, cfg: DictConfig, composed: Composed, task: Task) -> None:
        outer = instantiate(cfg.outer)
        if not isinstance(outer, PrefixVerification) or cfg.draft.model is None:
            raise ConfigError(
                f"outer is {type(outer).__name__}, draft is {'none' if cfg.draft.model is None else 'set'}; advice is "
                "about outer=parse with a draft model."
            )
        self.task = task
        self.limits = Limits(max_new_tokens=cfg.max_new_tokens, stop=cfg.stop)
        self.sampling = build_sampling(cfg)
        self.seed = int(cfg.seed)
        self.stack = build_engine(composed(chosen("inner", "none")))
        bound = self.stack.outer
        assert isinstance(bound, PrefixVerification)
        self.outer = bound
        self.equivalence: Equivalence = instantiate(cfg.equivalence).bind(self.stack.target)
        self.segmenters: dict[str, Segmenter] = {
            entry: instantiate(composed(chosen("segmenter", entry)).segmenter) for entry in cfg.segmenters
        }
        self.inners: dict[str, Parse] = {}
        self.left_out: dict[str, str] = {}
        for entry in dict.fromkeys(["none", *cfg.inners]):
            try:
                self.inners[entry] = build_engine(composed([*chosen("inner", entry), "outer=none"]))
            except IncompatibleStack as error:
                self.left_out[entry] = str(error)
                log.info("inner=%s is left out: %s", entry, error)

    def measure(self, problem: Problem, index: int, *, inners: bool) -> Trial:
        """Measure one problem, with `inners` on every inner level, too. A trial that fails says why in its `error`."""
        try:
            return self._measure(problem, index, inners)
        except ParsedecError as error:
            log.warning("%s is left out: %s", problem.id, error)
            return Trial(id=problem.id, error=str(error))

    @torch.inference_mode()
    def _measure(self, problem: Problem, index: int, inners: bool) -> Trial:
        own = self._alone("none", problem.asked, self.limits.max_new_tokens, index)
        ids = self.stack.target_ids(problem.asked)
        draft, draft_s = self._draft(problem, ids, index)
        own_correct, draft_correct, labels = self._labels(problem, own, draft)
        judged = self._judge(ids, draft, labels)
        times = own.times
        return Trial(
            id=problem.id,
            tokens=own.new_tokens,
            prefill_s=times.prefill_s,
            decode_s=times.decode_s,
            wall_s=times.wall_s,
            own_correct=own_correct,
            draft_tokens=len(draft.tokens),
            ended=draft.ended,
            draft_s=draft_s,
            draft_correct=draft_correct,
            agreement=self.task.score(problem, draft.text).correct is None,
            judged=judged,
            decoded=self._decode(problem, ids, draft, judged, own, index) if inners else {},
        )

    def _alone(self, inner: str, prompt: Any, most: int, index: int) -> Result:
        """The target's answer, of at most `most` tokens, with an inner level and no outer one."""
        return self.inners[inner].generate(
            prompt,
            max_new_tokens=most,
            stop=self.limits.stop,
            sampling=self.sampling,
            generator=request_generator(self.seed, index),
        )

    def _draft(self, problem: Problem, ids: list[int], index: int) -> tuple[Draft, float]:
        """The draft that the outer level would get from the draft model, and the seconds it takes."""
        meter = Meter(self.stack.target.device)
        sampler = Sampler(self.sampling, request_generator(self.seed, index))
        with meter.span("draft"):
            draft = self.stack.write_draft(problem.asked, ids, sampler, self.limits)
        return draft, meter.seconds("draft")

    def _judge(self, ids: list[int], draft: Draft, labels: Labels) -> dict[str, Pass]:
        """The judge's pass for each segmenter; segmenters that cut alike share one."""
        made: dict[tuple[int, ...], Pass] = {}
        judged = {}
        for entry, segmenter in self.segmenters.items():
            cuts = tuple(segmenter.cuts(draft))
            if cuts not in made:
                made[cuts] = self._pass(ids, draft, cuts, labels(cuts))
            judged[entry] = made[cuts]
        return judged

    def _pass(self, ids: list[int], draft: Draft, cuts: tuple[int, ...], right: tuple[bool, ...] | None) -> Pass:
        if not cuts:
            return Pass(cuts=(), scores=(), rows=0, seconds=0.0, right=right)
        session = judging_session(self.stack.target, self.outer.judge)
        session.feed(ids)
        meter = Meter(self.stack.target.device)
        with meter.span("judge"):
            scores = self.outer.judge.score(session, draft, cuts, cuts)
            session.keep_draft(cuts[0])
        return Pass(cuts=cuts, scores=scores.values, rows=scores.rows, seconds=meter.seconds("judge"), right=right)

    def _labels(self, problem: Problem, own: Result, draft: Draft) -> tuple[bool, bool, Labels]:
        """Whether the target's own answer is right, whether the draft is, and a function that labels its prefixes."""
        mine, drafted = (self.task.score(problem, text) for text in (own.text, draft.text))
        if drafted.correct is None:  # no program can tell: the target's own answer is all there is to compare with
            agrees = self.equivalence.compare(own.text, draft.text).score >= 0.5
            return True, agrees, _unlabelled
        if drafted.correct or drafted.first_wrong_line is not None:
            return bool(mine.correct), bool(drafted.correct), lambda cuts: right_prefixes(draft, cuts, drafted)
        return bool(mine.correct), False, _unlabelled

    def _decode(
        self, problem: Problem, ids: list[int], draft: Draft, judged: Mapping[str, Pass], own: Result, index: int
    ) -> dict[str, tuple[Decoding, ...]]:
        """Run every inner level on the whole answer and from a kept prefix on; the order rotates with `index`."""
        seen = next(iter(judged.values()))
        kept = self.outer.boundary.keep(seen.scores) if seen.scores else 0
        if kept in (0, len(seen.cuts)):  # nothing is kept, or all of it: take a prefix half-way
            kept = len(seen.cuts) // 2
        prefix = seen.cuts[kept - 1] if kept else 0
        names = list(self.inners)
        turn = index % len(names)
        decoded = {"none": [_decoding(0, own)]}
        for name in names[turn:] + names[:turn]:
            runs = decoded.setdefault(name, [])
            most = self.limits.max_new_tokens
            if name != "none":
                runs.append(_decoding(0, self._alone(name, problem.asked, most, index)))
            if 0 < prefix < most:
                runs.append(_decoding(prefix, self._alone(name, [*ids, *draft.tokens[:prefix]], most - prefix, index)))
        return {name: tuple(decoded[name]) for name in names}


def _decoding(prefix: int, result: Result) -> Decoding:
    return Decoding(
        prefix=prefix, tokens=result.new_tokens, seconds=result.times.decode_s, calls=result.counters.inner_steps
    )


def _unlabelled(_: Sequence[int]) -> None:
    """The labels of prefixes (none) where only final answers are known to be right or wrong."""
