"""The outer level: draft, judge, keep, continue (PARSE, arXiv 2605.04263; the README shows one round).

prompt -> Drafter -> draft d[0:N] -> cuts c_1 < ... < c_K = N -> judge: ONE target pass -> scores s_1 .. s_K
             ^                                                                                  |
             +-- loop policy <- segment written by the target <- inner level <- kept prefix c* <-+
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, Self, runtime_checkable

from parsedec.answer import Answer
from parsedec.boundary import BoundaryRule, FirstFailure
from parsedec.drafter import Drafter
from parsedec.errors import ConfigError, IncompatibleStack, require_number, require_part
from parsedec.gate import Always, Gate, GateHistory
from parsedec.inner import Decoder, InnerSpeculator
from parsedec.judge import Judge, LabelJudge, Scores, judged
from parsedec.loop import Loop, Once
from parsedec.meter import Meter
from parsedec.models.language_model import LanguageModel
from parsedec.segmenters import FirstSegment, Lines, Segmenter
from parsedec.text.chat import closing_token
from parsedec.text.spelling import Draft
from parsedec.types import Author, Round, Segment

Written = tuple[Author, list[int]]

# What may stand in the slots of an outer level, and an example
SLOTS: dict[str, tuple[type, str]] = {
    "judge": (Judge, "LabelJudge(), or one derived from PassJudge, which needs no more than `read`"),
    "segmenter": (Segmenter, "Lines()"),
    "boundary": (BoundaryRule, "FirstFailure(threshold=0.9)"),
    "gate": (Gate, "Always() or Adaptive()"),
    "loop": (Loop, "Once() or Rounds(rounds=3)"),
}


def require_parts(outer: object) -> None:
    """Raise ConfigError if a part of an outer level does not fit its slot."""
    for name, (kind, example) in SLOTS.items():
        if hasattr(outer, name):
            require_part(name, getattr(outer, name), kind, example)


@dataclass(slots=True)
class Work:
    """A request being answered, as an outer level sees it. The target's session holds the prompt: read if the outer
    level sets `prefill`, pending otherwise."""

    prompt_tokens: int
    target: Decoder
    drafter: Drafter | None
    answer: Answer
    meter: Meter
    history: GateHistory
    rounds: list[Round] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)  # for readers of the trace

    def note_no_room(self, judge: Judge) -> None:
        """Note that the context has no room left for a draft and its judge."""
        model, rows = self.target.session.model, judge.suffix_rows
        if rows:  # without a question the answer itself fills the context, as its stop reason says
            self.notes.add(
                f"nothing was drafted where prompt, answer and the judge's question of {rows} tokens fill the context "
                f"of {model.name}, {model.context_limit} tokens"
            )

    def target_writes(self, until: Segmenter | None = None) -> Iterator[Written]:
        """Let the target decode to the end of the answer, or until it has completed a segment of `until`.

        Tokens that an inner speculator commits beyond the segment are taken back, so that the choice of speculator
        does not change what is written.
        """
        before, start = self.meter.seconds("decode"), len(self.answer.tokens)
        free = self.target.session.next_logits is not None  # if so, the first token costs no call
        segment = None if until is None else FirstSegment(until, self.answer.model)
        writing = self.target.write(self.answer, Author.TARGET, whole=until is None)
        try:
            for tokens in self.meter.timed(writing, "decode"):
                complete = segment is not None and any(segment.push(token) for token in tokens)
                beyond = start + len(segment.growing.tokens) if segment and complete else len(self.answer.tokens)
                taken = len(tokens) - (len(self.answer.tokens) - beyond)
                if taken < len(tokens):
                    self.answer.cut(beyond)
                    self.target.rewind(self.prompt_tokens + beyond)
                yield Author.TARGET, tokens[:taken]
                if complete:
                    break
        finally:  # also when the reader leaves the stream early: a measuring gate needs a first figure
            decoded = len(self.answer.tokens) - start - free
            self.history.add_decoding(max(0, decoded), self.meter.seconds("decode") - before)


class Outer(Protocol):
    """Answers a request, yielding text as soon as it is final."""

    prefill: ClassVar[bool]
    """Whether the engine reads the prompt before `run`; if not, it is pending in the target's session."""

    @property
    def needs_draft(self) -> bool:
        """Whether it uses the stack's draft model."""

    def bind(self, target: LanguageModel) -> Self:
        """A copy for `target`; raises if the two do not fit."""

    def run(self, work: Work) -> Iterator[Written]: ...


@runtime_checkable
class AsksJudge(Protocol):
    """An outer level with a judge, so that the engine's sessions record what that judge reads.

    Optional, in addition to `Outer`.
    """

    @property
    def judge(self) -> Judge: ...


@runtime_checkable
class ChecksStack(Protocol):
    """An outer level that does not work with every draft model or inner speculator.

    Optional, in addition to `Outer`, for those that do more than decode with the stack's own parts.
    """

    def check_stack(self, target: LanguageModel, draft: LanguageModel | None, inner: InnerSpeculator) -> None:
        """Raise IncompatibleStack for a part that cannot work or would be ignored."""


@dataclass(frozen=True)
class TargetOnly:
    """outer=none: the inner level alone."""

    prefill: ClassVar[bool] = True
    needs_draft: ClassVar[bool] = False

    def bind(self, target: LanguageModel) -> TargetOnly:
        return self

    def run(self, work: Work) -> Iterator[Written]:
        start = len(work.answer.tokens)
        yield from work.target_writes()
        work.rounds.append(
            Round(drafted=False, target_tokens=len(work.answer.tokens) - start, decode_s=work.meter.seconds("decode"))
        )


@dataclass(frozen=True, kw_only=True)
class DraftVerification(ABC):
    """Base of the outer levels where the draft model writes, the target judges prefixes, and the longest valid is kept.

    max_draft_tokens  most tokens a draft may have; None: as many as the answer may have
    """

    prefill: ClassVar[bool] = True
    needs_draft: ClassVar[bool] = True

    judge: Judge = field(default_factory=LabelJudge)
    segmenter: Segmenter = field(default_factory=Lines)
    boundary: BoundaryRule = field(default_factory=FirstFailure)
    gate: Gate = field(default_factory=Always)
    loop: Loop = field(default_factory=Once)
    max_draft_tokens: int | None = None
    end_token: int = -1  # ends an answer that is a complete draft; set by `bind`

    def __post_init__(self) -> None:
        require_parts(self)
        limit = self.max_draft_tokens
        if limit is not None:
            require_number("outer.max_draft_tokens", limit, whole=True, low=1)

    def bind(self, target: LanguageModel) -> Self:
        judge = self.judge.bind(target)
        return replace(
            self,
            judge=judge,
            boundary=self.boundary.bind(judge.card),
            end_token=closing_token(target),
        )

    def run(self, work: Work) -> Iterator[Written]:
        for i in range(self.loop.rounds):
            work.answer.begin_round()
            limit = self.draft_limit(work.answer.remaining, work.target.session.room)
            if limit < 1:
                work.note_no_room(self.judge)
            drafting = limit > 0 and self.gate.allows(work.history)
            done = (yield from self._draft_and_judge(work, limit)) if drafting else Round(drafted=False)
            before, start = work.meter.seconds("decode"), len(work.answer.tokens)
            last = i == self.loop.rounds - 1 or not drafting
            yield from work.target_writes(until=None if last else self.segmenter)
            wrote, decoded_s = len(work.answer.tokens) - start, work.meter.seconds("decode") - before
            work.rounds.append(replace(done, target_tokens=wrote, decode_s=decoded_s))
            if work.answer.stop is not None:
                return

    @abstractmethod
    def _draft_and_judge(self, work: Work, limit: int) -> Generator[Written, None, Round]:
        """Write and judge one draft; yields the part kept, and returns the round without the target's own tokens."""

    def draft_limit(self, remaining: int, room: int) -> int:
        """The most tokens a draft may have; below 1 if there is no room for one.

        remaining  tokens left in the answer's limit
        room       tokens left in the target's context, which has to hold the draft and a probe behind it
        """
        room -= self.judge.suffix_rows
        return min(remaining, room, self.max_draft_tokens or room)

    def _decide(self, scores: Sequence[float | None], draft: Draft) -> tuple[int, bool]:
        """(leading segments to keep, whether the draft is the answer)."""
        asked = [score for score in scores if score is not None]
        if self.boundary.whole(asked[-1]):
            return len(scores), draft.ended
        return self.boundary.keep(asked), False

    def _count_draft(self, work: Work, drafted: int, done: Round) -> None:
        """Count a finished draft of `drafted` tokens, its end token included."""
        work.target.tally.draft_tokens += drafted
        work.target.tally.kept_draft_tokens += done.kept_tokens
        work.history.add_draft(done.draft_s + done.judge_s, drafted, done.kept_tokens)

    def _count_passes(self, work: Work, passes: Sequence[Scores]) -> None:
        work.notes |= {p.note for p in passes if p.note}
        work.target.tally.judge_passes += len(passes)
        work.target.tally.judge_rows += sum(p.rows for p in passes)

    def _judged(
        self,
        draft: Draft,
        cuts: Sequence[int],
        scores: Sequence[float | None],
        passes: Sequence[Scores],
        kept: int,
        whole: bool,
    ) -> Round:
        """The round of a judged draft.

        kept    tokens of the draft that stay
        whole   whether the draft is the answer
        passes  the judge passes made
        """
        starts = [0, *cuts[:-1]]
        logprobs = passes[-1].draft_logprobs
        return Round(
            drafted=True,
            judged_tokens=len(draft.tokens),
            kept_tokens=kept,
            draft_ended=draft.ended,
            accepted_whole=whole,
            segments=tuple(
                Segment(text=draft.piece(start, stop), tokens=stop - start, score=score, kept=start < kept)
                for start, stop, score in zip(starts, cuts, scores, strict=True)
            ),
            judge_path=passes[0].path,
            judge_passes=len(passes),
            judge_rows=sum(p.rows for p in passes),
            mean_draft_logprob=sum(logprobs) / len(logprobs) if logprobs else None,  # a server returns none
        )


def spent(meter: Meter) -> tuple[float, float]:
    """Seconds spent on drafting and on judging so far."""
    return meter.seconds("draft"), meter.seconds("judge")


def timed(done: Round, meter: Meter, before: tuple[float, float]) -> Round:
    """The round with the seconds spent since `before`, an earlier result of `spent`."""
    draft_s, judge_s = (now - then for now, then in zip(spent(meter), before, strict=True))
    return replace(done, draft_s=draft_s, judge_s=judge_s)


def drafter_of(work: Work) -> Drafter:
    """The request's drafter; raises IncompatibleStack if the stack has no draft model."""
    if work.drafter is None:
        raise IncompatibleStack("this outer level needs a draft model; set draft, or use outer=none.")
    return work.drafter


@dataclass(frozen=True, kw_only=True)
class PrefixVerification(DraftVerification):
    """outer=parse: the target judges all prefixes of a whole draft and keeps the longest valid one.

    passes  "fused": judge the complete draft and its prefixes in one pass; "two_pass": judge the complete draft first,
            and the prefixes only if it fails
    """

    passes: str = "fused"

    def __post_init__(self) -> None:
        DraftVerification.__post_init__(self)
        if self.passes not in ("fused", "two_pass"):
            raise ConfigError(f"outer.passes='{self.passes}'; expected fused or two_pass.")

    def _draft_and_judge(self, work: Work, limit: int) -> Generator[Written, None, Round]:
        before = spent(work.meter)
        with work.meter.span("draft"):
            draft = drafter_of(work).write(work.answer, limit)
        cuts = self.segmenter.cuts(draft)
        done, kept = Round(drafted=True, draft_ended=draft.ended), list[int]()
        if cuts:
            with work.meter.span("judge"):
                scores, passes = self._judge(work, draft, cuts)
                segments, whole = self._decide(scores, draft)
                cut = cuts[segments - 1] if segments else 0
                work.target.session.keep_draft(cut)
                work.target.note_refused(draft.tokens[cut:])
            kept = work.answer.extend([*draft.tokens[:cut], *([self.end_token] if whole else [])], Author.DRAFT)
            done = self._judged(draft, cuts, scores, passes, len(kept), whole)
        done = timed(done, work.meter, before)
        self._count_draft(work, len(draft.tokens) + draft.ended, done)
        if kept:
            yield Author.DRAFT, kept
        return done

    def _judge(self, work: Work, draft: Draft, cuts: list[int]) -> tuple[list[float | None], list[Scores]]:
        """One score per cut (None where two_pass had no need to ask), and the passes made."""
        session = work.target.session
        first = judged(self.judge, session, draft, cuts, cuts if self.passes == "fused" else cuts[-1:])
        passes = [first]
        scores: list[float | None] = list(first.values)
        if self.passes == "two_pass" and len(cuts) > 1:
            scores = [*([None] * (len(cuts) - 1)), *first.values]
            if not self.boundary.whole(first.values[-1]):
                passes.append(judged(self.judge, session, draft, cuts, cuts[:-1]))
                scores[:-1] = passes[-1].values
        self._count_passes(work, passes)
        return scores, passes
