"""Several continuations of one draft at once: a batch with a branch for every cut, each going on from there.

A small batch takes hardly longer than a single row. Branches that have finished still cost what the others do.

Shapes in this file:  B branches, C columns of the cache, S tokens of a text, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from parsedec.models.language_model import LanguageModel


class Branches(ABC):
    """B continuations, decoded together.

    logits       [B, V] after the last token of each branch
    calls, rows  forwards of the model so far, and the token positions they computed
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.calls = self.rows = 0

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token in every branch; returns the logits after it [B, V]."""
        self.logits = self._read(tokens)
        self.calls += 1
        self.rows += len(tokens)
        return self.logits

    @abstractmethod
    def _read(self, tokens: Sequence[int]) -> Tensor:
        """Read a token in every branch; the logits after it [B, V]."""


class PaddedBranches(Branches):
    """Branches on a batch of B copies of a cache (`kv.widen`), padded on the left.

    columns  C of the cache, padding included
    lengths  [B] how many of these columns, counted from the right, belong to each branch
    """

    def __init__(
        self, model: LanguageModel, cache: DynamicCache, columns: int, lengths: Sequence[int], logits: Tensor
    ) -> None:
        super().__init__(logits)
        self._model = model
        self._cache = cache
        self._positions = torch.tensor(list(lengths))  # [B] of the next token
        self._visible = (torch.arange(columns)[None] >= columns - self._positions[:, None]).long()  # [B, C]

    def _read(self, tokens: Sequence[int]) -> Tensor:
        return self.read([[token] for token in tokens])[0]

    def read(self, texts: Sequence[list[int]], taps: tuple[int, ...] = ()) -> tuple[Tensor, Tensor | None]:
        """Read S tokens in every branch; the logits after them [B, V], and taps of the last rows [B, L, H]."""
        s = len(texts[0])
        self._visible = torch.cat([self._visible, torch.ones(len(texts), s, dtype=torch.long)], dim=1)
        mask = self._visible.to(self._model.device) if self._model.has_attention else None
        positions = self._positions[:, None] + torch.arange(s)  # [B, S]
        self._positions = self._positions + s
        logits, seen = self._model.forward(list(texts), self._cache, keep=1, positions=positions, mask=mask, taps=taps)
        return logits[:, -1], None if seen is None else seen[:, -1]
