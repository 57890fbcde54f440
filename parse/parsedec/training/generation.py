"""Answers of many problems at once: a batched decoding loop with its own random generator.

Training and evaluation need thousands of plain answers and neither of the engine's two levels, so rows are left-padded
into batches of hundreds here, and leave the batch when they end. (`batch` runs the engine's own requests together.)

Shapes in this file:  B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from parsedec.errors import IncompatibleStack, PromptError
from parsedec.models.language_model import LanguageModel
from parsedec.tasks.base import Problem
from parsedec.text.chat import read_prompt
from parsedec.text.prompt import check_length

Written = tuple[tuple[int, ...], bool]  # (tokens without the end token, whether the model ended by itself)


def prompts(model: LanguageModel, problems: Sequence[Problem]) -> list[list[int]]:
    """The problems as the model's prompts, up to the assistant opening, read as the engine reads a request's.

    Raises PromptError, with the problem's id, for one that is empty, not text, or longer than the model's context.
    """
    return [_prompt(model, problem) for problem in problems]


def _prompt(model: LanguageModel, problem: Problem) -> list[int]:
    try:
        ids = read_prompt(model, problem.prompt)
        check_length(model, ids)
    except PromptError as error:
        raise type(error)(f"{problem.id}: {error}") from error
    return ids


def write_answers(
    model: LanguageModel,
    contexts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch: int = 256,
    generator: torch.Generator | None = None,
    after_each: Callable[[str], None] = lambda _: None,
    known: Mapping[int, Written] | None = None,
    after_batch: Callable[[Mapping[int, Written]], None] = lambda _: None,
) -> list[Written]:
    """An answer to every context, in order, of at most `max_new_tokens` and no longer than the model's context allows.

    temperature  0: greedy, which needs no generator
    after_each   called for each answer that is finished
    known        answers of an interrupted run, by index; these are not written again
    after_batch  called with these and all answers finished since, by index
    Raises IncompatibleStack for a model with recurrent layers.
    """
    if model.recurrent:
        raise IncompatibleStack(
            f"{model.name} has recurrent layers, which padded batches would disturb; sample from an attention model"
        )
    full = (i for i, context in enumerate(contexts) if len(context) >= model.context_limit)
    answers: dict[int, Written] = {**dict.fromkeys(full, ((), False)), **(known or {})}
    by_length = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))  # little padding in a batch
    by_length = [i for i in by_length if i not in answers]
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        own = [contexts[i] for i in chosen]
        written = _write_batch(model, own, max_new_tokens, temperature, generator, after_each)
        answers |= zip(chosen, written, strict=True)
        after_batch(answers)
    return [answers[i] for i in range(len(contexts))]


def noised(model: LanguageModel, share: float, generator: torch.Generator) -> LanguageModel:
    """A weaker copy of the model: each weight matrix gets noise of `share` times its own standard deviation."""
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise, alpha=share * float(weight.float().std()))
    return dataclasses.replace(model, hf=hf, name=f"{model.name} with noise {share:g}")


@torch.inference_mode()
def _write_batch(
    model: LanguageModel,
    contexts: Sequence[Sequence[int]],
    limit: int,
    temperature: float,
    generator: torch.Generator | None,
    after_each: Callable[[str], None],
) -> list[Written]:
    device, longest = model.device, max(map(len, contexts))
    pad = model.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(c)) + list(c) for c in contexts], device=device)  # [B, T]
    seen = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts], device=device)
    at = (seen.cumsum(-1) - 1).clamp(min=0)
    cache, ends = DynamicCache(config=model.hf.config), set(model.end_ids)
    alive = list(range(len(contexts)))
    tokens: list[list[int]] = [[] for _ in contexts]
    ended = [False] * len(contexts)
    for _ in range(limit):
        out = model.hf(
            input_ids=ids,
            attention_mask=seen,
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = _choose(out.logits[:, -1].float(), temperature, generator)  # [B]
        staying = []
        for place, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            if token in ends:
                ended[row] = True
                after_each("answers")
            else:
                tokens[row].append(token)
                if len(contexts[row]) + len(tokens[row]) < model.context_limit:
                    staying.append(place)
        if not staying:
            break
        if len(staying) < len(alive):
            index = torch.tensor(staying, device=device)
            cache.batch_select_indices(index)
            chosen, seen, at, alive = chosen[index], seen[index], at[index], [alive[place] for place in staying]
        ids, at = chosen[:, None], at[:, -1:] + 1
        seen = torch.cat([seen, seen.new_ones(len(alive), 1)], dim=-1)
    for _ in range(ended.count(False)):  # those that a limit has cut off
        after_each("answers")
    return [(tuple(row), done) for row, done in zip(tokens, ended, strict=True)]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # drawn on the host: the same generator then gives the same answers on every device
    weights = (logits / temperature).softmax(-1).cpu()
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)
