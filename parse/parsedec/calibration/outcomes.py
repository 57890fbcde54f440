"""Where only final answers can be scored: how the target's answer turns out, asked once per sample and kept prefix.

All pairs of thresholds that keep the same prefix of a draft lead to the same answer (decoding is greedy), so a few
continuations serve a whole grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from parsedec.calibration.decisions import Decisions, kept_tokens
from parsedec.calibration.risk import Losses
from parsedec.calibration.samples import Sample

Known = dict[str, dict[int, bool]]  # id -> tokens kept of the draft -> whether the answer is then right


class Outcomes:
    """Whether answers are right, with kept prefixes and without; asks for what is not known yet.

    known  outcomes known from an interrupted run; new ones are added in place
    ask    (sample, tokens kept of its draft) -> whether the answer that begins with them is right
    """

    def __init__(self, known: Known, ask: Callable[[Sample, int], bool]) -> None:
        self.known = known
        self.asked: Callable[[], None] = lambda: None  # called after each answer, e.g. to show progress
        self._ask = ask

    def right(self, sample: Sample, tokens: int) -> bool:
        answers = self.known.setdefault(sample.id, {})
        if tokens not in answers:
            answers[tokens] = self._ask(sample, tokens)
            self.asked()
        return answers[tokens]

    def missing(self, samples: Sequence[Sample], decisions: Decisions) -> int:
        """How many answers `losses` will ask for (the length of a progress bar)."""
        wanted = {(i, tokens) for i, column in self._columns(samples, decisions) for tokens in (0, *column)}
        return sum(tokens not in self.known.get(samples[i].id, {}) for i, tokens in wanted)

    def answers(self, samples: Sequence[Sample], decisions: Decisions) -> np.ndarray:
        """Whether PARSE's answer is right, per pair and sample [P, n]."""
        right = np.zeros(decisions.segments.shape, bool)
        tokens = kept_tokens(samples, decisions)
        for i, sample in enumerate(samples):
            for pair in range(len(tokens)):
                closed = decisions.whole[pair, i] and sample.ended
                right[pair, i] = sample.correct if closed else self.right(sample, int(tokens[pair, i]))
        return right

    def own(self, samples: Sequence[Sample]) -> np.ndarray:
        """Whether the target's own answer is right [n]."""
        return np.array([self.right(sample, 0) for sample in samples], dtype=bool)

    def losses(self, samples: Sequence[Sample], decisions: Decisions, of: str) -> Losses:
        """The losses of every pair. An error is a spoilt request: one that only the target alone answers rightly."""
        wrong = self.own(samples)[None] & ~self.answers(samples, decisions)
        counted = decisions.segments > 0 if of == "kept" else np.ones_like(decisions.whole)
        return Losses(wrong, counted, kept_tokens(samples, decisions))

    def _columns(self, samples: Sequence[Sample], decisions: Decisions) -> list[tuple[int, list[int]]]:
        """(index, kept lengths after which the target goes on) of every sample."""
        tokens = kept_tokens(samples, decisions)
        return [
            (i, sorted({int(t) for t, whole in zip(tokens[:, i], decisions.whole[:, i], strict=True)
                        if not (whole and sample.ended)}))
            for i, sample in enumerate(samples)
        ]  # fmt: skip
