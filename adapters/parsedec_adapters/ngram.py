"""Prompt lookup: guess what followed the last few tokens where they occurred earlier in the text.

Saxena 2023 (prompt lookup decoding); Yang et al. 2023 (LLMA, arXiv 2304.04487). No model, no memory, lossless. It pays
off where answers repeat the prompt or themselves - summaries, edits, code - and where the target writes what it has
refused: the outer draft's refused text is searched as well.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from parsedec.errors import ConfigError, require_kind, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.types import Needs, Outcome, Seen, Tree

WIDTH = array("i").itemsize  # bytes of a token id


@dataclass(frozen=True, slots=True)
class NgramState:
    """Texts as bytes, `WIDTH` per token, so that appending copies little and a search is one call.

    text     the committed tokens
    refused  refused texts, each with a few of the committed tokens before it; the latest first
    """

    text: bytes
    refused: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ngram:
    """A chain of up to `length` tokens that followed the latest earlier occurrence of the last n tokens.

    Tries n from `longest` down to `shortest`; the first match decides. With `refused`, texts that the outer level
    refused are searched first, since they were written for this very place.
    """

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    length: int = 8
    longest: int = 4
    shortest: int = 2
    refused: bool = True

    def __post_init__(self) -> None:
        for name in ("length", "longest", "shortest"):
            require_number(f"inner.{name}", getattr(self, name), whole=True, low=1)
        require_kind("inner.refused", self.refused, bool, "True or False")
        if self.shortest > self.longest:
            raise ConfigError(
                f"inner has longest={self.longest}, shortest={self.shortest}; expected shortest <= longest."
            )

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Ngram:
        return self

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> NgramState:
        return NgramState(_packed(tokens))

    def propose(self, state: NgramState, budget: int) -> Tree:
        guesses = self._after_match(state)[: WIDTH * max(0, min(self.length, budget))]
        return Tree.chain(_unpacked(state.text[-WIDTH:] + guesses))

    def commit(self, state: NgramState, outcome: Outcome) -> NgramState:
        return replace(state, text=state.text + _packed(outcome.tokens))

    def rewind(self, state: NgramState, length: int) -> NgramState:
        return replace(state, text=state.text[: WIDTH * length])

    def note_refused(self, state: NgramState, at: int, tokens: Sequence[int]) -> NgramState:
        """Remember a text that was to follow the first `at` committed tokens; see `parsedec.inner.NotesRefused`."""
        if not self.refused:
            return state
        before = state.text[: WIDTH * at][-WIDTH * self.longest :]
        return replace(state, refused=(before + _packed(tokens), *state.refused))

    def _after_match(self, state: NgramState) -> bytes:
        """What follows the latest earlier occurrence of the text's own end; empty if there is none."""
        text = state.text
        for n in range(min(self.longest, len(text) // WIDTH - 1), self.shortest - 1, -1):
            end = text[-WIDTH * n :]
            for source in (*state.refused, text):
                at = _latest(source, end)
                if at is not None:
                    return source[at:]
        return b""


def _latest(text: bytes, end: bytes) -> int | None:
    """Offset in `text` after the latest occurrence of `end` that is followed by a token; None if there is none."""
    at = text.rfind(end, 0, len(text) - WIDTH)
    while at >= 0 and at % WIDTH:  # a match that straddles tokens
        at = text.rfind(end, 0, at + len(end) - 1)
    return at + len(end) if at >= 0 else None


def _packed(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def _unpacked(text: bytes) -> list[int]:
    return array("i", text).tolist()
