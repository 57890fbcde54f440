"""The answer being written: its tokens, who wrote them, and when it ends. Every author goes through `extend`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from parsedec.models.language_model import LanguageModel
from parsedec.text.spelling import TextStream, token_ends
from parsedec.types import Author, Limits, Span, StopReason


class Answer:
    """The tokens of one answer. The token that ends it belongs to it; nothing after that does."""

    def __init__(self, model: LanguageModel, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.tokens: list[int] = []
        self.stop: StopReason | None = None
        self._authors: list[Author] = []
        self._rounds: list[int] = []  # token positions at which rounds began
        self._stream, self._text = TextStream(model), ""  # kept up to date only if there are stop strings

    @property
    def remaining(self) -> int:
        return self.limits.max_new_tokens - len(self.tokens)

    def begin_round(self) -> None:
        """Mark the beginning of a round. Spans do not cross rounds, so that a reader can tell where each one began."""
        self._rounds.append(len(self.tokens))

    def extend(self, tokens: Sequence[int], author: Author) -> list[int]:
        """Append tokens up to and including the first that ends the answer; returns those appended."""
        taken: list[int] = []
        end_ids, strings = self.model.end_ids, self.limits.stop
        for token in tokens:
            if self.stop is not None:
                break
            self.tokens.append(token)
            self._authors.append(author)
            taken.append(token)
            if token in end_ids:
                self.stop = StopReason.END_TOKEN
            elif strings and self._reads_stop_string(token):
                self.stop = StopReason.STOP_STRING
            elif not self.remaining:
                self.stop = StopReason.TOKEN_LIMIT
        return taken

    def cut(self, length: int) -> None:
        """Take back all but the first `length` tokens, and the stop that the others may have caused."""
        del self.tokens[length:], self._authors[length:]
        self.stop = None
        self._stream, self._text = TextStream(self.model), ""
        for token in self.tokens:
            self._reads_stop_string(token)

    @property
    def text(self) -> str:
        """The decoded answer, cut before a stop string."""
        text = self.model.decode(self.tokens)
        if self.stop is StopReason.STOP_STRING:
            text = text[: min(text.find(s) for s in self.limits.stop if s in text)]
        return text

    def spans(self) -> tuple[Span, ...]:
        """Runs of tokens by one author within one round, with their text. Joined, the texts are `text`."""
        if not self.tokens:
            return ()
        text, count = self.text, len(self.tokens)
        changes = (i for i in range(1, count) if self._authors[i] is not self._authors[i - 1] or i in self._rounds)
        starts = [0, *changes]
        # finding where tokens end means decoding each of them, which an answer in one piece does not need
        ends = token_ends(self.model, self.tokens)[1] if len(starts) > 1 else []
        spans = []
        for start, stop in pairwise([*starts, count]):
            piece = text[ends[start - 1] if start else 0 : ends[stop - 1] if stop < count else None]
            spans.append(Span(author=self._authors[start], start=start, stop=stop, text=piece))
        return tuple(spans)

    def _reads_stop_string(self, token: int) -> bool:
        """Append `token` to the text; returns whether it now contains a stop string."""
        if not self.limits.stop:
            return False
        known = len(self._text)
        self._text += self._stream.push(token)
        return any(self._text.find(stop, max(0, known - len(stop) + 1)) >= 0 for stop in self.limits.stop)
