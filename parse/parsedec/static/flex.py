"""FlexAttention (torch; arXiv 2412.05496) for a block of a judge pass.

Two integers per row say which squares of 128 rows by 128 columns are read, and what is masked inside them.

Rows and columns are padded to buckets, so that there are few shapes to compile for. On the CPU it is not compiled and
holds all scores of a block in memory: good for checking numbers only.

Shapes in this file:  R rows of a bucket, T columns of a bucket, A query heads, G key and value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from parsedec.static.memory import Buffers, bucket

SQUARE = 128
LEAST_ROWS = 128  # buckets of rows are this many and its doubles
LEAST_COLUMNS = 256  # and of columns
BUCKETS = 1 << 8  # shapes to compile for; torch takes more than eight of one function for a mistake


class FlexRows:
    """Rows written behind the first `before` columns of buffers.

    reach  [rows] how many columns of text each row sees
    own    [rows] the first column of its own probe, of which it sees the columns up to itself
    """

    def __init__(self, buffers: Buffers, before: int, rows: int, reach: Tensor, own: Tensor, scale: float) -> None:
        self._slots, self._rows, self._scale = buffers.columns(before, rows), rows, scale
        self._padded = bucket(rows, LEAST_ROWS)
        columns = min(bucket(before + rows, LEAST_COLUMNS), buffers.capacity)
        self._columns = buffers.columns(0, columns)
        self._mask = block_mask(reach, own, before, self._padded, columns, buffers.states.device)
        self._attend = compiled() if buffers.states.device.type == "cuda" else uncompiled

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._slots[2 * layer].copy_(k.transpose(0, 1)[None])
        self._slots[2 * layer + 1].copy_(v.transpose(0, 1)[None])
        queries = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, self._padded - self._rows)).transpose(0, 1)[None]
        out = self._attend(queries, self._columns[2 * layer], self._columns[2 * layer + 1], self._mask, self._scale)
        return out[0, :, : self._rows].transpose(0, 1).flatten(1)


@cache
def compiled() -> Callable[..., Tensor]:
    """One function for all buckets, compiled for each when it is first needed."""
    from torch._dynamo import config  # takes a second to import

    # before 2.13, torch.compile does not take the limit itself
    made: Callable[..., Tensor] = config.patch(recompile_limit=BUCKETS)(torch.compile(uncompiled, dynamic=False))
    return made


def uncompiled(q: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """q [1, A, R, d] against keys and values [1, G, T, d]: [1, A, R, d]."""
    out = flex_attention(q, keys, values, block_mask=mask, scale=scale, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out


def block_mask(reach: Tensor, own: Tensor, before: int, rows: int, columns: int, device: torch.device) -> BlockMask:
    """The squares in which any row sees any column, and those in which every row sees every column.

    Padding rows see the first column, so that their softmax is defined.
    """
    missing = rows - len(reach)
    reach = torch.cat([reach, torch.ones(missing, dtype=torch.long)])
    own = torch.cat([own, torch.full((missing,), columns)])
    some, full = _squares(reach.numpy(), own.numpy(), before, columns)
    sees, begins = reach.to(device), own.to(device)
    offset = torch.tensor(before, device=device)

    def allowed(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column < sees[row]) | ((column >= begins[row]) & (column <= row + offset))

    partial, whole = _listed(some & ~full, device), _listed(full, device)
    return BlockMask.from_kv_blocks(
        *partial, *whole, BLOCK_SIZE=SQUARE, mask_mod=allowed, seq_lengths=(rows, columns), compute_q_blocks=False
    )


def _squares(reach: np.ndarray, own: np.ndarray, before: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Squares [rows / 128, columns / 128] bool that are seen, and seen in full; the first may include unseen ones."""
    left = np.arange(0, columns, SQUARE)
    right = np.minimum(left + SQUARE, columns)
    by_row = reach.reshape(-1, SQUARE)
    most, least = by_row.max(1), by_row.min(1)
    starts = np.arange(0, len(reach), SQUARE)
    # from the first own column in the square of rows to the last row itself, for rows that have a probe
    first, last = own.reshape(-1, SQUARE).min(1), before + starts + SQUARE - 1
    some = (left < most[:, None]) | ((right > first[:, None]) & (left <= last[:, None]))
    return some, right <= least[:, None]


def _listed(squares: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many squares each row of squares has, and which: [1, 1, R / 128] and [1, 1, R / 128, T / 128] int32."""
    which = np.argsort(~squares, axis=1, kind="stable")
    counts, order = (torch.from_numpy(x.astype(np.int32))[None, None].to(device) for x in (squares.sum(1), which))
    return counts, order
