"""Training ParallelSpec's head (arXiv 2410.05589): groups of mask slots after random positions of a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from parsedec.errors import ConfigError
from parsedec.models.language_model import LanguageModel
from parsedec.training.drafts import Pool
from parsedec.training.heads import Guess, Texts
from parsedec_adapters.parallel_head import HeadConfig, ParallelHead, save_head


def chosen_positions(texts: Texts, share: float) -> Tensor:
    """A random share of the positions at which a draft of answer tokens may be rooted, ascending [G]."""
    first = int(texts.answers.any(0).nonzero()[0])
    last = texts.ids.shape[1] - 1
    where = torch.arange(first + 1, last + 1)
    chosen = torch.rand(len(where)) < share
    return where[chosen] if chosen.any() else where[:1]


def known_rows(texts: Texts, positions: Tensor) -> tuple[Tensor, Tensor]:
    """For guesses of the tokens after `positions` [G]: which of them belong to answers, and flat rows; both [B, G]."""
    batch, length = texts.ids.shape
    positions = positions.to(texts.answers.device)
    inside = positions.clamp(max=length - 1)
    about = texts.answers[:, inside] & (positions < length)
    return about, torch.arange(batch, device=inside.device)[:, None] * length + inside


class ParallelSpecTraining:
    """A new head for `target`.

    slots   guesses per pass
    share   share of the positions that get a group in a step
    """

    def __init__(self, *, target: LanguageModel, answers: Pool, seed: int, slots: int = 6, share: float = 0.25) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"recipe.head.share={share}; expected above 0 and at most 1.")
        torch.manual_seed(seed)
        self.layers = (target.num_layers,)
        self.module = ParallelHead(HeadConfig.for_target(target, slots)).to(target.device)
        self.share = share
        self._target = target

    def guesses(self, texts: Texts) -> Iterator[Guess]:
        embedded = self._target.hf.get_input_embeddings()(texts.ids)
        anchors = chosen_positions(texts, self.share).to(texts.ids.device)
        features = self.module(embedded, texts.taps[:, :, 0], anchors)  # [B, G, K, H]
        head = self._target.hf.get_output_embeddings()
        for slot in range(features.shape[2]):
            about, rows = known_rows(texts, anchors + slot)
            yield Guess(slot + 1, head(features[:, :, slot][about]), rows[about])

    def save(self, folder: Path) -> None:
        save_head(self.module, folder)
