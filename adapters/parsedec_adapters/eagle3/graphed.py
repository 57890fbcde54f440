"""The head's forwards with all sizes fixed, so that they can be captured in CUDA graphs, as the target's steps are.

Drafting a tree is one graph: its levels follow each other without the host, which would take several times as long as
the head of a small model itself. What changes from step to step is written into input tensors with fixed addresses.
Rows are read up to a bucket of columns, with unused ones masked. On devices other than CUDA, the same code is called
directly.

Shapes in this file:  K top_k, S stable rows, T columns of a bucket, R = 16 rows, d head dim, D head hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from parsedec.sessions.inference import whole_numbers
from parsedec.static.graphs import Graphs, Replayed
from parsedec.static.memory import Stock
from parsedec.static.steps import column_bucket
from parsedec_adapters.eagle3.head import Cache, EagleHead
from parsedec_adapters.eagle3.rotation import CosSin
from parsedec_adapters.eagle3.rows import Store
from parsedec_adapters.eagle3.tree import Pool, grow

COMMITTED = 16  # rows, more than a tree is deep; longer texts are not padded to a fixed size


class Drafting:
    """What all requests of one head share: stores of rows, and graphs of its forwards on them."""

    def __init__(self, head: EagleHead) -> None:
        weight = head.fc.weight
        self.head = copy.copy(head)  # a copy, which does not refer to this object
        self.graphs = Graphs(weight.device, "a forward of an EAGLE-3 head")
        self.stock = Stock(partial(Store, head.config, weight), weight.device)

    def commit(self, store: Store, start: int, tokens: Sequence[int], taps: Tensor) -> None:
        """Write the rows of up to 16 `tokens` after the first `start`; the rest of the 16 rows are overwritten.

        taps  [tokens, L, H]
        """
        columns = min(column_bucket(start + COMMITTED), store.capacity)
        step = store.graphs.get(columns)
        if step is None:
            step = store.graphs[columns] = Committing(self, store, columns)
        with self.graphs.device:
            step(start, tokens, taps)

    def grow(self, store: Store, stable: int, levels: int, most: int, top_k: int) -> Pool:
        """`tree.grow` after the first `stable` rows.  most  largest possible `levels`: so many are grown"""
        key = most, top_k, min(column_bucket(stable + (most - 1) * top_k), store.capacity)
        step = store.graphs.get(key)
        if step is None:
            step = store.graphs[key] = Growing(self, store, *key)
        with self.graphs.device:
            pool = step(stable)
        return Pool(pool.tokens[:levels], pool.scores[:levels], pool.expanded[: max(0, levels - 2)])


def drafting_of(head: EagleHead) -> Drafting:
    """The `Drafting` of a head: made once per head and embeddings, and again if the weights have moved."""
    assert head.embedding is not None
    places = tuple(tensor.data_ptr() for tensor in (head.embedding, *head.parameters(), *head.buffers()))
    if places not in head.shared:
        head.shared.clear()  # it holds the embeddings of another target
        head.shared[places] = Drafting(head)
    drafting = head.shared[places]
    assert isinstance(drafting, Drafting)
    return drafting


class Slots:
    """The `Cache` of one call of the head, which writes to rows whose places only the device knows.

    keys_values  [layers, 2, 1, kv, T, d];  slots  [rows]
    """

    def __init__(self, keys_values: Tensor, slots: Tensor) -> None:
        self._keys_values, self._slots = keys_values, slots

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        all_keys, all_values = self._keys_values[layer].unbind(0)  # [1, kv, T, d] each
        return all_keys.index_copy_(2, self._slots, keys), all_values.index_copy_(2, self._slots, values)


class Bucket:
    """The ground of a tree: T columns of a store, the first S of which are stable.  stable  [1], S

    It refers to what it needs of the store, but not to the store itself, which holds the graphs.
    """

    def __init__(self, head: EagleHead, store: Store, stable: Tensor, levels: int, top_k: int, columns: int) -> None:
        like, device = store.outputs, store.outputs.device
        self._keys_values, self._outputs = store.keys_values.narrow(4, 0, columns), store.outputs
        self._cos, self._sin = head.rotations.rows(0, columns + levels, like)
        self._stable, self._top_k = stable, top_k
        with torch.inference_mode(False):
            self._rank = torch.arange(top_k, device=device)
            self._place = torch.arange(1, columns + 1, device=device)
            self._shown = like.new_zeros(top_k, 1)
            self._hidden = like.new_full((top_k, 1), -math.inf)
            self._own = like.new_full((top_k, top_k), -math.inf).fill_diagonal_(0)
        self._sees = self._own

    def last(self) -> Tensor:
        return self._outputs.index_select(0, self._stable - 1).unsqueeze(0)

    def level(self, level: int, parents: Tensor | None) -> tuple[CosSin, Tensor, Cache]:
        if parents is None:
            self._sees = self._own
        else:  # the parents' ancestors, the parents, itself: [K, (level + 1) * K], additive
            self._sees = torch.cat([self._sees.index_select(0, parents), self._own], 1)
        width = (level + 1) * self._top_k
        column = (self._place - self._stable).clamp(0, width + 1)  # 0 for stable ones, 1 to width for those of the tree
        mask = torch.cat([self._shown, self._sees, self._hidden], 1).index_select(1, column)  # [K, T]
        at = self._stable + level
        slots = self._stable + level * self._top_k + self._rank
        rotation = self._cos.index_select(0, at), self._sin.index_select(0, at)
        return rotation, mask, Slots(self._keys_values, slots)


class Growing:
    """`tree.grow` for one bucket."""

    def __init__(self, drafting: Drafting, store: Store, levels: int, top_k: int, columns: int) -> None:
        with torch.inference_mode(False):
            self._stable = torch.zeros(1, dtype=torch.long, device=store.outputs.device)
        ground = Bucket(drafting.head, store, self._stable, levels, top_k, columns)
        self._run = Replayed(drafting.graphs, partial(grow, drafting.head, ground, levels, top_k))

    def __call__(self, stable: int) -> Pool:
        self._stable.fill_(stable)
        return self._run()


class Committing:
    """Writes rows of committed tokens in one bucket; some of its R rows are padding, which the next step overwrites."""

    def __init__(self, drafting: Drafting, store: Store, columns: int) -> None:
        head, like, device = drafting.head, store.outputs, store.outputs.device
        rotation = head.rotations.rows(0, columns, like)
        with torch.inference_mode(False):
            self._taps = like.new_zeros(COMMITTED, head.fc.in_features)
            # tokens, and where the first goes
            self._numbers = torch.zeros(COMMITTED + 1, dtype=torch.long, device=device)
            constants = (
                torch.arange(COMMITTED, device=device),
                torch.arange(columns, device=device),
                like.new_zeros(()),
                like.new_full((), -math.inf),
            )
        states = store.keys_values.narrow(4, 0, columns), store.outputs
        self._run = Replayed(
            drafting.graphs, partial(_commit, head, self._taps, self._numbers, rotation, *constants, *states)
        )

    def __call__(self, start: int, tokens: Sequence[int], taps: Tensor) -> None:
        count = len(tokens)
        padding = COMMITTED - count
        self._numbers.copy_(whole_numbers([*tokens, *[0] * padding, start], torch.device("cpu")))
        self._taps.narrow(0, 0, count).copy_(taps.flatten(1))
        self._taps.narrow(0, count, padding).zero_()  # else nan could stay in rows that are later only masked
        self._run()


def _commit(
    head: EagleHead, taps: Tensor, numbers: Tensor, angles: CosSin, rank: Tensor, columns: Tensor, shown: Tensor,
    hidden: Tensor, keys_values: Tensor, outputs: Tensor,
) -> Tensor:  # fmt: skip
    """Write R rows of committed tokens: the body of `Committing`."""
    tokens, start = numbers.split_with_sizes((len(rank), 1))
    slots = start + rank
    mask = torch.where(columns <= slots.unsqueeze(1), shown, hidden)  # [R, T]
    rotation = angles[0].index_select(0, slots), angles[1].index_select(0, slots)
    fused = head.fuse(taps.unsqueeze(0))  # [1, R, D]
    out = head.advance(fused, tokens.unsqueeze(0), rotation, mask=mask, cache=Slots(keys_values, slots))
    return outputs.index_copy_(0, slots, out.squeeze(0))
