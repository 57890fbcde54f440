"""The head's forwards with all sizes fixed, so that they can be captured in CUDA graphs, as the target's steps are.

Drafting a tree is one graph: its levels follow each other without the host, which costs several times as much as the
head of a small model itself. What changes from step to step is written into input tensors that stay where they are;
rows are read up to a bucket of columns, those that are nobody's masked. Elsewhere than on CUDA the same code is called
directly.

Shapes in this file:  K top_k, S stable rows, T columns of a bucket, R rows of a bucket, d head dim, D head hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from parsedec.inference import whole_numbers
from parsedec.static.graphs import Graphs, Replayed
from parsedec.static.memory import Stock
from parsedec.static.steps import column_bucket
from parsedec_adapters.eagle3.head import Cache, EagleHead
from parsedec_adapters.eagle3.rotation import CosSin
from parsedec_adapters.eagle3.rows import Rows, Store
from parsedec_adapters.eagle3.tree import Pool, grow

COMMITTED = (8, 64)  # buckets of rows; up to 64 cost little more than one, and longer texts run as they are


class Drafting(Graphs):
    """What the requests of one head share: stores of rows, and the graphs of its forwards on them."""

    def __init__(self, head: EagleHead) -> None:
        weight = head.fc.weight
        super().__init__(weight.device, "a forward of an EAGLE-3 head")
        self.head = head
        self.stock = Stock(partial(Store, head.config, weight), weight.device)

    def commit(self, rows: Rows, start: int, tokens: Sequence[int], taps: Tensor) -> Rows:
        """Rows that go on behind the first `start` of these by those of `tokens`, 64 at most.  taps  [tokens, L, H]"""
        bucket = next(rows for rows in COMMITTED if rows >= len(tokens))
        rows = rows.going_on(start, bucket)
        store = rows.store
        key = ("commit", bucket, min(column_bucket(start + bucket), store.capacity))
        step = store.graphs.get(key)
        if step is None:
            step = store.graphs[key] = Committing(self, store, *key[1:])
        with self.device:
            step(start, tokens, taps)
        return rows

    def grow(self, rows: Rows, stable: int, levels: int, most: int, top_k: int) -> Pool:
        """`tree.grow` behind the first `stable` rows.  most  what `levels` may be: so many are grown"""
        rows = rows.going_on(stable, (most - 1) * top_k)
        store = rows.store
        key = ("grow", most, top_k, min(column_bucket(stable + (most - 1) * top_k), store.capacity))
        step = store.graphs.get(key)
        if step is None:
            step = store.graphs[key] = Growing(self, store, *key[1:])
        with self.device:
            pool = step(stable)
        return Pool(pool.tokens[:levels], pool.scores[:levels], pool.expanded[: max(0, levels - 2)])


def drafting_of(head: EagleHead) -> Drafting:
    """Made once for a head and the embeddings it reads, and anew where its weights lie elsewhere now."""
    assert head.embedding is not None
    places = head.fc.weight.data_ptr(), head.embedding.data_ptr()
    if places not in head.shared:
        head.shared[places] = Drafting(head)
    drafting = head.shared[places]
    assert isinstance(drafting, Drafting)
    return drafting


class Slots:
    """The `Cache` of one call of the head, which writes to rows that are known on the device alone and sees T columns.

    slots  [rows]
    """

    def __init__(self, store: Store, columns: int, slots: Tensor) -> None:
        self._columns = store.keys_values.narrow(4, 0, columns)
        self._slots = slots

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        all_keys, all_values = self._columns[layer].unbind(0)  # [1, kv, T, d] each
        return all_keys.index_copy_(2, self._slots, keys), all_values.index_copy_(2, self._slots, values)


class Growing:
    """`tree.grow` behind as many stable rows as its input says [1]; also the ground of that."""

    def __init__(self, drafting: Drafting, store: Store, levels: int, top_k: int, columns: int) -> None:
        like, device = store.outputs, store.outputs.device
        self._head, self._store, self._levels, self._top_k, self._columns = (
            drafting.head, store, levels, top_k, columns)  # fmt: skip
        self._cos, self._sin = drafting.head.rotations.rows(0, columns + levels, like)
        with torch.inference_mode(False):
            self._stable = torch.zeros(1, dtype=torch.long, device=device)
            self._rank = torch.arange(top_k, device=device)
            self._place = torch.arange(1, columns + 1, device=device)
            self._shown = like.new_zeros(top_k, 1)
            self._hidden = like.new_full((top_k, 1), -math.inf)
            self._own = like.new_full((top_k, top_k), -math.inf).fill_diagonal_(0)
        self._sees = self._own
        self._run = Replayed(drafting, lambda: grow(self._head, self, levels, top_k))

    def __call__(self, stable: int) -> Pool:
        self._stable.fill_(stable)
        return self._run()

    def last(self) -> Tensor:
        return self._store.outputs.index_select(0, self._stable - 1).unsqueeze(0)

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
        return rotation, mask, Slots(self._store, self._columns, slots)


class Committing:
    """Rows of committed tokens, some of R of them padding, which the next step overwrites."""

    def __init__(self, drafting: Drafting, store: Store, rows: int, columns: int) -> None:
        head, like, device = drafting.head, store.outputs, store.outputs.device
        self._head, self._store, self._rows, self._columns = head, store, rows, columns
        self._cos, self._sin = head.rotations.rows(0, columns, like)
        with torch.inference_mode(False):
            self._taps = like.new_zeros(rows, head.fc.in_features)
            self._numbers = torch.zeros(rows + 1, dtype=torch.long, device=device)  # tokens, and where the first goes
            self._rank = torch.arange(rows, device=device)
            self._column = torch.arange(columns, device=device)
            self._shown, self._hidden = like.new_zeros(()), like.new_full((), -math.inf)
        self._run = Replayed(drafting, self._body)

    def __call__(self, start: int, tokens: Sequence[int], taps: Tensor) -> None:
        padding = [0] * (self._rows - len(tokens))
        self._numbers.copy_(whole_numbers([*tokens, *padding, start], torch.device("cpu")))
        self._taps.narrow(0, 0, len(tokens)).copy_(taps.flatten(1))
        self._run()

    def _body(self) -> Tensor:
        tokens, start = self._numbers.split_with_sizes((self._rows, 1))
        slots = start + self._rank
        mask = torch.where(self._column <= slots.unsqueeze(1), self._shown, self._hidden)  # [R, T]
        rotation = self._cos.index_select(0, slots), self._sin.index_select(0, slots)
        hidden = self._head.fuse(self._taps.unsqueeze(0))  # [1, R, D]
        cache = Slots(self._store, self._columns, slots)
        out = self._head.advance(hidden, tokens.unsqueeze(0), rotation, mask=mask, cache=cache)
        return self._store.outputs.index_copy_(0, slots, out.squeeze(0))
