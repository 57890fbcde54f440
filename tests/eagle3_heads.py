"""Tiny EAGLE-3 heads for the tiny models: random ones, and ones taught to continue one text."""

import functools

import torch
from torch.nn import functional

import tiny
from parsedec.sessions.session import Session
from parsedec_adapters.eagle3 import EagleHead, HeadConfig
from parsedec_adapters.eagle3.head import ConcatCache

SIZES = dict(
    hidden_size=64,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=tiny.VOCAB,
    draft_vocab_size=tiny.VOCAB,
    target_hidden_size=64,
    max_position_embeddings=512,
)


def random_head(seed=0, **changes):
    """Random weights, scaled up so that guesses are well apart; norm weights are random, too."""
    torch.manual_seed(seed)
    head = EagleHead(HeadConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for weight in head.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.mul_(3.0)
        if head.d2t is not None:
            head.set_vocabulary(torch.randperm(head.config.vocab_size)[: head.config.draft_vocab_size].sort().values)
    return head


@functools.cache
def tiny_head():
    return random_head(draft_vocab_size=40, taps=(1, 2, 3))


@functools.cache
def taught_head(model, ids, steps=40, ahead=3, taps=None):
    """A head trained on one text until it guesses it mostly right, also from its own outputs (training-time test)."""
    layers = model.num_layers
    taps = taps or (2, layers // 2, layers - 3)
    torch.manual_seed(1)
    head = EagleHead(HeadConfig(**SIZES, taps=taps)).with_embedding(model.hf.get_input_embeddings().weight)
    session = Session(model, taps)
    session.feed(ids[:-1])
    seen, tokens = session.seen(0).taps.clone()[None], torch.tensor([ids])
    optimiser = torch.optim.Adam(head.parameters(), 4e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        guesses = [(logits, tokens[0, 2 + s :]) for s, logits in enumerate(unrolled(head, seen, tokens, ahead))]
        sum(functional.cross_entropy(logits[: len(right)], right) for logits, right in guesses).backward()
        optimiser.step()
    return head.eval()


def unrolled(head, taps, tokens, ahead):
    """Logits [T, W] of `ahead` guesses in turn from every row: step s of row u reads token u + 1 + s at u + s."""
    t = taps.shape[1]
    hidden, cache, mask = head.fuse(taps), ConcatCache(), torch.ones(t, t, dtype=torch.bool).tril()
    for s in range(ahead):
        read = tokens[:, 1 + s : 1 + s + t]
        read = functional.pad(read, (0, t - read.shape[1]))
        hidden = head.advance(hidden, read, head.rotations.rows(s, s + t, hidden), mask=mask, cache=cache)
        yield head.logits(hidden)[0]
        mask = torch.cat([mask, torch.eye(t, dtype=torch.bool)], 1)
