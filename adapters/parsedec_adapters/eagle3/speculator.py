"""EAGLE-3 as an inner speculator (arXiv 2503.01840). Lossless: the tree is chosen before the target decides.

The head's row t is computed from the target's hidden states at t and token t + 1. T + 1 committed tokens make T such
*stable* rows, the last of which holds the root; they are the state. Accepted guesses are read again with the target's
own hidden states, which replace the head's own guesses of them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from parsedec.errors import IncompatibleStack, require_number, require_numbers
from parsedec.models.checkpoints import Version, version_of
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.sessions.backends import runs_static
from parsedec.sessions.inference import inference, whole_numbers
from parsedec.types import Needs, Outcome, Seen, Tree
from parsedec_adapters.eagle3.checkpoint import load_head, with_overrides
from parsedec_adapters.eagle3.graphed import COMMITTED, Drafting, drafting_of
from parsedec_adapters.eagle3.head import EagleHead
from parsedec_adapters.eagle3.rows import Rows, Store, Window, causal_mask
from parsedec_adapters.eagle3.tree import Behind, Drafted, grow, select

log = logging.getLogger(__name__)

FEWEST_LAYERS = 7  # below that EAGLE's default taps coincide


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Eagle3State:
    """The committed tokens, root last, and the head's rows for them: the first len(tokens) - 1 of `rows`.

    greedy  whether the order of a tree's nodes is free, so that they are laid out as the target reads them
    """

    tokens: tuple[int, ...]
    rows: Rows
    greedy: bool

    def __post_init__(self) -> None:
        self.rows.states.add(self)

    @property
    def length(self) -> int:
        """Stable rows."""
        return len(self.tokens) - 1


@dataclass(frozen=True, kw_only=True)
class Eagle3:
    """A tree of guesses by an EAGLE-3 head.

    head    a directory, a hub id, or a loaded head
    tokens  most nodes of the tree, including the root
    depth   how often the tree is extended: guesses are depth + 1 levels deep
    top_k   nodes expanded per level, and children of each; 1 drafts a chain
    taps    hidden states the head reads, as in `output_hidden_states`; None: what the head says, else EAGLE's choice
    rope_theta, norm_before_residual   in place of the head's own; None: the head's
    graphed whether to run it with all sizes fixed, from CUDA graphs on CUDA; None: if the target's steps run that way
    """

    lossless: ClassVar[bool] = True

    head: str | Path | EagleHead
    tokens: int = 60
    depth: int = 7
    top_k: int = 10
    taps: Sequence[int] | None = None
    rope_theta: float | None = None
    norm_before_residual: bool | None = None
    graphed: bool | None = None
    _drafting: Drafting | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("depth", 0), ("top_k", 1)):
            require_number(f"inner.{name}", getattr(self, name), whole=True, low=least)
        if self.taps is not None:
            require_numbers("inner.taps", self.taps)
            object.__setattr__(self, "taps", tuple(self.taps))

    @property
    def needs(self) -> Needs:
        return Needs(hidden_layers=tuple(self.taps or ()))

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Eagle3:
        head = self._prepared(target)
        taps = _fitting_taps(head, self.taps, target)
        _check_sizes(head, target, self.top_k)
        if head.embed_tokens is None:
            embedding = target.hf.get_input_embeddings().weight
            head = head.with_embedding(embedding.to(target.device))
        if target.context_limit > head.config.max_position_embeddings:
            log.warning(
                "inner=eagle3: the head was trained on %d tokens of context, %s takes %d. Drafts get worse past that; "
                "the output does not.",
                head.config.max_position_embeddings, target.name, target.context_limit)  # fmt: skip
        graphed = self.graphed
        if graphed is None:
            graphed = target.device.type == "cuda" and runs_static(target)
        bound = replace(self, head=head, taps=taps, graphed=graphed)
        object.__setattr__(bound, "_drafting", drafting_of(head))
        return bound

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> Eagle3State:
        rows = Rows(self._bound()[1].stock, len(tokens))
        state = Eagle3State((tokens[0],), rows, sampler.greedy)
        return self.commit(state, Outcome(tuple(tokens[1:]), seen)) if len(tokens) > 1 else state

    def propose(self, state: Eagle3State, budget: int) -> Tree:
        return self.draft(state, budget, depth_first=state.greedy).tree

    @inference
    def draft(self, state: Eagle3State, budget: int, *, depth_first: bool = False) -> Drafted:
        """The tree of `propose` with its scores; laid out depth-first, or level by level as in EAGLE."""
        head, drafting = self._bound()
        root, top_k, stable = state.tokens[-1], self.top_k, state.length
        most = self.depth + 1
        levels = min(most, budget)
        if levels < 1 or not stable:  # without a stable row there is nothing to continue
            return Drafted(Tree.chain([root]), (0.0,))
        rows = state.rows.going_on(stable, (most - 1) * top_k)
        if not self.graphed:
            pool = grow(head, Behind(head, rows.store, stable, levels - 1, top_k), levels, top_k)
            return select(root, pool, top_k, self.tokens, depth_first=depth_first)
        with drafting.graphs.turn:
            pool = drafting.grow(rows.store, stable, levels, most, top_k)
            drafted = select(root, pool, top_k, self.tokens, depth_first=depth_first)
        if not drafted.sound:  # or later trees would read it as well
            rows.store.clear(stable)
        return drafted

    @inference
    def commit(self, state: Eagle3State, outcome: Outcome) -> Eagle3State:
        head, drafting = self._bound()
        taps, start, count = outcome.seen.taps, state.length, len(outcome.tokens)
        if taps is None or len(taps) != count:
            raise ValueError(f"Eagle3.commit needs the taps of {count} rows; got {0 if taps is None else len(taps)}")
        graphed = self.graphed and count <= COMMITTED
        rows = state.rows.going_on(start, COMMITTED if graphed else count)
        if graphed:
            drafting.commit(rows.store, start, outcome.tokens, taps)
        else:
            advance(head, rows.store, start, outcome.tokens, taps)
        return Eagle3State(state.tokens + outcome.tokens, rows, state.greedy)

    def rewind(self, state: Eagle3State, length: int) -> Eagle3State:
        return Eagle3State(state.tokens[:length], state.rows, state.greedy)

    def _prepared(self, target: LanguageModel) -> EagleHead:
        """The head with the overrides, in the target's dtype, on its device."""
        if not isinstance(self.head, EagleHead):
            source, where = str(self.head), (target.dtype, target.device)
            return _load_once(source, version_of(source), self.rope_theta, self.norm_before_residual, *where)
        head = with_overrides(self.head, self.rope_theta, self.norm_before_residual)
        if (head.fc.weight.dtype, head.fc.weight.device) != (target.dtype, target.device):
            head = copy.deepcopy(head).to(target.device, target.dtype)
        return head

    def _bound(self) -> tuple[EagleHead, Drafting]:
        if not isinstance(self.head, EagleHead) or self._drafting is None:
            raise IncompatibleStack("inner=eagle3 was not bound to a target; call bind(target, draft) first.")
        return self.head, self._drafting


def advance(head: EagleHead, store: Store, start: int, tokens: Sequence[int], taps: Tensor) -> None:
    """Write the rows of `tokens` after the first `start` of a store.  taps  [tokens, L, H]"""
    outputs, count = store.outputs, len(tokens)
    mask = causal_mask(start, count, outputs.device) if start and count > 1 else None
    rotation = head.rotations.rows(start, start + count, outputs)
    hidden = head.fuse(taps.to(outputs).unsqueeze(0))  # [1, A, D]
    ids = whole_numbers(tokens, outputs.device).unsqueeze(0)
    out = head.advance(hidden, ids, rotation, mask=mask, cache=Window(store, start))
    outputs.narrow(0, start, count).copy_(out.squeeze(0))


@cache
def _load_once(
    source: str, _version: Version, rope_theta: float | None, norm_before_residual: bool | None, dtype: torch.dtype,
    device: torch.device,
) -> EagleHead:  # fmt: skip
    """Cached by version, since speculators are bound once per arm, and the arms of a process share their head."""
    head = load_head(source, rope_theta=rope_theta, norm_before_residual=norm_before_residual)
    return head.to(device, dtype).requires_grad_(False)


def _fitting_taps(head: EagleHead, override: Sequence[int] | None, target: LanguageModel) -> tuple[int, ...]:
    layers, config = target.num_layers, head.config
    trained = f" (it was trained for {config.trained_for})" if config.trained_for else ""
    if override is None and config.taps is None:
        if layers < FEWEST_LAYERS or config.num_taps != 3:
            raise IncompatibleStack(
                f"the EAGLE-3 head does not say which hidden states it reads, and the default, three of a target of at "
                f"least {FEWEST_LAYERS} layers, does not fit {config.num_taps} taps of {target.name}, which has "
                f"{layers} layers. Set inner.taps."
            )
        return (2, layers // 2, layers - 3)
    taps = tuple(override if override is not None else config.taps or ())
    if len(taps) != config.num_taps:
        raise IncompatibleStack(
            f"taps={list(taps)} are {len(taps)} hidden states, but the head's fc.weight fuses {config.num_taps} of "
            f"width {config.target_hidden_size}. Set inner.taps to as many."
        )
    outside = [tap for tap in taps if not 0 <= tap <= layers]
    if outside:
        raise IncompatibleStack(
            f"taps={list(taps)}: {outside} are not hidden states of {target.name}, which has 0 (embeddings) to "
            f"{layers}. Was the head trained for another model?{trained}"
        )
    return taps


def _check_sizes(head: EagleHead, target: LanguageModel, top_k: int) -> None:
    config = head.config
    trained = f" It was trained for {config.trained_for}." if config.trained_for else ""
    if config.target_hidden_size != target.hidden_size:
        raise IncompatibleStack(
            f"the EAGLE-3 head reads hidden states of width {config.target_hidden_size}, {target.name} has "
            f"{target.hidden_size}; expected a head for this target.{trained}"
        )
    if config.vocab_size != target.vocab_size:
        raise IncompatibleStack(
            f"the EAGLE-3 head has a vocabulary of {config.vocab_size} tokens, {target.name} one of "
            f"{target.vocab_size}; expected a head for this target.{trained}"
        )
    if not config.own_embedding and config.hidden_size != target.hidden_size:
        raise IncompatibleStack(
            f"the EAGLE-3 head is {config.hidden_size} wide and has no embed_tokens.weight, and the embeddings of "
            f"{target.name} are {target.hidden_size} wide. Is the checkpoint complete?"
        )
    if top_k > config.draft_vocab_size:
        raise IncompatibleStack(
            f"inner.top_k={top_k}, but the head knows {config.draft_vocab_size} tokens; lower inner.top_k."
        )
    if top_k > 1 and (obstacle := target.mask_obstacle):
        raise IncompatibleStack(
            f"{target.name} has {obstacle}; a branching tree cannot be verified on it. Use inner.top_k=1, a chain."
        )
