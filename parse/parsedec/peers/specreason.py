"""outer=specreason: the draft model writes one step, the target scores it and keeps it or writes the step itself.

SpecReason (Pan et al., arXiv 2504.07891), the sequential relative of PARSE: one judge pass per step, and drafting waits
for every verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from parsedec.errors import require_number
from parsedec.judge import Judge, LabelJudge, judged
from parsedec.models.language_model import LanguageModel
from parsedec.outer import Work, Written, drafter_of, require_parts
from parsedec.peers.steps import DraftSteps
from parsedec.segmenters import Paragraphs, Segmenter
from parsedec.text.chat import closing_token
from parsedec.text.spelling import Draft
from parsedec.types import Author, Round, Segment

PUBLISHED_THRESHOLD = 7 / 9  # a score of 7 on its scale of 0 to 9


@dataclass(frozen=True, kw_only=True)
class SpecReason:
    """A judge pass after every step.

    judge                  scores the answer up to and including the new step; any judge
    segmenter              defines a step; published: text up to a blank line
    threshold              lowest score at which a step is kept, from 0 to 1. None: the judge card's for prefixes, if
                           the judge asks the card's question; else 7/9, as published
    first_steps_by_target  number of steps at the beginning of the answer that the target writes itself

    Differs from the published method in this: the whole answer is written this way, not only its reasoning; it ends at
    an end token or a limit, not at "boxed" or "Answer:" in a step or at a repeated step; and the judge's pass continues
    from the cache, so that it reads only the step and the question. This pass is also the step's prefill.
    """

    prefill: ClassVar[bool] = True
    needs_draft: ClassVar[bool] = True

    judge: Judge = field(default_factory=LabelJudge)
    segmenter: Segmenter = field(default_factory=Paragraphs)
    threshold: float | None = None
    first_steps_by_target: int = 0
    end_token: int = -1  # ends an answer whose last step is the draft model's; set by `bind`

    def __post_init__(self) -> None:
        require_parts(self)
        require_number("outer.first_steps_by_target", self.first_steps_by_target, whole=True, low=0)
        if self.threshold is not None:
            require_number("outer.threshold", self.threshold, low=0, high=1)

    def bind(self, target: LanguageModel) -> Self:
        judge, threshold = self.judge.bind(target), self.threshold
        if threshold is None:
            threshold = judge.card.threshold if judge.card else PUBLISHED_THRESHOLD
        return replace(self, judge=judge, threshold=threshold, end_token=closing_token(target))

    def run(self, work: Work) -> Iterator[Written]:
        steps = DraftSteps(drafter_of(work), work.answer, self.segmenter)
        while work.answer.stop is None:
            work.answer.begin_round()
            limit = min(work.answer.remaining, work.target.session.room - self.judge.suffix_rows)
            if limit < 1:
                work.note_no_room(self.judge)
            facts: dict[str, Any] = {"drafted": limit > 0 and len(work.rounds) >= self.first_steps_by_target}
            if facts["drafted"]:
                yield from self._propose(work, steps, limit, facts)
            before, start = work.meter.seconds("decode"), len(work.answer.tokens)
            if not facts.get("kept_tokens"):
                steps.restart()
                yield from work.target_writes(until=self.segmenter)
            facts |= {
                "target_tokens": len(work.answer.tokens) - start,
                "decode_s": work.meter.seconds("decode") - before,
            }
            # as in PARSE, the whole draft is the answer: here if every step was kept and the last one ends it
            own = facts["target_tokens"] or any(earlier.target_tokens for earlier in work.rounds)
            facts["accepted_whole"] = bool(facts.pop("closed", False)) and not own
            work.rounds.append(Round(**facts))

    def _propose(self, work: Work, steps: DraftSteps, limit: int, facts: dict[str, Any]) -> Iterator[Written]:
        """Draft and judge one step; yields it if it is kept."""
        before = {phase: work.meter.seconds(phase) for phase in ("draft", "judge")}
        with work.meter.span("draft"):
            step = steps.next(limit)
        facts |= {"draft_s": work.meter.seconds("draft") - before["draft"], "draft_ended": step.ended}
        kept: list[int] = []
        if step.tokens:
            with work.meter.span("judge"):
                stands = self._judge(work, step, facts)
            facts["judge_s"] = work.meter.seconds("judge") - before["judge"]
            if stands:
                closed = [self.end_token] if step.ended else []
                kept = work.answer.extend([*step.tokens, *closed], Author.DRAFT)
                facts |= {"kept_tokens": len(kept), "closed": step.ended}
        drafted = len(step.tokens) + step.ended
        work.target.tally.draft_tokens += drafted
        work.target.tally.kept_draft_tokens += len(kept)
        work.history.add_draft(facts["draft_s"] + facts.get("judge_s", 0.0), drafted, len(kept))
        if kept:
            yield Author.DRAFT, kept

    def _judge(self, work: Work, step: Draft, facts: dict[str, Any]) -> bool:
        """Whether the step is kept. The target's session then ends after it, otherwise before it."""
        session, n = work.target.session, len(step.tokens)
        scores = judged(self.judge, session, step, [n], [n])
        assert self.threshold is not None
        stands = scores.values[0] >= self.threshold
        session.keep_draft(n if stands else 0)
        if not stands:
            work.target.note_refused(step.tokens)
        work.notes |= {scores.note} if scores.note else set()
        work.target.tally.judge_passes += 1
        work.target.tally.judge_rows += scores.rows
        facts |= {
            "judged_tokens": n,
            "segments": (Segment(text=step.text, tokens=n, score=scores.values[0], kept=stands),),
            "judge_path": scores.path,
            "judge_passes": 1,
            "judge_rows": scores.rows,
            "mean_draft_logprob": sum(scores.draft_logprobs) / n if scores.draft_logprobs else None,  # as in `outer`
        }
        return stands
