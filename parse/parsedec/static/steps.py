"""Decode steps of fixed size, so that they can be compiled, and captured in CUDA graphs.

A step reads a chain or a tree of a few tokens behind the cache. Its rows are padded to a bucket, and attention runs
over a bucket of columns, the unused ones masked; what changes from step to step is written into input tensors that stay
where they are. If layers are compiled, one is, and all run its code: compiling all of them together would gain little,
since few operations could be fused across layers, and would take as many times as long as there are layers.

On CUDA each step is captured once per buffers, bucket and taps, and replayed from then on (`graphs`).

Shapes in this file:  R rows of a bucket, T columns of a bucket, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from parsedec.static.attention import Bucket, BucketRows, hidden
from parsedec.static.graphs import Graphs, Replayed
from parsedec.static.memory import Buffers, Lease
from parsedec.static.network import Attends, Network, Stream
from parsedec.static.rotary import Angles
from parsedec.static.weights import Layer

ROWS = (1, 2, 4, 8, 16, 32, 64)  # buckets; longer passes are bound by arithmetic and run as they are
COMPILED_ROWS = (1, 8, 64)  # fewer, since each has to be compiled: up to 64 rows cost little more than one
LEAST_COLUMNS = 256  # buckets of columns: this many, 3/2 of it, twice as many, 3/2 of that, and so on
MANY = 1 << 12  # one function is compiled for every bucket, which torch takes for a mistake after the eighth

Output = tuple[Tensor, Tensor | None]


class Steps(Graphs):
    """The steps of one network.

    compiled  run through torch.compile, which takes a while at the first use of every bucket. Not the layers of a
              network that has Triton kernels: they leave nothing to fuse
    """

    def __init__(self, network: Network, *, compiled: bool) -> None:
        super().__init__(network.weights.device, "a decode step")
        self.network = network
        self.compiled = compiled
        self.compiles_layers = compiled and network.kernels is None

    def run(
        self,
        lease: Lease,
        ids: list[int] | Tensor,
        positions: list[int] | None,
        sees: Tensor | None,
        taps: tuple[int, ...],
    ) -> Output:
        """Logits [rows, V] and taps [rows, L, H] of at most 64 rows behind those of the lease, which grows by them.

        ids        a list, or a tensor of one id that only the device knows [1]
        positions  None: counting on from the end of the lease
        sees       [rows, rows] bool, which rows see which; None: each sees the rows before it
        """
        count, start = len(ids), lease.rows
        rows = next(bucket for bucket in (COMPILED_ROWS if self.compiled else ROWS) if bucket >= count)
        buffers = lease.writable(rows)
        key = (rows, min(column_bucket(start + rows), buffers.capacity), taps, self.compiled)
        step: Step | None = buffers.graphs.get(key)
        if step is None:
            step = buffers.graphs[key] = Step(self, buffers, rows, key[1], taps)
        with self.turn, self.device:
            logits, shown = step(ids, start, positions, sees)
            lease.rows = start + count
            # clones: the next step writes to the same tensors
            return logits[:count].clone(), None if shown is None else shown[:count].clone()

    def attention(self, buffers: Buffers, columns: int) -> Callable[[Tensor, Tensor], Attends]:
        """A function of slots and mask that makes the attention of steps over so many columns."""
        scale, kernels = self.network.weights.scale, self.network.kernels
        if kernels is not None:
            return partial(kernels.FusedRows, buffers.layers(columns), scale)
        return partial(BucketRows, buffers.columns(0, columns), scale)


class Readback:
    """Fetches an integer from the device without waiting for work that the device was given afterwards."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._number: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def begin(self, number: Tensor) -> None:
        """Start to fetch a number []."""
        if self._device.type != "cuda":
            self._number = number
            return
        if self._number is None or self._copied is None:
            self._number = torch.zeros((), dtype=torch.long, pin_memory=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._number.copy_(number, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> int:
        """The number that `begin` was given last."""
        assert self._number is not None
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._number)


def column_bucket(count: int) -> int:
    """The smallest bucket of at least `count` columns. The attention of a row takes as long as its bucket is wide."""
    columns = LEAST_COLUMNS
    while columns < count:
        columns = columns * 4 // 3 if columns & (columns - 1) else columns * 3 // 2
    return columns


class Step:
    """The step for one bucket on one set of buffers.

    Its inputs are ids and positions [R], the column of the first row [1], and which rows see which [R, R], additive.
    Padding rows come last: no row sees them, and the next step overwrites what they write.
    """

    def __init__(self, steps: Steps, buffers: Buffers, rows: int, columns: int, taps: tuple[int, ...]) -> None:
        self._steps = steps
        network, weights = steps.network, steps.network.weights
        network.positions.reach(buffers.capacity)
        self.rows, self.columns, self.taps = rows, columns, taps
        self._network = network
        # kept here: if the tables grow, a captured graph goes on with these
        self._cos, self._sin = network.positions.cos, network.positions.sin
        self._attend = steps.attention(buffers, columns)
        device, low = weights.device, hidden(weights.dtype)
        with torch.inference_mode(False):
            self._numbers = torch.zeros(2 * rows + 1, dtype=torch.long, device=device)  # ids, positions, start
            self._sees = torch.zeros(rows, rows, dtype=weights.dtype, device=device)
            self._row = torch.arange(rows, device=device)
            self._column = torch.arange(columns, device=device)
            self._chain = torch.full((rows, rows), low, dtype=weights.dtype, device=device).triu_(1)
            self._hidden = torch.tensor(low, dtype=weights.dtype, device=device)
            self._shown = torch.zeros((), dtype=weights.dtype, device=device)
        self._sees.copy_(self._chain)
        self._sees_chain = True
        self._staging = torch.zeros(2 * rows + 1, dtype=torch.long, pin_memory=device.type == "cuda")
        self._run = Replayed(steps, self._body)

    def __call__(self, ids: list[int] | Tensor, start: int, positions: list[int] | None, sees: Tensor | None) -> Output:
        if self.rows == 1 and positions is None:
            self._load_one(ids[0], start)
        else:
            assert isinstance(ids, list)
            self._load(ids, start, positions, sees)
        with _many_shapes() if self._steps.compiled and not self._run.begun else nullcontext():
            return self._run()

    def _load_one(self, token: int | Tensor, start: int) -> None:
        """A single row at the next position. Nothing is copied from the host, so nothing has to be waited for."""
        at = self._numbers.narrow(0, 0, 1)
        if isinstance(token, Tensor):  # an id beyond the table would end the process
            torch.clamp(token.view(1), max=self._network.weights.embedding.shape[0] - 1, out=at)
        else:
            at.fill_(token)
        self._numbers.narrow(0, 1, 2).fill_(start)

    def _load(self, ids: list[int], start: int, positions: list[int] | None, sees: Tensor | None) -> None:
        padding = [0] * (self.rows - len(ids))
        at = list(range(start, start + len(ids))) if positions is None else positions
        if self._staging.is_pinned():
            torch.cuda.current_stream().synchronize()  # the last copy may still be reading from it
        self._staging.copy_(torch.tensor([*ids, *padding, *at, *padding, start]))
        self._numbers.copy_(self._staging, non_blocking=True)
        if sees is None:
            if not self._sees_chain:
                self._sees.copy_(self._chain)
        else:
            allowed = torch.eye(self.rows, dtype=torch.bool)
            allowed[: len(ids), : len(ids)] = sees
            additive = torch.zeros(self.rows, self.rows, dtype=self._sees.dtype)
            self._sees.copy_(additive.masked_fill_(~allowed, hidden(self._sees.dtype)))
        self._sees_chain = sees is None

    def _body(self) -> Output:
        """The step on its inputs. Nothing in it depends on the host."""
        network, weights = self._network, self._network.weights
        inputs = (self._numbers, self._sees, self._row, self._column, self._shown, self._hidden)
        tables = (weights.embedding, self._cos, self._sin)
        x, angles, slots, mask = (_compiled(_opened) if self._steps.compiled else _opened)(*inputs, *tables)
        attend = self._attend(slots, mask)
        each = partial(_one_of_many, network) if self._steps.compiles_layers else None
        return network.forward(x, angles, attend, self.rows, self.taps, each)


def _opened(
    numbers: Tensor, sees: Tensor, row: Tensor, column: Tensor, shown: Tensor, hidden: Tensor,
    embeddings: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Angles, Tensor, Tensor]:  # fmt: skip
    """What comes before the layers: embedded rows [R, H], angles [R, 1, d], columns to write to [R], mask [R, T]."""
    rows = row.shape[0]
    ids, positions, start = numbers.split_with_sizes((rows, rows, 1))
    column = column - start  # 0 for the first of the rows' own columns
    own = sees.index_select(1, column.clamp(0, rows - 1))  # [R, T]
    # no index_copy into an expanded row: when compiled, the copies of that row share memory (torch 2.13, CPU)
    mask = torch.where(column < 0, shown, torch.where(column < rows, own, hidden))
    angles = cos.index_select(0, positions), sin.index_select(0, positions)
    return embedding(ids, embeddings), angles, start + row, mask


def _one_of_many(network: Network, i: int, layer: Layer, stream: Stream, angles: Angles, attend: Attends) -> Stream:
    """Run a layer by code that was compiled once for all layers of its shape: it is not told which layer it is."""
    assert isinstance(attend, Bucket)
    x, more = stream
    if x.is_cuda and more is None:  # only in the first layer, which would need code of its own
        stream = x, torch.zeros_like(x)
    out: Stream = _compiled(_layer)(network, layer, stream, angles, attend.only(i))
    return out


def _layer(network: Network, layer: Layer, stream: Stream, angles: Angles, attend: Any) -> Stream:
    return network.layer(0, layer, stream, angles, attend)


@cache
def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    compiling: Callable[..., Callable[..., Any]] = torch.compile
    return compiling(call, dynamic=False, fullgraph=True)


def _many_shapes() -> AbstractContextManager[Any]:
    """Let torch compile one function for as many buckets as there are."""
    from torch._dynamo import config  # takes a second to import, and only compiled steps need it

    changed: AbstractContextManager[Any] = config.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY)
    return changed
