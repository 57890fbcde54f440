"""ParallelSpec: a one-layer head on the target guesses a whole tree in one pass (Xiao et al. 2024, arXiv 2410.05589).

The head (`parallel_head.py`) gives a distribution for each of the next k tokens at once. The tree consists of the
`tokens` most probable paths, whose probability is taken as the product over the levels. Since no level depends on what
was chosen before it, all nodes of a level share one list of candidates. Guesses are certain: they do not depend on any
draw, so acceptance keeps the target's distribution at any temperature.

Shapes in this file:  T committed tokens, n rows, k guesses in depth, C candidates per level, V vocabulary, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import ClassVar

import torch
from torch import Tensor

from parsedec.errors import IncompatibleStack, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.types import Needs, Outcome, Seen, Tree
from parsedec_adapters.parallel_head import HeadConfig, ParallelHead, load_head


class Rows:
    """Tokens, the hidden states before them, and the head's keys and values: one row per token, only ever appended.

    States share the rows, each with its own length: a row depends only on what comes before it, so it is right for
    every state that is long enough. A state that appends at a shorter length continues with a copy.
    """

    def __init__(self, config: HeadConfig, like: Tensor, room: int) -> None:
        self.tokens: list[int] = []
        self.read = 0  # leading rows whose keys and values are known
        self.before = like.new_empty(room, config.hidden_size)
        self.keys = like.new_empty(config.num_key_value_heads, room, config.head_dim)
        self.values = torch.empty_like(self.keys)

    def grown(self, length: int, tokens: Sequence[int], before: Tensor) -> Rows:
        """The first `length` rows followed by n new ones, whose `before` is [n, H]. Extends itself if it ends there and
        has room, else a copy."""
        total = length + len(tokens)
        rows = self if length == len(self.tokens) and total <= self.before.shape[0] else self._copy(length, total)
        rows.tokens.extend(tokens)
        rows.before[length:total] = before
        return rows

    def _copy(self, length: int, total: int) -> Rows:
        twin = copy.copy(self)
        twin.tokens, twin.read = self.tokens[:length], min(self.read, length)
        room = max(total, 2 * length)
        twin.before = self.before.new_empty(room, self.before.shape[1])
        twin.before[:length] = self.before[:length]
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(old.shape[0], room, old.shape[2])
            new[:, : twin.read] = old[:, : twin.read]
            setattr(twin, name, new)
        return twin


@dataclass(frozen=True, slots=True)
class ParallelState:
    """The first `length` rows of `rows`, the last of which is the root's."""

    rows: Rows
    length: int


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """A tree of `tokens` guesses, up to the head's slots deep.

    head    a loaded head, or its directory or hub id
    tokens  guesses per tree
    top_k   candidates per level; 1 drafts chains
    depth   levels of the tree; None: as many as the head has slots
    """

    lossless: ClassVar[bool] = True

    head: ParallelHead | str
    tokens: int = 24
    top_k: int = 6
    depth: int | None = None
    target: LanguageModel | None = None  # set by `bind`

    def __post_init__(self) -> None:
        for name in ("tokens", "top_k", "depth"):
            if name != "depth" or self.depth is not None:
                require_number(f"inner.{name}", getattr(self, name), whole=True, low=1)

    @property
    def needs(self) -> Needs:
        return Needs((self.target.num_layers,) if self.target else ())

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> ParallelSpec:
        head = load_head(self.head) if isinstance(self.head, str) else self.head
        config = head.config
        wrong = [
            f"{name} {theirs}, but {target.name} has {own}"
            for name, theirs, own in (
                ("hidden size", config.hidden_size, target.hidden_size),
                ("vocabulary", config.vocab_size, target.vocab_size),
            )
            if theirs != own
        ]
        if wrong:
            raise IncompatibleStack(
                f"inner=parallelspec has a head for a target with {'; and '.join(wrong)}. Use the head that was "
                "trained for this target."
            )
        if target.hf.get_output_embeddings() is None:
            raise IncompatibleStack(f"inner=parallelspec reads the output matrix of {target.name}, which has none.")
        if target.mask_obstacle and self.top_k > 1:
            raise IncompatibleStack(
                f"{target.name} has {target.mask_obstacle}; a branching tree cannot be verified on it. Set "
                "inner.top_k=1, which drafts chains."
            )
        if (self.depth or 1) > config.slots:
            raise IncompatibleStack(
                f"inner.depth={self.depth}, but the head has {config.slots} slots; expected at most that, or null."
            )
        weight = next(head.parameters())
        if (weight.dtype, weight.device) != (target.dtype, target.device):
            head = copy.deepcopy(head).to(target.device, target.dtype)  # the caller's head stays as it is
        return replace(self, head=head.eval(), target=target)

    @torch.inference_mode()
    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> ParallelState:
        head, target = self._bound()
        assert seen.taps is not None
        taps = seen.taps[:, 0].to(target.device, target.dtype)  # [T, H]; an empty tensor may be of any dtype and device
        before = torch.cat([taps.new_zeros(1, head.config.hidden_size), taps])  # [T + 1, H]
        rows = Rows(head.config, before, len(tokens) + 256)
        return ParallelState(rows.grown(0, tokens, before), len(tokens))

    @torch.inference_mode()
    def propose(self, state: ParallelState, budget: int) -> Tree:
        head, target = self._bound()
        rows, root = state.rows, state.rows.tokens[state.length - 1]
        depth = min(self.depth or head.config.slots, budget, self.tokens)
        if depth < 1:
            return Tree.chain([root])
        start = min(rows.read, state.length - 1)  # the root's row is always computed, since it gives the first guess
        ids = torch.tensor(rows.tokens[start : state.length], device=rows.before.device)
        embedded = target.hf.get_input_embeddings()(ids)  # [n, H]
        past = rows.keys[:, :start], rows.values[:, :start]
        features, keys, values = head.draft(embedded, rows.before[start : state.length], depth, past)
        if rows.read < state.length:
            rows.keys[:, start : state.length], rows.values[:, start : state.length] = keys, values
            rows.read = state.length
        logits: Tensor = target.hf.get_output_embeddings()(features).float()  # [k, V]
        best = logits.log_softmax(-1).topk(min(self.top_k, logits.shape[-1]), dim=-1)  # [k, C]
        return best_paths(root, best.indices.tolist(), best.values.tolist(), self.tokens)

    @torch.inference_mode()
    def commit(self, state: ParallelState, outcome: Outcome) -> ParallelState:
        assert outcome.seen.taps is not None
        rows = state.rows.grown(state.length, outcome.tokens, outcome.seen.taps[:, 0])
        return ParallelState(rows, state.length + len(outcome.tokens))

    def rewind(self, state: ParallelState, length: int) -> ParallelState:
        return ParallelState(state.rows, length)

    def _bound(self) -> tuple[ParallelHead, LanguageModel]:
        if self.target is None or not isinstance(self.head, ParallelHead):
            raise IncompatibleStack("inner=parallelspec was not bound to a target; call bind(target, draft) first.")
        return self.head, self.target


def best_paths(root: int, candidates: list[list[int]], scores: list[list[float]], guesses: int) -> Tree:
    """The tree of the `guesses` most probable paths when the levels are independent.

    candidates  [k][C] tokens of each level, most probable first
    scores      [k][C] their log-probabilities
    """
    tokens, parents = [root], [-1]
    # (minus log-probability of the path, level, rank among the candidates, parent, log-probability of the parent)
    open_paths = [(-scores[0][0], 0, 0, 0, 0.0)]
    while open_paths and len(tokens) <= guesses:
        cost, level, rank, parent, above = heappop(open_paths)
        tokens.append(candidates[level][rank])
        parents.append(parent)
        if rank + 1 < len(candidates[level]):
            heappush(open_paths, (-(above + scores[level][rank + 1]), level, rank + 1, parent, above))
        if level + 1 < len(candidates):
            heappush(open_paths, (cost - scores[level + 1][0], level + 1, 0, len(tokens) - 1, -cost))
    return Tree(tuple(tokens), tuple(parents))
