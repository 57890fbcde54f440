"""A training run on disk: weights, optimiser, random generators and step. A new file is written, then renamed."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parsedec.errors import ParsedecError

FORMAT = 1


def save_checkpoint(
    path: Path, *, step: int, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write a checkpoint to `path`. `step` is also the position in the data: batch number `step` is to be read next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "format": FORMAT,
        "step": step,
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimiser": optimiser.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python_rng": random.getstate(),
        "facts": facts,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, *, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]]:
    """Load the checkpoint into `modules`, `optimiser` and the random generators; returns (step, facts).

    Raises ParsedecError for a file that cannot be read or has another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler fail in a dozen ways
        raise ParsedecError(f"cannot read the checkpoint {path}: {error}. Delete it to start again.") from error
    if state.get("format") != FORMAT:
        raise ParsedecError(f"{path} has checkpoint format {state.get('format')!r}; expected {FORMAT}.")
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["torch_rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    version, internal, gauss = state["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    return int(state["step"]), dict(state["facts"])
