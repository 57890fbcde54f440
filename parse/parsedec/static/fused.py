"""Kernels of a decode step's attention, in Triton: from the product with the weights to what the heads have seen.

Between two matrix products of a layer torch has ten kernels, each over before the device is busy. Here they are three:
queries and keys are normed, turned and, with the values, put where they belong; then the columns are read, in several
pieces side by side (Flash-Decoding, Dao et al. 2023); then what the pieces have seen is put together.

Shapes in this file:  R rows, T columns, A query heads, G key and value heads, g = A / G, d head size, P pieces.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from parsedec.static import kernels
from parsedec.static.attention import Bucket, agrees, attention, hidden
from parsedec.static.network import Angles, turned
from parsedec.static.weights import Layer, Norm

SIZES = (16, 32, 64, 128)  # of a head
LEAST_TILE = 16  # rows of queries a program holds, those of all heads that share keys
MOST_TILE = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}  # as far as registers go
COLUMNS = 64  # that a program reads at a time
PROGRAMS = 264  # about as many keep a GPU busy
MOST = 32  # pieces


class FusedRows(Bucket):
    """By kernels of our own, from the product on that queries, keys and values are parts of.

    columns  keys and values [2, 1, G, T, d] of each layer: one tensor, since torch.compile makes copies of two that a
             kernel writes to and that share their memory
    """

    each = 1

    def projected(self, i: int, layer: Layer, product: Tensor, angles: Angles) -> Tensor:
        """Rows [R, (A + 2 * G) * d] to what their heads have seen [R, A * d]."""
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        q = placed(product, norms, angles, self._columns[i], self._slots)
        return seen(q, self._columns[i], self._mask, self._scale)


def placed(product: Tensor, norms: tuple[Norm, Norm] | None, angles: Angles, columns: Tensor, slots: Tensor) -> Tensor:
    """Queries [R, A, d], normed and turned. Keys likewise, and values, go to columns `slots` [R] of [2, 1, G, T, d]."""
    (_, _, shared, _, size), rows = columns.shape, product.shape[0]
    heads = product.shape[1] // size - 2 * shared
    q = product.new_empty(rows, heads, size)
    weights, epsilon = ((q, q), 0.0) if norms is None else ([norm.weight for norm in norms], norms[0].epsilon)
    kernels.placed[(rows, heads + 2 * shared)](
        product, q, columns, slots, *angles, *weights, product.stride(0), columns.stride(0), columns.stride(2),
        epsilon, heads, shared, size, norms is not None, num_warps=1,
    )  # fmt: skip
    return q


def seen(q: Tensor, states: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [R, A, d] against keys and values [2, 1, G, T, d] with a mask [R, T] that is added: [R, A * d]."""
    (rows, heads, size), (_, _, shared, columns, _) = q.shape, states.shape
    group = heads // shared
    tile = min(MOST_TILE[q.dtype], max(LEAST_TILE, _power_of_2(rows * group)))
    tiles = _parts(rows * group, tile)
    blocks = _parts(columns, COLUMNS)
    width = _parts(blocks, min(blocks, MOST, max(1, PROGRAMS // (tiles * shared)))) * COLUMNS
    pieces = _parts(columns, width)
    whole = q.new_empty(rows, heads * size)
    out = whole if pieces == 1 else q.new_empty(pieces, rows, heads, size, dtype=torch.float32)
    weight = q.new_empty(pieces, rows, heads, dtype=torch.float32)
    kernels.seen[(tiles, shared, pieces)](
        q, states, mask, out, weight, rows, columns, width, states.stride(0), states.stride(2), mask.stride(0),
        scale, heads, group, size, tile, COLUMNS, q.dtype == torch.float32, num_stages=2,
    )  # fmt: skip
    if pieces > 1:
        kernels.together[(rows * heads,)](out, weight, whole, pieces, rows * heads, size, _power_of_2(pieces))
    return whole


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


@cache
def right(device: torch.device, dtype: torch.dtype, heads: int, shared: int, size: int) -> bool:
    """Whether the kernels give what torch's give for such heads on this device; tried once, on random numbers."""
    if dtype not in MOST_TILE or size not in SIZES:
        return False
    rows, columns, generator = 5, 5 * COLUMNS, torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    product, states = numbers(rows, (heads + 2 * shared) * size), numbers(2, 1, shared, columns, size)
    norms = Norm(numbers(size) / 4, 1e-6, None, None), Norm(numbers(size) / 4, 1e-6, None, None)
    angle = torch.arange(rows * size, device=device).view(rows, 1, size)
    angles = angle.cos().to(dtype), angle.sin().to(dtype)
    start = columns - 2 * COLUMNS - rows  # one piece and more is of nothing that is seen
    slots = torch.arange(start, start + rows, device=device)
    mask = torch.zeros(rows, columns, dtype=dtype, device=device)
    mask.narrow(1, start, columns - start).fill_(hidden(dtype)).triu_(1)

    def ours() -> Tensor:
        own = states.clone()
        q = placed(product, norms, angles, own, slots)
        return torch.cat([x.flatten() for x in (q, own, seen(q, own, mask, size**-0.5))])

    def torchs() -> Tensor:
        keys, values = own = states.clone()
        q, k, v = product.view(rows, -1, size).split_with_sizes((heads, shared, shared), 1)
        q, k = turned(norms[0](q), angles), turned(norms[1](k), angles)
        keys.index_copy_(2, slots, k.transpose(0, 1)[None])
        values.index_copy_(2, slots, v.transpose(0, 1)[None])
        out = attention(q, keys, values, mask, False, size**-0.5)
        return torch.cat([x.flatten() for x in (q, own, out)])

    return agrees("decode steps run without kernels of their own", ours, torchs, kernels.FAILS)
