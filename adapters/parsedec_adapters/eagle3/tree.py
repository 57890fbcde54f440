"""EAGLE-2's dynamic draft tree (Li et al. 2024, arXiv 2406.16858), as EAGLE-3 uses it.

Level by level, the `top_k` most likely nodes are expanded into their `top_k` best children; of everything that was
seen, the most likely nodes form the tree. A node's score is the sum of the head's log-probabilities on its path. All of
a level is one forward of the head. What is between forwards stays on the device, in as few operations as will do; the
host waits once, at the end, and chooses the tree then.

Shapes in this file:  K top_k, P pool size, N nodes of the tree, S stable rows, D head hidden, W draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from parsedec.types import Tree
from parsedec_adapters.eagle3.head import EagleHead
from parsedec_adapters.eagle3.rows import Rows, Window


@dataclass(frozen=True, slots=True)
class Drafted:
    """A tree with the score of every node, N of them: log-probabilities under the head, 0 for the root."""

    tree: Tree
    scores: tuple[float, ...]


@dataclass(slots=True)
class _Pool:
    """Everything that was seen: the root's K children, then K children of each node that was expanded, in turn.

    expanded  of every level but the first [K]: which of the K * K candidates of the level before were expanded
    """

    tokens: list[Tensor]
    scores: list[Tensor]
    expanded: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Constants:
    """What every tree needs and no tree changes.

    own      [K, K] bool: each node sees itself and none of its siblings
    stable   [K, C + K] bool: any number of rows that all nodes see, and `own` behind them
    parents  [K * K] the parent's rank among the K nodes that were expanded, for each of their children
    """

    own: Tensor
    stable: Tensor
    parents: Tensor


@lru_cache(maxsize=16)  # the capacity of a request's rows seldom changes
def _constants(top_k: int, capacity: int, device: torch.device) -> _Constants:
    with torch.inference_mode(False):
        own = torch.eye(top_k, dtype=torch.bool, device=device)
        stable = torch.cat([own.new_ones(top_k, capacity), own], 1)
        return _Constants(own, stable, torch.arange(top_k, device=device).repeat_interleave(top_k))


def grow(head: EagleHead, rows: Rows, root: int, *, levels: int, top_k: int, size: int) -> Drafted:
    """A tree of at most `size` nodes, root included, and at most `levels` below it.

    rows  the stable rows, `rows.used` of them, at least one, with room for `top_k` more a level but the last; what
          stands behind them is overwritten
    """
    stable = rows.used
    last = rows.outputs[None, stable - 1 : stable]  # [1, 1, D]
    best, guesses = _best(head, last, top_k)
    tokens, scores = guesses.flatten(), best.flatten()  # [K] of the nodes to be expanded, here and below
    pool = _Pool([tokens], [scores], [])
    hidden, constants = last.expand(1, top_k, -1), _constants(top_k, rows.capacity, last.device)
    sees = constants.stable[:, -stable - top_k :]  # [K, S + K]: the stable rows, the ancestors, itself
    cos, sin = head.rotations.rows(stable, stable + levels - 1, last)
    # siblings share their position: a row for all
    for level, rotation in enumerate(zip(cos[:, None].unbind(), sin[:, None].unbind(), strict=True)):
        mask = sees if top_k > 1 else None  # one row sees everything
        cache = Window(rows, stable + level * top_k)
        out = head.advance(hidden, tokens[None], rotation, mask=mask, cache=cache)  # [1, K, D]
        best, guesses = _best(head, out, top_k)  # [1, K, K]
        pool.tokens.append(guesses.flatten())
        pool.scores.append((scores[:, None] + best).flatten())
        if level < levels - 2:  # the likeliest candidates are next; each continues the output of its parent
            scores, chosen = pool.scores[-1].topk(top_k)
            parents, tokens = constants.parents.index_select(0, chosen), pool.tokens[-1].index_select(0, chosen)
            hidden = out.index_select(1, parents)
            sees = torch.cat([sees.index_select(0, parents), constants.own], 1)
            pool.expanded.append(chosen)
    return _select(root, pool, top_k, size - 1)


def _best(head: EagleHead, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and target ids of the likeliest tokens behind hidden [1, n, D]: [1, n, K] each."""
    best = head.logits(hidden).float().log_softmax(-1).topk(top_k, dim=-1)
    return best.values, head.target_ids(best.indices)


def _select(root: int, pool: _Pool, top_k: int, count: int) -> Drafted:
    """The `count` likeliest nodes of the pool in pool order: levels, then rank of the parent, then rank among siblings.

    A parent is never less likely than its child and stands before it, so with ties broken towards the front it is
    always selected with it.
    """
    parts = [*pool.scores, *pool.tokens, *pool.expanded]
    found = torch.cat(parts).tolist()  # as float32: whole numbers below 2 ** 24 stay what they are
    size, k = top_k + top_k * top_k * (len(pool.scores) - 1), top_k
    scores, tokens, chosen = found[:size], found[size : 2 * size], found[2 * size :]
    kept = sorted(sorted(range(size), key=scores.__getitem__, reverse=True)[:count])  # equal ones stay in their order
    # places in the pool of the nodes that were expanded: the i-th one's children stand at K + i * K and after
    expanded = [*range(k), *(k + i // k * k * k + int(one) for i, one in enumerate(chosen))]
    node_of = {place: node for node, place in enumerate(kept, 1)}
    # scores that are no numbers have no order, and a parent may be missing; the guess is worth nothing then anywhere
    parents = [0 if place < k else node_of.get(expanded[place // k - 1], 0) for place in kept]
    tree = Tree((root, *(int(tokens[place]) for place in kept)), (-1, *parents))
    return Drafted(tree, (0.0, *(scores[place] for place in kept)))
