"""The forward of a dense decoder over the rows of one pass: embeddings to logits, in few operations.

Attention is handed in: it writes the rows' keys and values into a cache and reads what they may see (`attention`).

Shapes in this file:  R rows of the pass, H hidden, A query heads, G key and value heads, d head size, V vocabulary,
L taps, K rows logits are wanted for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from parsedec.static.weights import Layer, Weights

FIRST_POSITIONS = 1024


class Attend(Protocol):
    """Attention of one pass: (layer, q [R, A, d], k [R, G, d], v [R, G, d]) -> [R, A * d]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


Angles = tuple[Tensor, Tensor]


class AttendProduct(Protocol):
    """The same from the product [R, (A + 2 * G) * d] on, whose parts are q, k and v, still to be normed and turned."""

    def projected(self, i: int, layer: Layer, product: Tensor, angles: Angles, /) -> Tensor: ...


Stream = tuple[Tensor, Tensor | None]  # rows [R, H] and, where the next layer's norm adds it, what is still to be added
EachLayer = Callable[[int, Layer, Stream, Angles, Any], Stream]  # as Network.layer


class Positions:
    """Rotary angles by position, made by the model's own module: cos and sin [T, 1, d], doubled when they run out.

    The rotation of x is  x cos + swapped(x) sin,  swapped exchanging the halves of a head; Hugging Face's sign, minus
    for the lower half, is in `sin` here, so that swapping is a plain roll.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.cos = self.sin = torch.empty(0, 1, weights.head_size)

    def reach(self, positions: int) -> None:
        """Make sure that the angles of so many positions are there."""
        have = self.cos.shape[0]
        if positions <= have:
            return
        weights = self._weights
        at = torch.arange(max(positions, 2 * have, FIRST_POSITIONS), device=weights.device)[None]
        cos, sin = weights.rotary(torch.empty(0, dtype=weights.dtype, device=weights.device), at)
        half = weights.head_size // 2
        self.cos = cos[0, :, None].contiguous()
        self.sin = torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)


class Network:
    """A model's forward. It holds weights and rotary angles; a request's cache comes with each pass."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.positions = Positions(weights)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """[R, H]"""
        table = self.weights.embedding
        if len(tokens) == 1:
            return table.narrow(0, tokens[0], 1)  # a view: nothing to send to the device
        return embedding(torch.tensor(tokens, device=table.device), table)

    def angles(self, at: int | Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """cos and sin [R, 1, d] of positions at, at + 1, …, or of the positions `at` [R] on the device."""
        table = self.positions
        if isinstance(at, int):
            return table.cos.narrow(0, at, rows), table.sin.narrow(0, at, rows)
        return table.cos.index_select(0, at), table.sin.index_select(0, at)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        attend: Attend | AttendProduct,
        keep: Tensor | int,
        taps: tuple[int, ...] = (),
        each: EachLayer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embedded rows [R, H] to logits [K, V] of the last `keep` rows or of the rows `keep`, and taps [R, L, H].

        `taps` are indices as in `output_hidden_states`: 0 the embeddings, the last one behind the final norm.
        `each` is what runs a layer, in place of `layer`.
        """
        weights, rows, run = self.weights, x.shape[0], each or self.layer
        shown = {0: x}
        stream: Stream = (x, None)
        for i, layer in enumerate(weights.layers):
            stream = run(i, layer, stream, angles, attend)
            if i + 1 in taps:
                shown[i + 1] = _whole(stream)
        x, final = _whole(stream), len(weights.layers)
        if final in taps:
            shown[final] = x = weights.norm(x)
        if isinstance(keep, Tensor):
            x = x.index_select(0, keep)
        elif keep < rows:
            x = x[rows - keep :]
        if final not in taps:
            x = weights.norm(x)
        logits = weights.head(x)
        return logits, torch.stack([shown[i] for i in taps], dim=1) if taps else None

    def layer(self, i: int, layer: Layer, stream: Stream, angles: Angles, attend: Attend | AttendProduct) -> Stream:
        """Decoder layer i."""
        x = _whole(stream)
        y = layer.before_attention(x)
        if hasattr(attend, "projected"):
            (qkv,) = layer.qkv
            out = attend.projected(i, layer, qkv(y), angles)
        else:
            out = attend(i, *self._heads(layer, y, angles))
        x = layer.o.added_to(x, out)
        y = layer.before_mlp(x)
        gate, up = layer.gate_up[0](y).chunk(2, -1) if len(layer.gate_up) == 1 else [part(y) for part in layer.gate_up]
        y = silu(gate).mul_(up)
        return (x, layer.down(y)) if x.is_cuda else (layer.down.added_to(x, y), None)

    def _heads(self, layer: Layer, y: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, A, d], k [R, G, d], v [R, G, d], normed and turned."""
        rows, heads, shared = y.shape[0], self.weights.query_heads, self.weights.kv_heads
        if len(layer.qkv) > 1 or torch.compiler.is_compiling():  # compiled, to norm and to turn each is one kernel
            parts = [part(y).view(rows, -1, self.weights.head_size) for part in layer.qkv]
            q, k, v = parts if len(parts) > 1 else parts[0].split_with_sizes((heads, shared, shared), 1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            return turned(q, angles), turned(k, angles), v
        both, v = layer.qkv[0](y).view(rows, -1, self.weights.head_size).split_with_sizes((heads + shared, shared), 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = both.split_with_sizes((heads, shared), 1)
            both = torch.cat([layer.q_norm(q), layer.k_norm(k)], 1)
        q, k = turned(both, angles).split_with_sizes((heads, shared), 1)  # queries and keys in one go
        return q, k, v


def _whole(stream: Stream) -> Tensor:
    x, more = stream
    return x if more is None else x + more


def turned(x: Tensor, angles: Angles) -> Tensor:
    """Heads [R, A, d] turned to the positions of their rows."""
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
