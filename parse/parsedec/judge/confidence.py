"""The confidence judge: the draft model's own probabilities decide where they are high (ConfSpec, arXiv 2602.18447).

A segment whose tokens the draft model found likely enough passes without a question. Another judge is asked about the
others, so that only they cost probes. The target reads the draft in any case, to continue from it. ConfSpec has the
draft model judge its own step in words; here its confidence is taken from the probabilities of what it wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from parsedec.errors import JudgeError, require_number, require_part
from parsedec.judge.logprob import check_statistic, stretches
from parsedec.judge.seam import Judge, JudgeNeeds, PassJudge, Reading, Scores, scores_of
from parsedec.models.language_model import LanguageModel
from parsedec.sessions.session import Session
from parsedec.text.spelling import Draft
from parsedec.types import JudgePath


@dataclass(frozen=True, kw_only=True)
class ConfidenceJudge(PassJudge):
    """The draft model's probability of its own tokens, segment by segment.

    statistic  how to combine a segment's tokens. "min": the probability of the least likely one; "mean": their
               geometric mean
    sure       lowest confidence at which a segment passes without a question
    judge      the judge to ask about unsure segments; None: ask none

    With `judge`, a prefix that ends in an unsure segment gets that judge's score. A sure segment changes nothing: its
    prefix gets the score of the one before, or 1 if it is the first. So the thresholds are those of `judge`. The first
    probe of a pass is left out only if the whole draft up to it is sure: outer=parse_streamed, which makes several
    passes, asks more often. Without `judge`, a prefix gets the confidence of its least sure segment.
    """

    statistic: str = "min"
    sure: float = 0.99
    judge: Judge | None = None

    def __post_init__(self) -> None:
        check_statistic(self.statistic)
        if self.judge is not None:
            require_part("judge.judge", self.judge, Judge, "LabelJudge()")
        require_number("judge.sure", self.sure, low=0, high=1)

    def bind(self, target: LanguageModel) -> Self:
        judge = self.judge.bind(target) if self.judge else None
        return replace(self, judge=judge, chosen=JudgePath.CAUSAL, card=judge.card if judge else None)

    @property
    def needs(self) -> JudgeNeeds:
        return JudgeNeeds(self.judge.needs.hidden_layers if self.judge else (), draft_logprobs=True)

    @property
    def wanted(self) -> tuple[int, ...]:
        return ()  # on its own it reads no logits of the target

    @property
    def suffix_rows(self) -> int:
        return self.judge.suffix_rows if self.judge else 0

    def read(self, reading: Reading) -> Tensor:
        if self.judge is not None:
            raise JudgeError("a confidence judge that asks another one makes passes of its own; expected score().")
        confident = self._confidence(reading.draft, reading.cuts)
        values = [min(confident[cut] for cut in reading.cuts if cut <= probe) for probe in reading.probes]
        return torch.tensor(values)

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        if self.judge is None:
            return PassJudge.score(self, session, draft, cuts, probes)
        confident, asked = self._confidence(draft, cuts), []
        for before, probe in pairwise([0, *probes]):
            if any(confident[cut] < self.sure for cut in cuts if before < cut <= probe):
                asked.append(probe)
        if not asked:
            return scores_of(
                torch.ones(len(probes)), [Reading.take(session, draft, cuts, [], wanted=self.wanted)], None
            )
        scores = self.judge.score(session, draft, cuts, asked)
        answers = dict(zip(asked, scores.values, strict=True))
        values, latest = [], 1.0
        for probe in probes:
            latest = answers.get(probe, latest)
            values.append(latest)
        return replace(scores, values=tuple(values))

    def _confidence(self, draft: Draft, cuts: Sequence[int]) -> dict[int, float]:
        """Confidence in the segment that ends at each cut."""
        if draft.logprobs is None:
            raise JudgeError(
                "judge=confidence needs the draft model's log-probabilities, and this draft has none; expected "
                "Draft.logprobs, one per token. The engine records them for drafts in the target's vocabulary."
            )
        values = stretches(torch.tensor(draft.logprobs), [0, *cuts[:-1]], cuts, self.statistic)
        return dict(zip(cuts, values.tolist(), strict=True))
