"""What an EAGLE-3 head remembers of a request: keys, values and outputs, a row for every position it has read.

Rows are only ever appended, so the states of a request share one buffer, each with its own length; going back costs
nothing, and going on from an older state than the newest costs a copy. Drafted rows are written behind the last row
anybody owns, and are overwritten by the next.

Shapes in this file:  C capacity in rows, d head dim, D head hidden, K nodes of a level, S stable rows.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from parsedec_adapters.eagle3.config import HeadConfig

FEW = 64  # rows that a step commits at most, as a rule
SPARE = 256  # rows; growing is by half, so that appending costs the same on average however long a request gets


class Rows:
    """keys and values [layers, 2, 1, kv heads, C, d], outputs [C, D]; `used` rows belong to a state."""

    def __init__(self, keys_values: Tensor, outputs: Tensor) -> None:
        self.keys_values, self.outputs, self.used = keys_values, outputs, 0
        self._sight: Sight | None = None

    @classmethod
    def empty(cls, config: HeadConfig, like: Tensor, capacity: int) -> Rows:
        shape = (config.num_layers, 2, 1, config.num_kv_heads, capacity, config.head_dim)
        return cls(like.new_empty(shape), like.new_empty(capacity, config.hidden_size))

    @property
    def capacity(self) -> int:
        return self.outputs.shape[0]

    def going_on(self, length: int, extra: int) -> Rows:
        """Rows whose first `length` are these, and nobody's after them, with room for `extra`."""
        if self.used != length:  # a later state owns what follows
            twin = Rows(self.keys_values, self.outputs)
            twin._move(length, length + extra + SPARE)
            return twin
        if length + extra > self.capacity:
            self._move(length, (length + extra) * 3 // 2 + SPARE)
        return self

    def sight(self, top_k: int, levels: int) -> Sight:
        """What the rows of a tree's levels see; overwritten by the next tree, as the rows are."""
        sight = self._sight
        if sight is None or sight.top_k != top_k or sight.levels < levels or sight.capacity < self.capacity:
            self._sight = sight = Sight(top_k, levels, self.capacity, self.outputs.device)
        return sight

    def _move(self, length: int, capacity: int) -> None:
        """Into a larger buffer; states that share this object find their rows in it."""
        old = self.keys_values, self.outputs
        self.keys_values = old[0].new_empty(*old[0].shape[:4], capacity, old[0].shape[5])
        self.outputs = old[1].new_empty(capacity, old[1].shape[1])
        self.keys_values[..., :length, :] = old[0][..., :length, :]
        self.outputs[:length] = old[1][:length]
        self.used = length


class Window:
    """The `Cache` of one call of the head: it writes from row `start` on and sees all rows up to its own."""

    def __init__(self, rows: Rows, start: int) -> None:
        self.rows, self.start = rows, start

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.start + keys.shape[2]
        all_keys, all_values = self.rows.keys_values[layer]  # [1, kv, C, d] each
        all_keys[:, :, self.start : stop] = keys
        all_values[:, :, self.start : stop] = values
        return all_keys[:, :, :stop], all_values[:, :, :stop]


class Sight:
    """The masks of a tree's levels, K rows each: all stable rows, the row's ancestors among the earlier levels, itself.

    One buffer a level, True where a row may attend, its columns  C stable | K of every earlier level | K of its own.
    The first part and the last never change: a level inherits its parents' ancestors, which is all there is to write.
    """

    def __init__(self, top_k: int, levels: int, capacity: int, device: torch.device) -> None:
        self.top_k, self.levels, self.capacity = top_k, levels, capacity
        own = torch.eye(top_k, dtype=torch.bool, device=device)
        before = [own.new_ones(top_k, capacity + level * top_k) for level in range(levels)]
        self._masks = [torch.cat([columns, own], 1) for columns in before]
        self._passed_on = [mask[:, capacity:] for mask in self._masks]  # [K, (level + 1) * K]
        self._inherited = [mask[:, capacity : capacity + level * top_k] for level, mask in enumerate(self._masks)]

    def first(self, stable: int) -> Tensor:
        """[K, S + K] of the first level."""
        return self._masks[0].narrow(1, self.capacity - stable, stable + self.top_k)

    def below(self, level: int, parents: Tensor, stable: int) -> Tensor:
        """[K, S + (level + 1) * K] of nodes whose parents stand at `parents` [K] in the level before."""
        torch.index_select(self._passed_on[level - 1], 0, parents, out=self._inherited[level])
        return self._masks[level].narrow(1, self.capacity - stable, stable + (level + 1) * self.top_k)


def causal_mask(start: int, count: int, device: torch.device) -> Tensor:
    """`count` rows behind `start` earlier ones, [count, start + count] bool."""
    if count > FEW:
        return torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start)
    before = 1 << start.bit_length()
    return _staircase(before, device).narrow(0, 0, count).narrow(1, before - start, start + count)


@lru_cache(maxsize=16)
def _staircase(before: int, device: torch.device) -> Tensor:
    """FEW rows behind `before` earlier ones: every shorter mask is cut from it."""
    with torch.inference_mode(False):
        return torch.ones(FEW, before + FEW, dtype=torch.bool, device=device).tril(before)
