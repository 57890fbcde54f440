"""outer=cascade: the draft model answers, the target judges the whole answer and keeps it or writes its own.

The simplest way to use two models (FrugalGPT, arXiv 2305.05176), and PARSE (arXiv 2605.04263) without its prefixes:
what PARSE gains over it is the value of keeping valid prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from parsedec.boundary import FirstFailure
from parsedec.errors import ConfigError, require_number
from parsedec.gate import Always, Gate
from parsedec.judge import Judge, LabelJudge
from parsedec.models.language_model import LanguageModel
from parsedec.outer import PrefixVerification, Work, Written, require_parts
from parsedec.segmenters import Lines

WHOLE = Lines(max_cuts=1)  # a single cut, at the end of the draft


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Accept the whole draft, or none of it.

    threshold         lowest score at which the draft is the answer; None: the judge card's for complete drafts, if the
                      judge asks the card's question; else 0.9
    max_draft_tokens  most tokens a draft may have; None: as many as the answer may have. The target continues a draft
                      of that length that is accepted but not finished
    """

    prefill: ClassVar[bool] = True
    needs_draft: ClassVar[bool] = True

    judge: Judge = field(default_factory=LabelJudge)
    threshold: float | None = None
    gate: Gate = field(default_factory=Always)
    max_draft_tokens: int | None = None
    verification: PrefixVerification | None = None  # set by `bind`

    def __post_init__(self) -> None:
        require_parts(self)
        if self.threshold is not None:
            require_number("outer.threshold", self.threshold, low=0, high=1)
        if self.max_draft_tokens is not None:
            require_number("outer.max_draft_tokens", self.max_draft_tokens, whole=True, low=1)

    def bind(self, target: LanguageModel) -> Self:
        # a prefix threshold of 1 keeps nothing beyond what the check of the whole draft has kept
        unbound = PrefixVerification(
            judge=self.judge,
            segmenter=WHOLE,
            boundary=FirstFailure(threshold=1.0, full_threshold=self.threshold),
            gate=self.gate,
            max_draft_tokens=self.max_draft_tokens,
        )
        verification = unbound.bind(target)
        return replace(self, judge=verification.judge, verification=verification)

    def run(self, work: Work) -> Iterator[Written]:
        if self.verification is None:
            raise ConfigError("the cascade was not bound to a target; call bind(target) first.")
        yield from self.verification.run(work)
