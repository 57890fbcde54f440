"""Loop policies: after the boundary, does the target finish the answer, or hand back to the draft model?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from parsedec.errors import require_number


class Loop(Protocol):
    """How many rounds a request may have."""

    @property
    def rounds(self) -> int:
        """The most drafts a request may have, at least 1."""


@dataclass(frozen=True)
class Once:
    """One round, as in the paper: the target writes everything after the kept prefix."""

    rounds: ClassVar[int] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Up to `rounds` drafts: the target writes one segment, as defined by the segmenter, and the draft model continues.

    After the last draft, the target finishes the answer alone.
    """

    rounds: int = 4

    def __post_init__(self) -> None:
        require_number("loop.rounds", self.rounds, whole=True, low=1)
