"""What a request may be given as: a user message, a list of messages, or token ids used as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from parsedec.errors import PromptError, PromptTooLong, shown
from parsedec.models.language_model import LanguageModel
from parsedec.types import Message


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt in both models' tokens, made by `Parse.read`, so that the request has nothing left to encode. `draft` is
    None if no draft model reads it."""

    target: list[int]
    draft: list[int] | None


# a mapping: what a tokenizer returns
Prompt = str | Sequence[Message] | Sequence[int] | Tensor | Mapping[str, Any] | ReadPrompt


class NewTurn(list[Message]):
    """Messages that get an answer in a turn of its own, even if the last one is the assistant's, as in OpenAI's API. In
    any other list, a last message of the assistant's is continued."""


class BareText(str):
    """Text to be continued as it is, without a chat template. Each model reads it in its own tokens."""


def token_ids(prompt: Prompt) -> list[int]:
    """The token ids of a prompt that is given as such; of any other prompt, an empty list.

    They may be a list, a tensor or array of one dimension or of one row, or what a tokenizer returns: `input_ids` of
    one prompt, of which those hidden by `attention_mask` are left out.
    """
    whole = prompt if isinstance(prompt, Mapping) else {"input_ids": prompt}
    rows = _one_row(whole.get("input_ids"), nested=whole is prompt)
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence):
        return []
    ids = [int(i) for i in rows if isinstance(i, (int, np.integer)) and not isinstance(i, bool)]
    if len(ids) < len(rows):
        return []
    mask = _one_row(whole.get("attention_mask"), nested=True)
    return ids if mask is None else [i for i, seen in zip(ids, mask, strict=True) if seen]


def _one_row(ids: Any, *, nested: bool) -> Any:
    """Ids as a list. Of a tensor or array with one row, or if `nested` of a list of one list, that row."""
    array = isinstance(ids, (Tensor, np.ndarray))
    rows = ids.tolist() if array else ids
    one = (array or nested) and isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], list)
    return rows[0] if one else rows


def messages_of(prompt: Prompt) -> list[Message]:
    """A user message or a dialogue, as messages. Raises PromptError for anything else."""
    messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise PromptError(
            f"the prompt is {shown(prompt)}; expected a user message, a list of messages, or the token ids of one "
            "prompt. Several prompts are for generate_batch."
        )
    malformed = [m for m in messages if not isinstance(m, Mapping) or not {"role", "content"} <= set(m)]
    if malformed:
        raise PromptError(
            f"message {shown(malformed[0])} is not of the form {{'role': …, 'content': …}}. Several prompts are for "
            "generate_batch."
        )
    texts: list[Message] = [{**message, "content": _text(message["content"])} for message in messages]
    if not texts or not texts[-1]["content"].strip():
        raise PromptError("the prompt is empty; expected a user message, a list of messages, or token ids.")
    return NewTurn(texts) if isinstance(messages, NewTurn) else texts


def _text(content: Any) -> str:
    """The text of a message, which may come in parts as from OpenAI's clients."""
    parts = [content] if isinstance(content, str) or not isinstance(content, Sequence) else content
    read = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part for part in parts]
    texts = [part for part in read if isinstance(part, str) and is_unicode(part)]
    if len(texts) < len(read):
        raise PromptError(
            f"a message's content is {shown(content)}; expected text, or a list of {{'type': 'text', 'text': …}}. Half "
            "of a surrogate pair is no text."
        )
    return "".join(texts)


def is_unicode(text: str) -> bool:
    """Whether a string is valid text: JSON can spell half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_length(model: LanguageModel, ids: Sequence[int]) -> None:
    """Raise PromptTooLong if a prompt leaves no room for an answer."""
    if len(ids) >= model.context_limit:
        raise PromptTooLong(
            f"the prompt has {len(ids)} tokens and leaves no room in the context of {model.name}, "
            f"{model.context_limit} tokens. Shorten it, or choose a model with a longer context."
        )
