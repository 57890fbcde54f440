"""EAGLE-2's dynamic draft tree (Li et al. 2024, arXiv 2406.16858), as EAGLE-3 uses it.

Level by level, the `top_k` most likely nodes are expanded into their `top_k` best children; of all nodes seen, the most
likely ones form the tree. A node's score is the sum of the head's log-probabilities on its path. A whole level is one
forward of the head. The work between forwards stays on the device, in as few operations as possible; the host waits
only once, at the end, and then chooses the tree.

Shapes in this file:  K top_k, P pool size, N nodes of the tree, S stable rows, D head hidden, W draft vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parsedec.types import Tree
from parsedec_adapters.eagle3.head import Cache, EagleHead
from parsedec_adapters.eagle3.rotation import CosSin
from parsedec_adapters.eagle3.rows import Store, Window

WIDE = 20_000  # for rows at least this long, torch's topk on CUDA runs some twenty short kernels
PARTS = 64  # into which to split such a row, for one kernel each; public vocabularies are divisible by it


@dataclass(frozen=True, slots=True)
class Drafted:
    """A tree with the scores of its N nodes: log-probabilities under the head, 0 for the root.

    sound  whether all nodes it was chosen from had scores that are numbers
    """

    tree: Tree
    scores: tuple[float, ...]
    sound: bool = True


@dataclass(slots=True)
class Pool:
    """All nodes seen: the root's K children, then K children of each expanded node, in order.

    tokens, scores  of every level: [K], then [K * K] each
    expanded        of every level but the first [K]: which of the K * K candidates of the level before were expanded
    """

    tokens: list[Tensor]
    scores: list[Tensor]
    expanded: list[Tensor]


class Ground(Protocol):
    """The stable rows of a request, and room after them for the rows of a tree's levels."""

    def last(self) -> Tensor:
        """Output of the last stable row [1, 1, D]."""

    def level(self, level: int, parents: Tensor | None) -> tuple[CosSin, Tensor | None, Cache]:
        """Rotation, mask and cache for a level's K rows, which overwrite what was there.

        parents  [K] ranks of their parents in the level before; None for the first level, level 0
        """


class Behind:
    """The ground of `grow`: S stable rows of a store, with room for `top_k` more per level."""

    def __init__(self, head: EagleHead, store: Store, stable: int, levels: int, top_k: int) -> None:
        self._store, self._stable, self._top_k = store, stable, top_k
        # siblings share their position: one row for all
        self._rotations = head.rotations.singles(stable, stable + levels, store.outputs)
        self._sight = store.sight(top_k, levels) if top_k > 1 and levels else None  # one row sees everything

    def last(self) -> Tensor:
        return self._store.outputs.narrow(0, self._stable - 1, 1).unsqueeze(0)

    def level(self, level: int, parents: Tensor | None) -> tuple[CosSin, Tensor | None, Cache]:
        sight, stable = self._sight, self._stable
        if sight is None:
            mask = None
        else:  # [K, S + (level + 1) * K]: the stable rows, the ancestors, itself
            mask = sight.first(stable) if parents is None else sight.below(level, parents, stable)
        return self._rotations[level], mask, Window(self._store, stable + level * self._top_k)


def grow(head: EagleHead, ground: Ground, levels: int, top_k: int) -> Pool:
    """The nodes that a tree of `levels` levels below the root is chosen from. Nothing here depends on the host."""
    hidden = ground.last()
    best, tokens = _best(head, head.logits(hidden), top_k)
    scores, tokens = best.view(-1), tokens.view(-1)  # [K] of the nodes to be expanded, here and below
    pool, parents = Pool([tokens], [scores], []), None
    hidden = hidden.expand(1, top_k, -1)
    for level in range(levels - 1):
        rotation, mask, cache = ground.level(level, parents)
        out, logits = head.guess(hidden, tokens.unsqueeze(0), rotation, mask=mask, cache=cache)  # [1, K, D], [1, K, W]
        best, guesses = _best(head, logits, top_k)  # [1, K, K]
        pool.tokens.append(guesses.view(-1))
        pool.scores.append(best.add_(scores.unsqueeze(1)).view(-1))
        if level < levels - 2:  # expand the likeliest candidates next; each continues the output of its parent
            scores, chosen = pool.scores[-1].topk(top_k)
            parents, tokens = chosen // top_k, pool.tokens[-1].index_select(0, chosen)
            hidden = out.index_select(1, parents)
            pool.expanded.append(chosen)
    return pool


def _best(head: EagleHead, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and target ids of the likeliest tokens by logits [1, n, W]: [1, n, K] each."""
    scores = logits.log_softmax(-1, dtype=torch.float32)
    parted = scores.device.type == "cuda" and scores.shape[-1] >= WIDE
    best, ids = likeliest(scores, top_k, PARTS if parted else 1)
    return best, ids if head.d2t is None else head.target_ids(ids)


def likeliest(scores: Tensor, top_k: int, parts: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(top_k)` of [1, n, W], found from the likeliest of each part; the order of equal ones may differ."""
    n, width = scores.shape[-2:]
    if parts == 1 or width % parts or width // parts < top_k:
        return scores.topk(top_k)
    best, places = scores.view(1, n, parts, -1).topk(top_k, sorted=False)  # [1, n, parts, K]
    best, chosen = best.flatten(2).topk(top_k)
    return best, places.flatten(2).gather(2, chosen).add_(chosen // top_k, alpha=width // parts)


def select(root: int, pool: Pool, top_k: int, size: int, *, depth_first: bool = False) -> Drafted:
    """A tree of the likeliest nodes of a pool, at most `size` of them, including the root.

    A parent is never less likely than its child and comes before it in the pool. So with ties broken towards the front,
    it is always selected along with its child.

    depth_first  order every node right before its descendants; else level by level, as EAGLE does
    """
    scores: list[float] = torch.cat(pool.scores).tolist()
    found: list[int] = torch.cat([*pool.tokens, *pool.expanded]).tolist()  # apart: joining dtypes is slow
    seen, k = len(scores), top_k
    # places in the pool of the expanded nodes: the children of the i-th one start at K + i * K
    expanded = [*range(k), *[k + i // k * k * k + one for i, one in enumerate(found[seen:])]]
    likeliest = sorted(range(seen), key=scores.__getitem__, reverse=True)[: size - 1]  # equal ones keep their order
    places, parents = (_depth_first if depth_first else _by_level)(likeliest, expanded, k)
    tree = Tree((root, *[found[place] for place in places]), (-1, *parents))
    return Drafted(tree, (0.0, *[scores[place] for place in places]), sound=not math.isnan(sum(scores)))


def _by_level(selected: list[int], expanded: list[int], k: int) -> tuple[list[int], list[int]]:
    """Places and parents of nodes 1 to N in pool order: levels, then rank of the parent, then rank among siblings."""
    places = sorted(selected)
    node_of = {place: node for node, place in enumerate(places, 1)}
    # scores that are not numbers have no order, so a parent may be missing; such a guess is worthless anywhere
    return places, [0 if place < k else node_of.get(expanded[place // k - 1], 0) for place in places]


def _depth_first(selected: list[int], expanded: list[int], k: int) -> tuple[list[int], list[int]]:
    """The same, but every node right before its descendants, siblings in order."""
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
