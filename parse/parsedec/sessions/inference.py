"""Cheaper ways to do two things that every decoding step does several times.

Each costs little, but code that runs between two forwards of a model finds cold processor caches, and takes several
times as long as in a loop. For the same reason such code calls `narrow`, `select` and `unsqueeze` where an index in
brackets would read better.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def inference(call: Callable[P, T]) -> Callable[P, T]:
    """`call` in torch's inference mode, entered only if it is off: entering it a second time is not free."""

    @wraps(call)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.is_inference_mode_enabled():
            return call(*args, **kwargs)
        with torch.inference_mode():
            return call(*args, **kwargs)

    return quiet


def whole_numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """`values` as an int64 tensor [n]: what `torch.tensor` gives, which looks at each value by itself."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device=device)
    found = torch.frombuffer(array("q", values), dtype=torch.int64)
    return found if device.type == "cpu" else found.to(device)
