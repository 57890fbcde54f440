"""Cascade attention for probes: the text they share and their own suffixes are read separately, then merged.

Attention to two parts of the columns is the average of both, weighted by their shares in the sum of exponentials:

    out = out_1 e^(l_1 - l) + out_2 e^(l_2 - l),      l = log(e^l_1 + e^l_2),      l_i the log-sum-exp of part i

(as in FlashAttention, arXiv 2205.14135, and FlashInfer's cascade, arXiv 2501.01005). The probes of a draft share
beginnings of different length, a staircase:

              text of the draft
    probe 0   xxxx
    probe 1   xxxxxxxxx
    probe 2   xxxxxxxxxxx          all probes of a group see the columns before its first cut: no mask there

Shapes in this file:  R = K * S rows, K probes, S rows a probe, T columns, A query heads, G key and value heads,
g = A / G, d head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from parsedec.static.attention import HALF, additive, agrees
from parsedec.static.memory import Buffers

GROUP = 128  # about how many rows a group of probes has: fewer leave less behind its first cut, more fill the processor
PAGE = 256  # columns of a page: flash attention wants a multiple of it
CAUSAL = (-1, 0)  # what varlen_attn calls it; rows are at the right end of their columns
# Before torch 2.13, varlen_attn has neither pages nor lengths nor shared heads; the operator below it has the last two
PAGED = "block_table" in inspect.signature(varlen_attn).parameters

Part = tuple[Tensor, Tensor]  # [..., R, d] and the log-sum-exp of its scores [..., R], float32


@dataclass(frozen=True, slots=True)
class Stair:
    """A group of neighbouring probes: rows start, …, stop - 1, all of which see the first `shared` columns.

    tail  [stop - start, last cut - shared] additive mask: which rows see which of the text behind those; None for none
    """

    start: int
    stop: int
    shared: int
    tail: Tensor | None


def stairs(cuts: Sequence[int], suffix: int, dtype: torch.dtype, device: torch.device) -> list[Stair]:
    """Probes in groups of about GROUP rows."""
    step, found = max(1, GROUP // suffix), []
    for first in range(0, len(cuts), step):
        some = cuts[first : first + step]
        shared, tail = some[0], None
        if some[-1] > shared:
            column = torch.arange(shared, some[-1], device=device)
            reach = torch.tensor(some, device=device).repeat_interleave(suffix)
            tail = additive(column < reach[:, None], dtype, device)
        found.append(Stair(first * suffix, (first + len(some)) * suffix, shared, tail))
    return found


def probes(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, staircase: Sequence[Stair], suffix: int, scale: float
) -> Tensor:
    """Attention of probes q [R, A, d] to the text [1, G, T, d] and to their own k and v [R, G, d]: [R, A * d]."""
    rows, shared = q.shape[0], k.shape[1]
    own, weight = _own(q, k, v, suffix, scale)  # [G, g, R, d], [G, g, R]
    out = torch.empty_like(own)
    for stair in staircase:
        some = slice(stair.start, stair.stop)
        queries = _by_head(q[some], shared)
        parts = [(own[:, :, some], weight[:, :, some])]
        if stair.shared:
            parts.append(part(queries, keys[:, :, : stair.shared], values[:, :, : stair.shared], None, scale))
        if stair.tail is not None:
            tail = slice(stair.shared, stair.shared + stair.tail.shape[1])
            parts.append(part(queries, keys[:, :, tail], values[:, :, tail], stair.tail, scale))
        out[:, :, some] = merged(parts)
    return out.permute(2, 0, 1, 3).reshape(rows, -1)


def _own(q: Tensor, k: Tensor, v: Tensor, suffix: int, scale: float) -> Part:
    """Causal attention of each probe to itself: [G, g, R, d] and its log-sum-exp [G, g, R]."""
    shared, size = k.shape[1:]
    group, count = q.shape[1] // shared, q.shape[0] // suffix
    queries = q.view(count, suffix, shared, group, size).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [K * G, g, S, d]
    keys, values = (x.view(count, suffix, shared, size).transpose(1, 2).flatten(0, 1)[None] for x in (k, v))
    out, weight = part(queries, keys, values, None, scale, causal=True)
    out = out.view(count, shared, group, suffix, size).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return out, weight.view(count, shared, group, suffix).permute(1, 2, 0, 3).flatten(2, 3)


def _by_head(q: Tensor, shared: int) -> Tensor:
    """[R, A, d] to [G, g, R, d]"""
    rows, heads, size = q.shape
    return q.view(rows, shared, heads // shared, size).permute(1, 2, 0, 3)


def part(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False) -> Part:
    """Attention of q [B, g, R, d] to keys and values [1, B, T, d], with an additive mask [R, T]; causal needs R = T.

    A row that sees nothing here gets no weight when parts are merged.
    """
    (batch, group), columns = q.shape[:2], keys.shape[2]
    keys, values = (x.transpose(0, 1).expand(batch, group, columns, -1) for x in (keys, values))
    if q.device.type == "cpu":
        out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, is_causal=causal, attn_mask=mask, scale=scale
        )
        return out, weight.float() if q.dtype in HALF else weight
    return by_hand(q, keys, values, mask, scale, causal)


def by_hand(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Part:
    """As `part`, with all scores in memory at once; keys and values [B, 1 or g, T, d]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ keys.to(wide).transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weight = scores.logsumexp(-1)
    return ((scores - weight[..., None]).exp() @ values.to(wide)).to(q.dtype), weight


def merged(parts: Sequence[Part]) -> Tensor:
    """Parts merged by their log-sum-exps [..., R, d]."""
    weights = torch.stack([weight for _, weight in parts]).softmax(0)[..., None]  # [parts, ..., R, 1]
    total = weights[0] * parts[0][0]
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total = torch.addcmul(total, weight, out.to(total.dtype))
    return total.to(parts[0][0].dtype)


def seen_of_itself(q: Tensor, k: Tensor, v: Tensor, suffix: int, scale: float) -> Part:
    """Causal attention of probes q [R, A, d] to their own k and v [R, G, d]: [R, A, d] and [R, A]."""
    out, weight = _own(q, k, v, suffix, scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2), weight.permute(2, 0, 1).flatten(1, 2)


def joined(text: Part, own: Part) -> Tensor:
    """What probes have seen of the text, [R * g, G, d] and [R * g, G] as `_packed`, merged with what they see of
    themselves, [R, A, d] and [R, A]: [R, A, d]."""
    group = len(text[0]) // len(own[0])
    return merged([(_unpacked(text[0], group), _unpacked(text[1], group)), own])


@dataclass(frozen=True, slots=True)
class Pages:
    """A block for flash attention over sequences of different lengths (torch.nn.attention.varlen), on CUDA.

    The cache is read as pages of PAGE columns. All probes have the same pages, and each uses the columns before its
    cut. Where torch has no pages (PAGED), the columns of every probe begin with the first one of the text.

    states          [M, G, C / PAGE, PAGE, d] the cache of all layers
    table           [K, pages] int32, the same for every probe
    used            [K] int32, how many columns each probe sees
    starts          [K + 1] int32, where the rows of each probe begin
    first           [K + 1] zeros, where its columns begin
    draft_rows      [2] int32, where the draft, a single sequence, begins and ends; draft_columns likewise
    drafted, text   rows of the draft; columns of text with these
    longest         the most columns that a probe sees
    quick           the module `fused`, if its kernels are to read the probes themselves and merge both
    """

    states: Tensor
    table: Tensor
    used: Tensor
    starts: Tensor
    first: Tensor
    draft_rows: Tensor
    draft_columns: Tensor
    drafted: int
    text: int
    longest: int
    suffix: int
    quick: Any = None

    @classmethod
    def of(
        cls, states: Tensor, before: int, drafted: int, cuts: Sequence[int], suffix: int, quick: Any = None
    ) -> Pages:
        device, longest = states.device, max(cuts, default=0)
        pages = torch.arange(-(-longest // PAGE), dtype=torch.int32)

        def numbers(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(device)

        return cls(
            states=states[:, 0].view(states.shape[0], states.shape[2], -1, PAGE, states.shape[-1]),
            table=pages.repeat(len(cuts), 1).to(device),
            used=numbers(*cuts),
            starts=numbers(*(suffix * i for i in range(len(cuts) + 1))),
            first=numbers(*([0] * (len(cuts) + 1))),
            draft_rows=numbers(0, drafted),
            draft_columns=numbers(0, before + drafted),
            drafted=drafted,
            text=before + drafted,
            longest=longest,
            suffix=suffix,
            quick=quick if quick is not None and suffix <= quick.LONGEST else None,
        )

    def attend(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of q [R, A, d] to the text [1, G, T, d] and to the block's own k and v [R, G, d]: [R, A * d]."""
        n, out = self.drafted, torch.empty_like(q)
        keys, values = keys[0].transpose(0, 1), values[0].transpose(0, 1)  # [T, G, d]
        if n:
            sizes = n, self.text
            out[:n] = _flash(q[:n], keys, values, self.draft_rows, self.draft_columns, sizes, scale, causal=True)[0]
        if len(q) > n:
            table, first = (self.table, None) if PAGED else (None, self.first)
            if PAGED:
                keys, values = self.states[2 * layer : 2 * layer + 2].permute(0, 2, 3, 1, 4)  # [pages, PAGE, G, d]
            # All rows and heads of a probe see the same columns, so heads that share keys become rows of one sequence:
            # the rows of a head by itself would leave most of a tile of 128 rows empty.
            heads, group = k.shape[1], q.shape[1] // k.shape[1]
            packed, starts, sizes = _packed(q[n:], heads), self.starts * group, (self.suffix * group, self.longest)
            text = _flash(packed, keys, values, starts, first, sizes, scale, used=self.used, table=table)
            if self.quick is not None:
                self.quick.probed(q[n:], k[n:], v[n:], *text, out[n:], self.suffix, scale)
            else:
                sizes = self.suffix, self.suffix
                own = _flash(q[n:], k[n:], v[n:], self.starts, self.starts, sizes, scale, causal=True)
                out[n:] = joined(text, own)
        return out.flatten(1)


def _packed(q: Tensor, shared: int) -> Tensor:
    """[R, A, d] to [R * g, G, d]"""
    rows, heads, size = q.shape
    return q.view(rows, shared, heads // shared, size).transpose(1, 2).reshape(-1, shared, size)


def _unpacked(x: Tensor, group: int) -> Tensor:
    """[R * g, G, …] to [R, A, …]"""
    return x.view(-1, group, *x.shape[1:]).transpose(1, 2).flatten(1, 2)


def _flash(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    row_starts: Tensor,
    column_starts: Tensor | None,
    longest: tuple[int, int],
    scale: float,
    *,
    causal: bool = False,
    used: Tensor | None = None,
    table: Tensor | None = None,
) -> Part:
    """Attention of sequences of rows q [R, A, d] to the columns of each: [R, A, d], and its log-sum-exp [R, A]."""
    if not PAGED:
        out, weight, *_ = flash_forward(
            q, keys, values, row_starts, column_starts, *longest, 0.0, causal, False, scale=scale, seqused_k=used
        )
        return out, weight.t()  # made as [A, R] (torch 2.11)
    made = varlen_attn(
        q,
        keys,
        values,
        row_starts,
        column_starts,
        *longest,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=CAUSAL if causal else (-1, -1),
        enable_gqa=True,
        seqused_k=used,
        block_table=table,
    )
    assert isinstance(made, tuple)
    out, weight = made
    # documented as [R, A], made as [A, R] (torch 2.13)
    return out, weight.t() if weight.shape == (q.shape[1], len(q)) else weight


def fused_for(buffers: Buffers, suffix: int) -> bool:
    """Whether flash attention can read these buffers, and was found to give the right numbers on this device."""
    states = buffers.states
    fits = states.device.type == "cuda" and states.dtype in HALF and buffers.capacity % PAGE == 0
    return fits and suffix > 0 and _flash_agrees(states.device, states.dtype, states.shape[2], states.shape[-1])


def flash_forward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(*arguments, **named)
    return made


@cache
def _flash_agrees(device: torch.device, dtype: torch.dtype, shared: int, size: int) -> bool:
    """Whether a block of a small judge pass comes out the same both ways; tried once per device and shape of heads."""
    generator = torch.Generator().manual_seed(0)
    cuts, suffix, drafted, before, heads = (130, 259, 300), 5, 40, 260, 2 * shared
    rows = drafted + len(cuts) * suffix

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    states = numbers(2, 1, shared, 2 * PAGE, size)
    q, k, v = numbers(rows, heads, size), numbers(rows, shared, size), numbers(rows, shared, size)
    keys, values = (state[:, :, : before + drafted] for state in states)
    scale = size**-0.5

    def expected() -> Tensor:
        column = torch.arange(before + drafted, device=device)
        mask = additive(column <= column[before:, None], dtype, device)
        draft, _ = part(_by_head(q[:drafted], shared), keys, values, mask, scale)
        staircase = stairs(cuts, suffix, dtype, device)
        rest = probes(q[drafted:], keys, values, k[drafted:], v[drafted:], staircase, suffix, scale)
        return torch.cat([draft.permute(2, 0, 1, 3).reshape(drafted, -1), rest])

    return agrees(
        "judge_kernel=cascade runs without flash attention",
        lambda: Pages.of(states, before, drafted, cuts, suffix).attend(0, q, keys, values, k, v, scale),
        expected,
    )
