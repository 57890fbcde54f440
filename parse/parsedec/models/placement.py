"""Where a model is loaded to and in which precision: the settings device, dtype, device_map and tp_plan."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.distributed import DistributedConfig

from parsedec.errors import ConfigError, ModelLoadError


def device_of(device: str) -> torch.device:
    """The device that a setting names.

    Raises ConfigError if it names none, and ModelLoadError if this machine does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device='{device}' is not a device; expected auto, cpu, cuda or cuda:N.") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            f"device='{device}', but this machine has no usable CUDA device (torch {torch.__version__}). "
            "Use device=cpu, or install a CUDA build of torch."
        )
    return where


def dtype_of(dtype: str | torch.dtype, source: str) -> torch.dtype | str:
    """The precision that a setting names, as `from_pretrained` takes it.

    "auto" is float32 for the zoo's models, which are stored in less than they are meant to run in. Raises ConfigError
    for an unknown name.
    """
    names = ("float32", "bfloat16", "float16")
    known: dict[str, torch.dtype | str] = {"auto": "auto", **{name: getattr(torch, name) for name in names}}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"dtype='{dtype}' is unknown; expected one of {sorted(known)}.")
    return torch.float32 if name == "auto" and source.startswith("zoo:") else known[name]


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products in `dtype` are fast on `device`: on a CPU without instructions for half precision, they
    take many times as long as in float32."""
    asked = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if device.type != "cpu" or asked is None:
        return True
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{asked}_supported")())


def spread(device_map: str | None, tp_plan: str | None, backend: str) -> dict[str, Any]:
    """Arguments for `from_pretrained` that spread a model over several devices; none for one device."""
    if tp_plan is None:
        return {} if device_map is None else {"device_map": device_map}
    if tp_plan != "auto" or device_map is not None or backend == "static":
        raise ConfigError(
            f"tp_plan={tp_plan!r}, device_map={device_map!r}, backend='{backend}'; expected tp_plan=auto, without a "
            "device_map and with backend=eager or auto. Leave the others at null."
        )
    if "WORLD_SIZE" not in os.environ:
        raise ModelLoadError(
            "tp_plan=auto divides the model among processes, and this one was started alone. Start it with "
            "torchrun --nproc-per-node GPUS …, or use device_map=auto to spread the layers within one process."
        )
    return {"distributed_config": DistributedConfig(tp_plan=tp_plan)}
