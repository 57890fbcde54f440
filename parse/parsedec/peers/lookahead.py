"""outer=lookahead: the draft model writes some steps ahead, the target writes its own version of each, and a judge says
up to where they mean the same.

Lookahead Reasoning (Fu et al., arXiv 2506.19830). The target's versions do not depend on one another, since each
follows the drafted steps before it, so they can be written at the same time. That is all there is to gain: the target
also writes every step that is kept.

    draft model   d1 | d2 | d3
    target        t1 | t2 after d1 | t3 after d1 d2 | t4 after d1 d2 d3
    judge         d1 = t1, d2 = t2, d3 differs from t3:  the answer continues with  d1 d2 t3
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, ClassVar, Self

from parsedec.acceptance import Acceptance
from parsedec.errors import ConfigError, require_number, require_part
from parsedec.inner import NoSpeculation
from parsedec.models.language_model import LanguageModel
from parsedec.outer import Work, Written, drafter_of, require_parts
from parsedec.peers.equivalence import Equivalence, LabelEquivalence
from parsedec.peers.steps import DraftSteps, OwnStep, OwnWriting, joined, write_own
from parsedec.remote.model import RemoteModel
from parsedec.sampling import Sampler
from parsedec.segmenters import Paragraphs, Segmenter
from parsedec.sessions.branches import Branches
from parsedec.text.chat import closing_token
from parsedec.text.spelling import Draft
from parsedec.types import Author, Round, Segment, StopReason, Tree

IN_TURN = "the target wrote its versions one after another: {} cannot decode a batch"
ANOTHER = "the equivalence judge is {}; its work is in the time, and in none of the counts of target and draft model"


@dataclass(frozen=True, kw_only=True)
class LookaheadReasoning:
    """Steps proposed ahead, compared with the target's own.

    steps        steps the draft model proposes per round
    equivalence  scores whether two versions of a step mean the same
    threshold    lowest score at which they do
    segmenter    defines a step; published: text up to a blank line
    together     "auto": the target writes its versions as a batch if it has no inner speculator and is not on a server,
                 else one after another up to the first that differs; "never": always one after another

    Differs from the published method in this: proposals form one chain, not a tree; rounds do not overlap, so nothing
    is proposed for the next one while the target writes; and a drafted step that ends the answer is kept only if the
    target's own version ends it as well. The batch stops as soon as the first difference is known. Times are wall-clock
    on the devices at hand, with nothing deducted for versions that could be written elsewhere. The counts of target
    calls and rows include what was written and then not used.
    """

    prefill: ClassVar[bool] = True
    needs_draft: ClassVar[bool] = True

    steps: int = 4
    equivalence: Equivalence = field(default_factory=LabelEquivalence)
    threshold: float = 0.5
    segmenter: Segmenter = field(default_factory=Paragraphs)
    together: str = "auto"
    end_token: int = -1  # ends an answer whose last step is the draft model's; set by `bind`

    def __post_init__(self) -> None:
        require_parts(self)
        require_part("equivalence", self.equivalence, Equivalence, "LabelEquivalence()")
        require_number("outer.steps", self.steps, whole=True, low=1)
        require_number("outer.threshold", self.threshold, low=0, high=1)
        if self.together not in ("auto", "never"):
            raise ConfigError(f"outer.together={self.together!r}; expected auto or never.")

    def bind(self, target: LanguageModel) -> Self:
        return replace(self, equivalence=self.equivalence.bind(target), end_token=closing_token(target))

    def run(self, work: Work) -> Iterator[Written]:
        asked = self.equivalence.asks
        if asked is not None and asked is not work.target.session.model:
            work.notes.add(ANOTHER.format(asked.name))
        ahead = DraftSteps(drafter_of(work), work.answer, self.segmenter)
        while work.answer.stop is None:
            work.answer.begin_round()
            before = {phase: work.meter.seconds(phase) for phase in ("draft", "judge", "decode")}
            round_ = Comparison(self, work, self._propose(work, ahead), before)
            yield from round_.run()
            work.rounds.append(round_.record())

    def _propose(self, work: Work, ahead: DraftSteps) -> list[Draft]:
        ahead.restart()
        limit = min(work.answer.remaining, work.target.session.room - 1)
        proposed: list[Draft] = []
        with work.meter.span("draft"):
            while limit > 0 and len(proposed) < self.steps and not (proposed and proposed[-1].ended):
                step = ahead.next(limit)
                if not step.tokens:
                    break
                proposed.append(step)
        return proposed


class Comparison:
    """One round: compares proposed steps with the target's own."""

    def __init__(
        self, outer: LookaheadReasoning, work: Work, proposed: list[Draft], before: Mapping[str, float]
    ) -> None:
        """`before`: seconds of each phase when the round began."""
        self.outer = outer
        self.work = work
        self.proposed = proposed
        self.scores: list[float] = []
        self.stands = 0  # leading steps to keep
        self._before = before
        self._asked = [0, 0]  # passes, rows of the equivalence judge
        self._counts = [0, 0]  # tokens of the answer: the draft model's, the target's

    def run(self) -> Iterator[Written]:
        """Yield the steps to keep, and the target's own step after them."""
        work, session = self.work, self.work.target.session
        obstacle = "an inner speculator" if not isinstance(work.target.inner, NoSpeculation) else None
        if obstacle is None and isinstance(session.model, RemoteModel):
            obstacle = "a model on a server"
        if not self.proposed:
            own = self._write_own()
        elif self.outer.together == "auto" and obstacle is None:
            own = self._together()
        else:
            work.notes |= {IN_TURN.format(obstacle)} if obstacle else set()
            own = self._in_turn()
        kept: list[int] = []
        if self.stands:
            closed = [self.outer.end_token] if self.proposed[self.stands - 1].ended else []
            kept = work.answer.extend([*joined(self.proposed[: self.stands]), *closed], Author.DRAFT)
            yield Author.DRAFT, kept
        taken: list[int] = []
        if own is not None and work.answer.stop is None:
            taken = work.answer.extend(own.tokens, Author.TARGET)
            if taken:
                yield Author.TARGET, taken
            else:
                work.answer.stop = StopReason.CONTEXT_LIMIT  # there was no room to write
        self._counts = [len(kept), len(taken)]

    def _in_turn(self) -> OwnStep | None:
        """Write versions one after another, up to the first that differs; the target's session follows the steps kept.
        Returns the target's own step that comes next, if any."""
        work = self.work
        session, target = work.target.session, work.target
        for step in self.proposed:
            base = session.length
            own = self._write_own()
            if own is None or not self._same(own, step):
                target.note_refused(step.tokens)
                return own
            with work.meter.span("decode"):
                target.rewind(base)
                session.feed(step.tokens)
            self.stands += 1
        return None if self.proposed[-1].ended else self._write_own()

    def _write_own(self) -> OwnStep | None:
        """The target's version after the steps kept so far; None if the answer has no room for one."""
        work = self.work
        left = work.answer.remaining - sum(len(step.tokens) for step in self.proposed[: self.stands])
        if not left:
            return None
        with work.meter.span("decode"):
            return write_own(work.target, work.answer, self.outer.segmenter, left)

    def _together(self) -> OwnStep | None:
        """Write all versions as a batch, and one after the last proposal, until the first that differs is known.
        Returns as `_in_turn`."""
        work, session = self.work, self.work.target.session
        ends = [0, *accumulate(len(step.tokens) for step in self.proposed)]
        room = min(work.answer.remaining, session.room)
        cuts = [end for end in ends if end < room]
        if self.proposed[-1].ended:
            cuts = cuts[: len(self.proposed)]
        with work.meter.span("decode"):
            branches = session.fan_out(list(joined(self.proposed)), cuts)
            writings = [OwnWriting(work.answer, self.outer.segmenter, room - cut) for cut in cuts]
        own: OwnStep | None = None
        while own is None and self.stands < len(cuts):
            with work.meter.span("decode"):
                _write_until_done(branches, writings, self.stands, work.target.acceptance, work.target.sampler)
            version = writings[self.stands].step()
            last = self.stands == len(self.proposed)
            if last or not self._same(version, self.proposed[self.stands]):
                own = version
            else:
                self.stands += 1
        with work.meter.span("decode"):
            session.calls += branches.calls
            session.rows += branches.rows
            del branches  # before the session goes on, or it would have to move out of memory that they still hold
            session.keep_draft(ends[self.stands])
            if own is not None:
                session.feed(own.tokens)  # read again, in one pass: a branch's cache is not reused
        return own

    def _same(self, own: OwnStep, step: Draft) -> bool:
        with self.work.meter.span("judge"):
            said = self.outer.equivalence.compare(own.text, step.text)
        self.scores.append(said.score if own.ended == step.ended else 0.0)
        self._asked[0] += said.calls
        self._asked[1] += said.rows
        self.work.notes |= {said.note} if said.note else set()
        session = self.work.target.session
        if self.outer.equivalence.asks is session.model:
            session.calls += said.calls
            session.rows += said.rows
        return self.scores[-1] >= self.outer.threshold

    def record(self) -> Round:
        """The round for the trace; also counts what was drafted and judged."""
        work, tally = self.work, self.work.target.tally
        drafted = sum(len(step.tokens) + step.ended for step in self.proposed)
        tally.draft_tokens += drafted
        tally.kept_draft_tokens += self._counts[0]
        tally.judge_passes += self._asked[0]
        tally.judge_rows += self._asked[1]
        scores = [*self.scores, *([None] * (len(self.proposed) - len(self.scores)))]
        facts: dict[str, Any] = {phase + "_s": work.meter.seconds(phase) - s for phase, s in self._before.items()}
        return Round(
            drafted=bool(self.proposed),
            judged_tokens=sum(len(step.tokens) for step in self.proposed),
            kept_tokens=self._counts[0],
            draft_ended=bool(self.proposed) and self.proposed[-1].ended,
            segments=tuple(
                Segment(text=step.text, tokens=len(step.tokens), score=score, kept=k < self.stands)
                for k, (step, score) in enumerate(zip(self.proposed, scores, strict=True))
            ),
            judge_passes=self._asked[0],
            judge_rows=self._asked[1],
            target_tokens=self._counts[1],
            **facts,
        )


def _write_until_done(
    branches: Branches, writings: list[OwnWriting], wanted: int, acceptance: Acceptance, sampler: Sampler
) -> None:
    """Write tokens in every branch until the wanted one is done; the last token of each is then still to be read.
    Finished branches read their last token again and again, since a batch has no gaps."""
    root = Tree.chain([0])
    while not writings[wanted].done:
        if writings[wanted].text.tokens:
            branches.step([writing.text.tokens[-1] for writing in writings])
        for branch, writing in enumerate(writings):
            if not writing.done:
                _, token = acceptance.accept(root, branches.logits[branch][None], sampler)
                writing.text.extend([token], Author.TARGET)
                writing.push(token)
