"""One forward for passes of several requests: their rows are concatenated, without any padding.

All layers but attention treat each row by itself, so they may see all rows as one sequence. The attention is ours
(transformers' `AttentionInterface`): it appends each request's keys and values to that request's own cache and attends
within it, under that request's own mask. So caches are never joined, requests come and go freely, and a prompt, a tree
and a judge pass may share a forward with single tokens.

Shapes in this file:  n rows of a pass, R rows of all passes, C cached columns of a pass, A query heads, d head size,
V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from parsedec import masks
from parsedec.meter import wait_for
from parsedec.models import ranks
from parsedec.models.findings import crossed_window, found_out
from parsedec.models.language_model import LanguageModel, captured
from parsedec.models.turns import turns_of
from parsedec.remote.model import RemoteModel
from parsedec.sessions import kv
from parsedec.sessions.reference import excess, plain_logits, random_tokens

log = logging.getLogger(__name__)

Output = tuple[Tensor, Tensor | None]
NAME = "parsedec_joint"


class Pass(Protocol):
    """A forward that a request waits for. Passes of the same `group` can be made together."""

    @property
    def group(self) -> object: ...

    @property
    def rows(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def separable(self) -> bool:
        """Whether passes may be made one by one if a forward of several has failed."""

    @classmethod
    def together(cls, passes: Sequence[Self]) -> list[Output]:
        """Logits [kept, V] and taps [n, L, H] of each. If this raises, the requests' caches are as before."""

    def alone(self) -> Output:
        """The same of this pass by itself."""


@torch.inference_mode()
def settled(passes: Sequence[Pass]) -> list[Output | Exception]:
    """The output of each pass, or what it raises.

    They are made together, and if that fails, one by one: only passes that also fail alone are without an output.
    """
    try:
        return [*_finished(passes, lambda: passes[0].together(passes))]
    except Exception as error:
        if not passes[0].separable:
            raise
        if len(passes) == 1:
            return [error]
        log.warning(
            "a forward for %d requests failed; each makes its own (%s: %s)", len(passes), type(error).__name__, error
        )
    return [_by_itself(one) for one in passes]  # outside the handler: its error keeps the failed forward's tensors


def _by_itself(one: Pass) -> Output | Exception:
    try:
        return _finished([one], lambda: [one.alone()])[0]
    except Exception as error:  # noqa: BLE001 - its request gets it
        return error


def _finished(passes: Sequence[Pass], made: Callable[[], list[Output]]) -> list[Output]:
    """What was made, after waiting for the device: only then is it known how long it took, and whether it failed."""
    outputs = made()
    if passes[0].device.type == "cuda":
        wait_for(passes[0].device)
    return outputs


@dataclass(frozen=True, slots=True, eq=False)
class HfPass:
    """The arguments of `LanguageModel.forward` for one request: n ids behind `cache`, which grows by them."""

    model: LanguageModel
    cache: DynamicCache
    ids: list[int]
    keep: int | Tensor
    positions: Tensor | None
    mask: Tensor | dict[str, Tensor] | None
    taps: tuple[int, ...]

    @property
    def group(self) -> object:
        return id(self.model.hf), self.taps

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def separable(self) -> bool:
        return not self.model.shared  # its processes must all make the same forwards, and one alone may have failed

    @classmethod
    def together(cls, passes: Sequence[HfPass]) -> list[Output]:
        if len(passes) == 1:
            return [passes[0].alone()]
        held = [one.cache.get_seq_length() for one in passes]
        try:
            return _forward(passes)
        except Exception:
            for one, rows in zip(passes, held, strict=True):
                kv.cut_to(one.cache, rows)
            raise

    def alone(self) -> Output:
        return alone(self.model, self.cache, self.ids, self.keep, self.positions, self.mask, self.taps)


def alone(
    model: LanguageModel,
    cache: DynamicCache,
    ids: list[int],
    keep: int | Tensor,
    positions: Tensor | None,
    mask: Tensor | dict[str, Tensor] | None,
    taps: tuple[int, ...],
) -> Output:
    """The forward of one request by itself; arguments as of `HfPass`."""
    where = None if positions is None else positions.unsqueeze(0)
    logits, seen = model.forward([ids], cache, keep=keep, positions=where, mask=mask, taps=taps)
    return logits.squeeze(0), None if seen is None else seen.squeeze(0)


class Rows:
    """Attention of a joint forward, in which rows bounds[i] to bounds[i + 1] are those of passes[i]."""

    def __init__(self, passes: Sequence[HfPass], bounds: Sequence[int], kinds: Sequence[str]) -> None:
        self._kinds = kinds
        self._parts = [(p.cache, _masks(p), a, b) for p, (a, b) in zip(passes, pairwise(bounds), strict=True)]

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """query [1, A, R, d], key and value of all rows; returns [1, R, A, d]."""
        layer = cast(int, module.layer_idx)
        kind, out = self._kinds[layer], []
        for cache, mask, start, stop in self._parts:
            keys, values = cache.update(key[:, :, start:stop], value[:, :, start:stop], layer)
            visible = mask.get(kind)
            out.append(sdpa_attention_forward(module, query[:, :, start:stop], keys, values, visible, **options)[0])
        return torch.cat(out, dim=1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    joint_rows: Rows,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function as transformers calls it; `joint_rows` comes through the model's keyword arguments."""
    return joint_rows(module, query, key, value, options), None


AttentionInterface.register(NAME, _attention)


@torch.inference_mode()
def _forward(passes: Sequence[HfPass]) -> list[Output]:
    model, taps = passes[0].model, passes[0].taps
    if model.shared:
        ranks.check_same(model.name, model.device, [one.ids for one in passes])
    bounds, kept, keep, positions = [0], [0], [], []
    for one in passes:
        n, start = one.rows, bounds[-1]
        which = torch.arange(n - one.keep, n) if isinstance(one.keep, int) else one.keep
        keep.append(which.cpu() + start)
        cached = one.cache.get_seq_length()
        positions.append(torch.arange(cached, cached + n) if one.positions is None else one.positions.cpu())
        bounds.append(start + n)
        kept.append(kept[-1] + len(which))
    with _attending(model.hf):
        out = model.hf(
            input_ids=torch.tensor([[i for one in passes for i in one.ids]], device=model.device),
            position_ids=torch.cat(positions)[None].to(model.device),
            use_cache=False,  # the attention keeps the caches
            logits_to_keep=torch.cat(keep).to(model.device),
            output_hidden_states=captured(taps),
            joint_rows=Rows(passes, bounds, _kinds(model)),
        )
    logits = [out.logits[0, a:b] for a, b in pairwise(kept)]
    if not taps:
        return [(own, None) for own in logits]
    shown = torch.stack([out.hidden_states[i][0] for i in taps], dim=1)  # [R, L, H]
    # clones: a session keeps its taps, and a view would keep those of all requests alive
    return [(own, shown[a:b].clone()) for own, (a, b) in zip(logits, pairwise(bounds), strict=True)]


@contextmanager
def _attending(hf: PreTrainedModel) -> Iterator[None]:
    """Have the model attend by `Rows`; whoever else wants to run it meanwhile waits."""
    config = hf.config.get_text_config()
    with turns_of(hf).alone():
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before


def _kinds(model: LanguageModel) -> list[str]:
    """The kind of every layer."""
    only = next(iter(model.windows))
    return list(getattr(model.hf.config.get_text_config(), "layer_types", None) or [only] * model.num_layers)


def _masks(one: HfPass) -> dict[str, Tensor]:
    """Additive mask [1, 1, n, C + n] by kind of layer; none where the rows see everything, or are simply causal."""
    model, n = one.model, one.rows
    if isinstance(one.mask, dict):
        return one.mask
    if one.mask is not None:
        return dict.fromkeys(model.windows, one.mask)
    cached = one.cache.get_seq_length()
    columns = cached + n
    hidden = any(window is not None and columns > window for window in model.windows.values())
    if not hidden and (n == 1 or not cached):
        return {}
    allowed = torch.ones(n, columns, dtype=torch.bool).tril(cached)
    at = torch.arange(columns)
    made = masks.for_model(allowed, at[cached:], at, windows=model.windows, dtype=model.dtype, device=model.device)
    return made if isinstance(made, dict) else dict.fromkeys(model.windows, made)


def joint_obstacle(model: LanguageModel) -> str | None:
    """Why passes of several requests cannot share a forward of this model, or None if they can. Tried out once."""
    return found_out(model.hf, "joint passes", lambda: _unfit(model) or _disagreement(model))


def _unfit(model: LanguageModel) -> str | None:
    if isinstance(model, RemoteModel):
        return "its weights on a server, which is asked for one request at a time"
    if model.mask_obstacle:
        return model.mask_obstacle
    if model.attention == "sdpa":
        return None
    return f"attention implementation '{model.attention}'; joint passes need sdpa"


def _disagreement(model: LanguageModel) -> str | None:
    """What is wrong with a joint forward of two requests, compared with plain forwards that cross sliding windows."""
    texts = [random_tokens(model, n + crossed_window(model), seed) for seed, n in enumerate((9, 7))]
    caches = [kv.new_cache(model.hf) for _ in texts]
    for parts in ([ids[:-3] for ids in texts], [ids[-3:] for ids in texts]):
        passes = [HfPass(model, cache, ids, 1, None, None, ()) for cache, ids in zip(caches, parts, strict=True)]
        out = _forward(passes)
    ours, plain = torch.cat([logits for logits, _ in out]), torch.cat([plain_logits(model, ids) for ids in texts])
    error = excess(model, ours, plain)
    return None if error is None else f"a forward in which requests disturb each other (by {error:.2g})"
