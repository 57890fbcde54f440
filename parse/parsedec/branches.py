"""Several continuations of one draft at once: a batch with a row for every cut, each going on from there by itself.

Every row costs the same, finished or not; what it saves is time, since a small batch takes hardly longer than one row.
Shapes in this file:  B branches, C columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from parsedec.model import LanguageModel


class Branches:
    """B copies of a cache that end at different tokens, padded on the left, decoded together.

    columns  C of the cache, the padding included
    lengths  [B] how many of them each branch has, the last ones
    logits   [B, V] after the last token of each branch
    """

    def __init__(
        self, model: LanguageModel, cache: DynamicCache, columns: int, lengths: Sequence[int], logits: Tensor
    ) -> None:
        self.model = model
        self.logits = logits
        self.calls = self.rows = 0
        self._cache = cache
        self._positions = torch.tensor(list(lengths))  # [B] of the next token
        self._visible = (torch.arange(columns)[None] >= columns - self._positions[:, None]).long()  # [B, C]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token in every branch; the logits after it [B, V]."""
        size = len(tokens)
        self._visible = torch.cat([self._visible, torch.ones(size, 1, dtype=torch.long)], dim=1)
        mask = self._visible.to(self.model.device) if self.model.has_attention else None
        logits, _ = self.model.forward(
            [[token] for token in tokens], self._cache, keep=1, positions=self._positions[:, None], mask=mask
        )
        self._positions = self._positions + 1
        self.calls += 1
        self.rows += size
        self.logits = logits[:, -1]
        return self.logits
