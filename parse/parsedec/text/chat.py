"""Chat templates: a request as a model's prompt, and the judge's question as a verification suffix.

The suffix is what the target's own template puts behind the text of an assistant turn: the end of the turn, a user turn
with the question, and the assistant opening. It is cut out of a rendered dialogue, which works for every template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parsedec.errors import ChatTemplateError, JudgeError, PromptError
from parsedec.models.language_model import LanguageModel
from parsedec.text.prompt import BareText, NewTurn, Prompt, messages_of
from parsedec.types import Message

PLACEHOLDER = "PARSEDEC-DRAFT-STANDS-HERE"


def read_prompt(model: LanguageModel, prompt: Prompt) -> list[int]:
    """A user message, messages or bare text in the model's own tokens. Raises PromptError if there is no text."""
    if not isinstance(prompt, BareText):
        return prompt_ids(model, messages_of(prompt))
    ids = bare_ids(model, prompt)
    if not ids:
        raise PromptError("the prompt is empty; expected text that can be gone on with.")
    return ids


def bare_ids(model: LanguageModel, text: str) -> list[int]:
    """Tokens of a whole text, with the BOS token that the tokenizer puts before one; not twice, if it is there."""
    start = model.tokenizer.bos_token
    return model.encode(text, whole=not (start and text.startswith(start)))


def prompt_ids(model: LanguageModel, messages: Sequence[Message]) -> list[int]:
    """A dialogue with the assistant opening, in the model's tokens.

    If the last message is the assistant's, it is left open to be continued, as in transformers' text-generation
    pipeline; except in a `NewTurn`, where another assistant turn follows it.
    """
    continued = bool(messages) and messages[-1]["role"] == "assistant" and not isinstance(messages, NewTurn)
    return model.encode(prompt_text(model, messages, continued=continued))


def prompt_text(model: LanguageModel, messages: Sequence[Message], *, continued: bool = False) -> str:
    """A dialogue as the model's template renders it, with the assistant opening behind it.

    continued  leave its last message open instead: it is an answer to be continued
    Raises ChatTemplateError where there is no template, or it does not take the messages.
    """
    template = model.chat_template or model.tokenizer.chat_template
    if template is None:
        raise ChatTemplateError(
            f"the tokenizer of {model.name} has no chat template; expected one, to render the prompt "
            "and the judge's question. Set chat_template to Jinja text or a file, or give token ids."
        )
    arguments: dict[str, Any] = dict(model.template_args)
    try:
        return str(
            model.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                chat_template=model.chat_template,
                **arguments,
            )
        )
    except Exception as error:  # Jinja has errors of its own, and templates can raise any
        raise ChatTemplateError(
            f"the chat template of {model.name} rejects the roles "
            f"{[m.get('role') for m in messages]}: {error}. Check the messages or set "
            "chat_template."
        ) from error


def suffix_text(model: LanguageModel, question: str) -> str:
    """The verification suffix: end of the assistant's turn, a user turn with `question`, and the assistant opening."""
    dialogue = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": PLACEHOLDER},
        {"role": "user", "content": question},
    ]
    rendered = prompt_text(model, dialogue)
    before, found, after = rendered.rpartition(PLACEHOLDER)
    if not found or PLACEHOLDER in before or question.strip() not in after:
        raise ChatTemplateError(
            f"the chat template of {model.name} does not show an assistant turn followed by a user "
            "turn, so the judge cannot ask about a draft. Expected both turns in order; set "
            "target.chat_template to one that keeps earlier turns."
        )
    return after


def shows_role(model: LanguageModel, role: str) -> bool:
    """Whether the model's template renders messages of this role: some leave out roles that they do not know."""
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        return PLACEHOLDER in prompt_text(model, [*asked, {"role": role, "content": PLACEHOLDER}])
    except ChatTemplateError:
        return False


def closing_token(model: LanguageModel) -> int:
    """The id by which the model's template closes an assistant turn; its first end token if that is not one of them."""
    if not model.end_ids:
        raise ChatTemplateError(
            f"{model.name} names no end token, so an answer that is a whole draft could not be closed. Set "
            "eos_token_id in its generation config, or use outer=none."
        )
    first = model.encode(suffix_text(model, "?"))[:1]
    return first[0] if first and first[0] in model.end_ids else model.end_ids[0]


def label_tokens(model: LanguageModel, suffix: str, labels: Sequence[str]) -> list[int]:
    """The first token of each label, as the model would write it behind `suffix`.

    A label may have several tokens. Its first one decides, so no two labels may begin with the same token: JudgeError.
    """
    head = model.encode(suffix)
    firsts = []
    for label in labels:
        joined = model.encode(suffix + label)
        ids = joined[len(head) :] if joined[: len(head)] == head else model.encode(label)
        if not label or not ids:
            raise JudgeError(f"judge label {label!r} has no tokens in the vocabulary of {model.name}; expected a word.")
        firsts.append(ids[0])
    if len(set(firsts)) < len(firsts):
        shared = [model.tokenizer.convert_ids_to_tokens(first) for first in firsts]
        raise JudgeError(
            f"judge labels {list(labels)} begin with the same token {shared} in the vocabulary of "
            f"{model.name}, so one row of logits cannot tell them apart. Choose words that start differently."
        )
    return firsts
