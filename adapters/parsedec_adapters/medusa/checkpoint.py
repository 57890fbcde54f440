"""Medusa heads from disk or hub, in the public layouts. Errors name tensors that are missing, left over or misshapen.

    v0.1       a file of heads alone: {k}.{j}.linear.weight [H, H], {k}.{j}.linear.bias [H] for every layer j of head k,
               {k}.{J}.weight [V, H] for its output matrix
    Medusa-2   one directory with the (fine-tuned) target, whose weights also hold medusa_head.{k}. ... as above
    legacy     "version 2": as v0.1 without output matrices; the target's is used

The tensors decide how many heads and layers there are, since published config files name fewer heads than they have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from parsedec.errors import IncompatibleStack
from parsedec.models.checkpoints import DAMAGE, Version, find_file, read_tensors, version_of
from parsedec_adapters.medusa.heads import HEADS_FILE, MedusaHeads

PREFIX = "medusa_head."
NAME = re.compile(r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
FILES = (HEADS_FILE, "medusa_lm_head.pt")
WHOLE_MODELS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def load_once(source: str) -> MedusaHeads:
    """Cached, since speculators are bound once per arm, and the arms of a process share their weights."""
    return _load_version(source, version_of(source))


@lru_cache(maxsize=8)
def _load_version(source: str, _version: Version) -> MedusaHeads:
    return load_heads(source)


def load_heads(source: str | Path) -> MedusaHeads:
    """Heads in their file's dtype, on the CPU. `source`: a directory or hub id in any of the layouts.

    Raises IncompatibleStack that names the file and what is wrong with it.
    """
    for name in FILES:
        if path := find_file(source, name):
            return _build(path, read_tensors(path))
    for name in WHOLE_MODELS:
        if path := find_file(source, name):
            return _build(path, _read_from_model(source, path))
    raise IncompatibleStack(
        f"inner.heads='{source}' holds no Medusa heads; expected one of {', '.join((*FILES, *WHOLE_MODELS))}. Check "
        "the path, and that the download is complete."
    )


def inside_a_model(source: str | Path) -> bool:
    """Whether the heads of `source`, a loadable one, are among a whole model's weights (Medusa-2)."""
    return all(find_file(source, name) is None for name in FILES)


def _read_from_model(source: str | Path, path: Path) -> dict[str, Tensor]:
    """The heads inside a whole model's weights. If these are sharded, only shards that hold heads are opened."""
    shards = [path]
    if path.suffix == ".json":
        try:
            index = json.loads(path.read_text())["weight_map"]
        except DAMAGE as error:
            raise IncompatibleStack(f"{path} is not an index of weight files: {error}. Download it again.") from error
        names = sorted({shard for name, shard in index.items() if name.startswith(PREFIX)})
        shards = [find_file(source, name) or path.with_name(name) for name in names]
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_tensors(shard, PREFIX)
    if not tensors:
        raise IncompatibleStack(
            f"{path} is a model without Medusa heads: no tensor has a name like {PREFIX}0.0.linear.weight. "
            "Give inner.heads the directory of the heads."
        )
    return tensors


def _build(path: Path, tensors: Mapping[str, Tensor]) -> MedusaHeads:
    """Heads of these tensors, all of which are used; none is made up."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    named = {name: match for name in tensors if (match := NAME.fullmatch(name))}
    strange = sorted(set(tensors) - set(named))
    if strange or not named:
        raise IncompatibleStack(
            f"{path} holds {strange[:4] or 'no tensors'}; expected only names like 0.0.linear.weight, "
            "0.0.linear.bias and 0.1.weight. Is it a file of Medusa heads?"
        )
    heads = 1 + max(int(match[1]) for match in named.values())
    layers = 1 + max((int(match[2]) for match in named.values() if match[3] != "weight"), default=-1)
    outputs = any(match[3] == "weight" for match in named.values())
    wanted = {f"{k}.{j}.linear.{kind}" for k in range(heads) for j in range(layers) for kind in ("weight", "bias")}
    wanted |= {f"{k}.{layers}.weight" for k in range(heads)} if outputs else set()
    missing, unexpected = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or unexpected or not layers:
        raise IncompatibleStack(
            f"{path} is not a complete set of Medusa heads: with {heads} heads of {layers} layers, missing "
            f"{missing[:4] or 'nothing'}, unexpected {unexpected[:4] or 'nothing'}. Download it again, or check how it "
            "was saved."
        )
    hidden = tensors["0.0.linear.bias"].shape[0] if tensors["0.0.linear.bias"].dim() else 0
    vocab = tensors[f"0.{layers}.weight"].shape[0] if outputs else None
    shapes = {"linear.weight": (hidden, hidden), "linear.bias": (hidden,), "weight": (vocab, hidden)}
    for name, match in named.items():
        if tuple(tensors[name].shape) != shapes[match[3]]:
            raise IncompatibleStack(
                f"{path}: {name} has the shape {list(tensors[name].shape)}; expected {list(shapes[match[3]])} "
                "like the other tensors. The file is damaged, or was made for two models."
            )
    made = MedusaHeads(heads=heads, hidden=hidden, vocab=vocab, layers=layers).to(tensors["0.0.linear.weight"].dtype)
    with torch.no_grad():
        for name, match in named.items():
            k, j = int(match[1]), int(match[2])
            if match[3] != "weight":
                (made.weight if match[3] == "linear.weight" else made.bias)[j, k].copy_(tensors[name])
            elif made.output is not None:
                made.output[k].copy_(tensors[name])
    return made
