"""A model's own forward without a cache: the reference for every other way of computing its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parsedec.models.language_model import LanguageModel
from parsedec.models.turns import turns_of

# Errors are allowed in standard deviations of the logits. Where rounding is nearly nothing, the largest error counts.
EXACT = {torch.float64: 0.01, torch.float32: 0.01}
# In half precision errors grow with depth, and the largest of 150,000 logits is a matter of luck (0.2 to 0.5 behind 64
# random layers). So the root mean square of a row counts: 0.05 to 0.11 there, and at least 1.2 where a cache has lost
# one of nine tokens.
HALF = 0.3


def excess(model: LanguageModel, ours: Tensor, plain: Tensor) -> float | None:
    """The error of `ours` against `plain`, both [..., V], if it is more than rounding explains; else None."""
    difference, spread = ours.float() - plain.float(), float(plain.float().std())
    if model.dtype in EXACT:
        error, allowed = float(difference.abs().max()), EXACT[model.dtype] * spread
    else:
        error, allowed = float(difference.square().mean(-1).sqrt().max()), HALF * spread
    return None if error <= allowed else error


def plain_logits(model: LanguageModel, ids: Sequence[int], last: int = 1) -> Tensor:
    """Logits after each of the `last` last tokens [last, V]."""
    with torch.inference_mode(), turns_of(model.hf).plain():
        logits: Tensor = model.hf(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits
    return logits[0, -last:]


def random_tokens(model: LanguageModel, n: int, seed: int) -> list[int]:
    return torch.randint(model.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
