"""Loop policies: after the boundary, does the target finish, or does it hand back to the draft model?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from parsedec.errors import require_number


class Loop(Protocol):
    """How many rounds a request may have."""

    @property
    def rounds(self) -> int:
        """Drafts at most, 1 or more."""


@dataclass(frozen=True)
class Once:
    """One round, as in the paper: the target writes all that follows the kept prefix."""

    rounds: ClassVar[int] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Up to `rounds` drafts: the target writes one segment, then the draft model goes on from there.

    What a segment is, the segmenter says. After the last round the target finishes alone.
    """

    rounds: int = 4

    def __post_init__(self) -> None:
        require_number("loop.rounds", self.rounds, whole=True, low=1)
