"""The log-probability judge: how likely the target finds the tokens of the draft. It comes with reading the draft.

The pass is a plain prefill: no question, no mask, no row but the draft's own. That a token is unlikely need not mean
that it is wrong - the target may only have worded it otherwise - which is what the paper's label judge is for.
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

    over       "prefix": of all tokens up to the cut; "segment": of those since the cut before
    statistic  "min": of the least likely token; "mean": their geometric mean
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
    """Probability [K] of the tokens starts[k]:stops[k], of log-probabilities [N]: the least, or the geometric mean."""
    parts = [logprobs[start:stop] for start, stop in zip(starts, stops, strict=True)]
    values = [part.min() if statistic == "min" else part.mean() for part in parts]
    return torch.stack(values).exp().clamp(max=1.0) if values else logprobs[:0]
