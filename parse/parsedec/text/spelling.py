"""Tokens and the text they spell: where each token ends, text that grows, and drafts for another vocabulary."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from parsedec.models.language_model import LanguageModel

INCOMPLETE = "\ufffd"  # what a decoder prints for a character whose bytes are not all there yet
UNSETTLED = 8  # last tokens of an encoded text that its continuation may still change


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft, in the target's tokens and without its end token.

    tokens    N target ids
    text      what they spell
    ends      [N] where each token ends in `text`
    ended     whether the draft model wrote an end token behind them
    logprobs  [N] the draft model's log-probability of each token at temperature 1, in nats; None: not recorded
    inside    the n after whose first tokens the text stops within a character, some of its bytes still to come
    """

    tokens: tuple[int, ...]
    text: str
    ends: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...] | None = None
    inside: frozenset[int] = frozenset()

    @classmethod
    def of(cls, model: LanguageModel, tokens: Sequence[int], ended: bool) -> Draft:
        growing = GrowingDraft(model)
        for token in tokens:
            growing.add(token)
        return replace(growing.draft(), ended=ended)

    def first(self, n: int, *, ended: bool) -> Draft:
        """The draft as it was after its first n tokens, n at least 1."""
        return replace(self.part(0, n), ended=ended)

    def position(self, offset: int) -> int:
        """The first token position at which the text up to `offset` is complete."""
        return token_at_offset(self.ends, offset)

    def piece(self, start: int, stop: int) -> str:
        """Text of tokens[start:stop]."""
        return self.text[self.ends[start - 1] if start else 0 : self.ends[stop - 1] if stop else 0]

    def part(self, start: int, stop: int) -> Draft:
        """tokens[start:stop] as a draft of its own, which is ended if it ends where this one does."""
        offset = self.ends[start - 1] if start else 0
        ends = tuple(end - offset for end in self.ends[start:stop])
        ended = self.ended and stop == len(self.tokens)
        logprobs = None if self.logprobs is None else self.logprobs[start:stop]
        inside = frozenset(n - start for n in self.inside if start < n <= stop)
        return Draft(self.tokens[start:stop], self.piece(start, stop), ends, ended, logprobs, inside)


class TextStream:
    """The text of a token sequence that grows: `push` returns what the new tokens add to it.

    As in streaming servers, tokens are decoded in a window that starts at the last complete character: to decode them
    one by one would lose leading spaces and split characters, and to decode all of them each time would be quadratic.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._window: list[int] = []
        self._read = 0  # first tokens of the window, whose text was returned before

    def push(self, *tokens: int) -> str:
        self._window.extend(tokens)
        text = self.model.decode(self._window)
        if text.endswith(INCOMPLETE):
            return ""
        before = self.model.decode(self._window[: self._read])
        added = text[len(before) :]
        if added:
            self._window = self._window[self._read :]
        elif before:  # with tokens without text in front, decoders would drop a leading space as at a text's beginning
            self._window = self._window[: self._read]
        self._read = len(self._window)
        return added

    @property
    def inside(self) -> bool:
        """Whether the tokens so far end inside a character."""
        return self._read < len(self._window)


class GrowingDraft:
    """A draft that is still being written. Attributes are those of `Draft`; `draft` returns it as it is now."""

    def __init__(self, model: LanguageModel) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.ends: list[int] = []
        self.inside: set[int] = set()
        self._stream = TextStream(model)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.text += self._stream.push(token)
        self.ends.append(len(self.text))
        if self._stream.inside:
            self.inside.add(len(self.tokens))

    def position(self, offset: int) -> int:
        """As `Draft.position`."""
        return token_at_offset(self.ends, offset)

    def draft(self) -> Draft:
        return Draft(tuple(self.tokens), self.text, tuple(self.ends), ended=False, inside=frozenset(self.inside))


def token_at_offset(ends: Sequence[int], offset: int) -> int:
    """The first token position at which the text up to `offset` is complete, after tokens that end at `ends`."""
    return min(bisect_left(ends, offset) + 1, len(ends))


def token_ends(model: LanguageModel, tokens: Sequence[int]) -> tuple[str, list[int]]:
    """The text of `tokens` and the offset after each of them."""
    draft = Draft.of(model, tokens, ended=False)
    return draft.text, list(draft.ends)


def carried(
    source: LanguageModel, before: Sequence[int], tokens: Sequence[int], into: LanguageModel, after: Sequence[int]
) -> list[int]:
    """`tokens` of one model, written behind `before`, as tokens of another model that will follow `after`.

    Many decoders drop a leading space, and many encoders add one, so both are given some of the text before. A
    character that is incomplete at the end is left out, and text that looks like a control token stays text.
    """
    head = source.decode(list(before))
    text = source.decode([*before, *tokens])[len(head) :].rstrip(INCOMPLETE)
    return encoded_behind(into, text, after)


def encoded_behind(into: LanguageModel, text: str, after: Sequence[int]) -> list[int]:
    """`text` as tokens of a model, which will follow `after`."""
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
    """Holds back streamed text while it may be the beginning of a stop string, which is not part of the answer."""

    def __init__(self, stream: TextStream, stop: Sequence[str]) -> None:
        self.stream = stream
        self.stop = stop
        self.sent = 0  # characters handed out
        self._held = ""

    def push(self, *tokens: int) -> str:
        """The text that, with these tokens, is now certain to be part of the answer."""
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
        """The part of the finished answer that was still held back."""
        return answer[self.sent :]
