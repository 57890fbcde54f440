"""The forward of a dense decoder over the rows of one pass: embeddings to logits, in few operations.

Attention is passed in: it writes the rows' keys and values into a cache and reads what they may see (`attention`).

Shapes in this file:  R rows of the pass, H hidden, I intermediate, A query heads, G key and value heads, d head size,
V vocabulary, L taps, K rows to give logits for.
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

LEAST_GPU = (8, 0)  # compute capability: older GPUs have too few registers for the kernels

log = logging.getLogger(__name__)


class Attend(Protocol):
    """Attention of one pass: (layer, q [R, A, d], k [R, G, d], v [R, G, d]) -> [R, A * d]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


class AttendProduct(Protocol):
    """The same, but given q, k and v as one product [R, (A + 2 * G) * d], still to be normed and rotated."""

    def projected(self, i: int, layer: Layer, product: Tensor, angles: Angles, /) -> Tensor: ...


Stream = tuple[Tensor, Tensor | None]  # rows [R, H], and what the next norm has still to add to them, if anything
Attends = Attend | AttendProduct
EachLayer = Callable[[int, Layer, Stream, Angles, Attends], Stream]  # as Network.layer


class Network:
    """A model's forward. It holds weights and rotary angles; the cache of a request comes with each pass."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.positions = RotaryTable(weights)
        self.kernels = kernels_for(weights)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Embeddings of the tokens [R, H]."""
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
        """Embedded rows x [R, H] to logits [K, V] and taps [R, L, H].

        keep  the rows to give logits for: indices, or how many of the last ones
        taps  layers whose hidden states are wanted, as in `output_hidden_states`: 0 the embeddings, the last one behind
              the final norm
        each  runs a layer in place of `self.layer`
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
        """The Triton kernels, unless torch.compile is fusing operations by itself."""
        return None if torch.compiler.is_compiling() else self.kernels

    def _normed(self, stream: Stream, norm: Norm) -> tuple[Tensor, Tensor]:
        """The rows with all that was still to be added, and the same normed."""
        if self._quick is not None:
            both: tuple[Tensor, Tensor] = self._quick.normed(*stream, norm)
            return both
        x = _whole(stream)
        return x, norm(x)

    def _gated(self, layer: Layer, y: Tensor) -> Tensor:
        """silu(gate) * up, [R, H] to [R, I]."""
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
        q, k = rotated(both, angles).split_with_sizes((heads, shared), 1)  # queries and keys at once
        return q, k, v


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current one. Streams and graphs belong to the current device, and Triton
    launches on it, whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def kernels_for(weights: Weights) -> Any:
    """The module `fused`, or None unless on CUDA with Triton and the kernels were found right for such a model."""
    joined = all(len(layer.qkv) == len(layer.gate_up) == 1 for layer in weights.layers)
    if weights.device.type != "cuda" or not joined or torch.cuda.get_device_capability(weights.device) < LEAST_GPU:
        return None
    try:
        from parsedec.static import fused  # needs Triton, which only comes with torch for CUDA on Linux
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
    # Without the extra dimension, torch.compile turns sum and product into a product onto a copy of x (torch 2.11).
    return (x[None] + more[None])[0]
