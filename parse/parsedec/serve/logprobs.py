"""Log-probabilities as OpenAI's clients read them, for answers of which the target has chosen every token.

They are the target's own, at temperature 1 and before top-k or top-p. A token is shown with the piece of text in which
it begins. So all text is covered; the last token may reach into a stop string, and those behind that are not shown. The
end token is only shown if it is the whole answer, for clients that ask for one token and its rivals, as a judge does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parsedec.models.language_model import LanguageModel
from parsedec.text.spelling import INCOMPLETE, TextStream
from parsedec.types import Delta, StopReason

Spelt = tuple[str, bool]  # (a token's text, True), or (its name, False) if it has no text by itself


@dataclass(frozen=True, slots=True)
class Entry:
    """A token of an answer: how it is spelt, where it begins in the text, and other tokens in its place."""

    spelt: Spelt
    logprob: float
    offset: int
    top: tuple[tuple[Spelt, float], ...]


class Book:
    """The log-probabilities of a request's choices: `push` takes what was written, `page` returns what is new."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._choices: dict[int, _Choice] = {}

    def push(self, index: int, delta: Delta) -> None:
        self._choices.setdefault(index, _Choice(self._model)).push(delta)

    def page(self, index: int, *, chat: bool, ended: StopReason | None = None) -> dict[str, Any]:
        """The tokens of the text that was handed out since the last page; at the end also tokens without text."""
        entries = self._choices[index].take(ended)
        return _chat(entries) if chat else _text(entries)


class _Choice:
    def __init__(self, model: LanguageModel) -> None:
        self._model, self._stream = model, TextStream(model)
        self._waiting: list[Entry] = []
        self._last: list[int] = []  # the token before: decoders may drop the space a text begins with
        self._written = self._out = 0  # characters of the tokens, and of the text handed out
        self._end: list[Entry] = []  # the token that ends the answer, as long as it is the only one

    def push(self, delta: Delta) -> None:
        for shown in delta.shown:
            top = tuple((self._spelt(token), logprob) for token, logprob in shown.top)
            entry = Entry(self._spelt(shown.token), shown.logprob, self._written, top)
            if shown.token in self._model.end_ids:
                self._end = [] if self._last else [entry]
            else:
                self._waiting.append(entry)
                self._written += len(self._stream.push(shown.token))
                self._last = [shown.token]
        self._out += len(delta.text)

    def take(self, ended: StopReason | None) -> list[Entry]:
        all_stands = ended is not None and ended is not StopReason.STOP_STRING
        ready = [entry for entry in self._waiting if all_stands or entry.offset < self._out]
        self._waiting = self._waiting[len(ready) :]
        return ready + self._end if all_stands else ready

    def _spelt(self, token: int) -> Spelt:
        """How a token is spelt. Control tokens and parts of a character have no text by themselves."""
        before = self._model.decode(self._last)
        text = self._model.decode([*self._last, token])[len(before) :]
        if text and INCOMPLETE not in text + before:
            return text, True
        return str(self._model.tokenizer.convert_ids_to_tokens(token)), False


def _chat(entries: list[Entry]) -> dict[str, Any]:
    def named(spelt: Spelt, logprob: float) -> dict[str, Any]:
        text, known = spelt
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}

    content = [named(e.spelt, e.logprob) | {"top_logprobs": [named(*other) for other in e.top]} for e in entries]
    return {"content": content, "refusal": None}


def _text(entries: list[Entry]) -> dict[str, Any]:
    tops: list[dict[str, float]] = []
    for entry in entries:
        tops.append({})
        for (text, _), logprob in entry.top:
            tops[-1].setdefault(text, logprob)  # of several tokens with one text, the likeliest
    return {
        "tokens": [entry.spelt[0] for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops,
        "text_offset": [entry.offset for entry in entries],
    }
