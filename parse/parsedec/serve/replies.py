"""Answers as OpenAI's clients read them, whole or event by event.

`usage` counts the prompt once and the tokens of all choices. Drafts are OpenAI's predictions: what was kept is
`accepted_prediction_tokens`, what was not `rejected_prediction_tokens`; unlike OpenAI, refused tokens are not part of
`completion_tokens`, which are those of the answer. Two additions say who wrote what: `delta.parsedec` of a chunk
(of a completion: `choice.parsedec`) names the author of its text, and `choice.parsedec` of a finished answer has its
spans and counts.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from parsedec.serve.logprobs import Book
from parsedec.types import Delta, Result, StopReason

DONE = "data: [DONE]\n\n"
FINISHED = {
    StopReason.END_TOKEN: "stop",
    StopReason.STOP_STRING: "stop",
    StopReason.TOKEN_LIMIT: "length",
    StopReason.CONTEXT_LIMIT: "length",
}


def event(data: dict[str, Any]) -> str:
    """A server-sent event. It is one line, as JSON has no line ends of its own."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def usage(results: Iterable[Result], prompts: int = 1) -> dict[str, Any]:
    """The `usage` of a request's choices. They answer `prompts` different prompts, each of which is counted once."""
    done = list(results)
    choices = max(1, len(done) // prompts)
    prompt = sum(result.prompt_tokens for result in done[::choices])
    written = sum(result.new_tokens for result in done)
    drafted = sum(result.counters.draft_tokens for result in done)
    kept = sum(result.counters.kept_draft_tokens for result in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "completion_tokens_details": {
            "accepted_prediction_tokens": kept,
            "rejected_prediction_tokens": drafted - kept,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "parsedec": {"kept_share": kept / drafted if drafted else None},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Makes the parts of one request's answer, which all carry the same id, time and model."""

    chat: bool
    model: str
    fingerprint: str
    book: Book | None = None  # log-probabilities, where they are asked for
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}")

    def whole(self, results: list[Result], prompts: int) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(i, result) for i, result in enumerate(results)]
        return self._frame("chat.completion" if self.chat else "text_completion", choices) | {
            "usage": usage(results, prompts)
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens a choice of a chat."""
        if not self.chat:
            return None
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def note(self, index: int, delta: Delta) -> None:
        """Note the tokens of an event. Needed for every event, as tokens may come before their text."""
        if self.book:
            self.book.push(index, delta)

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """A chunk with text that is certain, and who wrote it."""
        told = {"author": delta.author.value, "tokens": len(delta.tokens)}
        body = {"delta": {"content": delta.text, "parsedec": told}} if self.chat else _text(delta.text, told)
        return self._chunk({"index": index, **body, "finish_reason": None}, self._logprobs(index))

    def last(self, index: int, result: Result) -> dict[str, Any]:
        """The chunk that ends a choice."""
        body: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        told = {"parsedec": _told(result)}
        choice = {"index": index, **body, "finish_reason": FINISHED[result.stop], **told}
        left = self._logprobs(index, result.stop)
        return self._chunk(choice, left if left and any(left.values()) else None)

    def total(self, results: list[Result], prompts: int) -> dict[str, Any]:
        """The chunk with `usage`, if it was asked for."""
        return self._frame(self._kind, []) | {"usage": usage(results, prompts)}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _logprobs(self, index: int, ended: StopReason | None = None) -> dict[str, Any] | None:
        return self.book.page(index, chat=self.chat, ended=ended) if self.book else None

    def _chunk(self, choice: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._frame(self._kind, [{**choice, "logprobs": logprobs}])

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        said = {"role": "assistant", "content": result.text, "refusal": None}
        body = {"message": said} if self.chat else {"text": result.text}
        told = _told(result) | {"spans": [{"author": s.author.value, "text": s.text} for s in result.spans]}
        ended = {"finish_reason": FINISHED[result.stop], "parsedec": told}
        return {"index": index, **body, **ended, "logprobs": self._logprobs(index, result.stop)}


def _text(text: str, told: dict[str, Any]) -> dict[str, Any]:
    return {"text": text, "parsedec": told}


def _told(result: Result) -> dict[str, Any]:
    counters = result.counters
    return {
        "stop": result.stop.value,
        "draft_tokens": counters.draft_tokens,
        "kept_draft_tokens": counters.kept_draft_tokens,
        "kept_share": result.kept_share if counters.draft_tokens else None,
        "target_calls": counters.target_calls,
        "seconds": round(result.times.wall_s, 4),
    }
