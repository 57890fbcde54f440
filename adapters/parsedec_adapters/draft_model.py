"""Vanilla speculative decoding: a small causal LM with the target's vocabulary guesses a chain of tokens.

Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318). Greedy and sampled, lossless: sampled
guesses are drawn with the request's own sampling settings, and their distributions travel with them as `logq`.

With `confidence` the chain also ends early: after a guess that the draft model itself gave less than that probability
(the rule of Hugging Face's assisted generation, `assistant_confidence_threshold`; Mamou et al. 2024, arXiv 2405.04304,
study such dynamic lengths). The unsure guess is still offered. Leaving it out would save nothing and, when sampling,
would be wrong: whether a draw is offered would depend on the draw, so offered ones would no longer follow `logq`.
Ending the chain *after* it depends only on tokens already offered, so every offered guess is a plain draw.

Shapes in this file:  V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from parsedec.errors import ConfigError, IncompatibleStack, require_number
from parsedec.models.checkpoints import Version, version_of
from parsedec.models.language_model import LanguageModel, load
from parsedec.sampling import Sampler
from parsedec.sessions.backends import open_session
from parsedec.sessions.session import Session
from parsedec.text.spelling import common_prefix
from parsedec.types import Needs, Outcome, Seen, Tree


@lru_cache(maxsize=8)
def _load_version(source: str, _version: Version, dtype: str, device: str, backend: str) -> LanguageModel:
    """Cached, since speculators are bound once per arm, and the arms of a process share their model."""
    return load(source, dtype=dtype, device=device, backend=backend)


@dataclass(slots=True)
class DraftState:
    """The draft model's session, which holds all committed tokens, including the root (perhaps unread).

    `ahead` caches the last proposal's session, so that accepted guesses are not read twice; the next commit takes it.
    It never changes proposals, only their cost.
    """

    session: Session
    sampler: Sampler
    ahead: Session | None = None


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """A chain of up to `length` guesses by `model`.

    confidence  end the chain after a guess less probable than this, 0 to 1; None: always `length` guesses
    model       a loaded model, or what `parsedec.load` takes (then in the target's dtype, on its device); None: the
                stack's own draft model
    """

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    length: int = 4
    confidence: float | None = None
    model: LanguageModel | str | None = None
    vocab: int = 0  # the target's, set by `bind`

    def __post_init__(self) -> None:
        require_number("inner.length", self.length, whole=True, low=1)
        if self.confidence is not None:
            require_number("inner.confidence", self.confidence, low=0, high=1)
            if self.confidence == 0:
                raise ConfigError("inner.confidence=0 ends no chain; expected more than 0, or null for a fixed length.")

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> DraftModel:
        model = drafting_model("draft_model", self.model, target, draft)
        return replace(self, model=model, vocab=target.vocab_size)

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> DraftState:
        if not isinstance(self.model, LanguageModel):
            raise IncompatibleStack("inner=draft_model was not bound to a target; call bind(target, draft) first.")
        return DraftState(extended(open_session(self.model, ids=self.vocab), tokens), sampler)

    def propose(self, state: DraftState, budget: int) -> Tree:
        root = state.session.tokens[-1]
        length = min(self.length, budget, state.session.room)
        if length < 1:
            return Tree.chain([root])
        ahead = state.session.fork()
        guesses: list[int] = []
        rows: list[Tensor] = []
        for left in range(length - 1, -1, -1):
            logits = fitted(ahead.feed([]), self.vocab)  # [V]
            if state.sampler.greedy:
                best, is_read = logits.argmax(), left > 0 and self.confidence is None
                guesses.append(ahead.prefetch(best) if is_read else int(best))
            else:
                rows.append(state.sampler.log_distribution(logits))
                guesses.append(state.sampler.draw(rows[-1].exp()))
            ahead.append(guesses[-1])
            if self._unsure(rows[-1] if rows else logits, guesses[-1]):
                break
        state.ahead = ahead
        return Tree.chain([root, *guesses], torch.stack([rows[0], *rows]) if rows else None)

    def commit(self, state: DraftState, outcome: Outcome) -> DraftState:
        known = state.session.length
        session, state.ahead = state.ahead or state.session.fork(), None  # reuse it: a fork costs a little
        shared = common_prefix(session.tokens[known:], outcome.tokens)  # before `known` they agree
        session.rewind(known + shared)
        return DraftState(extended(session, outcome.tokens[shared:]), state.sampler)

    def rewind(self, state: DraftState, length: int) -> DraftState:
        session = state.session.fork()
        session.rewind(length)
        return DraftState(session, state.sampler)

    def _unsure(self, scores: Tensor, guess: int) -> bool:
        """Whether the draft model gave its guess less than `confidence`; scores [V] are logits or log-probabilities."""
        if self.confidence is None:
            return False
        scores = scores.float()
        return float((scores[guess] - scores.logsumexp(-1)).exp()) < self.confidence


def drafting_model(
    inner: str, model: LanguageModel | str | None, target: LanguageModel, draft: LanguageModel | None
) -> LanguageModel:
    """The model that `inner` drafts with: `model`, or the stack's draft model. Raises IncompatibleStack if there is
    none, or if its vocabulary is not the target's."""
    if isinstance(model, str):
        model = _load_version(
            model, version_of(model), str(target.dtype).removeprefix("torch."), str(target.device), target.backend
        )
    model = model or draft
    if model is None:
        raise IncompatibleStack(
            f"inner={inner} has no model to draft with; set inner.model or draft (draft.inner.model, for the draft "
            "model's own inner level)."
        )
    if not target.same_vocabulary(model):
        raise IncompatibleStack(
            f"inner={inner} needs the target's vocabulary, but {model.name} ({len(model.tokenizer)} tokens) "
            f"and {target.name} ({len(target.tokenizer)} tokens) differ, so its guesses cannot be mapped token by "
            "token. Use it as the outer draft (outer=parse maps text), or choose a draft model of the same family."
        )
    return model


def fitted(logits: Tensor, vocab: int) -> Tensor:
    """Logits [..., V'], cut or padded to the target's output rows [..., V]. Rows that only one of the models has are
    padding, and cannot be guessed."""
    if logits.shape[-1] >= vocab:
        return logits[..., :vocab]
    return torch.nn.functional.pad(logits, (0, vocab - logits.shape[-1]), value=-torch.inf)


def extended(session: Session, tokens: Sequence[int]) -> Session:
    """The session itself, after `tokens` are committed but not read."""
    for token in tokens:
        session.append(token)
    return session
