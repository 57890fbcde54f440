"""What an EAGLE-3 head remembers of a request: keys, values and outputs, one row for every position it has read.

Rows are only ever appended, so the states of a request share one store, each with its own length. Going back costs
nothing; continuing from an older state costs a copy while a later one is still held. Drafted rows are written after the
last row that any state owns, and the next ones overwrite them. Stores are passed on from request to request.

Shapes in this file:  C capacity in rows, d head dim, D head hidden, K nodes of a level, S stable rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from parsedec.static.memory import Stock
from parsedec_adapters.eagle3.config import HeadConfig

FEW = 64  # most rows that a step usually commits


class Store:
    """One allocation: keys and values [layers, 2, 1, kv heads, C, d], outputs [C, D].

    leases  the `Rows` that holds it, if any
    graphs  captured on its addresses, so they live as long as it does
    """

    def __init__(self, config: HeadConfig, like: Tensor, capacity: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # zeros, since rows that were never written are masked, and a mask does not hide nan
            self.keys_values = like.new_zeros(config.num_layers, 2, 1, config.num_kv_heads, capacity, config.head_dim)
            self.outputs = like.new_zeros(capacity, config.hidden_size)
        self.capacity = capacity
        self.leases: WeakSet[Rows] = WeakSet()
        self.graphs: dict[Any, Any] = {}
        self._sight: Sight | None = None

    def clear(self, start: int = 0) -> None:
        """Write zeros to all rows from `start` on."""
        self.keys_values[..., start:, :] = 0
        self.outputs[start:] = 0

    def sight(self, top_k: int, levels: int) -> Sight:
        """The masks for the rows of a tree's levels; overwritten by the next tree, as the rows are."""
        sight = self._sight
        if sight is None or sight.top_k != top_k or sight.levels < levels:
            self._sight = sight = Sight(top_k, levels, self.capacity, self.outputs.device)
        return sight


class State(Protocol):
    """Owns the first `length` rows."""

    @property
    def length(self) -> int: ...


class Rows:
    """What the states of a request share: a store, and a record of how much of it each one owns."""

    def __init__(self, stock: Stock[Store], capacity: int) -> None:
        self._stock = stock
        self.store = stock.take(capacity, self)
        self.states: WeakSet[State] = WeakSet()

    def going_on(self, length: int, extra: int) -> Rows:
        """Rows that begin with the first `length` of these, with room for `extra` more that no state owns."""
        if any(state.length > length for state in self.states):
            twin = Rows(self._stock, length + extra)
            twin._copy(self.store, length)
            return twin
        if length + extra > self.store.capacity:
            old, self.store = self.store, self._stock.take(length + extra, self)
            self._copy(old, length)
            old.leases.discard(self)
        return self

    def _copy(self, old: Store, length: int) -> None:
        self.store.keys_values[..., :length, :] = old.keys_values[..., :length, :]
        self.store.outputs[:length] = old.outputs[:length]


class Window:
    """The `Cache` of one call of the head: it writes from row `start` on and sees all rows up to its own."""

    def __init__(self, store: Store, start: int) -> None:
        self.store, self.start = store, start

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.start + keys.shape[2]
        all_keys, all_values = self.store.keys_values[layer]  # [1, kv, C, d] each
        all_keys[:, :, self.start : stop] = keys
        all_values[:, :, self.start : stop] = values
        return all_keys[:, :, :stop], all_values[:, :, :stop]


class Sight:
    """The masks of a tree's levels, K rows each: a row sees all stable rows, its ancestors and itself.

    One buffer per level, True where a row may attend, with the columns  C stable | K of every earlier level | K of its
    own. The first part and the last never change, so only the ancestors inherited from the parents have to be written.
    """

    def __init__(self, top_k: int, levels: int, capacity: int, device: torch.device) -> None:
        self.top_k, self.levels, self.capacity = top_k, levels, capacity
        own = torch.eye(top_k, dtype=torch.bool, device=device)
        before = [own.new_ones(top_k, capacity + level * top_k) for level in range(levels)]
        self._masks = [torch.cat([columns, own], 1) for columns in before]
        self._passed_on = [mask[:, capacity:] for mask in self._masks]  # [K, (level + 1) * K]
        self._inherited = [mask[:, capacity : capacity + level * top_k] for level, mask in enumerate(self._masks)]

    def first(self, stable: int) -> Tensor:
        """The mask of the first level [K, S + K]."""
        return self._masks[0].narrow(1, self.capacity - stable, stable + self.top_k)

    def below(self, level: int, parents: Tensor, stable: int) -> Tensor:
        """The mask [K, S + (level + 1) * K] of nodes whose parents are at `parents` [K] in the level before."""
        torch.index_select(self._passed_on[level - 1], 0, parents, out=self._inherited[level])
        return self._masks[level].narrow(1, self.capacity - stable, stable + (level + 1) * self.top_k)


def causal_mask(start: int, count: int, device: torch.device) -> Tensor:
    """The mask of `count` rows after `start` earlier ones, [count, start + count] bool."""
    if count > FEW:
        return torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start)
    before = 1 << start.bit_length()
    return _staircase(before, device).narrow(0, 0, count).narrow(1, before - start, start + count)


@lru_cache(maxsize=16)
def _staircase(before: int, device: torch.device) -> Tensor:
    """The mask of FEW rows after `before` earlier ones, from which every shorter mask is cut."""
    with torch.inference_mode(False):
        return torch.ones(FEW, before + FEW, dtype=torch.bool, device=device).tril(before)
