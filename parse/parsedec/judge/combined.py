"""The combined judge: logistic regression over the log-odds of several judges.

    s = sigmoid(b + sum over j of  w_j * log(s_j / (1 - s_j)))

Judges that ask the same question, or none, share one pass. Each further question adds the rows of its probes; the
draft is not read again for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from parsedec.errors import ConfigError, IncompatibleStack, JudgeError
from parsedec.judge.probe import Mixture, read_card
from parsedec.judge.seam import JudgeNeeds, PassJudge, Reading, Scores, check_labels, scores_of
from parsedec.models.language_model import LanguageModel
from parsedec.remote.capabilities import Labels
from parsedec.remote.model import RemoteModel
from parsedec.sessions.session import Session
from parsedec.text.spelling import Draft

BIAS = "bias"
EPS = 1e-6  # scores are kept this far from 0 and 1, where log-odds are infinite


@dataclass(frozen=True, kw_only=True)
class CombinedJudge:
    """Several judges as one.

    judges   name -> judge. Each must be read off a single pass, which rules out a confidence judge that asks another
    weights  name -> weight, and "bias"; or a folder, hub id or `zoo:NAME` written by experiments/train_probe.py
    """

    judges: Mapping[str, PassJudge]
    weights: Mapping[str, float] | str
    mixture: Mixture | None = field(default=None)  # set by `bind`

    def __post_init__(self) -> None:
        if not self.judges:
            raise ConfigError("judge.judges is empty; expected at least one judge by name.")
        for name, judge in self.judges.items():
            if not isinstance(judge, PassJudge) or getattr(judge, "judge", None) is not None:
                raise ConfigError(
                    f"judge.judges.{name} is {type(judge).__name__}, which makes passes of its own. Expected label, "
                    "digit, logprob, probe, or confidence with judge=null."
                )

    def bind(self, target: LanguageModel) -> Self:
        mixture = self._mixture()
        if set(mixture.weights) != set(self.judges):
            raise IncompatibleStack(
                f"judge.weights are for {sorted(mixture.weights)}, judge.judges are {sorted(self.judges)}; expected "
                "the same names. Fit weights for these judges: python experiments/train_probe.py"
            )
        if isinstance(target, RemoteModel) and target.can.labels is Labels.TOP:
            raise IncompatibleStack(
                f"judge=combined needs exact scores, but where a label is missing those of {target.name} are only "
                f"bounds: it shows the {target.can.top} most probable tokens. Use judge=label, or engine=local."
            )
        bound = {name: judge.bind(target) for name, judge in self.judges.items()}
        combined = replace(self, judges=bound, mixture=mixture)
        for names in combined._passes().values():
            check_labels(target, "combined", combined._wanted(names) or ())
        return combined

    @property
    def needs(self) -> JudgeNeeds:
        each = [judge.needs for judge in self.judges.values()]
        layers = dict.fromkeys(layer for needs in each for layer in needs.hidden_layers)
        return JudgeNeeds(tuple(layers), any(needs.draft_logprobs for needs in each))

    @property
    def suffix_rows(self) -> int:
        return sum(len(suffix) for suffix in self._passes())

    @property
    def card(self) -> Mixture | None:
        """The thresholds found for these weights, if the weights come from a file."""
        return self.mixture if isinstance(self.weights, str) else None

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        if self.mixture is None:
            raise JudgeError("the judge was not bound to a target; call bind(target) first.")
        odds, readings = self.odds(session, draft, cuts, probes)
        total = sum((odds[name] * weight for name, weight in self.mixture.weights.items()), torch.zeros(len(probes)))
        notes = [judge.reason for judge in self.judges.values() if judge.reason]
        return scores_of(torch.sigmoid(total + self.mixture.bias), readings, notes[0] if notes else None)

    def odds(
        self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]
    ) -> tuple[dict[str, Tensor], list[Reading]]:
        """Log-odds [K] of the bound judges' scores, by name, and the passes they were read off."""
        found: dict[str, Tensor] = {}
        readings: list[Reading] = []
        for suffix, names in self._passes().items():
            path, wanted = self.judges[names[-1]].bound_path, self._wanted(names)
            readings.append(Reading.take(session, draft, cuts, probes, suffix=suffix, path=path, wanted=wanted))
            found |= {name: log_odds(self.judges[name].checked(readings[-1])) for name in names}
        return found, readings

    def _wanted(self, names: Sequence[str]) -> tuple[int, ...] | None:
        """Ids whose logits at least one of these judges reads; None: any may be read."""
        ids: list[int] = []
        for name in names:
            wanted = self.judges[name].wanted
            if wanted is None:
                return None
            ids += wanted
        return tuple(dict.fromkeys(ids))

    def _passes(self) -> dict[tuple[int, ...], list[str]]:
        """Suffix -> names of the judges that read its pass. Judges without a suffix join the first pass."""
        free = [name for name, judge in self.judges.items() if not judge.suffix]
        passes: dict[tuple[int, ...], list[str]] = {}
        for name, judge in self.judges.items():
            if judge.suffix:
                passes.setdefault(judge.suffix, [*free] if not passes else []).append(name)
        return passes or {(): free}

    def _mixture(self) -> Mixture:
        if isinstance(self.weights, str):
            fitted = read_card(self.weights)[0].combined
            if fitted is None:
                raise IncompatibleStack(
                    f"'{self.weights}' holds no weights for judge=combined. Train with combined.judges set, or give "
                    "judge.weights as {name: weight, …, bias: …}."
                )
            return fitted
        named = {str(name): float(weight) for name, weight in self.weights.items()}
        if not all(math.isfinite(weight) for weight in named.values()):
            raise ConfigError(f"judge.weights={named}; expected finite numbers.")
        return Mixture(threshold=0.0, full_threshold=0.0, bias=named.pop(BIAS, 0.0), weights=named)


def log_odds(values: Tensor) -> Tensor:
    """log(s / (1 - s)) of scores [K], finite everywhere, on the host in float32."""
    return torch.logit(values.float().cpu(), eps=EPS)
