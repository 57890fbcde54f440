"""Operations that CUDA alone has, in terms of the others, with what CUDA asks of their arguments."""

import sys
from itertools import pairwise
from types import ModuleType

import torch

ROWS = 32  # the efficient kernel gives weights for whole blocks of rows
PAGE = 256  # flash attention's pages are multiples of it
HALF = (torch.float16, torch.bfloat16)

_library = torch.library.Library("aten", "IMPL")


def install():
    for name, call in (
        ("_scaled_dot_product_efficient_attention", efficient),
        ("_flash_attention_forward", flash),
        ("_conv_depthwise2d", depthwise),
        ("_grouped_mm", grouped),
        ("histc", histc),
    ):
        _library.impl(name, call, "CUDA")
    sys.modules["parsedec.static.kernels"] = ours = ModuleType("parsedec.static.kernels")
    ours.FAILS = ()
    for call in (normed, gated, placed, seen, together, probed):
        setattr(ours, call.__name__, On(call))


def scores(q, keys, scale, causal):
    found = q.float() @ keys.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:  # rows stand at the right end of their columns
        rows, columns = found.shape[-2:]
        later = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(columns - rows + 1)
        found = found.masked_fill(later, -torch.inf)
    return found


def efficient(q, keys, values, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """[B, A, R, d] against [B, A, T, d]; the bias has all four dimensions."""
    assert q.shape[:2] == keys.shape[:2] == values.shape[:2], (q.shape, keys.shape, values.shape)
    assert bias is None or bias.shape == (*q.shape[:3], keys.shape[2]), (bias.shape, q.shape, keys.shape)
    assert all(x is None or x.stride(-1) == 1 for x in (q, keys, values, bias))
    assert dropout_p == 0
    found = scores(q, keys, scale, is_causal)
    if bias is not None:
        found = found + bias.float()
    out = (found.softmax(-1) @ values.float()).to(q.dtype)
    rows = -(-q.shape[2] // ROWS) * ROWS if compute_log_sumexp else 0
    weight = q.new_full((*q.shape[:2], rows), torch.nan, dtype=torch.float32)
    if compute_log_sumexp:
        weight[..., : q.shape[2]] = found.logsumexp(-1)
    seed = torch.zeros((), dtype=torch.long)
    return out.transpose(1, 2).contiguous().transpose(1, 2), weight, seed, seed


def flash(
    q, keys, values, row_starts, column_starts, most_rows, most_columns, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
    num_splits=None,
):  # fmt: skip
    """Sequences of rows [R, A, d] against columns [T, G, d] of their own, or in pages [pages, PAGE, G, d]."""
    assert q.dtype in HALF, q.dtype
    assert all(x.stride(-1) == 1 for x in (q, keys, values))
    counts = [x for x in (row_starts, column_starts, seqused_k, block_table) if x is not None]
    assert all(x.is_cuda and x.dtype is torch.int32 for x in counts), counts
    assert block_table is None or keys.shape[1] % PAGE == 0, keys.shape
    out, weight = torch.zeros_like(q), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
    starts = row_starts.tolist()
    for i, (start, stop) in enumerate(pairwise(starts)):
        if block_table is not None:
            own = [x[block_table[i].long()].flatten(0, 1)[: int(seqused_k[i])] for x in (keys, values)]
        else:
            first = int(column_starts[i])
            last = int(column_starts[i + 1]) if seqused_k is None else first + int(seqused_k[i])
            assert last <= len(keys), (last, keys.shape)
            own = [x[first:last] for x in (keys, values)]
        assert stop - start <= most_rows, (start, stop, most_rows)
        assert len(own[0]) <= most_columns, (own[0].shape, most_columns)
        group = q.shape[1] // own[0].shape[1]
        k, v = (x.float().transpose(0, 1).repeat_interleave(group, 0) for x in own)
        found = scores(q[start:stop].transpose(0, 1), k, scale, is_causal)
        out[start:stop] = (found.softmax(-1) @ v).transpose(0, 1).nan_to_num().to(q.dtype)
        weight[:, start:stop] = found.logsumexp(-1)
    none = q.new_empty(0)
    return out, weight, none, none, none


def depthwise(x, weight, kernel, bias, stride, padding, dilation):
    made = torch.nn.functional.conv2d(
        x.cpu(), weight.cpu(), None if bias is None else bias.cpu(), stride, padding, dilation, groups=x.shape[1]
    )
    return made.to(x.device)


def grouped(x, weights, ends=None, bias=None, out_dtype=None):
    """Rows of x up to each of the ends by a matrix of their own."""
    out, start = x.new_zeros(len(x), weights.shape[-1]), 0
    for weight, stop in zip(weights, ends.tolist(), strict=True):
        out[start:stop] = x[start:stop] @ weight
        start = stop
    return out


def histc(x, bins=100, min=0, max=0):  # noqa: A002 (the operation's own names)
    assert (min, max) == (0, bins - 1)
    return torch.bincount(x.flatten().long(), minlength=bins).to(x.dtype)


class On:
    """In place of a kernel of Triton's: kernel[grid](arguments)."""

    def __init__(self, call):
        self._call = call

    def __getitem__(self, grid):
        return lambda *arguments, num_warps=4, num_stages=3: self._call(grid, *arguments)


def check_states(states, value_stride, head_stride, size):
    """Keys and values [2, 1, G, T, d] as kernels are told they lie."""
    assert states.stride()[0::2] == (value_stride, head_stride, 1)
    assert states.stride(3) == size


def normed(grid, x, more, weight, whole, y, epsilon, size, width, adds):
    assert grid == (len(x),)
    assert width >= size == x.shape[1]
    assert all(part.is_contiguous() for part in (x, more, weight, whole, y))
    if adds:
        torch.add(x, more, out=whole)
    y.copy_(torch.nn.functional.rms_norm((whole if adds else x).float(), (size,), weight.float(), epsilon))


def gated(grid, product, y, size, width):
    assert grid[0] == len(product)
    assert grid[1] * width >= size == y.shape[1]
    assert product.is_contiguous()
    gate, up = product.float().chunk(2, -1)
    y.copy_(torch.nn.functional.silu(gate) * up)


def placed(
    grid, product, q, states, slots, cos, sin, q_weight, k_weight, row_stride, value_stride, head_stride,
    epsilon, heads, shared, size, has_norms, has_slots,
):  # fmt: skip
    assert grid == (len(product), heads + 2 * shared)
    assert (product.stride(0), product.stride(1)) == (row_stride, 1)
    check_states(states, value_stride, head_stride, size)
    assert all(x.is_contiguous() for x in (q, slots, cos, sin, q_weight, k_weight))
    slots = slots if has_slots else torch.arange(len(product), device=product.device)
    made = product.float().view(len(product), -1, size)
    queries, keys, values = made.split_with_sizes((heads, shared, shared), 1)
    if has_norms:
        queries, keys = (
            torch.nn.functional.rms_norm(x, (size,), weight.float(), epsilon)
            for x, weight in ((queries, q_weight), (keys, k_weight))
        )
    queries, keys = (x * cos.float() + x.roll(size // 2, -1) * sin.float() for x in (queries, keys))
    q.copy_(queries)
    for place, x in zip(states, (keys, values), strict=True):
        place.index_copy_(2, slots, x.transpose(0, 1)[None].to(place.dtype))


def seen(
    grid, q, states, mask, out, weight, rows, columns, width, value_stride, head_stride, mask_stride,
    scale, heads, group, size, tile, block, exact,
):  # fmt: skip
    tiles, shared, pieces = grid
    assert tiles * tile >= rows * group > (tiles - 1) * tile
    assert pieces * width >= columns > (pieces - 1) * width
    assert width % block == 0
    assert shared * group == heads
    check_states(states, value_stride, head_stride, size)
    assert (mask.stride(0), mask.stride(1)) == (mask_stride, 1)
    assert q.is_contiguous()
    keys, values = (x.float()[0].repeat_interleave(group, 0) for x in states)  # [A, T, d]
    found = q.float().transpose(0, 1) @ keys.transpose(-1, -2) * scale + mask.float()
    for piece, to in enumerate(out.view(pieces, rows, heads, size)):
        part = slice(piece * width, min(columns, (piece + 1) * width))
        to.copy_((found[..., part].softmax(-1) @ values[:, part]).transpose(0, 1))
        weight[piece].copy_(found[..., part].logsumexp(-1).t())


def together(grid, out, weight, whole, pieces, heads, size, most):
    assert grid == (heads,)
    assert most >= pieces == len(out) == len(weight)
    share = weight.view(pieces, heads).softmax(0)[..., None]
    whole.view(heads, size).copy_((share * out.view(pieces, heads, size)).sum(0))


def probed(
    grid, q, k, v, text, text_weight, out, row_stride, head_stride, weight_row_stride, weight_head_stride,
    scale, heads, group, size, suffix, tile, columns, exact,
):  # fmt: skip
    tiles, shared, probes = grid
    assert tiles * tile >= suffix * group > (tiles - 1) * tile
    assert columns >= suffix
    assert len(q) == probes * suffix
    assert shared * group == heads == q.shape[1]
    assert k.stride() == v.stride() == (row_stride, head_stride, 1)
    assert text_weight.stride() == (weight_row_stride, weight_head_stride)
    assert all(x.is_contiguous() for x in (q, text, out))
    queries = q.float().view(probes, suffix, shared, group, size).permute(0, 2, 3, 1, 4)  # [K, G, g, S, d]
    keys, values = (x.float().view(probes, suffix, shared, 1, size).permute(0, 2, 3, 1, 4) for x in (k, v))
    found = scores(queries, keys, scale, True)
    seen_text, weighs = (
        x.float().view(probes, suffix, group, shared, -1).permute(0, 3, 2, 1, 4) for x in (text, text_weight[..., None])
    )
    share = torch.cat([found, weighs], -1).softmax(-1)  # the text last
    made = share[..., :-1] @ values + share[..., -1:] * seen_text
    out.copy_(made.permute(0, 3, 1, 2, 4).reshape(out.shape))
