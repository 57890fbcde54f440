"""Attention of a pass's rows to the columns of a cache: keys and values are written in place and read as views.

Query heads that share keys and values see them through a dimension of stride zero, so nothing is repeated in memory.
The session cuts long passes into blocks of rows, so a mask has at most the rows of a block: memory grows with the
length of a pass, not with its square.

Shapes in this file:  R rows, T columns before the pass, A query heads, G key and value heads, d head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parsedec.errors import first_line
from parsedec.static.memory import Buffers, Lease

log = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 3e-4}  # for outputs of size one


class Rows:
    """R rows written behind the first `start` columns. Each sees those columns, the rows before it and itself.

    mask  [R, start + R] additive; needed if they see anything else, and for several rows behind others
    """

    __slots__ = ("_causal", "_columns", "_mask", "_scale", "_slots")

    def __init__(self, buffers: Buffers, start: int, rows: int, scale: float, mask: Tensor | None) -> None:
        self._columns = buffers.columns(0, start + rows)
        self._slots = buffers.columns(start, rows)
        self._scale, self._mask = scale, mask
        self._causal = mask is None and rows > 1
        if self._causal and start:
            raise ValueError(f"{rows} rows behind {start} columns need a mask")

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._slots[2 * layer].copy_(k.transpose(0, 1)[None])
        self._slots[2 * layer + 1].copy_(v.transpose(0, 1)[None])
        keys, values = self._columns[2 * layer], self._columns[2 * layer + 1]
        return attention(q, keys, values, self._mask, self._causal, self._scale)


def rows_behind(lease: Lease, rows: int, allowed: Tensor | None) -> Rows:
    """The attention of rows behind those of a lease.  allowed  [R, columns] bool; None: causal"""
    weights, start = lease.pool.weights, lease.rows
    mask = None
    if allowed is not None:
        mask = additive(allowed, weights.dtype, weights.device)
    elif rows > 1 and start:
        mask = causal_mask(start, rows, weights.dtype, weights.device)
    return Rows(lease.writable(rows), start, rows, weights.scale, mask)


class Bucket:
    """Attention of fixed size: R rows, some of them padding, written to slots that only the device knows.

    columns  views of the first T columns of every layer
    slots    [R] the columns that the rows are written to
    mask     [R, T] additive
    each     how many of `columns` belong to one layer
    """

    each: ClassVar[int]

    def __init__(self, columns: tuple[Tensor, ...], scale: float, slots: Tensor, mask: Tensor) -> None:
        self._columns, self._scale, self._slots, self._mask = columns, scale, slots, mask

    def only(self, layer: int) -> Self:
        """The attention of one layer as if it were the only one, so that code compiled for it fits all layers."""
        columns = self._columns[self.each * layer : self.each * (layer + 1)]
        return type(self)(columns, self._scale, self._slots, self._mask)


class BucketRows(Bucket):
    """By torch's kernels.  columns  two views [1, G, T, d] per layer, of its keys and its values"""

    each = 2

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._columns[2 * layer], self._columns[2 * layer + 1]
        keys.index_copy_(2, self._slots, k.transpose(0, 1)[None])
        values.index_copy_(2, self._slots, v.transpose(0, 1)[None])
        return attention(q, keys, values, self._mask, False, self._scale)


def attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """q [R, A, d] against keys and values [1, G, T, d]: [R, A * d].  mask  [R, T] additive, or None."""
    (rows, heads, size), shared = q.shape, keys.shape[1]
    group = heads // shared
    if rows == 1:  # the heads that share keys become rows of one product: all see the same columns
        together = q.view(1, shared, group, size)
        out = scaled_dot_product_attention(together, keys, values, mask, scale=scale)
    elif group == 1:
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, mask, is_causal=causal, scale=scale
        ).transpose(1, 2)
    else:
        out = scaled_dot_product_attention(
            q.view(rows, shared, group, size).permute(1, 2, 0, 3),  # [G, A / G, R, d]
            keys.transpose(0, 1).expand(shared, group, -1, -1),
            values.transpose(0, 1).expand(shared, group, -1, -1),
            mask,
            is_causal=causal,
            scale=scale,
        ).permute(2, 0, 1, 3)
    return out.reshape(rows, heads * size)


def agrees(
    otherwise: str,
    quick: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    fails: tuple[type[Exception], ...] = (),
) -> bool:
    """Whether `quick` gives what `plain` does, on numbers of about one.

    otherwise  what happens if it does not, for a warning
    fails      errors that `quick` may raise, besides those of torch's operations
    """
    ends: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, *fails)
    try:
        ours = quick()
    except ends as error:
        log.warning("%s: %s", otherwise, first_line(error))
        return False
    expected, most = plain().double(), TOLERANCE[ours.dtype]
    off = float(((ours.double() - expected).abs() / (1 + expected.abs())).max())
    if not off <= most:
        log.warning("%s: its output differs by %.2g", otherwise, off)
    return off <= most


def hidden(dtype: torch.dtype) -> float:
    """What is added to a score that is masked: far below any other, but finite even after kernels scale it to base 2.
    So a piece of the columns of which a row sees nothing still has a weight, which vanishes beside the others'."""
    return -3e4 if dtype is torch.float16 else -1e30


def additive(allowed: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask to be added to scores, made of a bool one that is True where a row may attend."""
    low = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed.to(device), low)


def causal_mask(start: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Each of `rows` rows sees the `start` columns before them, the earlier rows and itself: [R, start + R]."""
    mask = torch.zeros(rows, start + rows, dtype=dtype, device=device)
    mask.narrow(1, start, rows).fill_(torch.finfo(dtype).min).triu_(1)
    return mask
