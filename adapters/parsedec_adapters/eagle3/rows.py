"""What an EAGLE-3 head remembers of a request: keys, values and outputs, a row for every position it has read.

Rows are only ever appended, so the states of a request share one buffer, each with its own length; going back costs
nothing, and going on from an older state than the newest costs a copy. Drafted rows are written behind the last row
anybody owns, and are overwritten by the next.

Shapes in this file:  C capacity in rows, d head dim, D head hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parsedec_adapters.eagle3.config import HeadConfig

SPARE = 256  # rows; growing is by half, so that appending costs the same on average however long a request gets


class Rows:
    """keys and values [layers, 2, 1, kv heads, C, d], outputs [C, D]; `used` rows belong to a state."""

    def __init__(self, keys_values: Tensor, outputs: Tensor) -> None:
        self.keys_values, self.outputs, self.used = keys_values, outputs, 0

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


def causal_mask(start: int, count: int, device: torch.device) -> Tensor:
    """`count` rows behind `start` earlier ones, [count, start + count] bool."""
    return torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start)
