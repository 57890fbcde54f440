"""What every step pays for several times over, at less than torch's usual price.

Each is small, but what runs between two forwards of a model is cold, and takes several times as long as in a loop. For
the same reason such code calls `narrow`, `select` and `unsqueeze` where an index in brackets would read better.
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
    """`call` in torch's inference mode, which is entered only where it is off: entering it again is not free."""

    @wraps(call)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.is_inference_mode_enabled():
            return call(*args, **kwargs)
        with torch.inference_mode():
            return call(*args, **kwargs)

    return quiet


def whole_numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """`values` [n] as a tensor of 64-bit integers. As `torch.tensor`, which looks at each by itself."""
    if not values:
        return torch.empty(0, dtype=torch.int64, device=device)
    found = torch.frombuffer(array("q", values), dtype=torch.int64)
    return found if device.type == "cpu" else found.to(device)
