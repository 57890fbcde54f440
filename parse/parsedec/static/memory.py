"""Keys and values of requests: buffers that stay where they are, and leases on their rows.

A lease holds the first `rows` rows of its buffers. Going back is a shorter lease; a fork is a second lease on the same
buffers. Rows are only ever written behind a lease's own, and only if no other lease reaches further; else the writer
first moves to buffers of its own (copy on write). So of two forks the first that goes on writes in place.

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
SPARE = 2  # buffers nobody holds, kept for the next requests


def bucket(count: int, least: int) -> int:
    """The smallest of `least` and its doubles that is at least `count`."""
    while least < count:
        least *= 2
    return least


class Buffers:
    """One allocation for all layers. `states` [M, 1, G, C, d]: 2 * i are the keys of layer i, 2 * i + 1 its values."""

    def __init__(self, weights: Weights, capacity: int) -> None:
        shape = (2 * len(weights.layers), 1, weights.kv_heads, capacity, weights.head_size)
        # zeros: rows that were never written are masked, and a mask does not hide what is not a number
        with torch.inference_mode(False):  # a normal tensor, so that whoever holds it may write to it
            self.states = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self.capacity = capacity
        self.leases: WeakSet[Lease] = WeakSet()
        self.graphs: dict[Any, Any] = {}  # captured steps hold these addresses, so they live and die with them

    def clear(self) -> None:
        self.states.zero_()

    def columns(self, start: int, count: int) -> tuple[Tensor, ...]:
        """Views of rows start, …, start + count - 1: M of [1, G, count, d]."""
        return self.states.narrow(3, start, count).unbind(0)

    def layers(self, count: int) -> tuple[Tensor, ...]:
        """Views of the first `count` rows, of each layer [2, 1, G, count, d]."""
        return self.states.narrow(3, 0, count).split_with_sizes([2] * (self.states.shape[0] // 2))


class Held(Protocol):
    """Buffers that know who holds them."""

    @property
    def capacity(self) -> int: ...

    @property
    def leases(self) -> WeakSet[Any]: ...

    def clear(self) -> None:
        """Write zeros to all rows."""


B = TypeVar("B", bound=Held)


class Stock(Generic[B]):
    """Buffers of one kind, a few of which are kept for the next requests when nobody holds them any more.

    make    new ones for so many rows, on `device`
    clears  whether they are handed on cleared: steps with fixed sizes also read rows that are nobody's, and what is no
            number there, after a request whose numbers were too large, no mask hides
    """

    def __init__(self, make: Callable[[int], B], device: torch.device) -> None:
        self._make, self._device = make, device
        self._all: list[B] = []
        self.clears = device.type == "cuda"
        self._choosing = Lock()  # a judge in a thread of its own must not choose what is being chosen here

    def take(self, capacity: int, holder: object) -> B:
        """Buffers of at least `capacity` rows that nobody holds but, from now on, `holder`."""
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
            self._all.remove(buffers)  # the smallest go first: requests have outgrown them
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
        """The buffers, in which `count` rows may be written behind those of this lease."""
        buffers = self._buffers
        if buffers is not None and self.rows + count <= buffers.capacity and self._reaches_furthest(buffers):
            return buffers
        return self._move(count)

    @torch.inference_mode()
    def gather(self, start: int, rows: Sequence[int]) -> None:
        """Of the rows from `start` on, keep `rows` (relative to `start`, ascending) and forget the others.

        One gather and one copy for all layers. Only behind what other leases hold, as after a pass of this one.
        """
        assert self._buffers is not None
        right = next((i for i, row in enumerate(rows) if row != i), len(rows))  # leading rows stand where they stay
        if right < len(rows):
            states = self._buffers.states
            index = torch.tensor(rows[right:], device=states.device) + start
            states.narrow(3, start + right, len(rows) - right).copy_(states.index_select(3, index))
        self.rows = start + len(rows)

    def _reaches_furthest(self, buffers: Buffers) -> bool:
        return len(buffers.leases) == 1 or all(other.rows <= self.rows for other in buffers.leases if other is not self)

    @torch.inference_mode()
    def _move(self, count: int) -> Buffers:
        """To buffers of its own with room for `count` rows more."""
        old = self._buffers
        new = self.pool.take(self.rows + count, self)
        if old is not None:
            if self.rows:
                new.states.narrow(3, 0, self.rows).copy_(old.states.narrow(3, 0, self.rows))
            old.leases.discard(self)
        self._buffers = new
        return new
