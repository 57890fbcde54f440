"""A speculator that knows the answer and is right with a given probability: for tests and cost studies.

Whether the guess at a position is right depends only on the seed and the position, so runs are repeatable. If no answer
is given, it asks the target, which then decodes ahead greedily in a session of its own: every guess costs a call of the
target that no counter shows. Calls and accepted tokens are those of a drafter with that rate; seconds mean nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from parsedec.errors import IncompatibleStack, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.types import Needs, Outcome, Sampling, Seen, Tree
from parsedec_adapters.draft_model import DraftModel, DraftState

ScriptedState = tuple[int, ...] | DraftState  # the committed tokens; if no answer is given, the target's session


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """Guesses a chain of `depth` tokens, each right with probability `rate`.

    answer  the tokens of the only request to serve, including the prompt; None: what the target would write greedily
    """

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    answer: Sequence[int] | None = None
    rate: float
    depth: int = 4
    seed: int = 0
    vocab: int = 0  # the target's, set by `bind`
    oracle: DraftModel | None = None  # the target as its own draft model, set by `bind`

    def __post_init__(self) -> None:
        require_number("inner.rate", self.rate, low=0, high=1)
        require_number("inner.depth", self.depth, whole=True, low=1)
        require_number("inner.seed", self.seed, whole=True)

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Scripted:
        oracle = DraftModel(length=self.depth, model=target).bind(target, None) if self.answer is None else None
        return replace(self, vocab=target.vocab_size, oracle=oracle)

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> ScriptedState:
        if self.answer is not None:
            return tuple(tokens)
        return self._asked().start(tokens, seen, Sampler(Sampling()))

    def propose(self, state: ScriptedState, budget: int) -> Tree:
        if isinstance(state, DraftState):
            start = state.session.length
            root, *right = self._asked().propose(state, budget).tokens
        else:
            assert self.answer is not None
            start, root = len(state), state[-1]
            right = list(self.answer[start : start + min(self.depth, budget)])
        return Tree.chain([root, *(self._guess(start + i, token) for i, token in enumerate(right))])

    def commit(self, state: ScriptedState, outcome: Outcome) -> ScriptedState:
        return self._asked().commit(state, outcome) if isinstance(state, DraftState) else state + outcome.tokens

    def rewind(self, state: ScriptedState, length: int) -> ScriptedState:
        return self._asked().rewind(state, length) if isinstance(state, DraftState) else state[:length]

    def _asked(self) -> DraftModel:
        if self.oracle is None:
            raise IncompatibleStack("inner=scripted has no answer and was not bound to a target; call bind first.")
        return self.oracle

    def _guess(self, position: int, token: int) -> int:
        """The right token, or as a wrong one its neighbour (any other would do)."""
        if random.Random(f"{self.seed}:{position}").random() < self.rate:
            return token
        wrong = token ^ 1
        return token - 1 if self.vocab and wrong >= self.vocab else wrong
