"""Training an EAGLE-3 head (arXiv 2503.01840, section 3): it is fed its own outputs, as when it drafts.

Pass 0 reads the target's hidden states at all positions. At row t, pass j reads the output of pass j - 1 at row t - 1,
as if the draft had begun j rows before. Row t of pass j sees:

    keys of pass 0            keys of pass i (1 <= i <= j)
    rows 0 .. t - j           row t - j + i

as a drafted chain does: the stable rows up to where it began, and itself.

Shapes in this file:  B texts, T tokens, n = T - 1 rows, W draft vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from parsedec.errors import ConfigError
from parsedec.models.language_model import LanguageModel
from parsedec.training.drafts import Pool
from parsedec.training.heads import Guess, Texts
from parsedec_adapters.eagle3 import EagleHead, HeadConfig, save_head
from parsedec_adapters.eagle3.head import ConcatCache


class Eagle3Training:
    """A new head for `target`, as wide as one of the target's layers.

    passes        number of tokens guessed in a row while training
    draft_vocab   number of tokens it can guess: the most frequent ones of the answers; None: all
    taps          hidden states it reads, as in `output_hidden_states`; None: EAGLE's choice
    """

    def __init__(
        self,
        *,
        target: LanguageModel,
        answers: Pool,
        seed: int,
        passes: int = 5,
        draft_vocab: int | None = None,
        taps: Sequence[int] | None = None,
    ) -> None:
        if passes < 1 or not 1 <= (draft_vocab or 1) <= target.vocab_size:
            raise ConfigError(
                f"recipe.head has passes={passes}, draft_vocab={draft_vocab}; expected passes >= 1 and a vocabulary of "
                f"at most {target.vocab_size} tokens."
            )
        torch.manual_seed(seed)
        depth = target.num_layers
        self.layers = tuple(taps) if taps is not None else (2, depth // 2, depth - 3)
        if list(self.layers) != sorted(set(self.layers)) or not all(0 <= tap <= depth for tap in self.layers):
            raise ConfigError(
                f"recipe.head would read hidden states {list(self.layers)} of {target.name}, which has 0 to {depth}; "
                "expected different ones of these, ascending: other readers of the head take them in that order. Set "
                "recipe.head.taps."
            )
        self.passes = passes
        table = target.hf.get_output_embeddings().weight.detach()
        head = EagleHead(_config(target, draft_vocab or target.vocab_size, self.layers))
        self._columns: Tensor | None = None
        if head.d2t is not None:
            counts = Counter(token for written in answers for tokens, _ in written for token in tokens)
            counts.update(target.end_ids)
            ranked = sorted(range(target.vocab_size), key=lambda token: -counts[token])
            self._columns = torch.tensor(sorted(ranked[: head.config.draft_vocab_size]), device=target.device)
            head.set_vocabulary(self._columns)
        with torch.no_grad():  # begin with the target's own output matrix
            head.lm_head.weight.copy_(table if self._columns is None else table[self._columns])
        self.module = head.to(target.device).with_embedding(target.hf.get_input_embeddings().weight)

    def guesses(self, texts: Texts) -> Iterator[Guess]:
        head, (batch, length) = self.module, texts.ids.shape
        rows = length - 1
        tokens, device = texts.ids[:, 1:], texts.ids.device
        flat = torch.arange(batch, device=device)[:, None] * length + torch.arange(1, length, device=device)  # [B, n]
        about = texts.answers[:, 1:]
        if self._columns is not None:  # tokens that the head cannot guess teach nothing
            assert head.t2d is not None
            following = torch.cat([texts.ids[:, 2:], texts.ids[:, :1]], dim=1)
            about = about & head.t2d[following]
        hidden, cache = head.fuse(texts.taps[:, :-1]), ConcatCache()
        rotation = head.rotations.rows(0, rows, hidden)
        for j in range(self.passes):
            about = about & (torch.arange(rows, device=device) >= j)  # nothing was drafted that far back
            if not about.any():
                return
            out = head.advance(hidden, tokens, rotation, mask=_visible(rows, j).to(device), cache=cache)
            yield Guess(j + 1, head.logits(out[about]), flat[about], self._columns)
            hidden = torch.cat([out[:, :1], out[:, :-1]], dim=1)

    def save(self, folder: Path) -> None:
        save_head(self.module, folder)


def _visible(rows: int, j: int) -> Tensor:
    """The mask of what the rows of pass j see of passes 0..j, [n, (j + 1) * n]."""
    back = torch.arange(rows)[:, None] - torch.arange(rows)[None]  # how far a key's row is before a row
    # the first rows follow no draft and see themselves, since the softmax of a row that sees nothing is nan
    early = (torch.arange(rows)[:, None] < j) & (back == 0)
    return torch.cat([(back >= j) | early, *(back == j - i for i in range(1, j + 1))], dim=1)


def _config(target: LanguageModel, draft_vocab: int, taps: tuple[int, ...]) -> HeadConfig:
    config = target.hf.config.get_text_config()
    heads = config.num_attention_heads
    return HeadConfig(
        hidden_size=target.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * target.hidden_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or target.hidden_size // heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab,
        target_hidden_size=target.hidden_size,
        num_taps=len(taps),
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        taps=taps,
    )
