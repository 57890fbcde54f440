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


@lru_cache(maxsize=16)
def _parents(top_k: int, device: torch.device) -> Tensor:
    """The parent's rank among the K nodes that were expanded, for each of their children [K * K]."""
    with torch.inference_mode(False):
        return torch.arange(top_k, device=device).repeat_interleave(top_k)


def grow(
    head: EagleHead, rows: Rows, root: int, *, levels: int, top_k: int, size: int, depth_first: bool = False
) -> Drafted:
    """A tree of at most `size` nodes, root included, and at most `levels` below it.

    depth_first  every node right before what is below it; else level by level, as EAGLE does
    rows  the stable rows, `rows.used` of them, at least one, with room for `top_k` more a level but the last; what
          stands behind them is overwritten
    """
    stable = rows.used
    last = rows.outputs.narrow(0, stable - 1, 1).unsqueeze(0)  # [1, 1, D]
    best, tokens = _best(head, head.logits(last), top_k)
    scores, tokens = best.view(-1), tokens.view(-1)  # [K] of the nodes to be expanded, here and below
    pool = _Pool([tokens], [scores], [])
    hidden, parent_of = last.expand(1, top_k, -1), _parents(top_k, last.device)
    sight = rows.sight(top_k, levels - 1) if top_k > 1 and levels > 1 else None  # one row sees everything
    mask = None if sight is None else sight.first(stable)  # [K, S + K]: the stable rows, the ancestors, itself
    # siblings share their position: a row for all
    for level, rotation in enumerate(head.rotations.singles(stable, stable + levels - 1, last)):
        cache = Window(rows, stable + level * top_k)
        out, logits = head.guess(hidden, tokens.unsqueeze(0), rotation, mask=mask, cache=cache)  # [1, K, D], [1, K, W]
        best, guesses = _best(head, logits, top_k)  # [1, K, K]
        pool.tokens.append(guesses.view(-1))
        pool.scores.append(best.add_(scores.unsqueeze(1)).view(-1))
        if level < levels - 2:  # the likeliest candidates are next; each continues the output of its parent
            scores, chosen = pool.scores[-1].topk(top_k)
            parents, tokens = parent_of.index_select(0, chosen), pool.tokens[-1].index_select(0, chosen)
            hidden = out.index_select(1, parents)
            mask = None if sight is None else sight.below(level + 1, parents, stable)
            pool.expanded.append(chosen)
    return _select(root, pool, top_k, size - 1, depth_first)


def _best(head: EagleHead, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and target ids of the likeliest tokens by logits [1, n, W]: [1, n, K] each."""
    best, ids = logits.log_softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return best, ids if head.d2t is None else head.target_ids(ids)


def _select(root: int, pool: _Pool, top_k: int, count: int, depth_first: bool) -> Drafted:
    """The `count` likeliest nodes of the pool. A parent is never less likely than its child and stands before it in the
    pool, so with ties broken towards the front it is always selected with it."""
    scores: list[float] = torch.cat(pool.scores).tolist()
    found: list[int] = torch.cat([*pool.tokens, *pool.expanded]).tolist()  # apart: joining kinds of numbers is slow
    size, k = len(scores), top_k
    # places in the pool of the nodes that were expanded: the i-th one's children stand at K + i * K and after
    expanded = [*range(k), *[k + i // k * k * k + one for i, one in enumerate(found[size:])]]
    likeliest = sorted(range(size), key=scores.__getitem__, reverse=True)[:count]  # equal ones stay in their order
    places, parents = (_depth_first if depth_first else _by_level)(likeliest, expanded, k)
    tree = Tree((root, *[found[place] for place in places]), (-1, *parents))
    return Drafted(tree, (0.0, *[scores[place] for place in places]))


def _by_level(selected: list[int], expanded: list[int], k: int) -> tuple[list[int], list[int]]:
    """Places and parents of nodes 1 to N in pool order: levels, then rank of the parent, then rank among siblings."""
    places = sorted(selected)
    node_of = {place: node for node, place in enumerate(places, 1)}
    # scores that are no numbers have no order, and a parent may be missing; the guess is worth nothing then anywhere
    return places, [0 if place < k else node_of.get(expanded[place // k - 1], 0) for place in places]


def _depth_first(selected: list[int], expanded: list[int], k: int) -> tuple[list[int], list[int]]:
    """The same, but every node right before what is below it, siblings in their order."""
    wanted, first_child = set(selected), {place: k + i * k for i, place in enumerate(expanded)}
    places, parents = list[int](), list[int]()
    waiting = [(place, 0) for place in range(k - 1, -1, -1)]
    while waiting:
        place, parent = waiting.pop()
        if place in wanted:
            places.append(place)
            parents.append(parent)
            if (first := first_child.get(place)) is not None:
                node = len(places)
                waiting += [(child, node) for child in range(first + k - 1, first - 1, -1)]
    return places, parents
