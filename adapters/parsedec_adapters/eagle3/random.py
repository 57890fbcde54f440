"""An EAGLE-3 head of the right size with random weights: what drafting costs, whatever is accepted.

For replays only (`experiments/replay.py`): its guesses are noise, and the acceptance rule is scripted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from parsedec.models.language_model import LanguageModel
from parsedec_adapters.eagle3.config import HeadConfig
from parsedec_adapters.eagle3.head import EagleHead
from parsedec_adapters.eagle3.speculator import Eagle3

DRAFT_VOCABULARY = 32_000  # of the public heads
# Trained heads are sure of some guesses, so that the likeliest 60 nodes reach down to the last level. A head that finds
# all tokens about equally likely takes them from the first two levels, and no call could yield more than three tokens.
SHARPNESS = 64.0
SMALL = 8  # layers, below which EAGLE's choice of taps does not exist

_heads: WeakKeyDictionary[PreTrainedModel, EagleHead] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class RandomEagle3(Eagle3):
    """`Eagle3` with a head made for the model it is bound to; `head` is a name only."""

    head: str | EagleHead = "random"

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Eagle3:
        if target.hf not in _heads:
            _heads[target.hf] = random_head(target)
        return Eagle3.bind(replace(self, head=_heads[target.hf]), target, draft)


def random_head(target: LanguageModel, seed: int = 0) -> EagleHead:
    """A head of one layer as wide as the target's, in its dtype and on its device. It is sure of its guesses, and never
    guesses that a text ends."""
    config, layers = target.hf.config.get_text_config(), target.num_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = HeadConfig(
        hidden_size=config.hidden_size,
        target_hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=size,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(DRAFT_VOCABULARY, target.vocab_size - len(target.end_ids)),
        max_position_embeddings=target.context_limit,
        taps=(2, layers // 2, layers - 3) if layers >= SMALL else (0, layers // 2, layers),
    )
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(target.device):
        torch.manual_seed(seed)
        head = EagleHead(sizes)
    with torch.no_grad():
        head.lm_head.weight.mul_(SHARPNESS)
    if head.config.reduced:
        guessed = [token for token in range(target.vocab_size) if token not in target.end_ids]
        head.set_vocabulary(torch.tensor(guessed[: sizes.draft_vocab_size], device=target.device))
    return head.to(target.dtype).eval()
