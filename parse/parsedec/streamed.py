"""outer=parse_streamed: judges a draft while it is written, so that drafting stops soon after a prefix has failed.

PARSE (arXiv 2605.04263) judges a draft once it is complete. Here the target reads and judges every `chunk` finished
segments while the draft model writes on, as PEARL (arXiv 2408.11850) verifies while the drafter drafts. Text whose
prefixes have passed is handed out at once.

draft model   segment 1 | segment 2 | segment 3 | segment 4 |  stopped
target                    judges 1    judges 2    judges 3: fails -> keeps 1 and 2, goes on from there

Decisions do not depend on timing: a pass judges the next `chunk` cuts, however many more are known by then, and reads
each row of the draft once. The pass that judges the complete draft decides exactly as the fused pass of outer=parse.
So both keep the same text under the same rule, with one exception: outer=parse may keep a complete draft although one
of its prefixes failed, whereas here a draft that fails in any pass but its last is never completed. Also, `max_cuts`
bounds the probes of a pass, not of a draft: cuts are judged before their number is known, so they are not thinned.

Nor does sampled text depend on timing: every draft has a generator of its own (`Drafter`).
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

FINAL = (FirstFailure, Smoothed)  # rules whose decision about a prefix no later score can change
ONE_MODEL = "judged in turn: target and draft model share one module, which two threads must not run at once"
RECODED = "a draft was ended early: its text behind the judged part changed how that part is encoded for the target"

FEW_SEGMENTS = 2  # per pass of chunk=auto, where the time of a pass grows with its rows or nothing waits for it
# About the number of rows from which the time of a pass on a GPU grows with its rows. With fewer, reading the target's
# weights takes longest. In bfloat16 the number is that of floating-point operations per byte read: by data sheets 150
# on an A100, 205 on an H200, 280 on a B200, 295 on an H100.
ENOUGH_ROWS = 256


@dataclass(slots=True)
class Judging:
    """The judge passes over one draft as it grows, and what they have decided.

    `ready` and `rest` make passes, in the thread that writes the draft. Each pass is a function to be called once, in
    the order they were made. Only passes write `scores`, `passes`, `failed` and `complete`.

    chunk, rows  least segments and least rows of a pass, except of the last one; `max_cuts` has precedence
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
    failed: bool = False  # in a pass before the last: nothing behind the failed prefix can be kept
    complete: bool = False  # whether the complete draft was judged
    _look_at: int = 0

    def looks(self, written: int) -> bool:
        """Whether to look for cuts at this length: not at every token, since each look reads the whole text."""
        if written < self._look_at:
            return False
        self._look_at = written + max(1, written // 64)
        return True

    def continues(self, draft: Draft) -> bool:
        """Whether `draft` begins with the tokens that the passes made so far read."""
        return draft.tokens[: len(self.asked.tokens)] == self.asked.tokens

    def ready(self, draft: Draft) -> list[Callable[[], None]]:
        """The new full passes over a draft that is still being written."""
        new = self.segmenter.sure_cuts(draft)[len(self.cuts) :]
        passes = []
        while full := self._full(new):
            passes.append(self._pass(draft, new[:full]))
            new = new[full:]
        return passes

    def rest(self, draft: Draft) -> list[Callable[[], None]]:
        """The passes over what is left of a finished draft; the last one judges the complete draft."""
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
        """Number of draft tokens that are certain to be kept."""
        segments = self.boundary.keep(list(self.scores))  # copied, since a pass may be adding scores
        return self.cuts[segments - 1] if segments else 0

    def _full(self, cuts: Sequence[int]) -> int | None:
        """How many of the next cuts make a full pass; None if there are too few."""
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
             "auto": two, but on a GPU that also drafts, enough for 256 rows, since smaller passes take as long
    overlap  whether to draft and judge at the same time: "always", "never", or "auto": unless the target is on the CPU

    Needs a boundary rule whose decision about a prefix no later score changes: first_failure or smoothed.
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
        # settling the clock between phases would wait for passes that should run beside the draft model
        span = partial(work.meter.span, settled=lane.in_turn)
        handed = 0  # draft tokens already in the answer
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
        """Let the draft model write until there may be a new decision; returns whether it has more to write."""
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
        """Judge what is left of a finished draft, unless a prefix of it has failed."""
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
        """Keep what passed in the target's session, yield what is not handed out yet, and return the round."""
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
            # when sampling, guesses decide which draws are made, so no guess may come from text that depends on timing
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
        """The least segments and rows of a full pass."""
        if isinstance(self.chunk, int):
            return self.chunk, 0
        target, draft = work.target.session.model.device, drafter_of(work).model.device
        few = min(FEW_SEGMENTS, self.segmenter.max_cuts)
        return few, ENOUGH_ROWS if target.type == "cuda" and (lane.in_turn or draft == target) else 0

    def _lane(self, work: Work) -> Lane:
        target, draft = work.target.session.model, drafter_of(work).model
        if target.shared:  # all ranks must decide alike, whatever their clocks
            return InTurn()
        if self.overlap == "never" or (self.overlap == "auto" and target.device.type == "cpu"):
            return InTurn()
        if target.hf is draft.hf:
            work.notes.add(ONE_MODEL)
            return InTurn()
        return Beside(target.device, draft.device)
