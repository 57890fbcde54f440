"""The Triton kernels of `fused`. Tensors are contiguous unless said otherwise. Row numbers are 64-bit, since offsets
into the rows of several long passes exceed 32 bits.

Shapes in this file:  R rows, T columns, H hidden, I intermediate, A query heads, G key and value heads, g = A / G,
d head size, P pieces.
"""

import subprocess

import triton
import triton.language as tl
from triton.errors import TritonError

# the last four are raised where Triton's launcher cannot be compiled, found or loaded
FAILS = TritonError, OSError, subprocess.SubprocessError, ImportError, AssertionError


@triton.jit
def normed(
    x, more, weight, whole, y,
    EPSILON: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """RMSNorm of a row of x [R, H] to y; if ADDS, of its sum with the row of `more`, which goes to `whole`."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = at < SIZE
    place = row * SIZE + at
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(more + place, mask=there, other=0.0).to(tl.float32)
        kept = value.to(whole.dtype.element_ty)
        tl.store(whole + place, kept, mask=there)
        value = kept.to(tl.float32)
    length = 1 / tl.sqrt(tl.sum(value * value, 0) / SIZE + EPSILON)
    scaled = value * length * tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + place, scaled.to(y.dtype.element_ty), mask=there)


@triton.jit
def gated(product, y, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """silu(gate) * up for a part of a row, [R, 2 * I] to [R, I]."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = at < SIZE
    gate = tl.load(product + row * (2 * SIZE) + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(product + row * (2 * SIZE) + SIZE + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + row * SIZE + at, (gate / (1 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=there)


@triton.jit
def placed(
    product, q, states, slots, cos, sin, q_weight, k_weight, row_stride, value_stride, head_stride,
    EPSILON: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, NORMED: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """One head of one row: a query's to `q` [R, A, d], a key's or value's to its slot or, if not SLOTS, to its row."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, SIZE)
    here = product + row * row_stride + head * SIZE
    x = tl.load(here + at).to(tl.float32)
    if head < HEADS + SHARED:
        other = (at + SIZE // 2) % SIZE
        y = tl.load(here + other).to(tl.float32)
        if NORMED:
            weight = q_weight
            if head >= HEADS:
                weight = k_weight
            length = 1 / tl.sqrt(tl.sum(x * x, 0) / SIZE + EPSILON)
            x *= length * tl.load(weight + at).to(tl.float32)
            y *= length * tl.load(weight + other).to(tl.float32)
        x = x * tl.load(cos + row * SIZE + at).to(tl.float32) + y * tl.load(sin + row * SIZE + at).to(tl.float32)
    if head < HEADS:
        tl.store(q + (row * HEADS + head) * SIZE + at, x.to(q.dtype.element_ty))
    else:
        column = row
        if SLOTS:
            column = tl.load(slots + row)
        place = states + column * SIZE + (head - HEADS) * head_stride
        if head >= HEADS + SHARED:
            place += value_stride - SHARED * head_stride
        tl.store(place + at, x.to(states.dtype.element_ty))


@triton.jit
def seen(
    q, states, mask, out, weight, rows, columns, width, value_stride, head_stride, mask_stride,
    SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of rows, in which each head of a group is a row, to one piece of the columns.

    out     [P, R, A, d] averages of values
    weight  [P, R, A] the log-sum-exp of their scores
    """
    tile, shared, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    each = tile * TILE + tl.arange(0, TILE)
    row, head = each // GROUP, shared * GROUP + each % GROUP
    there = row < rows
    at = tl.arange(0, SIZE)
    query = tl.load(q + (row * HEADS + head)[:, None] * SIZE + at[None, :], mask=there[:, None], other=0.0)
    most = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    average = tl.zeros([TILE, SIZE], tl.float32)
    stop = tl.minimum(columns, (piece + 1) * width)
    for start in range(piece * width, stop, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < stop
        cells = states + shared * head_stride + column[:, None] * SIZE + at[None, :]
        key = tl.load(cells, mask=inside[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee" if EXACT else "tf32") * SCALE
        sees = tl.load(
            mask + row[:, None] * mask_stride + column[None, :],
            mask=there[:, None] & inside[None, :],
            other=float("-inf"),
        )
        score += sees.to(tl.float32)
        above = tl.maximum(most, tl.max(score, 1))
        above = tl.where(above == float("-inf"), 0.0, above)  # rows beyond the last
        share = tl.exp(score - above[:, None])
        faded = tl.exp(most - above)
        total = total * faded + tl.sum(share, 1)
        value = tl.load(cells + value_stride, mask=inside[:, None], other=0.0)
        average = average * faded[:, None]
        average += tl.dot(share.to(value.dtype), value, input_precision="ieee" if EXACT else "tf32")
        most = above
    total = tl.where(there, total, 1.0)
    place = (piece * rows + row) * HEADS + head
    tl.store(weight + place, most + tl.log(total), mask=there)
    tl.store(
        out + place[:, None] * SIZE + at[None, :],
        (average / total[:, None]).to(out.dtype.element_ty),
        mask=there[:, None],
    )


@triton.jit
def together(out, weight, whole, pieces, heads, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """Merge the pieces [P, R, A, d] of one head of one row, by their weights [P, R, A]."""
    head = tl.program_id(0)
    piece, at = tl.arange(0, PIECES), tl.arange(0, SIZE)
    there = piece < pieces
    place = piece * heads + head
    weighs = tl.load(weight + place, mask=there, other=float("-inf"))
    share = tl.exp(weighs - tl.max(weighs, 0))
    share /= tl.sum(share, 0)
    part = tl.load(out + place[:, None] * SIZE + at[None, :], mask=there[:, None], other=0.0)
    tl.store(whole + head * SIZE + at, tl.sum(share[:, None] * part, 0).to(whole.dtype.element_ty))


@triton.jit
def probed(
    q, k, v, text, text_weight, out, row_stride, head_stride, weight_row_stride, weight_head_stride,
    SCALE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, SUFFIX: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Causal attention of a tile of a probe's rows, in which each head of a group is a row, to their own probe, merged
    with what they have seen of the text.

    q, out       [R, A, d], SUFFIX rows per probe; k and v likewise [R, G, d]
    text         [R * g, G, d] averages of values
    text_weight  [R * g, G] the log-sum-exp of their scores
    """
    tile, shared, probe = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    each = tile * TILE + tl.arange(0, TILE)
    row, head = each // GROUP, shared * GROUP + each % GROUP
    there = row < SUFFIX
    at, column = tl.arange(0, SIZE), tl.arange(0, COLUMNS)
    place = ((probe * SUFFIX + row) * HEADS + head)[:, None] * SIZE + at[None, :]
    query = tl.load(q + place, mask=there[:, None], other=0.0)
    cells = (probe * SUFFIX + column)[:, None] * row_stride + shared * head_stride + at[None, :]
    inside = (column < SUFFIX)[:, None]
    key = tl.load(k + cells, mask=inside, other=0.0)
    score = tl.dot(query, tl.trans(key), input_precision="ieee" if EXACT else "tf32") * SCALE
    score = tl.where(column[None, :] <= row[:, None], score, float("-inf"))
    packed = probe * SUFFIX * GROUP + each
    weighs = tl.load(
        text_weight + packed * weight_row_stride + shared * weight_head_stride, mask=there, other=float("-inf")
    )
    most = tl.maximum(tl.max(score, 1), weighs)
    share, beside = tl.exp(score - most[:, None]), tl.exp(weighs - most)
    value = tl.load(v + cells, mask=inside, other=0.0)
    average = tl.dot(share.to(value.dtype), value, input_precision="ieee" if EXACT else "tf32")
    read = (packed * (HEADS // GROUP) + shared)[:, None] * SIZE + at[None, :]
    average += beside[:, None] * tl.load(text + read, mask=there[:, None], other=0.0).to(tl.float32)
    average /= (tl.sum(share, 1) + beside)[:, None]
    tl.store(out + place, average.to(out.dtype.element_ty), mask=there[:, None])
