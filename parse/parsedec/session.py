"""One request in one model: the tokens committed so far and the cache behind them.

This is the only place that touches a cache. A session's tokens are in three parts:

    cached    committed and in the cache                        tokens[:cached]
    pending   committed, not yet read by the model              tokens[cached:]
    staged    read by the model in the last `tree` or `judge`, not committed; `keep` says which of them stay

`next_logits` are the model's logits after the last committed token, whenever nothing is pending; after a `keep` they
come from the pass that staged the rows, so decoding on never needs another prefill.

Shapes in this file:  N staged rows, K cuts or probes, S suffix rows a probe, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from parsedec import kv, masks
from parsedec.errors import IncompatibleStack, PromptError
from parsedec.model import LanguageModel
from parsedec.staged import JudgeRows, Staged, check_cuts, stage_draft
from parsedec.types import JudgePath, Seen, Tree

# Forked probes copy the cache once each; a batch holds at most so many cached positions in all
FORKED_COLUMNS = 1 << 16


class Session:
    """Eager backend: any Hugging Face causal LM, CPU or CUDA, batch 1."""

    def __init__(self, model: LanguageModel, taps: tuple[int, ...] = ()) -> None:
        self.model = model
        self.taps = taps
        self.tokens: list[int] = []
        self.cached = self.calls = self.rows = 0
        self._cache = kv.new_cache(model.hf)
        self._logits: Tensor | None = None  # after the last cached row
        self._staged: Staged | None = None
        self._tap_rows: list[Tensor] = []  # [rows, L, H] each, together one row per cached token
        # Recurrent models go back by restoring: committed length -> (cache, logits after it). First and latest feed.
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
        """Tokens that can still be committed before the context is full."""
        return self.model.context_limit - self.length

    def seen(self, start: int) -> Seen:
        """Taps of the cached rows from `start` on."""
        if not self.taps:
            return Seen()
        wanted, parts = self.cached - start, []
        for rows in reversed(self._tap_rows):  # a step asks for the last few; joining all each time would be quadratic
            if wanted <= 0:
                break
            parts.append(rows[-wanted:])
            wanted -= len(rows)
        if len(parts) == 1:
            return Seen(parts[0])
        none = self._tap_rows[-1][:0] if self._tap_rows else torch.empty(0, len(self.taps), self.model.hidden_size)
        return Seen(torch.cat([none, *reversed(parts)]))

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Commit `tokens`, read everything pending, return the logits after the last token [V]."""
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
        """Commit a token without reading it: the root of the next tree."""
        self._drop_staged()
        self.tokens.append(token)

    def read_ahead(self) -> None:
        """Read all pending tokens but the last; there is more than one after a rewind or an injection."""
        if len(self.pending) > 1:
            self._read_pending(self.length - 1)

    def tree(self, tree: Tree) -> Tensor:
        """Read a tree of guesses whose node 0 is the last committed token, which is pending.

        Returns the logits after every node [N, V]; `keep` then commits the accepted path.
        """
        self._drop_staged()
        self._check_room(tree.depth)
        self.read_ahead()
        if self.pending != [tree.tokens[0]]:
            raise ValueError(f"tree root is {tree.tokens[0]}, the pending tokens {self.pending}; expected the same")
        base = kv.snapshot(self._cache) if self.model.recurrent and tree.size > 1 else None
        if tree.is_chain:
            logits, taps = self._forward(list(tree.tokens), keep=tree.size)
        else:
            logits, taps = self._read_branching(tree)
        taps = self._commit_read(1, logits, taps)
        self._staged = Staged(list(tree.tokens[1:]), dict(enumerate(logits[1:])), taps)
        if base is not None:
            self._staged.before = (base, [tree.tokens[0]])
        return logits

    def keep(self, path: Sequence[int]) -> None:
        """Commit the accepted path of the staged tree: node indices from the root on."""
        if self._staged is None or self._staged.logprobs is not None or not path or path[0] != 0:
            raise ValueError(f"keep({list(path)}) needs a staged tree and a path that starts at its root, node 0")
        self._keep_rows([node - 1 for node in path[1:]])

    def judge(
        self,
        draft: Sequence[int],
        cuts: Sequence[int],
        suffix: Sequence[int],
        *,
        probes: Sequence[int] | None = None,
        path: JudgePath = JudgePath.PACKED,
        wanted: Sequence[int] | None = None,
    ) -> JudgeRows:
        """Read a draft and, after each probed cut, the verification suffix; nothing is committed.

        draft    N tokens that would follow the committed ones
        cuts     ascending positions in 1..N at which the draft may be kept; their next-token logits are remembered
        suffix   S tokens, appended once per probe
        probes   the cuts to judge in this pass (default: all)
        wanted   ids whose logits will be read, for sessions that do not have all of them (here they are all there)

        Packed: one pass of N + K*S rows (and pending ones). Forked: the draft, then a batch of K suffixes. A draft that
        begins with the staged one is read from there on: only its new rows are computed, and those of the probes.
        """
        if not self.tokens:
            raise PromptError("a draft was judged on an empty session; feed the prompt first.")
        probes = list(cuts if probes is None else probes)
        check_cuts(len(draft), cuts, probes, suffix)
        self._check_room(len(draft) + len(suffix))
        before = self.rows
        done = self._staged.reusable(draft, cuts) if self._staged else 0
        if not done:
            self._drop_staged()
        if path is JudgePath.PACKED:
            probe_logits = self._read_packed(draft, cuts, suffix, probes, done)
        else:
            if done < len(draft):
                self._read_in_segments(draft, cuts, done)
            probe_logits = self._probe_forked(suffix, probes)
        assert self._staged is not None
        assert self._staged.logprobs is not None
        return JudgeRows(probe_logits.float(), self._staged.logprobs, self.rows - before, path)

    def keep_draft(self, cut: int) -> None:
        """Commit the first `cut` tokens of the judged draft: 0 or one of the cuts the pass was told of."""
        if self._staged is None or self._staged.logprobs is None:
            raise ValueError(f"keep_draft({cut}) needs a judged draft; call judge() first")
        if cut and cut - 1 not in self._staged.known:
            raise ValueError(f"keep_draft({cut}): the logits there are not known; expected 0 or one of the cuts")
        self._keep_rows(list(range(cut)))

    def rewind(self, length: int) -> None:
        """Go back to the first `length` committed tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"rewind({length}) on a session of {self.length} tokens; expected 0 to {self.length}")
        self._drop_staged()
        if length < self.cached or (length == self.cached and self._logits is None):
            self._go_back(length)
        del self.tokens[length:]

    def fork(self) -> Session:
        """An independent copy; attention caches are shared until one of the two grows, so it costs next to nothing."""
        self._drop_staged()
        twin = copy.copy(self)  # a new Session would make a cache, which takes longer than the rest
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
        """One forward of len(ids) rows behind the cache: (logits [kept, V], taps [rows, L, H] or None)."""
        self.calls += 1
        self.rows += len(ids)
        where = None if positions is None else positions[None]
        logits, taps = self.model.forward([ids], self._cache, keep=keep, positions=where, mask=mask, taps=self.taps)
        return logits[0], None if taps is None else taps[0]

    def _read_pending(self, end: int) -> None:
        """Read the pending tokens before position `end`."""
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
        positions = torch.tensor(tree.depths()) + self.cached
        return self._forward(
            list(tree.tokens),
            keep=tree.size,
            positions=positions,
            mask=self._mask(masks.tree_mask(self.cached, tree.parents), positions),
        )

    def _read_packed(
        self, draft: Sequence[int], cuts: Sequence[int], suffix: Sequence[int], probes: list[int], done: int
    ) -> Tensor:
        """Probes and what of the draft is not staged yet in one pass; stages it, returns the probes' logits [K, V]."""
        if obstacle := self.model.mask_obstacle:
            raise IncompatibleStack(
                f"{self.model.name} has {obstacle}; the packed judge pass would be wrong on it. "
                "Use judge.path=auto or forked."
            )
        lead = len(self.pending)  # none once a part of the draft is staged
        tokens = [*self.pending, *draft[done:]]
        ends = [lead + cut for cut in probes]  # the pending tokens are a prefix that every probe sees
        n, new, s = lead + len(draft), len(tokens), len(suffix)
        positions = masks.probe_positions(self.cached, n, ends, s)  # of the staged rows, too: they are columns here
        logits, taps = self._forward(
            tokens + list(suffix) * len(probes),
            keep=torch.tensor([*range(new), *(new + s * (k + 1) - 1 for k in range(len(probes)))]),
            positions=positions[done:],
            mask=self._mask(masks.probe_mask(self.cached, n, ends, s)[done:], positions),
        )
        kv.cut_tail(self._cache, s * len(probes))
        taps = self._commit_read(lead, logits, None if taps is None else taps[:new])
        if done < len(draft):
            self._staged = stage_draft(self._staged, self._logits, draft[done:], cuts, logits[lead:new], taps)
        return logits[new:]

    def _read_in_segments(self, draft: Sequence[int], cuts: Sequence[int], done: int) -> None:
        """Stage what is new of the draft causally; for recurrent models in segments, with a snapshot at every cut."""
        if not done:
            self.feed([])  # the snapshots start behind the committed tokens
        recurrent = self.model.recurrent
        stops = sorted({*(cut for cut in cuts if cut > done), len(draft)}) if recurrent else [len(draft)]
        snapshots = dict(self._staged.snapshots) if self._staged else {}
        if recurrent and not done:
            snapshots[0] = kv.snapshot(self._cache)
        parts, taps, start = [], [], done
        for stop in stops:
            logits, tap = self._forward(list(draft[start:stop]), keep=stop - start)
            parts.append(logits)
            taps += [] if tap is None else [tap]
            if recurrent:
                snapshots[stop] = kv.snapshot(self._cache)
            start = stop
        tap_rows = torch.cat(taps) if taps else None
        self._staged = stage_draft(self._staged, self._logits, draft[done:], cuts, torch.cat(parts), tap_rows)
        self._staged.snapshots = snapshots

    def _probe_forked(self, suffix: Sequence[int], probes: list[int]) -> Tensor:
        """Batches of suffixes, each on a copy of the cache that ends at its cut: logits [K, V]."""
        assert self._staged is not None
        at_once = max(1, FORKED_COLUMNS // (self.cached + len(self._staged.tokens) + len(suffix)))
        return torch.cat([self._probe_batch(suffix, probes[i : i + at_once]) for i in range(0, len(probes), at_once)])

    def _probe_batch(self, suffix: Sequence[int], probes: list[int]) -> Tensor:
        assert self._staged is not None
        n, s, k = len(self._staged.tokens), len(suffix), len(probes)
        branches = [self._staged.snapshots[cut] for cut in probes] if self.model.recurrent else []
        wide = kv.widen(self._cache, branches, [n - cut for cut in probes])
        columns = torch.arange(self.cached + n + s)
        visible = (columns[None] >= n - torch.tensor(probes)[:, None]).long()  # [K, T + N + S], left-padded
        self.calls += 1
        self.rows += s * k
        positions = torch.tensor(probes)[:, None] + self.cached + torch.arange(s)  # [K, S]
        mask = visible.to(self.model.device) if self.model.has_attention else None
        logits, _ = self.model.forward([list(suffix)] * k, wide, keep=1, positions=positions, mask=mask)
        return logits[:, -1]

    def _mask(self, allowed: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        windows = self.model.windows
        columns_at = positions[:0]  # read only where there is a window
        if any(windows.values()):
            columns_at = torch.cat([torch.arange(self.cached), positions])
        return masks.for_model(
            allowed,
            positions[-allowed.shape[0] :],
            columns_at,
            windows=windows,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    def _commit_read(self, rows: int, logits: Tensor, taps: Tensor | None) -> Tensor | None:
        """The first `rows` rows of a pass were pending tokens, which are read now. Returns the taps of the others."""
        if rows:
            self.cached += rows
            self._logits = logits[rows - 1].clone()
        if taps is None:
            return None
        self._tap_rows.append(taps[:rows])
        return taps[rows:]

    def _keep_rows(self, rows: list[int]) -> None:
        staged = self._staged
        assert staged is not None
        self._staged = None
        total = len(staged.tokens)
        if self.model.recurrent and len(rows) < total:
            self._restore(staged, rows)
        elif rows == list(range(len(rows))):
            kv.cut_tail(self._cache, total - len(rows))
        else:
            kv.keep_rows(self._cache, self.cached, rows)
        self.tokens.extend(staged.tokens[row] for row in rows)
        self.cached += len(rows)
        if rows:
            self._logits = staged.known[rows[-1]]
            if staged.taps is not None:
                self._tap_rows.append(staged.taps[rows])

    def _restore(self, staged: Staged, rows: list[int]) -> None:
        """Recurrent models: back to the snapshot after len(rows) rows, or to before the pass to read them again."""
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
        """Remember the state after a feed; the first one (the prompt) and the latest are enough for our rewinds."""
        while len(self._marks) > 1:
            self._marks.pop(max(self._marks))
        self._marks[self.cached] = (kv.snapshot(self._cache), self._logits)

    def _go_back(self, length: int) -> None:
        """Shorten the cache to at most `length` rows; what is missing before `length` becomes pending again."""
        if self.model.recurrent:
            at = max((mark for mark in self._marks if mark <= length), default=0)
            cache, self._logits = self._marks.get(at, (kv.new_cache(self.model.hf), None))
            self._cache = kv.snapshot(cache)
            self._marks = {mark: state for mark, state in self._marks.items() if mark <= at}
        else:
            at = max(0, length - 1)  # the last token is read again: the logits after it are gone
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
