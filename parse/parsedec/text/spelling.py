"""Where tokens end in the text they spell, and drafts carried from one vocabulary to another."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from parsedec.models.language_model import LanguageModel

INCOMPLETE = "\ufffd"  # what a decoder prints for a character whose bytes are not all there yet
UNSETTLED = 8  # last tokens of an encoded text that its continuation may still change


@dataclass(frozen=True, slots=True)
class Draft:
    """A whole answer by the draft model, in the target's tokens, its end token left out.

    tokens    N target ids
    text      what they spell
    ends      [N] offset in `text` after each token
    ended     the draft model closed the answer by itself
    logprobs  [N] the draft model's log-probability of each token at temperature 1, nats; None: nobody asked for them
    """

    tokens: tuple[int, ...]
    text: str
    ends: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...] | None = None

    @classmethod
    def of(cls, model: LanguageModel, tokens: Sequence[int], ended: bool) -> Draft:
        text, ends = token_ends(model, tokens)
        return cls(tuple(tokens), text, tuple(ends), ended)

    def first(self, n: int, *, ended: bool) -> Draft:
        """The draft as it was when its first n tokens were written, n at least 1."""
        logprobs = None if self.logprobs is None else self.logprobs[:n]
        return Draft(self.tokens[:n], self.text[: self.ends[n - 1]], self.ends[:n], ended, logprobs)

    def position(self, offset: int) -> int:
        """The first token position at which the text up to `offset` is complete."""
        return token_at_offset(self.ends, offset)

    def piece(self, start: int, stop: int) -> str:
        """Text of tokens[start:stop]."""
        return self.text[self.ends[start - 1] if start else 0 : self.ends[stop - 1] if stop else 0]

    def part(self, start: int, stop: int) -> Draft:
        """tokens[start:stop] as a draft of their own, which is ended if the draft ends there."""
        offset = self.ends[start - 1] if start else 0
        ends = tuple(end - offset for end in self.ends[start:stop])
        ended = self.ended and stop == len(self.tokens)
        logprobs = None if self.logprobs is None else self.logprobs[start:stop]
        return Draft(self.tokens[start:stop], self.piece(start, stop), ends, ended, logprobs)


class TextStream:
    """Text of a token sequence that grows: `push` returns what new tokens added.

    Decoded in a sliding window that restarts at the last complete character, as streaming servers do: token by token
    would lose leading spaces and split characters, and from the start each time would be quadratic.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._window: list[int] = []
        self._read = 0  # leading tokens of the window whose text is out already

    def push(self, *tokens: int) -> str:
        self._window.extend(tokens)
        text = self.model.decode(self._window)
        if text.endswith(INCOMPLETE):
            return ""
        added = text[len(self.model.decode(self._window[: self._read])) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return added


class GrowingDraft:
    """A text still being written: what it is made of as in `Draft`, which `draft` makes a copy of."""

    def __init__(self, model: LanguageModel) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.ends: list[int] = []
        self._stream = TextStream(model)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.text += self._stream.push(token)
        self.ends.append(len(self.text))

    def position(self, offset: int) -> int:
        """As of a draft."""
        return token_at_offset(self.ends, offset)

    def draft(self) -> Draft:
        return Draft(tuple(self.tokens), self.text, tuple(self.ends), ended=False)


def token_at_offset(ends: Sequence[int], offset: int) -> int:
    """The first token position at which the text up to `offset` is complete, after tokens that end at `ends`."""
    return min(bisect_left(ends, offset) + 1, len(ends))


def token_ends(model: LanguageModel, tokens: Sequence[int]) -> tuple[str, list[int]]:
    """The text of `tokens` and the offset after each of them."""
    stream, text, ends = TextStream(model), "", []
    for token in tokens:
        text += stream.push(token)
        ends.append(len(text))
    return text, ends


def carried(
    source: LanguageModel, before: Sequence[int], tokens: Sequence[int], into: LanguageModel, after: Sequence[int]
) -> list[int]:
    """`tokens` of one model, written behind `before`, as tokens of another that will stand behind `after`.

    Many decoders drop the leading space of what they decode, and many encoders put one in front; so both sides see
    some of the text before. A character cut in half at the end is left out, and text that looks like a control token
    stays text.
    """
    head = source.decode(list(before))
    text = source.decode([*before, *tokens])[len(head) :].rstrip(INCOMPLETE)
    return encoded_behind(into, text, after)


def encoded_behind(into: LanguageModel, text: str, after: Sequence[int]) -> list[int]:
    """`text` as tokens of a model that will stand behind `after`."""
    anchor = into.decode(list(after[-8:]))
    known = into.encode(anchor, plain=True)
    joined = into.encode(anchor + text, plain=True)
    return joined[len(known) :] if joined[: len(known)] == known else into.encode(text, plain=True)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class StopText:
    """Holds back streamed text that may be the beginning of a stop string, which is not part of the answer."""

    def __init__(self, stream: TextStream, stop: Sequence[str]) -> None:
        self.stream = stream
        self.stop = stop
        self.sent = 0  # characters handed out
        self._held = ""

    def push(self, *tokens: int) -> str:
        """Text that is sure to be part of the answer after more tokens."""
        text = self._held + self.stream.push(*tokens)
        found = [text.find(s) for s in self.stop if s in text]
        if found:
            safe = min(found)
        else:
            safe = min(
                (
                    len(text) - n
                    for s in self.stop
                    for n in range(1, min(len(s), len(text) + 1))
                    if text.endswith(s[:n])
                ),
                default=len(text),
            )
        self._held = text[safe:]
        self.sent += safe
        return text[:safe]

    def rest(self, answer: str) -> str:
        """What of the finished answer was still held back."""
        return answer[self.sent :]
