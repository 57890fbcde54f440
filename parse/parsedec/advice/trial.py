"""What was measured on one problem: the target alone, a draft, judge passes over that draft, and inner levels.

Shapes in this file:  K cuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parsedec.calibration.samples import Sample
from parsedec.experiment.record import to_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One judge pass over the draft: its cost, and its scores at a segmenter's cuts [K].

    right  [K] whether the prefix up to each cut is free of errors; None if not known
    """

    cuts: tuple[int, ...]
    scores: tuple[float, ...]
    rows: int
    seconds: float
    right: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """The target decoding with an inner level, after the prompt and the draft's first `prefix` tokens."""

    prefix: int
    tokens: int
    seconds: float
    calls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The measurements on one problem. Seconds are wall-clock; `wall_s` is all that the target alone takes.

    tokens         of the target's own answer, its end token included
    draft_tokens   of the draft in the target's vocabulary, without its end token
    ended          whether the draft model closed its answer
    own_correct    whether the target's own answer is right
    draft_correct  whether the draft is; see `agreement`
    agreement      whether "right" only means that the draft agrees with the target's answer, as no program can score it
    judged         judge passes, by segmenter
    decoded        runs, by inner level; empty where inner levels were not run
    error          why the problem could not be measured; everything else is then missing
    """

    id: str
    tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    wall_s: float = 0.0
    own_correct: bool = False
    draft_tokens: int = 0
    ended: bool = False
    draft_s: float = 0.0
    draft_correct: bool = False
    agreement: bool = False
    judged: Mapping[str, Pass] = field(default_factory=dict)
    decoded: Mapping[str, tuple[Decoding, ...]] = field(default_factory=dict)
    error: str | None = None

    @property
    def token_s(self) -> float:
        """Seconds per token of the target alone. The first token is not counted: it comes with the prefill."""
        return self.decode_s / max(1, self.tokens - 1)

    def sample(self, segmenter: str, *, prefixes: bool) -> Sample:
        """The draft as one segmenter cuts it, in calibration's form; with `prefixes`, it has their labels."""
        seen = self.judged[segmenter]
        return Sample(
            part="fit",
            id=self.id,
            ended=self.ended,
            cuts=seen.cuts,
            scores=seen.scores,
            right=seen.right if prefixes else None,
            correct=self.draft_correct,
        )

    def as_data(self) -> dict[str, Any]:
        data: dict[str, Any] = to_json(self)
        return data

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Trial:
        """The inverse of `as_data` after a round trip through JSON."""
        judged = {
            name: Pass(
                cuts=tuple(seen["cuts"]),
                scores=tuple(seen["scores"]),
                rows=seen["rows"],
                seconds=seen["seconds"],
                right=None if seen["right"] is None else tuple(seen["right"]),
            )
            for name, seen in data["judged"].items()
        }
        decoded = {name: tuple(Decoding(**run) for run in runs) for name, runs in data["decoded"].items()}
        return cls(**{**data, "judged": judged, "decoded": decoded})
