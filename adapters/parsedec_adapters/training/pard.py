"""Training PARD (arXiv 2504.18583): a draft model learns to fill in masks after many positions of a text at once.

    rows        tokens of the text        masks of group a              masks of group b  …
    positions   0 1 … T-1                 a+1 a+2 … a+depth             b+1 …
    sees        causal                    tokens up to a, own masks     tokens up to b, own masks

The text's own rows learn the first guess, and a mask at depth i the guess after it. Deep masks are rarer than shallow
ones, as in the paper's conditional drop: a group reaches depth i with probability max(keep^i, floor), so that chains
have no gaps.

Shapes in this file:  B texts, T tokens, G groups, M mask rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from parsedec import masks
from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.models.language_model import LanguageModel, load
from parsedec.training.drafts import Pool
from parsedec.training.export import export
from parsedec.training.heads import Guess, Texts
from parsedec_adapters.training.parallelspec import chosen_positions, known_rows


class PardTraining:
    """A draft model that is trained into a PARD checkpoint.

    init        the model to start from, which needs the target's vocabulary
    mask_token  an id that no text uses
    length      guesses per pass
    share       share of the positions that get a group in a step
    keep, floor parameters of the conditional drop
    """

    layers: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        target: LanguageModel,
        answers: Pool,
        seed: int,
        init: str,
        mask_token: int,
        length: int = 8,
        share: float = 0.3,
        keep: float = 0.7,
        floor: float = 0.2,
    ) -> None:
        if length < 2 or not 0 < share <= 1 or not 0 < keep <= 1 or not 0 <= floor <= 1:
            raise ConfigError(
                f"recipe.head has length={length}, share={share}, keep={keep}, floor={floor}; expected length from 2, "
                "the others above 0 and at most 1."
            )
        model = load(init, dtype="float32", device=str(target.device))
        if not target.same_vocabulary(model):
            raise IncompatibleStack(f"{init} has another vocabulary than {target.name}; PARD drafts in the target's.")
        if not 0 <= mask_token < model.vocab_size:
            raise ConfigError(f"recipe.head.mask_token={mask_token}; expected an id below {model.vocab_size}.")
        if any(mask_token in tokens for written in answers for tokens, _ in written):
            raise ConfigError(
                f"recipe.head.mask_token={mask_token}, {model.tokenizer.convert_ids_to_tokens(mask_token)!r}, is a "
                f"token that {target.name} writes; expected an id that no text uses, such as a reserved one."
            )
        self.model = model
        self.module = model.hf
        self.mask_token = mask_token
        self.length = length
        self.share = share
        # models with one vocabulary may have different numbers of rows; those that only one of them has are padding
        self._rows = min(model.vocab_size, target.vocab_size)
        fewer = self._rows < target.vocab_size
        self._columns = torch.arange(self._rows, device=target.device) if fewer else None
        self.reach = torch.tensor([max(keep**i, floor) for i in range(1, length)])

    def guesses(self, texts: Texts) -> Iterator[Guess]:
        length = texts.ids.shape[1]
        anchors = chosen_positions(texts, self.share)
        # one draw per group: it reaches depth i if the draw is below the probability of that
        depths = (torch.rand(len(anchors), 1) < self.reach).sum(-1)  # [G]
        anchor = anchors.repeat_interleave(depths)  # [M]
        depth = torch.cat([torch.arange(1, int(d) + 1) for d in depths]) if depths.any() else anchors[:0]
        logits = self._read(texts.ids, anchor, depth)[..., : self._rows].float()
        about, rows = known_rows(texts, torch.arange(length))
        yield Guess(1, logits[:, :length][about], rows[about], self._columns)
        for i in range(1, self.length):
            chosen = (depth == i).nonzero().flatten()
            about, rows = known_rows(texts, (anchor + depth)[chosen])
            if about.any():
                yield Guess(i + 1, logits[:, length + chosen][about], rows[about], self._columns)

    def save(self, folder: Path) -> None:
        twin = copy.copy(self.model.hf.config)
        twin.pard_token, twin.spd_type = self.mask_token, "pard"
        self.model.hf.config = twin
        export(self.model, folder)

    def _read(self, ids: Tensor, anchor: Tensor, depth: Tensor) -> Tensor:
        """Logits of the text's rows, followed by those of the masks [B, T + M, V]."""
        batch, length = ids.shape
        positions = torch.cat([torch.arange(length), anchor + depth])
        last = torch.cat([torch.arange(length), anchor])  # the last token of the text that a row sees
        tokens = torch.arange(length)[None] <= last[:, None]  # [T + M, T]
        own = (anchor[:, None] == anchor[None]) & (depth[None] <= depth[:, None])  # [M, M]
        unseen = torch.zeros(length, len(anchor), dtype=torch.bool)
        allowed = torch.cat([tokens, torch.cat([unseen, own])], dim=1)
        device = ids.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        mask = masks.for_model(allowed, positions, positions, windows=self.model.windows, dtype=dtype, device=device)
        filler = ids.new_full((batch, len(anchor)), self.mask_token)
        out: Tensor = self.module(
            # as when drafting, the last row stands in for those the model lacks (`LanguageModel.readable`)
            input_ids=torch.cat([ids, filler], dim=1).clamp(max=self.model.vocab_size - 1),
            position_ids=positions[None].expand(batch, -1).to(device),
            attention_mask=mask,
            use_cache=False,
        ).logits
        return out
