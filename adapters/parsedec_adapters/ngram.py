"""Prompt lookup: guess what followed the last few tokens when they stood in the text before.

Saxena 2023 (prompt lookup decoding); Yang et al. 2023 (LLMA, arXiv 2304.04487). No model, no memory, lossless; it pays
where answers repeat the prompt or themselves - summaries, edits, code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from parsedec.errors import ConfigError
from parsedec.model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.types import Needs, Outcome, Seen, Tree


@dataclass(frozen=True, kw_only=True)
class Ngram:
    """A chain of up to `length` tokens that followed the latest earlier occurrence of the last n tokens.

    n goes from `longest` down to `shortest`; the first that occurs decides. The state is the committed tokens.
    """

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    length: int = 8
    longest: int = 4
    shortest: int = 2

    def __post_init__(self) -> None:
        if self.length < 1 or not 1 <= self.shortest <= self.longest:
            raise ConfigError(
                f"inner has length={self.length}, longest={self.longest}, shortest={self.shortest}; expected "
                "length >= 1 and 1 <= shortest <= longest."
            )

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Ngram:
        return self

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> tuple[int, ...]:
        return tuple(tokens)

    def propose(self, state: tuple[int, ...], budget: int) -> Tree:
        follows = self._after_latest_match(state)
        guesses = state[follows : follows + min(self.length, budget)] if follows else ()
        return Tree.chain([state[-1], *guesses])

    def commit(self, state: tuple[int, ...], outcome: Outcome) -> tuple[int, ...]:
        return state + outcome.tokens

    def rewind(self, state: tuple[int, ...], length: int) -> tuple[int, ...]:
        return state[:length]

    def _after_latest_match(self, tokens: tuple[int, ...]) -> int | None:
        """Where the text goes on after the latest earlier occurrence of its own end."""
        for n in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            end = tokens[-n:]
            for at in range(len(tokens) - 1, n - 1, -1):
                if tokens[at - 1] == end[-1] and tokens[at - n : at] == end:
                    return at
        return None
