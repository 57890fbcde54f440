"""outer=parse_streamed: the judge reads along, so that drafting stops soon after the first prefix that fails.

PARSE (arXiv 2605.04263) judges a draft when it is complete. Here every `chunk` finished segments are read and judged
while the draft model writes on, as PEARL (arXiv 2408.11850) lets the target verify while its drafter drafts. Text whose
prefixes have passed is handed out at once.

draft model   segment 1 | segment 2 | segment 3 | segment 4 |  stopped
target                    judges 1    judges 2    judges 3: fails -> keeps 1 and 2, goes on from there

What is decided does not depend on when: a pass judges the next `chunk` cuts, however many more are known by then, and
reads each row of the draft once. The pass that judges the complete draft decides exactly as the fused pass of
outer=parse does. So both keep the same text under the same rule, unless outer=parse keeps a complete draft one of whose
prefixes had failed: a draft that failed in an earlier pass than its last is never completed here. And `max_cuts` bounds
the probes of a pass, not of a draft: cuts are not thinned, since how many will come is not known while they are judged.

Sampled text does not depend on when either: every draft has a generator of its own (`Drafter`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from parsedec.boundary import BoundaryRule, FirstFailure, Smoothed
from parsedec.drafter import NOTHING, Writing
from parsedec.errors import ConfigError
from parsedec.judge import Judge, Scores, judged
from parsedec.lanes import Beside, InTurn, Lane
from parsedec.outer import DraftVerification, Work, Written, drafter_of, spent, timed
from parsedec.segmenters import Segmenter
from parsedec.sessions.session import Session
from parsedec.text.spelling import Draft
from parsedec.types import Author, Round

FINAL = (FirstFailure, Smoothed)  # rules that a later score cannot make change what they said of earlier ones
ONE_MODEL = "judged in turn: target and draft model share one module, which two threads must not run at once"
RECODED = "a draft was ended early: its text behind the judged part changed how that part is encoded for the target"

FEW_SEGMENTS = 2  # what chunk=auto judges at a time where passes cost what their rows cost, or nobody waits for them
# Rows from which about the time of a pass on a GPU goes with its rows. With fewer it is that of reading the target's
# weights: in bfloat16 they are as many as the device makes floating-point operations while it reads a byte, by data
# sheets 150 on an A100, 205 on an H200, 280 on a B200, 295 on an H100.
ENOUGH_ROWS = 256


@dataclass(slots=True)
class Judging:
    """The passes over one draft as it grows, and what they have decided.

    `ready` and `rest` are called where the draft is written and make passes; each pass is a function to be called once,
    in the order they were made. A pass writes `scores`, `passes`, `failed` and `complete`, and nothing else does.

    chunk, rows  segments and rows of which a pass has at least so many, the last one aside; `max_cuts` bounds it
    """

    judge: Judge
    segmenter: Segmenter
    boundary: BoundaryRule
    chunk: int
    rows: int
    session: Session
    asked: Draft = NOTHING  # what the passes made so far read
    cuts: list[int] = field(default_factory=list)  # of all passes made so far
    scores: list[float] = field(default_factory=list)
    passes: list[Scores] = field(default_factory=list)
    failed: bool = False  # in a pass before the last: nothing behind that prefix can stand
    complete: bool = False  # the complete draft was judged
    _look_at: int = 0

    def looks(self, written: int) -> bool:
        """Whether to look for cuts at this length: that reads the whole text, so not at every token of a long one."""
        if written < self._look_at:
            return False
        self._look_at = written + max(1, written // 64)
        return True

    def continues(self, draft: Draft) -> bool:
        """Whether `draft` begins with the tokens that the passes were made of."""
        return draft.tokens[: len(self.asked.tokens)] == self.asked.tokens

    def ready(self, draft: Draft) -> list[Callable[[], None]]:
        """Full passes over a draft still being written."""
        new = self.segmenter.sure_cuts(draft)[len(self.cuts) :]
        passes = []
        while full := self._full(new):
            passes.append(self._pass(draft, new[:full]))
            new = new[full:]
        return passes

    def rest(self, draft: Draft) -> list[Callable[[], None]]:
        """Passes for what is left of a finished draft, the one that decides about the whole of it among them."""
        cuts = self.segmenter.cuts(draft, thinned=False)
        new = [cut for cut in cuts if cut > len(self.asked.tokens)]
        passes = []
        while new:
            count = self._full(new) or len(new)
            passes.append(self._pass(draft, new[:count], last=count == len(new)))
            new = new[count:]
        return passes

    @property
    def stands(self) -> int:
        """Draft tokens that are sure to stand."""
        segments = self.boundary.keep(list(self.scores))  # a copy: a pass may be adding to it
        return self.cuts[segments - 1] if segments else 0

    def _full(self, cuts: Sequence[int]) -> int | None:
        """How many of the next cuts make a full pass; None if all of them do not."""
        for count, cut in enumerate(cuts, start=1):
            rows = cut - len(self.asked.tokens) + count * self.judge.suffix_rows
            if count == self.segmenter.max_cuts or (count >= self.chunk and rows >= self.rows):
                return count
        return None

    def _pass(self, draft: Draft, probes: list[int], last: bool = False) -> Callable[[], None]:
        n = probes[-1]
        self.cuts += probes
        self.asked = draft.first(n, ended=last and draft.ended)
        return partial(self._run, self.asked, list(self.cuts), probes, last)

    def _run(self, draft: Draft, cuts: Sequence[int], probes: Sequence[int], last: bool) -> None:
        if self.failed:
            return
        scores = judged(self.judge, self.session, draft, cuts, probes)
        self.passes.append(scores)
        self.scores += scores.values
        self.failed = not last and self.boundary.keep(self.scores) < len(self.scores)
        self.complete = last


@dataclass(frozen=True, kw_only=True)
class StreamedVerification(DraftVerification):
    """outer=parse_streamed: finished segments are judged while the draft model writes on.

    chunk    segments per judge pass: fewer find an error sooner, more let the target read its weights less often.
             "auto": two, and on a GPU that also drafts as many as give the pass 256 rows: it takes no less with fewer
    overlap  "auto": drafting and judging at the same time unless the target is on the CPU; "always", "never"

    The boundary rule has to be one whose decision about a prefix no later score changes: first_failure or smoothed.
    """

    chunk: int | str = "auto"
    overlap: str = "auto"

    def __post_init__(self) -> None:
        DraftVerification.__post_init__(self)
        most = self.segmenter.max_cuts
        if self.chunk != "auto" and not (type(self.chunk) is int and 1 <= self.chunk <= most):
            raise ConfigError(f"outer.chunk={self.chunk!r}; expected auto, or 1 to {most}, the segmenter's max_cuts.")
        if self.overlap not in ("auto", "always", "never"):
            raise ConfigError(f"outer.overlap={self.overlap!r}; expected auto, always or never.")
        if not isinstance(self.boundary, FINAL):
            raise ConfigError(
                f"outer=parse_streamed cannot stop a draft under the boundary rule {type(self.boundary).__name__}: a "
                "later score may change what it says of earlier prefixes. Use boundary=first_failure or smoothed, or "
                "outer=parse."
            )

    def _draft_and_judge(self, work: Work, limit: int) -> Generator[Written, None, Round]:
        drafter, lane = drafter_of(work), self._lane(work)
        judging = Judging(self.judge, self.segmenter, self.boundary, *self._least(work, lane), work.target.session)
        before = spent(work.meter)
        # a boundary between phases would wait for the passes that are to run beside the draft model
        span = partial(work.meter.span, settled=lane.in_turn)
        handed = 0  # tokens of the draft that are in the answer
        with lane:
            with span("draft"), lane.drafting():
                writing = drafter.begin(work.answer, limit)
            more = writing is not None
            while writing and more:
                with span("draft"), lane.drafting():
                    more = self._write_on(writing, judging, lane)
                with span("judge"):
                    if not more:
                        lane.wait()
                        self._judge_rest(work, writing, judging, lane)
                    elif lane.waits():
                        lane.wait()
                taken = work.answer.extend(judging.asked.tokens[handed : judging.stands], Author.DRAFT)
                handed += len(taken)
                if taken:
                    yield Author.DRAFT, taken
                more = more and not judging.failed and work.answer.stop is None
            with work.meter.span("judge"):
                lane.wait()
        return (yield from self._conclude(work, writing, judging, handed, before))

    def _write_on(self, writing: Writing, judging: Judging, lane: Lane) -> bool:
        """Let the draft model write until text may have been decided about; whether it has more to write."""
        known = len(judging.scores)
        while writing.step():
            if judging.failed or lane.waits() or len(judging.scores) > known:
                return True
            if judging.looks(writing.written):
                draft = writing.draft()
                if not judging.continues(draft):
                    return False
                for judge_pass in judging.ready(draft):
                    lane.submit(judge_pass)
                if lane.waits():
                    return True
        return False

    def _judge_rest(self, work: Work, writing: Writing, judging: Judging, lane: Lane) -> None:
        """The draft is finished. If no prefix of it has failed, judge what is left of it."""
        draft = writing.draft(final=True)
        if not judging.continues(draft):
            work.notes.add(RECODED)
        elif not judging.failed:
            for judge_pass in judging.rest(draft):
                lane.submit(judge_pass)
            lane.wait()

    def _conclude(
        self,
        work: Work,
        writing: Writing | None,
        judging: Judging,
        handed: int,
        before: tuple[float, float],
    ) -> Generator[Written, None, Round]:
        """Settle the session on what stands, hand out the rest of it and return what the round was."""
        draft = writing.draft(final=True) if writing else judging.asked
        if not judging.continues(draft):
            draft = judging.asked
        done, taken = Round(drafted=True, draft_ended=draft.ended), list[int]()
        if judging.passes:
            scores = judging.scores
            segments, whole = self._decide(scores, draft) if judging.complete else (self.boundary.keep(scores), False)
            cut = judging.cuts[segments - 1] if segments else 0
            with work.meter.span("judge"):
                work.target.session.keep_draft(cut)
            read = judging.cuts[len(scores) - 1]
            # where guesses decide which draws are made, no guess may come from text that only this timing has
            work.target.note_refused(draft.tokens[cut : None if work.target.sampler.greedy else read])
            rest = [*draft.tokens[handed:cut], *([self.end_token] if whole else [])]
            taken = work.answer.extend(rest, Author.DRAFT)
            cuts = judging.cuts[: len(scores)]
            unread = [len(draft.tokens)] if len(draft.tokens) > read else []  # written, never judged
            scored = [*scores, *([None] * len(unread))]
            done = self._judged(draft, cuts + unread, scored, judging.passes, handed + len(taken), whole)
            done = replace(done, judged_tokens=read)
            self._count_passes(work, judging.passes)
        done = timed(done, work.meter, before)
        self._count_draft(work, len(draft.tokens) + draft.ended, done)
        if taken:
            yield Author.DRAFT, taken
        return done

    def _least(self, work: Work, lane: Lane) -> tuple[int, int]:
        """Segments and rows of a full pass."""
        if isinstance(self.chunk, int):
            return self.chunk, 0
        target, draft = work.target.session.model.device, drafter_of(work).model.device
        few = min(FEW_SEGMENTS, self.segmenter.max_cuts)
        return few, ENOUGH_ROWS if target.type == "cuda" and (lane.in_turn or draft == target) else 0

    def _lane(self, work: Work) -> Lane:
        target, draft = work.target.session.model, drafter_of(work).model
        if target.shared:  # what a rank decides must not hang on its clock
            return InTurn()
        if self.overlap == "never" or (self.overlap == "auto" and target.device.type == "cpu"):
            return InTurn()
        if target.hf is draft.hf:
            work.notes.add(ONE_MODEL)
            return InTurn()
        return Beside(target.device, draft.device)
