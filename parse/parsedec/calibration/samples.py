"""Labelled drafts with the judge's scores: what thresholds are fitted on, and what the record keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from parsedec.tasks.base import Score
from parsedec.text.spelling import Draft

PARTS = ("fit", "check")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A judged draft with N tokens and K cuts.

    part     "fit" or "check"
    problem  id of the first sample of the same problem; None if this one is
    tokens   N ids in the target's vocabulary, without the end token
    ended    whether the draft closes its answer
    cuts     [K] token positions, the last one N; empty for an empty draft
    scores   [K] the judge's scores
    right    [K] whether the prefix up to each cut is free of errors; None where only the final answer is known
    correct  whether the complete draft is a right answer
    error    why it could not be judged; such samples are counted, but left out of every figure
    """

    part: str
    id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    ended: bool = False
    cuts: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    right: tuple[bool, ...] | None = None
    correct: bool = False
    error: str | None = None
    problem: str | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS or len(self.scores) != len(self.cuts):
            raise ValueError(f"sample {self.id} of part {self.part!r} has {len(self.scores)} scores, {self.cuts} cuts")
        if self.right is not None and len(self.right) != len(self.cuts):
            raise ValueError(f"sample {self.id} has {len(self.right)} labels for {len(self.cuts)} cuts")

    @property
    def group(self) -> str:
        """An id that all samples of a problem share: they are not independent of each other."""
        return self.id if self.problem is None else self.problem

    @property
    def first_wrong(self) -> int:
        """Index of the first wrong cut; K if none is wrong. Raises ValueError without labels of prefixes."""
        if self.right is None:
            raise ValueError(f"sample {self.id} has no labels of its prefixes, only of its final answer")
        return next((k for k, right in enumerate(self.right) if not right), len(self.cuts))

    def kept_tokens(self, segments: int) -> int:
        """Tokens of the first `segments` segments."""
        return self.cuts[segments - 1] if segments else 0

    def as_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Sample:
        """The inverse of `as_data` after a round trip through JSON."""
        right = data["right"]
        return cls(
            part=data["part"],
            id=data["id"],
            tokens=tuple(data["tokens"]),
            text=data["text"],
            ended=data["ended"],
            cuts=tuple(data["cuts"]),
            scores=tuple(data["scores"]),
            right=None if right is None else tuple(right),
            correct=data["correct"],
            error=data["error"],
            problem=data.get("problem"),
        )


def one_of_each(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """One sample of each problem, drawn with the seed, in the order given.

    Solutions to one problem tend to be right or wrong together. Counted as independent, they would pass for more
    evidence than they are, and exact bounds would be too low.
    """
    chosen: dict[str, tuple[bytes, str]] = {}
    for sample in samples:
        lot = (hashlib.sha256(f"one of each/{seed}/{sample.id}".encode()).digest(), sample.id)
        chosen[sample.group] = min(chosen.get(sample.group, lot), lot)
    ids = {name for _, name in chosen.values()}
    return [sample for sample in samples if sample.id in ids]


def right_prefixes(draft: Draft, cuts: Sequence[int], score: Score) -> tuple[bool, ...]:
    """Whether the prefix up to each cut is free of errors, from the first wrong line and character in `score`.

    A prefix of whole lines is right if all its lines are. One that stops inside the wrong line is right as long as
    some right answer begins with it.
    """
    wrong = score.first_wrong_line
    if wrong is None:
        return (True,) * len(cuts)
    marks = []
    for cut in cuts:
        end = draft.ends[cut - 1]
        lines = draft.text[:end].rstrip().count("\n")
        whole_lines = draft.text[end : end + 1] in ("", "\n") or draft.text[:end].endswith("\n")
        begins_right = not whole_lines and score.error_at is not None and end <= score.error_at
        marks.append(lines < wrong or begins_right)
    return tuple(marks)
