"""Attention of a judge pass, block by block: three kernels that give the same numbers (PARSE, arXiv 2605.04263).

A row of a judge pass sees two ranges of columns: the text up to its `reach`, and its own probe up to itself. Two
integers per row say so, and no mask of all rows by all columns is ever made.

    sdpa      a dense mask, of the rows of one block by all columns so far. Any device, any dtype
    cascade   the shared text and each probe's own suffix are read separately and merged by the log-sum-exp of their
              scores. On CUDA in half precision by flash attention over the cache as pages, without any mask; otherwise
              by torch's own operations
    flex      FlexAttention (torch): a mask of blocks of 128 by 128 and a function of indices, compiled once per bucket

Shapes in this file:  R rows of a block, N those of the draft among them, K probes, S rows a probe, T columns, A query
heads, G key and value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parsedec.static import cascade, flex
from parsedec.static.attention import Rows, additive, attention, rows_behind
from parsedec.static.memory import Buffers, Lease
from parsedec.static.network import Attend, Network

# kernel=auto: cascade for blocks behind more columns of text than this, by device; fewer with flash attention
CASCADE_COLUMNS = {"cpu": 1024, "cuda": 2048}
FLASH_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a judge pass behind `before` columns: N = `drafted` rows of the draft, then one probe per cut.

    cuts    how many columns of text each probe sees, cached ones included; ascending
    suffix  S, the rows of a probe
    """

    before: int
    drafted: int
    cuts: tuple[int, ...]
    suffix: int

    @property
    def text(self) -> int:
        """Columns of text once the block is written."""
        return self.before + self.drafted

    @property
    def rows(self) -> int:
        return self.drafted + len(self.cuts) * self.suffix

    def reach(self) -> Tensor:
        """How many columns of text each row sees [R]: of the draft, up to itself; of a probe, up to its cut."""
        draft = torch.arange(self.before + 1, self.text + 1)
        return torch.cat([draft, torch.tensor(self.cuts, dtype=torch.long).repeat_interleave(self.suffix)])

    def own(self) -> Tensor:
        """The first column of each row's own probe [R]. A row of the draft has none: the column behind all others."""
        last = self.before + self.rows
        starts = torch.arange(len(self.cuts)) * self.suffix + self.text
        return torch.cat([torch.full((self.drafted,), last), starts.repeat_interleave(self.suffix)])

    def positions(self) -> Tensor:
        """Position ids [R]: those of the draft count on, those of each probe start behind its cut."""
        probes = torch.tensor(self.cuts, dtype=torch.long)[:, None] + torch.arange(self.suffix)
        return torch.cat([torch.arange(self.before, self.text), probes.flatten()])

    def allowed(self, device: torch.device) -> Tensor:
        """The mask [R, before + R] bool, as `masks.probe_mask` draws it."""
        column = torch.arange(self.before + self.rows, device=device)
        reach, own = self.reach().to(device)[:, None], self.own().to(device)[:, None]
        itself = column[self.before :, None]
        return (column < reach) | ((column >= own) & (column <= itself))


class CascadeRows:
    """The rows of a block, with the cascade kernel: the text that its probes share is read once for all of them."""

    def __init__(self, buffers: Buffers, block: Block, scale: float, quick: Any = None) -> None:
        self._block, self._scale = block, scale
        self._slots = buffers.columns(block.before, block.rows)
        self._text = buffers.columns(0, block.text)
        self._fused = cascade.fused_for(buffers, block.suffix)
        device, dtype = buffers.states.device, buffers.states.dtype
        self._causal: Tensor | None = None
        self._pages: cascade.Pages | None = None
        self._stairs: list[cascade.Stair] = []
        if self._fused:
            rows = block.before, block.drafted, block.cuts, block.suffix
            self._pages = cascade.Pages.of(buffers.states, *rows, quick)
            return
        if block.drafted:
            draft = Block(block.before, block.drafted, (), 1)
            self._causal = additive(draft.allowed(device), dtype, device)
        self._stairs = cascade.stairs(block.cuts, block.suffix, dtype, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._slots[2 * layer].copy_(k.transpose(0, 1)[None])
        self._slots[2 * layer + 1].copy_(v.transpose(0, 1)[None])
        keys, values, n = self._text[2 * layer], self._text[2 * layer + 1], self._block.drafted
        if self._pages is not None:
            return self._pages.attend(layer, q, keys, values, k, v, self._scale)
        parts = [attention(q[:n], keys, values, self._causal, False, self._scale)] if n else []
        if self._stairs:
            suffix = self._block.suffix
            parts.append(cascade.probes(q[n:], keys, values, k[n:], v[n:], self._stairs, suffix, self._scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def sdpa(buffers: Buffers, block: Block, scale: float) -> Attend:
    device = buffers.states.device
    return Rows(buffers, block.before, block.rows, scale, additive(block.allowed(device), buffers.states.dtype, device))


def flexible(buffers: Buffers, block: Block, scale: float) -> Attend:
    return flex.FlexRows(buffers, block.before, block.rows, block.reach(), block.own(), scale)


KERNELS: dict[str, Callable[[Buffers, Block, float], Attend]] = {
    "sdpa": sdpa,
    "cascade": CascadeRows,
    "flex": flexible,
}


def kernel(wanted: str, buffers: Buffers, block: Block, scale: float, quick: Any = None) -> Attend:
    """Attention of a block by the kernel `wanted`; "auto": by the length of what the probes share, and the device.

    quick  the module `fused`, where its kernels serve the model
    """
    if wanted == "auto":
        flash = cascade.fused_for(buffers, block.suffix)
        least = FLASH_COLUMNS if flash else CASCADE_COLUMNS[buffers.states.device.type]
        wanted = "cascade" if block.text > least else "sdpa"
    if wanted == "cascade":
        return CascadeRows(buffers, block, scale, quick)
    return KERNELS[wanted](buffers, block, scale)


def attention_behind(
    network: Network, lease: Lease, rows: int, allowed: Tensor | None, block: Block | None, wanted: str
) -> Attend:
    """The attention of so many rows behind those of a lease: those of a judge pass's `block`, or else `allowed`."""
    if block is None:
        return rows_behind(lease, rows, allowed)
    return kernel(wanted, lease.writable(rows), block, network.weights.scale, network.kernels)
