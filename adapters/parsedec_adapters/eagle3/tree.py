"""EAGLE-2's dynamic draft tree (Li et al. 2024, arXiv 2406.16858), as EAGLE-3 uses it.

Level by level, the `top_k` most likely nodes are expanded into their `top_k` best children; of everything that was
seen, the most likely nodes form the tree. A node's score is the sum of the head's log-probabilities on its path. All of
a level is one forward of the head; the host waits for the device once, at the end.

Shapes in this file:  K top_k, P pool size, N nodes of the tree, S stable rows, D head hidden, W draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parsedec.types import Tree
from parsedec_adapters.eagle3.head import EagleHead
from parsedec_adapters.eagle3.rows import Rows, Window


@dataclass(frozen=True, slots=True)
class Drafted:
    """A tree with the score of every node [N], float32: log-probabilities under the head, 0 for the root."""

    tree: Tree
    scores: Tensor


@dataclass(slots=True)
class _Beam:
    """The nodes of one level that are expanded: all [K], hidden [K, D], ancestors [K, level * K] bool."""

    tokens: Tensor
    scores: Tensor
    pool: Tensor  # where they stand in the pool
    hidden: Tensor
    ancestors: Tensor


def grow(head: EagleHead, rows: Rows, root: int, *, levels: int, top_k: int, size: int) -> Drafted:
    """A tree of at most `size` nodes, root included, and at most `levels` below it.

    rows  the stable rows, `rows.used` of them, at least one, with room for `top_k` more a level but the last; what
          stands behind them is overwritten
    """
    stable = rows.used
    last = rows.outputs[stable - 1 : stable]  # [1, D]
    scores, tokens = _best(head, last, top_k)
    beam = _Beam(
        tokens[0], scores[0], torch.arange(top_k, device=last.device), last.expand(top_k, -1),
        torch.zeros(top_k, 0, dtype=torch.bool, device=last.device))  # fmt: skip
    pool = [(beam.tokens, beam.scores, torch.full_like(beam.pool, -1))]
    for level in range(levels - 1):
        out = _expand(head, rows, beam, stable, level)
        scores, tokens = _best(head, out, top_k)
        scores = beam.scores[:, None] + scores  # [K, K]
        pool.append((tokens.flatten(), scores.flatten(), beam.pool.repeat_interleave(top_k)))
        if level < levels - 2:
            beam = _next_beam(beam, out, tokens.flatten(), scores.flatten(), top_k * (1 + level * top_k))
    tokens, scores, parents = (torch.cat(part) for part in zip(*pool, strict=True))  # [P] each
    return _select(root, tokens, scores, parents, size - 1)


def _best(head: EagleHead, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and target ids of the likeliest tokens behind hidden [n, D]: [n, K] each."""
    best = head.logits(hidden).float().log_softmax(-1).topk(top_k, dim=-1)
    return best.values, head.target_ids(best.indices)


def _expand(head: EagleHead, rows: Rows, beam: _Beam, stable: int, level: int) -> Tensor:
    """The head's output for every node of the beam [K, D]; its rows join the drafted ones."""
    k = len(beam.tokens)
    own = torch.eye(k, dtype=torch.bool, device=beam.tokens.device)
    beam.ancestors = torch.cat([beam.ancestors, own], 1)
    mask = None  # one row sees everything
    if k > 1:
        mask = torch.cat([own.new_ones(k, stable), beam.ancestors], 1)  # [K, S + (level + 1) * K]
    rotation = head.rotations.rows(stable + level, stable + level + 1, beam.hidden)  # siblings share their position
    cache = Window(rows, stable + level * k)
    return head.advance(beam.hidden[None], beam.tokens[None], rotation, mask=mask, cache=cache)[0]


def _next_beam(beam: _Beam, out: Tensor, tokens: Tensor, scores: Tensor, pool_start: int) -> _Beam:
    """The likeliest of a level's K * K candidates; each continues the output of its parent."""
    k = len(beam.tokens)
    best = scores.topk(k)
    parent = best.indices // k
    return _Beam(tokens[best.indices], best.values, best.indices + pool_start, out[parent], beam.ancestors[parent])


def _select(root: int, tokens: Tensor, scores: Tensor, parents: Tensor, count: int) -> Drafted:
    """The `count` likeliest nodes of the pool in pool order: levels, then rank of the parent, then rank among siblings.

    A parent is never less likely than its child and stands before it, so with ties broken towards the front it is
    always selected with it.
    """
    order = scores.sort(descending=True, stable=True).indices
    kept = order[:count].sort().values  # [N - 1]
    node_of = torch.zeros(len(tokens) + 1, dtype=torch.long, device=tokens.device)  # pool index + 1 -> node; root 0
    node_of[kept + 1] = torch.arange(1, len(kept) + 1, device=tokens.device)
    chosen, parent_nodes = torch.stack([tokens[kept], node_of[parents[kept] + 1]]).tolist()
    tree = Tree((root, *chosen), (-1, *parent_nodes))
    return Drafted(tree, torch.cat([scores.new_zeros(1), scores[kept]]))
