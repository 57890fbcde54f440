"""The tokens of an answer that arrives in pieces, depending on how the server names them (`TokensBack`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from parsedec.models.language_model import LanguageModel
from parsedec.remote.capabilities import TokensBack
from parsedec.remote.model import RemoteModel
from parsedec.remote.wire import Piece
from parsedec.text.spelling import INCOMPLETE, UNSETTLED, encoded_behind

MENDED = "characters of several tokens are encoded again: the server names only the last token of each"


class Reader(Protocol):
    """Reads the tokens of one streamed answer."""

    def push(self, piece: Piece) -> list[int]:
        """The tokens that are certain after this piece and were not before."""
        ...


def reader(model: RemoteModel, before: Sequence[int], notes: set[str]) -> Reader:
    """A reader for one answer.

    before  the tokens that the answer follows
    notes   where to note what had to be worked around
    """
    if model.can.tokens_back is TokensBack.TEXT:
        return EncodedText(model, before)
    if model.can.tokens_back is TokensBack.LOGPROBS:
        return WholeCharacters(model, before, notes)
    return NamedTokens()


class NamedTokens:
    """For servers that name every id."""

    def push(self, piece: Piece) -> list[int]:
        return list(piece.tokens or ())


class WholeCharacters:
    """For ids that come with log-probabilities.

    llama.cpp holds text back until its last character is complete, and then names only the last token: the others are
    found by encoding that text. Servers that name every token are taken at their word.
    """

    def __init__(self, model: LanguageModel, before: Sequence[int], notes: set[str]) -> None:
        self._model = model
        self._tokens = list(before)
        self._notes = notes
        self._named: list[int] = []  # since the last character was complete

    def push(self, piece: Piece) -> list[int]:
        tokens = list(piece.tokens or ())
        self._named += tokens
        if piece.text:
            if self._hidden(piece.text):
                tokens = encoded_behind(self._model, piece.text, self._tokens)
                self._notes.add(MENDED)
            self._named = []
        self._tokens += tokens
        return tokens

    def _hidden(self, text: str) -> bool:
        """Whether a whole text came with tokens that do not spell it: a part of a character decodes to U+FFFD."""
        return not self._named or (INCOMPLETE in self._model.decode(self._named) and INCOMPLETE not in text)


class EncodedText:
    """For servers that name no ids: the text is encoded, and its last tokens are held back until they are certain."""

    def __init__(self, model: LanguageModel, before: Sequence[int]) -> None:
        self._model = model
        self._before = list(before)
        self._text = ""
        self._sent: list[int] = []

    def push(self, piece: Piece) -> list[int]:
        self._text += piece.text
        tokens = encoded_behind(self._model, self._text, self._before)
        if tokens[: len(self._sent)] != self._sent:  # more text has changed what was sent: encode what is behind that
            rest = self._text[len(self._model.decode(self._sent)) :]
            tokens = self._sent + encoded_behind(self._model, rest, [*self._before, *self._sent])
        sure = len(tokens) if piece.finish else max(len(self._sent), len(tokens) - UNSETTLED)
        new = tokens[len(self._sent) : sure]
        self._sent += new
        return new
