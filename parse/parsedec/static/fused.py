"""Everything between the matrix products of a layer on CUDA, by a few Triton kernels.

Torch takes three times as many kernels. In a decode step each of them is over before the device is busy, and in a judge
pass every result goes to memory and back. Here

    normed    adds the output of the product before it, and norms the sum
    placed    norms and rotates queries and keys, and writes keys and values to the cache
    seen      is the attention of a decode step, to pieces of columns in parallel (Flash-Decoding, Dao et al. 2023)
    probed    is the attention of probes to themselves, merged with what they have seen of the text
    gated     is the activation and the product inside the MLP

Shapes in this file:  R rows, T columns, H hidden, I intermediate, A query heads, G key and value heads, g = A / G,
d head size, P pieces, K probes, S rows of each.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import silu

from parsedec.static import cascade, kernels
from parsedec.static.attention import Bucket, agrees, attention, hidden
from parsedec.static.memory import bucket
from parsedec.static.rotary import Angles, rotated
from parsedec.static.weights import Layer, Norm

SIZES = (16, 32, 64, 128)  # of a head
LEAST_TILE = 16  # rows of queries that a program holds; all heads that share keys count as rows
MOST_TILE = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}  # as many as registers can hold
COLUMNS = 64  # columns that a program reads at a time
PROGRAMS = 264  # about as many keep a GPU busy
MOST = 32  # most pieces of the columns
WIDTH = 1024  # columns of the MLP that a program computes
LONGEST = 128  # most rows of a probe: a program reads a whole one at a time


class FusedRows(Bucket):
    """By our own kernels, from the joint product of queries, keys and values on.

    columns  keys and values of each layer, in one tensor [2, 1, G, T, d]: of two tensors that share memory and that a
             kernel writes to, torch.compile would make copies
    """

    each = 1

    def projected(self, i: int, layer: Layer, product: Tensor, angles: Angles) -> Tensor:
        """The product of the rows [R, (A + 2 * G) * d] to the attention's output [R, A * d]."""
        q = placed(product, layer.norms, angles, self._columns[i], self._slots)
        return seen(q, self._columns[i], self._mask, self._scale)


def normed(x: Tensor, more: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The sum of x and `more` [R, H], and the same normed."""
    rows, size = x.shape
    y, whole = torch.empty_like(x), x if more is None else torch.empty_like(x)
    kernels.normed[(rows,)](
        x, x if more is None else more, norm.weight, whole, y, norm.epsilon, size, bucket(size, 1), more is not None,
        num_warps=8,
    )  # fmt: skip
    return whole, y


def gated(product: Tensor) -> Tensor:
    """silu(gate) * up [R, I], of a product that holds both [R, 2 * I]."""
    rows, size = product.shape[0], product.shape[1] // 2
    y = product.new_empty(rows, size)
    kernels.gated[(rows, _parts(size, WIDTH))](product, y, size, WIDTH)
    return y


def placed(
    product: Tensor, norms: tuple[Norm, Norm] | None, angles: Angles, states: Tensor, slots: Tensor | None
) -> Tensor:
    """Queries [R, A, d], normed and rotated, of a product [R, (A + 2 * G) * d].

    Keys, treated likewise, and values are written to `states` [2, 1, G, T, d]: to columns `slots` [R], or in order.
    """
    (_, _, shared, _, size), rows = states.shape, product.shape[0]
    heads = product.shape[1] // size - 2 * shared
    q = product.new_empty(rows, heads, size)
    weights, epsilon = ((q, q), 0.0) if norms is None else ([norm.weight for norm in norms], norms[0].epsilon)
    kernels.placed[(rows, heads + 2 * shared)](
        product, q, states, q if slots is None else slots, *angles, *weights,
        product.stride(0), states.stride(0), states.stride(2),
        epsilon, heads, shared, size, norms is not None, slots is not None, num_warps=1,
    )  # fmt: skip
    return q


def seen(q: Tensor, states: Tensor, mask: Tensor, scale: float, programs: int = PROGRAMS) -> Tensor:
    """Attention of q [R, A, d] to keys and values [2, 1, G, T, d] with an additive mask [R, T]: [R, A * d].

    programs  about how many to run: the more, the more pieces the columns are read in
    """
    (rows, heads, size), (_, _, shared, columns, _) = q.shape, states.shape
    group = heads // shared
    tile = min(MOST_TILE[q.dtype], bucket(rows * group, LEAST_TILE))
    tiles = _parts(rows * group, tile)
    blocks = _parts(columns, COLUMNS)
    width = _parts(blocks, min(blocks, MOST, max(1, programs // (tiles * shared)))) * COLUMNS
    pieces = _parts(columns, width)
    whole = q.new_empty(rows, heads * size)
    out = whole if pieces == 1 else q.new_empty(pieces, rows, heads, size, dtype=torch.float32)
    weight = q.new_empty(pieces, rows, heads, dtype=torch.float32)
    kernels.seen[(tiles, shared, pieces)](
        q, states, mask, out, weight, rows, columns, width, states.stride(0), states.stride(2), mask.stride(0),
        scale, heads, group, size, tile, COLUMNS, q.dtype == torch.float32, num_stages=2,
    )  # fmt: skip
    if pieces > 1:
        kernels.together[(rows * heads,)](out, weight, whole, pieces, rows * heads, size, bucket(pieces, 1))
    return whole


def probed(
    q: Tensor, k: Tensor, v: Tensor, text: Tensor, weight: Tensor, out: Tensor, suffix: int, scale: float
) -> None:
    """Causal attention of probes q [K * S, A, d] to their own keys and values [K * S, G, d], merged with what they have
    seen of the text; written to `out` [K * S, A, d].

    text    [K * S * g, G, d], in which each head of a group is a row of its own
    weight  [K * S * g, G] the log-sum-exp of its scores
    """
    (rows, heads, size), shared = q.shape, k.shape[1]
    assert k.stride() == v.stride()
    assert all(x.is_contiguous() for x in (q, text, out))
    group = heads // shared
    tile = min(MOST_TILE[q.dtype], bucket(suffix * group, LEAST_TILE))
    kernels.probed[(_parts(suffix * group, tile), shared, rows // suffix)](
        q, k, v, text, weight, out, k.stride(0), k.stride(1), weight.stride(0), weight.stride(1),
        scale, heads, group, size, suffix, tile, bucket(suffix, LEAST_TILE), q.dtype == torch.float32,
    )  # fmt: skip


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


@cache
def right(
    device: torch.device, dtype: torch.dtype, heads: int, shared: int, size: int, hidden_size: int, has_norms: bool
) -> bool:
    """Whether the kernels give what torch's operations do for such a model, on random numbers; tried once per device.

    Tried are: heads of a few rows, with slots and without; a decode step in two pieces of several blocks, the last one
    incomplete; a tree in as many pieces as blocks; as many rows as a step can have, in one piece; and probes.
    """
    if dtype not in MOST_TILE or size not in SIZES:
        return False
    rows, suffix, columns, scale = 5, 21, 5 * COLUMNS + 24, size**-0.5
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def norm(of: int) -> Norm:
        return Norm(numbers(of) / 4, 1e-6, None, None)

    def tree(rows: int) -> Tensor:
        """Each row sees the columns before all rows, the rows before it and itself; more than a block nobody sees."""
        start, mask = columns - COLUMNS - 40 - rows, torch.zeros(rows, columns, dtype=dtype, device=device)
        mask.narrow(1, start, columns - start).fill_(hidden(dtype)).triu_(1)
        return mask

    x, more, before = numbers(rows, hidden_size) / 4, numbers(rows, hidden_size) / 4, norm(hidden_size)
    norms = (norm(size), norm(size)) if has_norms else None
    product, states = numbers(rows, (heads + 2 * shared) * size) / 2, numbers(2, 1, shared, columns, size)
    both = numbers(rows, 2 * (WIDTH + 8)) / 4
    angle = torch.arange(rows * size, device=device).view(rows, 1, size)
    angles, slots = (angle.cos().to(dtype), angle.sin().to(dtype)), torch.arange(7, 7 + rows, device=device)
    reads = [(numbers(n, heads, size), tree(n), programs) for n, programs in ((1, 2 * shared), (5, PROGRAMS), (64, 1))]
    probes, own, group = numbers(3 * suffix, heads, size), numbers(2, shared, 3 * suffix, size), heads // shared
    own_k, own_v = own.transpose(1, 2)
    text = numbers(3 * suffix * group, shared, size), numbers(shared, 3 * suffix * group).float().t()

    def ours() -> Tensor:
        own, tight = states.clone(), states.new_empty(2, 1, shared, rows, size)
        made = [placed(product, norms, angles, own, slots), own, placed(product, norms, angles, tight, None), tight]
        made += [*normed(x, more, before), *normed(x, None, before), gated(both)]
        made += [seen(q, states, mask, scale, programs) for q, mask, programs in reads]
        made.append(torch.empty_like(probes))
        probed(probes, own_k, own_v, *text, made[-1], suffix, scale)
        return torch.cat([part.flatten() for part in made])

    def torchs() -> Tensor:
        q, k, v = product.view(rows, -1, size).split_with_sizes((heads, shared, shared), 1)
        if norms is not None:
            q, k = (norm(part) for norm, part in zip(norms, (q, k), strict=True))
        q, tight = rotated(q, angles), torch.stack([rotated(k, angles).transpose(0, 1), v.transpose(0, 1)])[:, None]
        own, (gate, up) = states.clone().index_copy_(3, slots, tight), both.chunk(2, -1)
        made = [q, own, q, tight, x + more, before(x + more), x, before(x), silu(gate) * up]
        made += [attention(q, states[0], states[1], mask, False, scale) for q, mask, _ in reads]
        made.append(cascade.joined(text, cascade.seen_of_itself(probes, own_k, own_v, suffix, scale)))
        return torch.cat([part.flatten() for part in made])

    return agrees("the static backend runs without kernels of its own", ours, torchs, kernels.FAILS)
