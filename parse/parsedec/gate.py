"""Whether to draft, decided before every round from what earlier rounds cost and gained.

Costs are in *target tokens*: the time of a round's drafting and judging, divided by the time the target needs to decode
a token. A draft that costs c and of which k tokens are kept has a net cost of c - k.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from parsedec.errors import ConfigError, require_number


@dataclass(frozen=True, slots=True)
class DraftRecord:
    """A finished draft: seconds of drafting and judging, tokens written, tokens kept."""

    seconds: float
    drafted: int
    kept: int


class GateHistory:
    """What an engine has seen so far in all its requests, the last few thousand events of it; safe to use from several
    threads."""

    def __init__(self) -> None:
        self._events: deque[DraftRecord | int] = deque(maxlen=4096)
        self.decoded_tokens = 0  # by the target, in `decode_s` seconds
        self.decode_s = 0.0
        self._changing = Lock()

    @property
    def events(self) -> list[DraftRecord | int]:
        """A copy of the events in order: finished drafts, and the token counts of finished answers."""
        with self._changing:
            return list(self._events)

    def add_draft(self, seconds: float, drafted: int, kept: int) -> None:
        with self._changing:
            self._events.append(DraftRecord(seconds, drafted, kept))

    def add_answer(self, tokens: int) -> None:
        with self._changing:
            self._events.append(tokens)

    def add_decoding(self, tokens: int, seconds: float) -> None:
        with self._changing:
            self.decoded_tokens += tokens
            self.decode_s += seconds

    @property
    def drafts(self) -> list[DraftRecord]:
        return [event for event in self.events if isinstance(event, DraftRecord)]

    @property
    def token_s(self) -> float | None:
        """Seconds the target needs for a token; None before it has decoded any."""
        with self._changing:
            return self.decode_s / self.decoded_tokens if self.decoded_tokens else None


class Gate(Protocol):
    """Decides before every round whether the draft model is to write."""

    def allows(self, history: GateHistory) -> bool: ...


@dataclass(frozen=True, slots=True)
class Always:
    """Draft every time."""

    def allows(self, history: GateHistory) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Never:
    """Never draft: the target writes alone, through the outer loop."""

    def allows(self, history: GateHistory) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Draft while what is kept pays for the drafting, and never risk more than `bound` of the work.

    bound           largest share of the target's own work that refused drafts may waste. If every draft from some
                    request on is refused, drafting takes at most `bound` times the target's time for the answers since,
                    plus the time of `reserve` tokens (or of one draft, if that is more), plus one draft
    reserve         most tokens that may be risked from earlier gains and unused bound
    window          number of latest drafts whose mean cost is expected of the next
    cost_per_token  cost of a drafted token in target tokens, judging included; None: measured, so that decisions, and
                    with them answers, can depend on the machine's timing

    The gate keeps an account in target tokens: a draft costs its cost and earns its kept tokens, every answer earns
    `bound` times its length, and the account never holds more than the reserve. A draft is made if the account covers
    its expected cost. So the share of kept tokens decides: above break-even, the account stays full.
    """

    bound: float = 0.05
    reserve: float = 128.0
    window: int = 8
    cost_per_token: float | None = None

    def __post_init__(self) -> None:
        require_number("gate.bound", self.bound, low=0)
        require_number("gate.reserve", self.reserve, low=0)
        require_number("gate.window", self.window, whole=True, low=1)
        if self.cost_per_token is not None:
            require_number("gate.cost_per_token", self.cost_per_token, low=0)
        if not self.bound:
            raise ConfigError(f"gate.bound={self.bound}; expected more than 0. Use gate=never to draft nothing.")

    def allows(self, history: GateHistory) -> bool:
        drafts = history.drafts
        if not drafts or (self.cost_per_token is None and history.token_s is None):
            return True
        recent = drafts[-self.window :]
        cost = sum(self._cost(record, history) for record in recent) / len(recent)
        return self.account(history, max(self.reserve, cost)) >= cost

    def account(self, history: GateHistory, most: float) -> float:
        """Time that may be risked now, in target tokens; never more than `most`."""
        credit = 0.0
        for event in history.events:
            if isinstance(event, DraftRecord):
                credit += event.kept - self._cost(event, history)
            else:
                credit += self.bound * event
            credit = min(credit, most)
        return credit

    def _cost(self, record: DraftRecord, history: GateHistory) -> float:
        if self.cost_per_token is not None:
            return self.cost_per_token * record.drafted
        assert history.token_s is not None
        return record.seconds / history.token_s
