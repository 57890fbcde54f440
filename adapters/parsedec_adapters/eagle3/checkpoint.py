"""Reads EAGLE-3 heads in any public layout, strictly, and writes them in the EAGLE repository's.

Tensor names are converted to one form, vLLM's: `midlayer.` (EAGLE, SpecForge) becomes `layers.0.`, SGLang's
`additional_layers.{i}.` becomes `layers.{i + 1}.`, and a leading `model.` is dropped. Tensors that are missing, left
over or of another shape than config.json says are errors: a head that is silently wrong still drafts, but nothing is
accepted.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parsedec.errors import IncompatibleStack
from parsedec.models.checkpoints import find_file, read_tensors, write_tensors
from parsedec_adapters.eagle3.config import HeadConfig, flat_config, read_config
from parsedec_adapters.eagle3.head import EagleHead
from parsedec_adapters.eagle3.rotation import Rotations

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEXES = tuple(f"{name}.index.json" for name in WEIGHTS)
# copies of the target's tensors that trainers may save beside the head
OF_THE_TARGET = {"verifier_norm.weight", "verifier_lm_head.weight"}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_head(
    source: str | Path, *, rope_theta: float | None = None, norm_before_residual: bool | None = None
) -> EagleHead:
    """A head on the CPU, in its file's dtype.

    source                             a directory or hub id with config.json and the weights
    rope_theta, norm_before_residual   override what config.json says

    Raises IncompatibleStack that names the file, the tensor, what was expected and what was found.
    """
    raw = _read_json(_find(source, "config.json"))
    if norm_before_residual is not None:
        raw["norm_before_residual"] = norm_before_residual
    path, tensors = _read_weights(source)
    tensors = {_canonical(name): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in OF_THE_TARGET}
    config = read_config(raw, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, str(source))
    head = build(config, tensors, str(path))
    return with_overrides(head, rope_theta, norm_before_residual)


def build(config: HeadConfig, tensors: Mapping[str, Tensor], where: str) -> EagleHead:
    """A head of these tensors (canonical names); raises IncompatibleStack if they are not as `config` says."""
    tensors = dict(tensors)
    with torch.device("meta"):
        head = EagleHead(config)
    if not config.reduced:  # the map is then the identity, whatever the file holds
        tensors.pop("d2t", None)
        tensors.pop("t2d", None)
    elif "d2t" in tensors:
        tensors["t2d"] = _guessable(config, tensors, where)
        tensors["d2t"] = tensors["d2t"].long()
    _check_tensors(head, tensors, where)
    head.load_state_dict(tensors, assign=True)
    return head


def with_overrides(head: EagleHead, rope_theta: float | None, norm_before_residual: bool | None) -> EagleHead:
    """The same parameters with other settings; the head itself if nothing is overridden."""
    config = head.config
    if rope_theta is not None:
        config = replace(config, rope={**config.rope, "rope_theta": float(rope_theta)})
    if norm_before_residual is not None:
        config = replace(config, norm_before_residual=norm_before_residual)
    if config == head.config:
        return head
    twin = copy.copy(head)
    twin.config = config
    twin.rotations = Rotations(config.head_dim, config.max_position_embeddings, config.rope)
    return twin


def save_head(head: EagleHead, folder: str | Path) -> Path:
    """Write config.json and model.safetensors in the EAGLE repository's layout; returns the folder."""
    folder = Path(folder)
    tensors = {_published(name, head.config): tensor for name, tensor in head.state_dict().items()}
    write_tensors(tensors, folder / "model.safetensors")
    written = flat_config(head.config) | {"torch_dtype": str(head.fc.weight.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    return folder


def _canonical(name: str) -> str:
    name = name.removeprefix("model.").replace("midlayer.", "layers.0.", 1)
    return re.sub(r"^additional_layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + 1}.", name)


def _published(name: str, config: HeadConfig) -> str:
    if name.startswith("layers.0."):
        return name.replace("layers.0.", "midlayer.", 1)
    if config.mlp_stream:
        return re.sub(r"^layers\.(\d+)\.", lambda found: f"additional_layers.{int(found[1]) - 1}.", name)
    return name


def _find(source: str | Path, name: str) -> Path:
    found = _find_any(source, (name,))
    if found is None:
        raise IncompatibleStack(
            f"{source} has no {name}, or cannot be reached; expected the directory or hub id of an EAGLE-3 head. Check "
            "inner.head, and that the download is complete."
        )
    return found


def _find_any(source: str | Path, names: tuple[str, ...]) -> Path | None:
    return next((path for name in names if (path := find_file(source, name))), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise IncompatibleStack(f"{path} is not JSON: {error}. Is the download complete?") from error
    if not isinstance(raw, dict):
        raise IncompatibleStack(f"{path} holds {type(raw).__name__}; expected an object with the head's settings.")
    return raw


def _read_weights(source: str | Path) -> tuple[Path, dict[str, Tensor]]:
    path = _find_any(source, WEIGHTS)
    if path is not None:
        return path, read_tensors(path)
    index = _find_any(source, INDEXES)
    if index is None:
        raise IncompatibleStack(f"{source} has no weights; expected {' or '.join(WEIGHTS)} beside config.json.")
    shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
    return index, {name: t for shard in shards for name, t in read_tensors(_find(source, shard)).items()}


def _guessable(config: HeadConfig, tensors: Mapping[str, Tensor], where: str) -> Tensor:
    """t2d [V] as implied by d2t; raises IncompatibleStack for a map that is not one."""
    d2t = tensors["d2t"]
    if tuple(d2t.shape) != (config.draft_vocab_size,) or d2t.is_floating_point():
        raise IncompatibleStack(
            f"{where}: d2t is {list(d2t.shape)} {d2t.dtype}; expected [{config.draft_vocab_size}] whole numbers."
        )
    ids = d2t.long() + torch.arange(len(d2t))
    low, high, distinct = int(ids.min()), int(ids.max()), len(set(ids.tolist()))
    if low < 0 or high >= config.vocab_size or distinct < len(ids):
        raise IncompatibleStack(
            f"{where}: d2t maps {len(ids)} draft tokens to {distinct} tokens from {low} to {high}; expected offsets "
            f"that map each to a different one of the target's {config.vocab_size}."
        )
    stored = tensors.get("t2d")
    if stored is not None and tuple(stored.shape) != (config.vocab_size,):
        raise IncompatibleStack(f"{where}: t2d is {list(stored.shape)}; expected [{config.vocab_size}].")
    return torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)


def _check_tensors(head: EagleHead, tensors: Mapping[str, Tensor], where: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    faults = [f"{name} is missing (expected {list(shape)})" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            faults.append(f"{name} {list(tensor.shape)} is not part of an EAGLE-3 head with this config.json")
        elif tuple(tensor.shape) != expected[name]:
            faults.append(f"{name} is {list(tensor.shape)}, expected {list(expected[name])}")
        elif name not in ("d2t", "t2d") and tensor.dtype not in FLOATS:
            faults.append(f"{name} is {tensor.dtype}, expected floating-point weights (quantised heads are not read)")
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise IncompatibleStack(
            f"{where}: {'; '.join(faults[:4])}{more}. Does config.json belong to these weights, and is this an EAGLE-3 "
            "head?"
        )
