"""Keys and values of requests: buffers that stay where they are, and leases on their rows.

A lease holds the first `rows` rows of its buffers. To go back is to shorten the lease; a fork is a second lease on the
same buffers. A lease only writes behind its own rows, and only if no other lease reaches further; otherwise it first
moves to buffers of its own (copy on write). So of two forks, the first to go on writes in place.

Shapes in this file:  M = 2 * layers (keys and values of each), G heads, C capacity, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from parsedec.static.weights import Weights

FIRST_CAPACITY = {"cpu": 256, "cuda": 2048}
SPARE = 2  # unused buffers that are kept for the next requests


def bucket(count: int, least: int) -> int:
    """The smallest number of least, 2 * least, 4 * least, … that is at least `count`."""
    while least < count:
        least *= 2
    return least


class Buffers:
    """One allocation for all layers: states [M, 1, G, C, d], 2 * i being the keys of layer i, 2 * i + 1 its values."""

    def __init__(self, weights: Weights, capacity: int) -> None:
        shape = (2 * len(weights.layers), 1, weights.kv_heads, capacity, weights.head_size)
        # zeros: rows that were never written are masked, but a mask would not hide a NaN
        with torch.inference_mode(False):  # a normal tensor may be written to in and out of inference mode
            self.states = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self.capacity = capacity
        self.leases: WeakSet[Lease] = WeakSet()
        self.graphs: dict[Any, Any] = {}  # captured steps use these addresses, so they live as long

    def clear(self) -> None:
        self.states.zero_()

    def columns(self, start: int, count: int) -> tuple[Tensor, ...]:
        """Views of rows start, …, start + count - 1: M views [1, G, count, d]."""
        return self.states.narrow(3, start, count).unbind(0)

    def layers(self, count: int) -> tuple[Tensor, ...]:
        """Views of the first `count` rows: for each layer [2, 1, G, count, d]."""
        return self.states.narrow(3, 0, count).split_with_sizes([2] * (self.states.shape[0] // 2))


class Held(Protocol):
    """Buffers that know who holds them."""

    @property
    def capacity(self) -> int: ...

    @property
    def leases(self) -> WeakSet[Any]: ...

    def clear(self) -> None:
        """Fill all rows with zeros."""


B = TypeVar("B", bound=Held)


class Stock(Generic[B]):
    """Buffers of one kind. When nobody holds them any more, a few are kept for the next requests.

    make    makes new ones, of so many rows, on `device`
    clears  whether to clear them before they are used again: steps of fixed size also read rows beyond a request's own,
            and no mask hides a NaN there, left by a request that overflowed
    """

    def __init__(self, make: Callable[[int], B], device: torch.device) -> None:
        self._make, self._device = make, device
        self._all: list[B] = []
        self.clears = device.type == "cuda"
        self._choosing = Lock()  # a judge in another thread may be taking buffers, too

    def take(self, capacity: int, holder: object) -> B:
        """Buffers of at least `capacity` rows, which from now on only `holder` holds."""
        with self._choosing:
            buffers = self._kept(capacity) or self._new(capacity)
            buffers.leases.add(holder)
        return buffers

    def _kept(self, capacity: int) -> B | None:
        fitting = [buffers for buffers in self._all if not buffers.leases and buffers.capacity >= capacity]
        if not fitting:
            return None
        smallest = min(fitting, key=lambda buffers: buffers.capacity)
        if self.clears:
            smallest.clear()
        return smallest

    def _new(self, capacity: int) -> B:
        free = [buffers for buffers in self._all if not buffers.leases]
        for buffers in sorted(free, key=lambda buffers: buffers.capacity)[: max(0, len(free) - SPARE + 1)]:
            self._all.remove(buffers)  # the smallest first: requests have outgrown them
        self._all.append(self._make(bucket(capacity, FIRST_CAPACITY.get(self._device.type, 256))))
        return self._all[-1]


class Pool(Stock[Buffers]):
    """The buffers of one network."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(partial(Buffers, weights), weights.device)
        self.weights = weights


class Lease:
    """The rows of one session in some buffers: the first `rows` are its own."""

    __slots__ = ("__weakref__", "_buffers", "pool", "rows")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.rows = 0
        self._buffers: Buffers | None = None

    def fork(self) -> Lease:
        twin = Lease(self.pool)
        twin.rows, twin._buffers = self.rows, self._buffers
        if self._buffers is not None:
            self._buffers.leases.add(twin)
        return twin

    def writable(self, count: int) -> Buffers:
        """Buffers that have `count` rows to write to behind those of this lease; it moves to new ones if need be."""
        buffers = self._buffers
        if buffers is not None and self.rows + count <= buffers.capacity and self._reaches_furthest(buffers):
            return buffers
        return self._move(count)

    @torch.inference_mode()
    def gather(self, start: int, rows: Sequence[int]) -> None:
        """Of the rows from `start` on, keep `rows` (relative to `start`, ascending) and forget the others.

        One gather and one copy for all layers. Only for rows that no other lease holds, as after a pass of this one.
        """
        assert self._buffers is not None
        right = next((i for i, row in enumerate(rows) if row != i), len(rows))  # the rows before it stay
        if right < len(rows):
            states = self._buffers.states
            index = torch.tensor(rows[right:], device=states.device) + start
            states.narrow(3, start + right, len(rows) - right).copy_(states.index_select(3, index))
        self.rows = start + len(rows)

    def _reaches_furthest(self, buffers: Buffers) -> bool:
        return len(buffers.leases) == 1 or all(other.rows <= self.rows for other in buffers.leases if other is not self)

    @torch.inference_mode()
    def _move(self, count: int) -> Buffers:
        """Move to buffers of its own, with room for `count` more rows."""
        old = self._buffers
        new = self.pool.take(self.rows + count, self)
        if old is not None:
            if self.rows:
                new.states.narrow(3, 0, self.rows).copy_(old.states.narrow(3, 0, self.rows))
            old.leases.discard(self)
        self._buffers = new
        return new
