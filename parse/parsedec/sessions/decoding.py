"""One request in one model, as decoding needs it: its committed tokens and the cache that holds them.

Only this class and `Session`, which adds the judging of drafts, decide what a request's cache holds. Forwards write
into it: the model's own, those shared by several requests (`joint`), and those of `branches`, on copies. A session's
tokens are of three kinds:

    cached    committed, and in the cache                       tokens[:cached]
    pending   committed, but not yet read by the model          tokens[cached:]
    staged    read by the last `tree` or `judge`, but not committed; `keep` or `keep_draft` says which of them stay

`next_logits` are the model's logits after the last committed token, whenever nothing is pending. After a `keep` they
come from the pass that staged the rows, so going on never takes another prefill.

Shapes in this file:  N nodes of a tree, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from transformers import DynamicCache

from parsedec import masks
from parsedec.batching import fibers
from parsedec.batching.joint import HfPass, Output, alone, joint_obstacle
from parsedec.errors import IncompatibleStack, PromptError
from parsedec.models.language_model import LanguageModel
from parsedec.sessions import kv
from parsedec.sessions.inference import whole_numbers
from parsedec.sessions.staged import Staged
from parsedec.types import Seen, Tree

CPU = torch.device("cpu")


class DecodingSession:
    """Reads and commits tokens, verifies trees of guesses, and rewinds; for any Hugging Face causal LM, batch 1.

    taps  layers whose hidden states are recorded for every row, as indices into `output_hidden_states`
    ids   size of the vocabulary the tokens come from, if that is another model's: ids that this model has no row for
          are then mapped (`LanguageModel.readable`)
    """

    def __init__(self, model: LanguageModel, taps: tuple[int, ...] = (), *, ids: int = 0) -> None:
        self.model = model
        self._maps_ids = ids > model.vocab_size
        self.taps = taps
        self.tokens: list[int] = []
        self.cached = self.calls = self.rows = 0
        self._cache = kv.new_cache(model.hf)
        self._logits: Tensor | None = None  # after the last cached row
        self._staged: Staged | None = None
        self._tap_rows: list[Tensor] = []  # [rows, L, H] each, together one row per cached token
        # Recurrent models rewind by restoring a saved state: committed length -> (cache, logits after it)
        self._marks: dict[int, tuple[DynamicCache, Tensor | None]] = {}

    @property
    def length(self) -> int:
        """Committed tokens, pending ones included."""
        return len(self.tokens)

    @property
    def pending(self) -> list[int]:
        """Committed tokens that the model has not read yet."""
        return self.tokens[self.cached :]

    @property
    def next_logits(self) -> Tensor | None:
        """Logits after the last committed token [V]; None while tokens are pending."""
        return self._logits if self.cached == self.length else None

    @property
    def room(self) -> int:
        """How many more tokens fit into the context."""
        return self.model.context_limit - self.length

    def seen(self, start: int) -> Seen:
        """Hidden states of the cached rows from `start` on."""
        if not self.taps:
            return Seen()
        wanted, parts = self.cached - start, []
        for rows in reversed(self._tap_rows):  # a step wants only the last few: joining all would be quadratic
            if wanted <= 0:
                break
            have = len(rows)
            parts.append(rows if have <= wanted else rows[-wanted:])
            wanted -= have
        if len(parts) == 1:
            return Seen(parts[0])
        if not parts:
            parts = [
                self._tap_rows[-1][:0] if self._tap_rows else torch.empty(0, len(self.taps), self.model.hidden_size)
            ]
        return Seen(torch.cat(parts[::-1]))

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Commit `tokens`, read everything that is pending, and return the logits after the last token [V].

        Raises PromptError if the context has no room for them, or if there is nothing to read.
        """
        self._drop_staged()
        self._check_room(len(tokens))
        self.tokens.extend(tokens)
        if self.pending:
            self._read_pending(self.length)
            if self.model.recurrent:
                self._mark()
        if self._logits is None:
            raise PromptError("feed() was given no tokens on an empty session; expected at least one token.")
        return self._logits

    def append(self, token: int) -> None:
        """Commit a token without reading it, as the root of the next tree."""
        self._drop_staged()
        self.tokens.append(token)

    @property
    def prefetches(self) -> bool:
        """Whether `prefetch` saves time on this backend."""
        return False

    def prefetch(self, token: Tensor) -> int:
        """The value of a token [] that is still on the device.

        Where `prefetches`, the model already reads the token while its value is fetched, so that the device never waits
        for the host. Either way the caller then commits the token as usual.
        """
        return int(token)

    def read_ahead(self) -> None:
        """Read all pending tokens but the last. More than one is pending after a rewind or an injection."""
        if len(self.pending) > 1:
            self._read_pending(self.length - 1)

    def tree(self, tree: Tree) -> Tensor:
        """Read a tree of guesses. Its node 0 must be the last committed token, and that token must be pending.

        Returns the logits after every node [N, V], in the tree's order; `keep` then commits the accepted path.

        Rows are read depth-first, so that the path of first children is contiguous: keeping it only cuts off the rest.
        """
        self._drop_staged()
        self._check_room(tree.depth)
        self.read_ahead()
        if self.pending != [tree.tokens[0]]:
            raise ValueError(f"tree root is {tree.tokens[0]}, the pending tokens {self.pending}; expected the same")
        size = tree.size
        base = kv.snapshot(self._cache) if self.model.recurrent and size > 1 else None
        laid, row_of = tree.depth_first()
        if tree.is_chain:
            logits, taps = self._forward(list(tree.tokens), keep=size)
        else:
            logits, taps = self._read_branching(laid)
        self.cached += 1
        self._logits = logits.select(0, 0)  # a view costs nothing: the staged rows keep these logits alive
        if taps is not None:
            self._tap_rows.append(taps.narrow(0, 0, 1))
        self._staged = Staged(list(laid.tokens[1:]), logits.narrow(0, 1, size - 1), taps, row_of)
        if base is not None:
            self._staged.before = (base, [tree.tokens[0]])
        return logits if laid is tree else logits.index_select(0, whole_numbers(row_of, logits.device))

    def keep(self, path: Sequence[int]) -> None:
        """Commit the accepted path of the staged tree, given as node indices from the root on."""
        if self._staged is None or self._staged.logprobs is not None or not path or path[0] != 0:
            raise ValueError(f"keep({list(path)}) needs a staged tree and a path that starts at its root, node 0")
        self._keep_rows([self._staged.row_of[node] - 1 for node in path[1:]])

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` committed tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"rewind({length}) on a session of {self.length} tokens; expected 0 to {self.length}")
        self._drop_staged()
        if length < self.cached or (length == self.cached and self._logits is None):
            self._go_back(length)
        del self.tokens[length:]

    def fork(self) -> Self:
        """An independent copy. It costs next to nothing: keys and values are shared until one of the two grows."""
        self._drop_staged()
        twin = copy.copy(self)  # __init__ would make a new cache, which takes longer than all of this
        twin.tokens, twin.calls, twin.rows = list(self.tokens), 0, 0
        twin._cache, twin._tap_rows, twin._marks = kv.snapshot(self._cache), list(self._tap_rows), dict(self._marks)
        return twin

    def _forward(
        self,
        ids: list[int],
        *,
        keep: int | Tensor,
        positions: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One forward of len(ids) rows behind the cache: logits [kept, V], and taps [rows, L, H] or None."""
        self.calls += 1
        self.rows += len(ids)
        if self._maps_ids:
            ids = self.model.readable(ids)
        request = fibers.current()
        if request is None or joint_obstacle(self.model):
            return alone(self.model, self._cache, ids, keep, positions, mask, self.taps)
        out: Output = request.ask(HfPass(self.model, self._cache, ids, keep, positions, mask, self.taps))
        return out

    def _read_pending(self, end: int) -> None:
        """Read the pending tokens up to position `end`, which is not read."""
        logits, taps = self._forward(self.tokens[self.cached : end], keep=1)
        self._logits = logits[-1]
        self.cached = end
        if taps is not None:
            self._tap_rows.append(taps)

    def _read_branching(self, tree: Tree) -> tuple[Tensor, Tensor | None]:
        if obstacle := self.model.mask_obstacle:
            raise IncompatibleStack(
                f"{self.model.name} has {obstacle}; a branching tree cannot be verified on it. "
                "Choose an inner speculator that drafts chains, or inner=none."
            )
        cached = self.cached
        positions = whole_numbers([cached + depth for depth in tree.depths()], CPU)
        return self._forward(
            list(tree.tokens),
            keep=tree.size,
            positions=positions,
            mask=self._mask(masks.tree_mask(cached, tree.parents), positions),
        )

    def _mask(self, allowed: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        windows = self.model.windows
        rows_at = columns_at = positions  # only looked at where there is a window
        if any(windows.values()):
            rows_at, columns_at = positions[-len(allowed) :], torch.cat([torch.arange(self.cached), positions])
        return masks.for_model(
            allowed,
            rows_at,
            columns_at,
            windows=windows,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    def _keep_rows(self, rows: list[int]) -> None:
        staged = self._staged
        assert staged is not None
        self._staged = None
        total, in_one_piece = len(staged.tokens), rows == list(range(len(rows)))
        if self.model.recurrent and len(rows) < total:
            self._restore(staged, rows)
        elif in_one_piece:
            kv.cut_tail(self._cache, total - len(rows))
        else:
            kv.keep_rows(self._cache, self.cached, rows)
        self.tokens.extend(staged.tokens[row] for row in rows)
        self.cached += len(rows)
        if rows:
            self._logits = staged.known[rows[-1]]
        if staged.taps is not None and (rows or staged.row_of):
            if staged.row_of:  # a tree: `kept_taps` has the root's row again, in one tensor with the others
                self._tap_rows.pop()
            self._tap_rows.append(staged.kept_taps(rows))

    def _restore(self, staged: Staged, rows: list[int]) -> None:
        """Recurrent models: restore the snapshot after len(rows) rows; or that before the pass, and read them again."""
        if len(rows) in staged.snapshots:
            self._cache = kv.snapshot(staged.snapshots[len(rows)])
            return
        assert staged.before is not None
        cache, read = staged.before
        self._cache = kv.snapshot(cache)
        self._forward(read + [staged.tokens[row] for row in rows], keep=1)

    def _drop_staged(self) -> None:
        if self._staged is not None:
            self._keep_rows([])

    def _mark(self) -> None:
        """Save the state after a feed. Only the first (the prompt's) and the latest are kept; rewinds need no other."""
        while len(self._marks) > 1:
            self._marks.pop(max(self._marks))
        self._marks[self.cached] = (kv.snapshot(self._cache), self._logits)

    def _go_back(self, length: int) -> None:
        """Shorten the cache to at most `length` rows; committed tokens that are no longer in it are pending again."""
        if self.model.recurrent:
            at = max((mark for mark in self._marks if mark <= length), default=0)
            cache, self._logits = self._marks.get(at, (kv.new_cache(self.model.hf), None))
            self._cache = kv.snapshot(cache)
            self._marks = {mark: state for mark, state in self._marks.items() if mark <= at}
        else:
            at = max(0, length - 1)  # the last token has to be read again for the logits after it
            kv.cut_tail(self._cache, self.cached - at)
            self._logits = None
        if self.taps:
            self._tap_rows = [rows] if (rows := self.seen(0).taps) is not None and at else []
            self._tap_rows = [rows[:at] for rows in self._tap_rows]
        self.cached = at

    def _check_room(self, extra: int) -> None:
        if self.length + extra > self.model.context_limit:
            raise PromptError(
                f"{self.length} tokens plus {extra} more exceed the context of {self.model.name}, "
                f"{self.model.context_limit} tokens. Shorten the prompt or lower max_new_tokens."
            )
