"""Whether drafting is worth it, decided before every round, from what earlier rounds cost and brought.

Costs are in *target tokens*: the time a round's drafting and judging took, divided by the time the target needs to
decode a token. A draft of cost c of which k tokens are kept has a balance of c - k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from parsedec.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DraftRecord:
    """A finished draft: seconds of drafting and judging, tokens written, tokens kept."""

    seconds: float
    drafted: int
    kept: int


@dataclass(slots=True)
class GateHistory:
    """What an engine has seen so far, over all its requests."""

    drafts: list[DraftRecord] = field(default_factory=list)
    answer_tokens: int = 0
    decoded_tokens: int = 0  # by the target, in `decode_s`
    decode_s: float = 0.0

    @property
    def token_s(self) -> float | None:
        """Seconds the target needs for a token, or None before it has decoded any."""
        return self.decode_s / self.decoded_tokens if self.decoded_tokens else None

    def kept_share(self, window: int) -> float | None:
        """Share of the drafted tokens kept over the last `window` drafts."""
        recent = self.drafts[-window:]
        drafted = sum(record.drafted for record in recent)
        return sum(record.kept for record in recent) / drafted if drafted else None


class Gate(Protocol):
    """Decides before every round whether the draft model writes."""

    def allows(self, history: GateHistory) -> bool: ...


@dataclass(frozen=True, slots=True)
class Always:
    """Draft every time."""

    def allows(self, history: GateHistory) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Never:
    """The target writes alone: the inner level by itself, through the outer loop."""

    def allows(self, history: GateHistory) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Draft while the running kept share pays for the drafting, and never risk more than `bound` of the work.

    bound           largest share of the target's own work that drafts may waste. If every draft is refused from some
                    point on, the run takes at most (1 + bound) times the target alone, plus `reserve` tokens' worth
                    of time and one draft.
    reserve         most tokens of past gain that may be risked again after the drafts turned bad
    window          drafts the running kept share and the expected cost look back on
    cost_per_token  cost of a drafted token, judging included, in target tokens; None: measured, in which case
                    decisions, and with them answers, can depend on the machine's timing

    The balance of cost minus kept tokens is summed over all drafts and never falls below -reserve. A draft is made if
    the balance and its expected cost fit into `bound` times the tokens answered so far; where the recent kept share is
    below break-even, into half of that, so that exploring leaves room for a better stretch.
    """

    bound: float = 0.05
    reserve: float = 128.0
    window: int = 8
    cost_per_token: float | None = None

    def __post_init__(self) -> None:
        if self.bound <= 0 or self.reserve < 0 or self.window < 1 or (self.cost_per_token or 0) < 0:
            raise ConfigError(
                f"gate has bound={self.bound}, reserve={self.reserve}, window={self.window}, "
                f"cost_per_token={self.cost_per_token}; expected bound > 0, reserve >= 0, window >= 1 and "
                "cost_per_token >= 0 or null."
            )

    def allows(self, history: GateHistory) -> bool:
        if not history.drafts or (self.cost_per_token is None and history.token_s is None):
            return True
        recent = history.drafts[-self.window :]
        cost = sum(self._cost(record, history) for record in recent) / len(recent)
        gain = sum(record.kept for record in recent) / len(recent)
        budget = self.bound * history.answer_tokens * (1.0 if gain > cost else 0.5)
        return self.balance(history) + cost <= budget

    def balance(self, history: GateHistory) -> float:
        """Tokens' worth of time wasted so far, net of what kept drafts saved, but no lower than -reserve."""
        total = 0.0
        for record in history.drafts:
            total = max(-self.reserve, total + self._cost(record, history) - record.kept)
        return total

    def _cost(self, record: DraftRecord, history: GateHistory) -> float:
        if self.cost_per_token is not None:
            return self.cost_per_token * record.drafted
        assert history.token_s is not None
        return record.seconds / history.token_s
