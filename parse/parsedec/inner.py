"""The inner level: a model decodes token by token, helped by the guesses of a swappable speculator.

The same loop serves the target and the draft model, with inner=none as well: the baseline runs through the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from parsedec.acceptance import Acceptance, Siblings
from parsedec.answer import Answer
from parsedec.errors import shown
from parsedec.meter import Tally
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler, checked_token
from parsedec.sessions.backends import open_session
from parsedec.sessions.inference import inference
from parsedec.sessions.session import Session
from parsedec.sessions.staged import token_logprobs
from parsedec.types import Author, Needs, Outcome, Seen, Shown, StopReason, Tree


class InnerSpeculator(Protocol):
    """Guesses tokens for one model. It never decides: acceptance belongs to the engine.

    A request runs as  s = start(tokens, seen, sampler);  repeat { tree = propose(s, budget);  s = commit(s, outcome) }.
    The object holds weights and settings only. Whatever changes during a request is in the state, so one speculator
    serves many requests, and an outer loop can keep an old state and return to it. (States are `Any` here: each
    speculator has its own kind.)
    """

    lossless: ClassVar[bool]
    """Whether the output keeps the target's distribution."""

    @property
    def needs(self) -> Needs:
        """What the target must provide, e.g. hidden states of some layers."""

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Self:
        """A copy that serves `target`; raises IncompatibleStack if it cannot. `draft` is the stack's draft model."""

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> Any:
        """The state for T + 1 committed tokens, the last of which is the root; `seen` holds T rows of taps."""

    def propose(self, state: Any, budget: int) -> Tree:
        """A tree at most `budget` levels deep below the root; must not change the state. Deeper levels are cut off,
        since no more tokens are wanted."""

    def commit(self, state: Any, outcome: Outcome) -> Any:
        """The state after more committed tokens, whoever wrote them; commit(commit(s, a), b) == commit(s, a + b)."""

    def rewind(self, state: Any, length: int) -> Any:
        """The state for the first `length` committed tokens, the last of which is the root."""


@runtime_checkable
class NotesRefused(Protocol):
    """A speculator that is also told which text an outer level refused, since the target may write something similar.

    Optional, in addition to `InnerSpeculator`.
    """

    def note_refused(self, state: Any, at: int, tokens: Sequence[int]) -> Any:
        """The state after `tokens`, drafted to follow the first `at` committed tokens, were refused. Rewinding the
        state must not forget them."""


class NoSpeculation:
    """inner=none: one token per call, through the same loop as every speculator. Its state is the committed tokens."""

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> Self:
        return self

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> tuple[int, ...]:
        return tuple(tokens)

    def propose(self, state: tuple[int, ...], budget: int) -> Tree:
        return Tree.chain(state[-1:])

    def commit(self, state: tuple[int, ...], outcome: Outcome) -> tuple[int, ...]:
        return state + outcome.tokens

    def rewind(self, state: tuple[int, ...], length: int) -> tuple[int, ...]:
        return state[:length]


class Decoder:
    """A session and its speculator, kept in step whatever an outer loop does in between."""

    def __init__(
        self,
        model: LanguageModel,
        inner: InnerSpeculator,
        sampler: Sampler,
        tally: Tally,
        acceptance: Acceptance | None = None,
        layers: Sequence[int] = (),
        *,
        session: Session | None = None,
    ) -> None:
        """`layers`: hidden states that the session records for other readers than the speculator. `session`: one to use
        in place of a new one; it has to record all of these states."""
        own = inner.needs.hidden_layers
        shown = own + tuple(layer for layer in layers if layer not in own)
        self._own_layers = len(own)
        self.session = open_session(model, shown) if session is None else session
        self.inner = inner
        self.sampler = sampler
        self.tally = tally
        self.notes: set[str] = set()  # for readers of the trace
        self.acceptance: Acceptance = acceptance or Siblings()
        self.logprobs: list[float] | None = None  # of the tokens written; recorded if a caller has set it to a list
        self.top: int | None = None  # how many of the most probable tokens to record in `shown`; None: record nothing
        self.shown: list[Shown] = []
        # whether every token is read on its own, and is the one the sampler chooses
        self._plain = isinstance(inner, NoSpeculation) and (self.acceptance.lossless or sampler.greedy)
        self._whole = True  # whether the caller wants all that `write` can write
        self._state: Any = None
        self._told = 0  # committed tokens that the speculator's state knows of
        self._refused: list[tuple[int, Sequence[int]]] = []  # still to be told: (tokens before them, refused tokens)

    @inference
    def step(self, budget: int) -> list[int]:
        """Commit at least one and at most `budget` tokens; returns them."""
        logits = self.session.next_logits
        if logits is None:
            tree = self._propose(budget - 1)
            rows = self.session.tree(tree)
            if tree.size > 1:
                return self._accept(tree, rows)
            self.session.keep([0])
            self.tally.count_tree(0, 0)
            logits = rows.select(0, 0)
        # else, after a prefill or a boundary, the next token is known without another pass
        return [self._next(logits, budget)]

    def _accept(self, tree: Tree, logits: Tensor) -> list[int]:
        """Commit the accepted path of a tree that was read, and the token after it; returns both. logits [N, V]."""
        path, bonus = self._accepted(tree, logits)
        tokens = [*(tree.tokens[node] for node in path[1:]), bonus]
        self._record(logits, tokens, path)
        self.session.keep(path)
        self.session.append(bonus)
        self.tally.count_tree(tree.depth, len(path) - 1)
        return tokens

    def _next(self, logits: Tensor, budget: int) -> int:
        """Choose the next token from its logits [V], commit and return it."""
        session = self.session
        if self._reads_on and budget > 1 and session.prefetches:
            token = checked_token(session.prefetch(self.sampler.chosen(logits)), len(logits))
        else:
            _, token = self._accepted(Tree.chain(session.tokens[-1:]), logits[None])
        session.append(token)
        self._record(logits[None], [token])
        return token

    def write(self, answer: Answer, author: Author, *, whole: bool = True) -> Iterator[list[int]]:
        """Decode until the answer stops; yields, step by step, the tokens that became part of it.

        whole   whether the caller wants the answer to its end, not just a segment: every token is then sure to be read
        """
        self._whole = whole
        while answer.stop is None:
            if self.session.room <= 0:
                answer.stop = StopReason.CONTEXT_LIMIT
                return
            yield answer.extend(self.step(min(answer.remaining, self.session.room)), author)

    @property
    def _reads_on(self) -> bool:
        """Whether the next token will be read on its own, with nothing else asked of the device before that."""
        return self._plain and self._whole and self.logprobs is None and self.top is None

    def rewind(self, length: int) -> None:
        """Go back to the first `length` tokens, speculator included."""
        self.session.rewind(length)
        if self._told > length:
            self._state = self.inner.rewind(self._state, length) if length else None
            self._told = length

    def note_refused(self, tokens: Sequence[int]) -> None:
        """An outer level refused `tokens`, which were to follow the committed ones."""
        if tokens and isinstance(self.inner, NotesRefused):
            self._refused.append((self.session.length, tokens))

    def _record(self, logits: Tensor, tokens: Sequence[int], rows: Sequence[int] = (0,)) -> None:
        """Record the log-probability of tokens[i] under logits[rows[i]], if asked for."""
        if self.logprobs is not None:
            self.logprobs += token_logprobs(logits[list(rows)], tokens).tolist()
        if self.top is not None:
            seen = logits[list(rows)].float().log_softmax(-1)  # [N, V]
            best, ids = (part.tolist() for part in seen.topk(min(self.top, seen.shape[-1])))
            own = [float(seen[i, token]) for i, token in enumerate(tokens)]
            tops = [tuple(zip(*row, strict=True)) for row in zip(ids, best, strict=True)]
            self.shown += [Shown(*entry) for entry in zip(tokens, own, tops, strict=True)]

    def _seen(self, start: int) -> Seen:
        """Hidden states of the rows from `start` on in the speculator's layers, which are the session's first."""
        own = self._own_layers
        if own == len(self.session.taps):
            return self.session.seen(start)
        taps = self.session.seen(start).taps if own else None
        return Seen(None if taps is None else taps[:, :own].contiguous())

    def _propose(self, budget: int) -> Tree:
        """Tell the speculator what is new, and return its proposal for the committed tokens."""
        tokens = self.session.tokens
        self.session.read_ahead()  # the speculator is owed the taps of all tokens but the root
        if self._state is None:
            self._state = self.inner.start(tokens, self._seen(0), self.sampler)
        elif self._told < len(tokens):
            seen = self._seen(self._told - 1)
            self._state = self.inner.commit(self._state, Outcome(tuple(tokens[self._told :]), seen))
        self._told = len(tokens)
        while self._refused:
            at, refused = self._refused.pop(0)
            if at <= len(tokens) and isinstance(self.inner, NotesRefused):
                self._state = self.inner.note_refused(self._state, at, refused)
        return self._checked(self.inner.propose(self._state, max(0, budget)), max(0, budget))

    def _checked(self, tree: Tree, budget: int) -> Tree:
        """The proposal, cut off below `budget` levels; raises ValueError for one that cannot be verified."""
        name, model, root = type(self.inner).__name__, self.session.model, self.session.tokens[-1]
        if not isinstance(tree, Tree):
            raise ValueError(
                f"{name} proposed {shown(tree)}; expected a Tree, e.g. Tree.chain([{root}, …]) with the root in front"
            )
        if tree.tokens[0] != root:
            raise ValueError(
                f"{name} proposed a tree with root {tree.tokens[0]}; expected the last committed token, {root}, in "
                "front of the guesses"
            )
        if tree.size > 1 and not 0 <= min(tree.tokens) <= max(tree.tokens) < model.vocab_size:
            raise ValueError(
                f"{name} proposed tokens from {min(tree.tokens)} to {max(tree.tokens)}; expected ids of {model.name}, "
                f"0 to {model.vocab_size - 1}"
            )
        if tree.logq is not None and tree.logq.shape != (tree.size, model.vocab_size):
            raise ValueError(
                f"{name} proposed a tree with logq {list(tree.logq.shape)}; expected {[tree.size, model.vocab_size]}: "
                f"for each node, the unused row of the root included, every token of {model.name}"
            )
        return tree if tree.depth <= budget else tree.first_levels(budget)

    def _accepted(self, tree: Tree, logits: Tensor) -> tuple[list[int], int]:
        """The path the rule accepts, and the token after it; raises ValueError for what is no path of the tree."""
        name, accepted = type(self.acceptance).__name__, self.acceptance.accept(tree, logits, self.sampler)
        try:
            path, bonus = [int(node) for node in accepted[0]], int(accepted[1])
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"{name} gave {shown(accepted)}; expected (path, token): nodes and a token id") from error
        if path[:1] != [0] or any(
            not 0 < node < tree.size or tree.parents[node] != above for above, node in pairwise(path)
        ):
            raise ValueError(
                f"{name} accepted the nodes {path} of a tree with parents {list(tree.parents)}; expected a path from "
                "the root, 0, down: the parent of each node right before it"
            )
        if not 0 <= bonus < logits.shape[-1]:
            raise ValueError(f"{name} gave the token {bonus}; expected an id from 0 to {logits.shape[-1] - 1}")
        return path, bonus
