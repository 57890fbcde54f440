"""The forward of a dense decoder over the rows of one pass: embeddings to logits, in few operations.

Attention is handed in: it writes the rows' keys and values into a cache and reads what they may see (`attention`).

Shapes in this file:  R rows of the pass, H hidden, A query heads, G key and value heads, d head size, V vocabulary,
L taps, K rows logits are wanted for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from parsedec.static.rotary import Angles, RotaryTable, rotated
from parsedec.static.weights import Layer, Norm, Weights

LEAST_GPU = (8, 0)  # older ones have too few registers for the kernels

log = logging.getLogger(__name__)


class Attend(Protocol):
    """Attention of one pass: (layer, q [R, A, d], k [R, G, d], v [R, G, d]) -> [R, A * d]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


class AttendProduct(Protocol):
    """The same from the product [R, (A + 2 * G) * d] on, whose parts are q, k and v, still to be normed and rotated."""

    def projected(self, i: int, layer: Layer, product: Tensor, angles: Angles, /) -> Tensor: ...


Stream = tuple[Tensor, Tensor | None]  # rows [R, H] and, where the next layer's norm adds it, what is still to be added
Attends = Attend | AttendProduct
EachLayer = Callable[[int, Layer, Stream, Angles, Attends], Stream]  # as Network.layer


class Network:
    """A model's forward. It holds weights and rotary angles; a request's cache comes with each pass."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.positions = RotaryTable(weights)
        self.kernels = kernels_for(weights)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """[R, H]"""
        table = self.weights.embedding
        if len(tokens) == 1:
            return table.narrow(0, tokens[0], 1)  # a view: nothing to send to the device
        return embedding(torch.tensor(tokens, device=table.device), table)

    def angles(self, at: int | Tensor, rows: int) -> Angles:
        """cos and sin [R, 1, d] of positions at, at + 1, …, or of the positions `at` [R] on the device."""
        table = self.positions
        if isinstance(at, int):
            return table.cos.narrow(0, at, rows), table.sin.narrow(0, at, rows)
        return table.cos.index_select(0, at), table.sin.index_select(0, at)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        attend: Attends,
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
        with on_device(weights.device):
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

    def layer(self, i: int, layer: Layer, stream: Stream, angles: Angles, attend: Attends) -> Stream:
        """Decoder layer i."""
        x, y = self._normed(stream, layer.before_attention)
        if hasattr(attend, "projected"):
            (qkv,) = layer.qkv
            out = attend.projected(i, layer, qkv(y), angles)
        else:
            out = attend(i, *self._heads(layer, y, angles))
        x, y = self._normed(layer.o.onto(x, out), layer.before_mlp)
        return layer.down.onto(x, self._gated(layer, y))

    @property
    def _quick(self) -> Any:
        """The kernels, where nothing else joins operations."""
        return None if torch.compiler.is_compiling() else self.kernels

    def _normed(self, stream: Stream, norm: Norm) -> tuple[Tensor, Tensor]:
        """The rows as a whole, and normed."""
        if self._quick is not None:
            both: tuple[Tensor, Tensor] = self._quick.normed(*stream, norm)
            return both
        x = _whole(stream)
        return x, norm(x)

    def _gated(self, layer: Layer, y: Tensor) -> Tensor:
        """[R, H] to [R, I]"""
        parts = [part(y) for part in layer.gate_up]
        if self._quick is not None:
            product: Tensor = self._quick.gated(*parts)
            return product
        gate, up = parts if len(parts) > 1 else parts[0].chunk(2, -1)
        return silu(gate).mul_(up)

    def _heads(self, layer: Layer, y: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, A, d], k [R, G, d], v [R, G, d], normed and rotated."""
        rows, heads, shared, size = y.shape[0], self.weights.query_heads, self.weights.kv_heads, self.weights.head_size
        parts = [part(y) for part in layer.qkv]
        if self._quick is not None:
            states = y.new_empty(2, 1, shared, rows, size)
            q = self._quick.placed(*parts, layer.norms, angles, states, None)
            k, v = states[:, 0].transpose(1, 2)
            return q, k, v
        if len(parts) > 1 or torch.compiler.is_compiling():  # compiled, norm and rotation are one kernel each
            parts = [part.view(rows, -1, size) for part in parts]
            q, k, v = parts if len(parts) > 1 else parts[0].split_with_sizes((heads, shared, shared), 1)
            if layer.norms is not None:
                q, k = (norm(x) for norm, x in zip(layer.norms, (q, k), strict=True))
            return rotated(q, angles), rotated(k, angles), v
        both, v = parts[0].view(rows, -1, size).split_with_sizes((heads + shared, shared), 1)
        if layer.norms is not None:
            apart = both.split_with_sizes((heads, shared), 1)
            both = torch.cat([norm(x) for norm, x in zip(layer.norms, apart, strict=True)], 1)
        q, k = rotated(both, angles).split_with_sizes((heads, shared), 1)  # queries and keys in one go
        return q, k, v


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current one: streams and graphs belong to that, and Triton launches there,
    whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def kernels_for(weights: Weights) -> Any:
    """The module `fused`: on CUDA, where Triton is and the kernels have been seen to be right for such a model."""
    joined = all(len(layer.qkv) == len(layer.gate_up) == 1 for layer in weights.layers)
    if weights.device.type != "cuda" or not joined or torch.cuda.get_device_capability(weights.device) < LEAST_GPU:
        return None
    try:
        from parsedec.static import fused  # Triton comes with torch for CUDA on Linux, and with no other
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("triton"):
            raise
        log.warning("the static backend runs without kernels of its own: %s", error)
        return None
    shape = weights.query_heads, weights.kv_heads, weights.head_size, weights.hidden_size, bool(weights.layers[0].norms)
    with on_device(weights.device):
        return fused if fused.right(weights.device, weights.dtype, *shape) else None


def _whole(stream: Stream) -> Tensor:
    x, more = stream
    if more is None:
        return x
    # But for the dimension, torch.compile sees a sum with a product and makes it a product onto a copy (torch 2.11).
    return (x[None] + more[None])[0]
