"""The log-probability judge: how likely the target finds the tokens of the draft, which it learns by reading them.

The pass is a plain prefill: no question, no mask, and no rows but the draft's own. But an unlikely token need not be
wrong - the target may just have worded it differently - which is why the paper has a label judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from parsedec.errors import ConfigError
from parsedec.judge.seam import PassJudge, Reading, check_here
from parsedec.models.language_model import LanguageModel
from parsedec.types import JudgePath

OVER = ("prefix", "segment")
STATISTICS = ("mean", "min")


@dataclass(frozen=True, kw_only=True)
class LogprobJudge(PassJudge):
    """The target's probability of the draft's tokens, as one number per prefix.

    over       "prefix": all tokens up to the cut; "segment": those since the previous cut
    statistic  "min": the probability of the least likely token; "mean": their geometric mean
    """

    over: str = "prefix"
    statistic: str = "min"

    def __post_init__(self) -> None:
        check_statistic(self.statistic)
        if self.over not in OVER:
            raise ConfigError(f"judge.over='{self.over}'; expected one of {', '.join(OVER)}.")

    def bind(self, target: LanguageModel) -> Self:
        check_here(target, "logprob", "the target's log-probabilities of the draft's tokens")
        return replace(self, chosen=JudgePath.CAUSAL)

    def read(self, reading: Reading) -> Tensor:
        starts = [0] * len(reading.probes)
        if self.over == "segment":
            starts = [max((cut for cut in reading.cuts if cut < probe), default=0) for probe in reading.probes]
        return stretches(reading.rows.draft_logprobs, starts, reading.probes, self.statistic)


def check_statistic(statistic: str) -> None:
    if statistic not in STATISTICS:
        raise ConfigError(f"judge.statistic='{statistic}'; expected one of {', '.join(STATISTICS)}.")


def stretches(logprobs: Tensor, starts: Sequence[int], stops: Sequence[int], statistic: str) -> Tensor:
    """Probabilities [K] of the tokens starts[k]:stops[k], from log-probabilities [N]: their least or geometric mean."""
    parts = [logprobs[start:stop] for start, stop in zip(starts, stops, strict=True)]
    values = [part.min() if statistic == "min" else part.mean() for part in parts]
    return torch.stack(values).exp().clamp(max=1.0) if values else logprobs[:0]
