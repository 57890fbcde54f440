"""How often are the heads right? Measured on the target's own answers, and turned into a tree (`tree_from_accuracies`).

    inner = Medusa(heads=…).bind(target, None)
    tree = tree_from_accuracies(head_accuracies(inner, target, prompts), nodes=24)
    engine = Parse(target, inner=Medusa(heads=…, tree=tree))

Shapes in this file:  T tokens of a text, K heads, R ranks, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from parsedec.engine import Parse
from parsedec.errors import ConfigError
from parsedec.models.language_model import LanguageModel
from parsedec.sessions.session import Session
from parsedec.text.chat import prompt_ids
from parsedec_adapters.medusa.speculator import Medusa

CHUNK = 64  # positions at once: the heads' logits are K x V numbers each


def head_accuracies(
    inner: Medusa,
    target: LanguageModel,
    prompts: Iterable[str | Sequence[int]],
    *,
    ranks: int = 10,
    max_new_tokens: int = 128,
) -> list[list[float]]:
    """The share of positions in the target's greedy answers at which the r-th best guess of head k is right, [K][R].

    inner    bound to `target`
    prompts  user messages or token ids

    Raises ConfigError if the answers are too short to ask every head once.
    """
    engine, ranks = Parse(target), min(ranks, target.vocab_size)
    hits, places = torch.zeros(0), torch.zeros(0)
    for prompt in prompts:
        ids = prompt_ids(target, [{"role": "user", "content": prompt}]) if isinstance(prompt, str) else list(prompt)
        answer = engine.generate(ids, max_new_tokens=max_new_tokens).tokens
        right, asked = count_ranks(inner, target, [*ids, *answer], len(ids), ranks)
        hits, places = (right, asked) if not len(hits) else (hits + right, places + asked)
    if not len(places) or int(places.min()) == 0:
        raise ConfigError(
            f"the answers to {'these prompts' if len(places) else 'no prompts'} are too short to ask the last head "
            "once. Give more prompts, or raise max_new_tokens."
        )
    shares: list[list[float]] = (hits / places[:, None]).tolist()
    return shares


@torch.inference_mode()
def count_ranks(
    inner: Medusa, target: LanguageModel, ids: Sequence[int], start: int, ranks: int
) -> tuple[Tensor, Tensor]:
    """Hits [K, R] and positions [K] in the answer ids[start:]; head k at position t is asked for token t + k + 2."""
    session = Session(target, inner.needs.hidden_layers)
    session.feed(ids)
    taps = session.seen(0).taps  # [T, 1, H]
    assert taps is not None
    tokens = torch.tensor(list(ids), device=target.device)
    hits, places = [], []
    for at in range(start - 1, len(ids), CHUNK):  # the row before the answer gave its first token
        best = inner.logits(taps[at : at + CHUNK, 0]).topk(ranks, dim=-1).indices  # [K, chunk, R]
        asked = [tokens[at + k + 2 : at + k + 2 + best.shape[1]] for k in range(len(best))]
        hits.append(torch.stack([(guess[: len(t)] == t[:, None]).sum(0) for guess, t in zip(best, asked, strict=True)]))
        places.append(torch.tensor([len(t) for t in asked]))
    return torch.stack(hits).sum(0).cpu(), torch.stack(places).sum(0)
