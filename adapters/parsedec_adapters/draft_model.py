"""Vanilla speculative decoding: a small causal LM with the target's vocabulary guesses a chain of tokens.

Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318). Greedy and sampled, lossless: sampled
guesses are drawn with the request's own sampling settings, and their distributions travel with them as `logq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.model import LanguageModel, load
from parsedec.sampling import Sampler
from parsedec.session import Session
from parsedec.text import common_prefix
from parsedec.types import Needs, Outcome, Seen, Tree


@cache
def load_once(source: str, dtype: str, device: str) -> LanguageModel:
    """A speculator is bound once per arm; the arms of a process share its model."""
    return load(source, dtype=dtype, device=device)


@dataclass(slots=True)
class DraftState:
    """Where the draft model stands: its session holds all committed tokens, the root included (maybe unread).

    `ahead` is a memo of the last proposal's session, so that accepted guesses are not read twice. It never changes
    what a proposal is, only what it costs.
    """

    session: Session
    sampler: Sampler
    ahead: Session | None = None


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """A chain of up to `length` guesses by `model`.

    model  a loaded model, what `parsedec.load` takes (then in the target's dtype, on its device), or None: the stack's
           own draft model
    """

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    length: int = 4
    model: LanguageModel | str | None = None
    vocab: int = 0  # the target's, filled in by bind

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"inner.length={self.length}; expected at least 1 guess. Use inner=none for none.")

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> DraftModel:
        model = self.model or draft
        if isinstance(model, str):
            model = load_once(model, str(target.dtype).removeprefix("torch."), str(target.device))
        if model is None:
            raise IncompatibleStack("inner=draft_model has no model to draft with; set inner.model or draft.")
        if not target.same_vocabulary(model):
            raise IncompatibleStack(
                f"inner=draft_model needs the target's vocabulary, but {model.name} ({len(model.tokenizer)} tokens) "
                f"and {target.name} ({len(target.tokenizer)} tokens) differ, so its guesses cannot be mapped token by "
                "token. Use it as the outer draft (outer=parse maps text), or choose a draft model of the same family."
            )
        return replace(self, model=model, vocab=target.vocab_size)

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> DraftState:
        if not isinstance(self.model, LanguageModel):
            raise IncompatibleStack("inner=draft_model was not bound to a target; call bind(target, draft) first.")
        return DraftState(_extended(Session(self.model), tokens), sampler)

    def propose(self, state: DraftState, budget: int) -> Tree:
        root = state.session.tokens[-1]
        length = min(self.length, budget, state.session.room)
        if length < 1:
            return Tree.chain([root])
        ahead = state.session.fork()
        guesses: list[int] = []
        rows: list[Tensor] = []
        for _ in range(length):
            logits = self._fit(ahead.feed([]))
            if state.sampler.greedy:
                guesses.append(int(logits.argmax()))
            else:
                rows.append(state.sampler.log_distribution(logits))
                guesses.append(state.sampler.draw(rows[-1].exp()))
            ahead.append(guesses[-1])
        state.ahead = ahead
        return Tree.chain([root, *guesses], torch.stack([rows[0], *rows]) if rows else None)

    def commit(self, state: DraftState, outcome: Outcome) -> DraftState:
        tokens = [*state.session.tokens, *outcome.tokens]
        session = (state.ahead or state.session).fork()
        shared = common_prefix(session.tokens, tokens)
        session.rewind(shared)
        return DraftState(_extended(session, tokens[shared:]), state.sampler)

    def rewind(self, state: DraftState, length: int) -> DraftState:
        session = state.session.fork()
        session.rewind(length)
        return DraftState(session, state.sampler)

    def _fit(self, logits: Tensor) -> Tensor:
        """Logits over the target's output rows: padding rows that only one of the models has cannot be guessed."""
        if logits.shape[0] >= self.vocab:
            return logits[: self.vocab]
        return torch.nn.functional.pad(logits, (0, self.vocab - logits.shape[0]), value=-torch.inf)


def _extended(session: Session, tokens: Sequence[int]) -> Session:
    for token in tokens:
        session.append(token)
    return session
