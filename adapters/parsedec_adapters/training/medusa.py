"""Training Medusa heads (arXiv 2401.10774, Medusa-1): the target stays as it is, each head learns its own offset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from parsedec.models.language_model import LanguageModel
from parsedec.training.drafts import Pool
from parsedec.training.heads import Guess, Texts
from parsedec_adapters.medusa.heads import MedusaHeads, output_layer, save_heads


class MedusaTraining:
    """New heads for `target`.

    heads, layers  how many heads, and how many residual layers in each
    own_output     whether heads have output matrices of their own (else they use the target's, for far smaller files)
    """

    def __init__(
        self,
        *,
        target: LanguageModel,
        answers: Pool,
        seed: int,
        heads: int = 5,
        layers: int = 1,
        own_output: bool = True,
    ) -> None:
        self.layers = (target.num_layers,)
        self.module = MedusaHeads.for_target(target, heads=heads, layers=layers, own_output=own_output)
        self._base = None if own_output else output_layer(target)
        self._target = target.name

    def guesses(self, texts: Texts) -> Iterator[Guess]:
        batch, length = texts.ids.shape
        flat = torch.arange(batch * length, device=texts.ids.device).view(batch, length)
        hidden = texts.taps[:, :, 0]
        wanted = texts.answers[:, 1:]  # where the first head guesses a token of an answer
        logits = self.module(hidden[:, :-1][wanted], self._base)  # [K, R, V]
        places = flat[:, :-1][wanted]  # [R]
        column = places % length
        for k in range(self.module.heads):
            inside = column + k + 1 < length
            about = inside & texts.answers.flatten()[(places + k + 1).clamp(max=batch * length - 1)]
            if about.any():
                yield Guess(k + 1, logits[k][about], (places + k + 1)[about])

    def save(self, folder: Path) -> None:
        layout = "v0.1" if self._base is None else "legacy"
        save_heads(self.module, folder, layout=layout, base_model=self._target)
