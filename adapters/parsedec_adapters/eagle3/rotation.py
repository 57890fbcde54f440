"""Rotary positions of an EAGLE-3 head: cos and sin of every position, computed in float32 when they are needed.

Su et al. 2021 (arXiv 2104.09864), in Llama's half-rotation form; scaled kinds use transformers' own functions. Two
kinds (dynamic, longrope) depend on the sequence's length: a row then gets the frequencies of the sequence that ends
with it, so that it never has to change as the sequence grows.

Shapes in this file:  n positions, d rotated dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from parsedec.errors import IncompatibleStack

KINDS = ("default", *sorted(ROPE_INIT_FUNCTIONS))
LENGTH_DEPENDENT = ("dynamic", "longrope")
CosSin = tuple[Tensor, Tensor]


def check_rope(rope: Mapping[str, Any], source: str) -> None:
    """Raise IncompatibleStack for an unknown kind of rotary embedding."""
    if rope["rope_type"] not in KINDS:
        raise IncompatibleStack(
            f"{source} has rope_type='{rope['rope_type']}', which is not supported; expected one of {list(KINDS)}."
        )


class Rotations:
    """The table of one head. It depends only on the configuration, so all requests share it.

    head_dim, max_positions, rope  as in `HeadConfig`
    """

    def __init__(self, head_dim: int, max_positions: int, rope: Mapping[str, Any]) -> None:
        self.head_dim, self.max_positions, self.rope = head_dim, max_positions, rope
        self._table: CosSin | None = None
        self._singles: dict[int, CosSin] = {}
        self._frequencies(None)  # finds missing settings now

    def rows(self, start: int, stop: int, like: Tensor) -> CosSin:
        """cos and signed sin [stop - start, d] of consecutive positions, in the dtype and on the device of `like`."""
        cos, sin = self._covering(stop, like)
        return cos.narrow(0, start, stop - start), sin.narrow(0, start, stop - start)

    def singles(self, start: int, stop: int, like: Tensor) -> list[CosSin]:
        """The same, [1, d] for each position: for rows that all have the same one."""
        cos, sin = self._covering(stop, like)
        singles = self._singles  # a thread that enlarges the table begins another one
        for position in range(start, stop):
            if position not in singles:
                singles[position] = cos[position : position + 1], sin[position : position + 1]
        return [singles[position] for position in range(start, stop)]

    def at(self, positions: Tensor, like: Tensor) -> CosSin:
        """The same for any positions [B, n]: [B, 1, n, d], ready for [B, heads, n, d]."""
        cos, sin = self._covering(int(positions.max()) + 1, like)
        return cos[positions][:, None], sin[positions][:, None]

    def _covering(self, stop: int, like: Tensor) -> CosSin:
        table = self._table
        if table is None or table[0].dtype != like.dtype or table[0].device != like.device or len(table[0]) < stop:
            have = 0 if table is None else len(table[0])
            with torch.inference_mode(False), torch.no_grad():  # training reads it, too
                self._table = table = self._computed(max(stop, 2 * have, 256), like)
            self._singles = {}
        return table

    def _computed(self, count: int, like: Tensor) -> CosSin:
        positions = torch.arange(count, dtype=torch.float32)
        frequencies, scale = self._frequencies(None)
        angles, scales = positions[:, None] * frequencies, torch.full((count, 1), scale)  # [n, d / 2], [n, 1]
        if self.rope["rope_type"] in LENGTH_DEPENDENT:
            for position in range(self._trained(), count):
                frequencies, scale = self._frequencies(position + 1)
                angles[position], scales[position] = position * frequencies, scale
        cos, sin = angles.cos() * scales, angles.sin() * scales
        # sin carries the sign of the half-rotation, so that rotating needs no negation
        table = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return table[0].to(like.device, like.dtype), table[1].to(like.device, like.dtype)

    def _trained(self) -> int:
        """Positions below this have the same frequencies at every length."""
        return int(self.rope.get("original_max_position_embeddings") or self.max_positions)

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        """Inverse frequencies [d / 2] and the factor on cos and sin, for a sequence of `length` tokens."""
        kind = self.rope["rope_type"]
        if kind == "default":
            d = int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))
            return 1.0 / self.rope["rope_theta"] ** (torch.arange(0, d, 2).float() / d), 1.0
        try:
            config = LlamaConfig(
                hidden_size=self.head_dim, num_attention_heads=1, num_key_value_heads=1, head_dim=self.head_dim,
                max_position_embeddings=self.max_positions, rope_parameters=dict(self.rope))  # fmt: skip
            with torch.device("cpu"):  # also while a head is built without storage
                frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), length)
        except (KeyError, TypeError) as error:
            raise IncompatibleStack(
                f"the head's rope_scaling {dict(self.rope)} is incomplete for type '{kind}': {error}. "
                "Compare it with the configuration the head was published with."
            ) from error
        return frequencies, float(scale)


def rotate(x: Tensor, rotation: CosSin) -> Tensor:
    """x [B, heads, n, head_dim] rotated by its positions; dimensions past d stay as they are."""
    cos, sin = rotation
    d = cos.shape[-1]
    turned, rest = (x, None) if d == x.shape[-1] else (x[..., :d], x[..., d:])
    turned = torch.addcmul(turned * cos, turned.roll(d // 2, -1), sin)
    return turned if rest is None else torch.cat([turned, rest], -1)
