"""Medusa as an inner speculator: a static tree, filled by the heads from one hidden state (arXiv 2401.10774).

The last row of taps belongs to the token before the root. The target's own output matrix has turned it into the root;
head k turns it into the k-th token after the root (k = 0: the first). There is no draft model and no cache: a proposal
is one small matrix product per head, and the state is the rows of the committed tokens.

Shapes in this file:  T + 1 committed tokens, A new ones, H hidden, K heads, R ranks, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from parsedec.errors import IncompatibleStack, require_number
from parsedec.models.checkpoints import find_checkpoint
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.types import Needs, Outcome, Seen, Tree
from parsedec_adapters.medusa.checkpoint import inside_a_model, load_once
from parsedec_adapters.medusa.heads import MedusaHeads, output_layer
from parsedec_adapters.medusa.trees import TreeShape, clip, read_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MedusaState:
    """Committed tokens and their rows, as a chain of pieces that later and rewound states share.

    before  the state that this one continues
    length  number of committed tokens, including the root
    tokens  the tokens this piece added; the last one is the root
    rows    [A, H] row of the token before each of them ([T, H] in the first piece, whose first token has none)
    """

    before: MedusaState | None
    length: int
    tokens: tuple[int, ...]
    rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """What `bind` prepares for one target."""

    heads: MedusaHeads
    base: nn.Module | None  # the target's output layer, for heads without their own
    shape: TreeShape
    index: Tensor  # [N - 1] place of each node's guess in the flattened ranking [K, R]
    hidden_layer: int


@dataclass(frozen=True, kw_only=True)
class Medusa:
    """A static tree of guesses by the heads in `heads`.

    heads  directory or hub id of heads in any public layout, or loaded heads. For Medusa-2, whose heads are in the
           target's directory, give that directory both here and as the target
    tree   name of a tree (trees.json, or "chain"), a list of choices, or a JSON file with such a list
    nodes  most guesses verified per target call, the tree's first ones; None: all
    """

    lossless: ClassVar[bool] = True

    heads: str | Path | MedusaHeads
    tree: str | Sequence[Sequence[int]] = "mc_sim_7b_63"
    nodes: int | None = None
    stack: Stack | None = None  # set by `bind`

    def __post_init__(self) -> None:
        if self.nodes is not None:
            require_number("inner.nodes", self.nodes, whole=True, low=1)
        TreeShape.of(read_tree(self.tree))  # a wrong tree is a wrong setting, whatever the target

    @property
    def needs(self) -> Needs:
        return Needs(hidden_layers=(self._bound.hidden_layer,))

    @property
    def _bound(self) -> Stack:
        if self.stack is None:
            raise IncompatibleStack("inner=medusa was not bound to a target; call bind(target, draft) first.")
        return self.stack

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Medusa:
        loaded = self.heads if isinstance(self.heads, MedusaHeads) else load_once(str(self.heads))
        name = "the given heads" if isinstance(self.heads, MedusaHeads) else str(self.heads)
        _check_fit(name, loaded, target)
        if not isinstance(self.heads, MedusaHeads):
            _warn_of_another_base(self.heads, target)
        choices = clip(read_tree(self.tree), heads=loaded.heads, ranks=target.vocab_size, nodes=self.nodes)
        shape = TreeShape.of(choices)
        obstacle = target.mask_obstacle if shape.branches else None
        if obstacle:
            raise IncompatibleStack(
                f"{target.name} has {obstacle}; the branches of inner.tree cannot be verified on it. "
                "Use inner.tree=chain."
            )
        heads = loaded if _fits(loaded, target) else _copy(loaded, target)
        index = torch.tensor([h * shape.width + r for h, r in zip(shape.heads, shape.ranks, strict=True)])
        stack = Stack(
            heads=heads,
            base=output_layer(target) if heads.output is None else None,
            shape=shape,
            index=index.to(target.device),
            hidden_layer=target.num_layers,
        )
        return replace(self, stack=stack)

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> MedusaState:
        return MedusaState(None, len(tokens), tuple(tokens), _rows(seen))

    @torch.inference_mode()
    def propose(self, state: MedusaState, budget: int) -> Tree:
        stack, root = self._bound, state.tokens[-1]
        depth = min(budget, stack.shape.depth)
        if depth < 1 or not len(state.rows):
            return Tree.chain([root])
        size = stack.shape.sizes[depth]
        best = self.logits(state.rows[-1], depth).topk(stack.shape.width, dim=-1).indices  # [K, R]
        guesses = best.flatten()[stack.index[: size - 1]].tolist()
        return Tree((root, *guesses), stack.shape.parents[:size])

    def commit(self, state: MedusaState, outcome: Outcome) -> MedusaState:
        if not outcome.tokens:
            return state
        return MedusaState(state, state.length + len(outcome.tokens), outcome.tokens, _rows(outcome.seen))

    def rewind(self, state: MedusaState, length: int) -> MedusaState:
        while state.before is not None and state.before.length >= length:
            state = state.before
        cut = state.length - length
        if cut <= 0:
            return state
        return MedusaState(state.before, length, state.tokens[:-cut], state.rows[:-cut])

    @torch.inference_mode()
    def logits(self, rows: Tensor, first: int | None = None) -> Tensor:
        """The heads' logits for hidden states: [..., H] -> [K, ..., V]. `first`: only the first so many heads."""
        logits: Tensor = self._bound.heads(rows, self._bound.base, first)
        return logits


def _rows(seen: Seen) -> Tensor:
    if seen.taps is None:
        raise IncompatibleStack("inner=medusa was given no hidden states; open the session with those in `needs`.")
    return seen.taps[:, 0]


def _fits(heads: MedusaHeads, target: LanguageModel) -> bool:
    return heads.weight.dtype == target.dtype and heads.weight.device == target.device


def _copy(heads: MedusaHeads, target: LanguageModel) -> MedusaHeads:
    """A copy of the heads in the target's dtype, on its device."""
    twin = MedusaHeads(heads=heads.heads, hidden=heads.hidden, vocab=heads.vocab, layers=heads.layers)
    twin.load_state_dict(heads.state_dict())
    return twin.to(target.device, target.dtype)


def _check_fit(name: str, heads: MedusaHeads, target: LanguageModel) -> None:
    if heads.hidden != target.hidden_size:
        raise IncompatibleStack(
            f"inner.heads ({name}) read hidden states of width {heads.hidden}, but {target.name} has "
            f"{target.hidden_size}. They were trained for another model."
        )
    if heads.vocab is not None and heads.vocab != target.vocab_size:
        raise IncompatibleStack(
            f"inner.heads ({name}) guess among {heads.vocab} tokens, but {target.name} has {target.vocab_size}. "
            "They were trained for another vocabulary."
        )


def _warn_of_another_base(source: str | Path, target: LanguageModel) -> None:
    """Warn if Medusa-2 heads have another target than they were tuned with: they guess poorly, but nothing fails."""
    own = str(getattr(target.hf.config, "name_or_path", ""))
    if not own or not inside_a_model(source):
        return
    place = find_checkpoint(source).location  # a directory or a hub id, as models are named by
    if own != place and Path(own).resolve() != Path(place).resolve():
        log.warning(
            "inner.heads=%s is a whole Medusa-2 model, but the target was loaded from %s; its heads were trained "
            "together with its own weights. Use target.source=%s.", source, own, source)  # fmt: skip
