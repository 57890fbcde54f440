"""PARD: a small causal LM, tuned to fill in masks, guesses several tokens in one pass.

An et al. 2025 (arXiv 2504.18583); checkpoints in the format of their release (AMD-AGI/PARD): ordinary causal LMs with
`pard_token`, the mask token's id, in config.json.

One draft pass reads the tokens committed since the last one and k - 1 copies of the mask token:

    rows      new_1 ... new_n = root   MASK    MASK   ...  MASK          (causal)
    logits                     |        |       |            |
    guesses                    1        2       3            k

The mask rows are cut off the draft model's cache right after the pass, so that it holds only real tokens. With k = 1
this is vanilla speculative decoding.

Lossless also when sampling: guess i is drawn from row i, whatever was drawn for earlier guesses, and the row travels
with it as `logq`. That is all the acceptance rule needs: if the earlier guesses are accepted, guess i is a draw from a
known distribution. That the row does not depend on them only lowers acceptance.

Shapes in this file:  n tokens not yet read, k guesses, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from parsedec.errors import IncompatibleStack, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.sessions.backends import open_session
from parsedec.sessions.session import Session
from parsedec.types import Needs, Outcome, Seen, Tree
from parsedec_adapters.draft_model import drafting_model, extended, fitted

# A pass gives the logits of all its rows; more new tokens than this (a kept draft) are read in a pass of their own
MOST_NEW = 32


@dataclass(slots=True)
class PardState:
    """The committed tokens are those of `session`, the last of which is not read yet, followed by `new`.

    `ahead` caches the last proposal: the same tokens, all of them read. The next commit takes it. It never changes
    proposals, only the cost of the next one.
    """

    session: Session
    new: tuple[int, ...]
    sampler: Sampler
    ahead: Session | None = None


@dataclass(frozen=True, kw_only=True)
class Pard:
    """A chain of up to `length` guesses from one pass of `model`.

    model       as in `DraftModel`
    mask_token  id of the mask token; None: `pard_token` of the checkpoint's config.json
    """

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    length: int = 8
    model: LanguageModel | str | None = None
    mask_token: int | None = None
    vocab: int = 0  # the target's, set by `bind`

    def __post_init__(self) -> None:
        require_number("inner.length", self.length, whole=True, low=1)
        if self.mask_token is not None:
            require_number("inner.mask_token", self.mask_token, whole=True, low=0)

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Pard:
        model = drafting_model("pard", self.model, target, draft)
        mask = self.mask_token
        if mask is None:
            mask = getattr(model.hf.config, "pard_token", None)
        if mask is None:
            raise IncompatibleStack(
                f"inner=pard needs a mask token, but the config.json of {model.name} has no 'pard_token', so it was "
                "not trained to fill in masks. Use a PARD checkpoint, or set inner.mask_token, or inner=draft_model."
            )
        if not isinstance(mask, int) or not 0 <= mask < model.vocab_size:
            raise IncompatibleStack(
                f"inner=pard has mask token {mask!r}, but {model.name} has the tokens 0 to {model.vocab_size - 1}. "
                "Correct inner.mask_token, or 'pard_token' in the checkpoint's config.json."
            )
        return replace(self, model=model, mask_token=mask, vocab=target.vocab_size)

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> PardState:
        if not isinstance(self.model, LanguageModel):
            raise IncompatibleStack("inner=pard was not bound to a target; call bind(target, draft) first.")
        return PardState(extended(open_session(self.model, ids=self.vocab), tokens), (), sampler)

    def propose(self, state: PardState, budget: int) -> Tree:
        root = state.new[-1] if state.new else state.session.tokens[-1]
        # the last guess needs no row of its own
        length = min(self.length, budget, state.session.room - len(state.new) + 1)
        if length < 1:
            return Tree.chain([root])
        logits = fitted(self._read(state, length - 1), self.vocab)  # [k, V]
        if state.sampler.greedy:
            return Tree.chain([root, *logits.argmax(-1).tolist()])
        logq = state.sampler.log_distribution(logits)
        guesses = [state.sampler.draw(row) for row in logq.exp()]
        return Tree.chain([root, *guesses], logq[[0, *range(length)]])

    def commit(self, state: PardState, outcome: Outcome) -> PardState:
        session, new = state.session, (*state.new, *outcome.tokens)
        if state.ahead is not None and outcome.tokens:
            session, new = extended(state.ahead, outcome.tokens[:1]), outcome.tokens[1:]
            state.ahead = None
        if len(new) > MOST_NEW:
            session, new = extended(session.fork(), new), ()
        return PardState(session, new, state.sampler)

    def rewind(self, state: PardState, length: int) -> PardState:
        known = state.session.length
        if length >= known:
            return PardState(state.session, state.new[: length - known], state.sampler)
        session = state.session.fork()
        session.rewind(length - 1)  # the last token has to be unread
        return PardState(extended(session, state.session.tokens[length - 1 : length]), (), state.sampler)

    def _read(self, state: PardState, masks: int) -> Tensor:
        """The draft model's logits after the root and after each mask [k, V']; the masks are not kept."""
        assert self.mask_token is not None
        ahead = state.session.fork()
        read = len(state.new)
        chain = [ahead.tokens[-1], *state.new, *[self.mask_token] * masks]
        logits: Tensor = ahead.tree(Tree.chain(chain))  # [1 + n + masks, V']
        ahead.keep(range(1 + read))
        state.ahead = ahead
        return logits[read:]
