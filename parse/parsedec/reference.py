"""A model's own forward without a cache: what every other way of computing its logits is checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parsedec.model import LanguageModel
from parsedec.turns import turns_of

# Largest error of a right computation, in standard deviations of the logits. Rounding is far below that in float32. In
# bfloat16 it grows with depth: 64 random layers of Qwen3 32B, two kernels of the same attention, reached 0.35. A mask
# or cache that is not honoured is off by one and more.
HALF = 0.6
ROUNDING = {torch.float64: 0.01, torch.float32: 0.01, torch.bfloat16: HALF, torch.float16: HALF}


def excess(model: LanguageModel, ours: Tensor, plain: Tensor) -> float | None:
    """Largest difference of two computations of the same logits, if it is more than rounding explains."""
    ours, plain = ours.float(), plain.float()
    error, allowed = float((ours - plain).abs().max()), ROUNDING.get(model.dtype, HALF) * float(plain.std())
    return None if error <= allowed else error


def plain_logits(model: LanguageModel, ids: Sequence[int], last: int = 1) -> Tensor:
    """Logits after each of the last tokens [last, V]."""
    with torch.inference_mode(), turns_of(model.hf).plain():
        logits: Tensor = model.hf(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits
    return logits[0, -last:]


def random_tokens(model: LanguageModel, n: int, seed: int) -> list[int]:
    return torch.randint(model.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
