"""Self-speculation by early exit: the target's own first layers, then its own norm and output matrix, guess a chain.

LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710) trains models whose early layers are good at this; Draft & Verify
(Zhang et al. 2023, arXiv 2309.08168) skips layers of ordinary models. It needs no second model and no further weights:
the truncated model is a view of the target's own modules. But it has a cache of its own, so the first layers read every
token twice, to draft and to verify; LayerSkip saves the second reading.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from parsedec.errors import IncompatibleStack, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.models.turns import share_turns
from parsedec.sampling import Sampler
from parsedec.sessions.selftest import check_decoding
from parsedec.types import Needs, Outcome, Seen, Tree
from parsedec_adapters.draft_model import DraftModel, DraftState


@dataclass(frozen=True, kw_only=True)
class SelfEarlyExit:
    """A chain of up to `length` guesses by the first `layers` layers of the target.

    layers      number of layers to run, from 1 to one less than the target has; None: a quarter of them
    length, confidence   as in `DraftModel`
    """

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    layers: int | None = None
    length: int = 4
    confidence: float | None = None
    drafter: DraftModel | None = None  # drafts with the truncated model; set by `bind`

    def __post_init__(self) -> None:
        DraftModel(length=self.length, confidence=self.confidence)  # for its checks
        if self.layers is not None:
            require_number("inner.layers", self.layers, whole=True, low=1)

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> SelfEarlyExit:
        layers = max(1, target.num_layers // 4) if self.layers is None else self.layers
        drafter = DraftModel(length=self.length, confidence=self.confidence, model=truncated(target, layers))
        return replace(self, layers=layers, drafter=drafter.bind(target, None))

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> DraftState:
        return self._bound().start(tokens, seen, sampler)

    def propose(self, state: DraftState, budget: int) -> Tree:
        return self._bound().propose(state, budget)

    def commit(self, state: DraftState, outcome: Outcome) -> DraftState:
        return self._bound().commit(state, outcome)

    def rewind(self, state: DraftState, length: int) -> DraftState:
        return self._bound().rewind(state, length)

    def _bound(self) -> DraftModel:
        if self.drafter is None:
            raise IncompatibleStack("inner=self_early_exit was not bound to a target; call bind(target, draft) first.")
        return self.drafter


def truncated(target: LanguageModel, layers: int) -> LanguageModel:
    """The target cut off after its first `layers` layers. All modules are shared; only the lists of them are new.

    Raises IncompatibleStack if the target does not have more layers than that, is not built as a list of layers, or
    cannot be decoded with so few of them (Qwen3-Next and LFM2 need their first attention layer).
    """
    if not 1 <= layers < target.num_layers:
        raise IncompatibleStack(
            f"inner=self_early_exit is to exit after {layers} layers, but {target.name} has {target.num_layers}; "
            f"expected inner.layers from 1 to {target.num_layers - 1}."
        )
    body = target.hf.base_model
    stack = getattr(body, "layers", None)
    if body is target.hf or not isinstance(stack, nn.ModuleList) or len(stack) != target.num_layers:
        raise IncompatibleStack(
            f"inner=self_early_exit needs a model whose layers are one list, `model.layers`; {target.name} "
            f"({type(target.hf).__name__}) keeps them elsewhere. Use inner=draft_model."
        )
    replaced = [type(module).__name__ for module in (target.hf, body) if "forward" in vars(module)]
    if replaced:  # a replaced forward is bound to the whole model, so the view would run all layers
        raise IncompatibleStack(
            f"inner=self_early_exit cannot cut {target.name}: the forward of {replaced} was replaced, as device_map "
            "and hooks do. Load the target on one device."
        )
    config = _shortened(target.hf.config, layers)
    short_body = _view(body, config, layers=stack[:layers])
    whole = _view(target.hf, config, **{target.hf.base_model_prefix: short_body})
    share_turns(whole, target.hf)
    view = replace(target, hf=whole, name=f"{target.name}, first {layers} of {target.num_layers} layers")
    check_decoding(view)
    return view


def _shortened(config: Any, layers: int) -> Any:
    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    if vars(short).get("layer_types"):  # it is a property if all layers are of one kind
        short.layer_types = short.layer_types[:layers]
    return short


def _view(module: PreTrainedModel, config: Any, **children: nn.Module) -> PreTrainedModel:
    """A copy of the module with another config and some children replaced; parameters and buffers are shared."""
    view = copy.copy(module)
    view._modules = {**module._modules, **children}
    view.config = config
    return view
