"""A speculator that knows the answer and is right with a given probability: for tests and cost studies.

Whether the guess at a position is right depends on the seed and the position alone, so runs repeat.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from parsedec.errors import ConfigError
from parsedec.model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.types import Needs, Outcome, Seen, Tree


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """Guesses a chain of `depth` tokens of `answer` (prompt included), each right with probability `rate`."""

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    answer: tuple[int, ...]
    rate: float
    depth: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or self.depth < 1:
            raise ConfigError(
                f"inner has rate={self.rate}, depth={self.depth}; expected 0 <= rate <= 1 and depth >= 1."
            )

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Scripted:
        return self

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> tuple[int, ...]:
        return tuple(tokens)

    def propose(self, state: tuple[int, ...], budget: int) -> Tree:
        guesses = [
            self._guess(position)
            for position in range(len(state), len(state) + min(self.depth, budget))
            if position < len(self.answer)
        ]
        return Tree.chain([state[-1], *guesses])

    def commit(self, state: tuple[int, ...], outcome: Outcome) -> tuple[int, ...]:
        return state + outcome.tokens

    def rewind(self, state: tuple[int, ...], length: int) -> tuple[int, ...]:
        return state[:length]

    def _guess(self, position: int) -> int:
        token = self.answer[position]
        right = random.Random(f"{self.seed}:{position}").random() < self.rate
        return token if right else token ^ 1  # a neighbouring id: any other token would do
