"""The few things done to a Hugging Face cache, in one place: copy, cut the tail, gather rows, widen to a batch.

Attention layers keep keys and values as `[B, heads, T, d]` and grow by concatenation, so a shallow copy of a layer is a
snapshot: nothing ever writes into the rows it holds. Recurrent and convolutional layers (Mamba-2, Qwen3-Next, LFM2 …)
overwrite their states in place: their snapshots are clones, and the only way back is to restore one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from parsedec.sessions.inference import inference, whole_numbers

STATES = ("conv_states", "recurrent_states")


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache whose attention layers keep every row, so that going back only cuts rows off, even past a sliding
    window (transformers' own sliding layers drop old rows and refuse to go back)."""
    typed = DynamicCache(config=model.config)
    if not is_recurrent(typed):
        return DynamicCache()
    for i, layer in enumerate(typed.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            typed.layers[i] = DynamicLayer()
    return typed


def is_recurrent(cache: DynamicCache) -> bool:
    """Whether any layer carries a state that cannot be cut or masked (transformers' `is_croppable` misses LFM2)."""
    return any(hasattr(layer, "conv_states") for layer in cache.layers)


def snapshot(cache: DynamicCache) -> DynamicCache:
    """A copy: later forwards of either one leave the other as it is."""
    twin = copy.copy(cache)
    twin.layers = [_copy_layer(layer) for layer in cache.layers]
    return twin


def _copy_layer(layer: Any) -> Any:
    twin = object.__new__(type(layer))  # what copy.copy does, but several times as fast
    vars(twin).update(vars(layer))
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # recurrent states, and flags about them, by state index
            clone = {key: item.clone() if torch.is_tensor(item) else item for key, item in value.items()}
            setattr(twin, name, clone)
    return twin


def cut_tail(cache: DynamicCache, rows: int) -> None:
    """Forget the last `rows` rows of an attention-only cache."""
    if rows:
        cache.crop(-rows)  # negative: how many rows to remove


def cut_to(cache: DynamicCache, rows: int) -> None:
    """Cut an attention-only cache to `rows` rows, where a forward that failed half-way has grown only some layers."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None and layer.keys.numel():
            layer.keys, layer.values = layer.keys[..., :rows, :], layer.values[..., :rows, :]


@inference  # tensors made in inference mode may only be written to in it
def keep_rows(cache: DynamicCache, start: int, rows: Sequence[int]) -> None:
    """Of the rows from `start` on, keep `rows` (relative to `start`, in this order) and forget the others.

    Rows are moved in place, since gathering would also copy all rows before `start`. Only for rows of the latest
    forward: it has made new tensors to hold them, so no snapshot shares what is overwritten here.
    """
    stop = start + len(rows)
    right = next((i for i, row in enumerate(rows) if row != i), len(rows))  # rows before this one stay where they are
    index: Tensor | None = None
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None or not layer.keys.numel():
            continue
        if index is None or index.device != layer.keys.device:
            index = whole_numbers([start + row for row in rows[right:]], layer.keys.device)
        for states in (layer.keys, layer.values):
            states[..., start + right : stop, :] = states.index_select(-2, index)
        layer.keys, layer.values = layer.keys[..., :stop, :], layer.values[..., :stop, :]


def widen(cache: DynamicCache, branches: Sequence[DynamicCache], dropped: Sequence[int]) -> DynamicCache:
    """A batch of copies of `cache`: copy b lacks the last dropped[b] rows and has the recurrent states of branches[b].

    The rows that stay are moved to the right end, which makes each copy a left-padded sequence. Distances between
    columns are then distances between positions, as sliding windows that count columns assume.
    """
    wide = snapshot(cache)
    for i, layer in enumerate(wide.layers):
        if getattr(layer, "keys", None) is not None and layer.keys.numel():
            layer.keys = torch.cat([layer.keys.roll(shift, dims=-2) for shift in dropped])
            layer.values = torch.cat([layer.values.roll(shift, dims=-2) for shift in dropped])
        for name in STATES:
            for key, state in getattr(layer, name, {}).items():
                if torch.is_tensor(state):
                    stack = [getattr(branch.layers[i], name)[key] for branch in branches]
                    getattr(layer, name)[key] = torch.cat(stack)
    return wide
