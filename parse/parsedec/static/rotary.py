"""Rotary position embeddings: the angles of each position, and heads rotated by them.

Shapes in this file:  T positions in the table, R rows, A heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parsedec.static.weights import Weights

FIRST_POSITIONS = 1024

Angles = tuple[Tensor, Tensor]  # cos and sin [R, 1, d] of the rows of a pass


class RotaryTable:
    """cos and sin [T, 1, d] of the first T positions, made by the model's own module; T doubles when it is exceeded.

    A rotated head is  x cos + swapped(x) sin,  where `swapped` exchanges the halves of a head. Hugging Face negates the
    lower half when it swaps; here that sign is part of `sin`, so that swapping is a plain roll.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.cos = self.sin = torch.empty(0, 1, weights.head_size)

    def reach(self, positions: int) -> None:
        """Make sure the table covers this many positions."""
        have = self.cos.shape[0]
        if positions <= have:
            return
        weights = self._weights
        at = torch.arange(max(positions, 2 * have, FIRST_POSITIONS), device=weights.device)[None]
        cos, sin = weights.rotary(torch.empty(0, dtype=weights.dtype, device=weights.device), at)
        half = weights.head_size // 2
        self.cos = cos[0, :, None].contiguous()
        self.sin = torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)


def rotated(x: Tensor, angles: Angles) -> Tensor:
    """Heads [R, A, d] rotated to the positions of their rows."""
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
