"""One request in one model: a `DecodingSession`, plus the methods that judge a draft.

`judge` stages a draft behind the committed tokens; `keep_draft` then says how much of it stays. The probes are read in
one packed pass under a mask, or as a batch of forked caches. A draft without probes is read causally, like any text.

Shapes in this file:  N staged rows, K cuts or probes, S suffix rows per probe, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parsedec import masks
from parsedec.errors import IncompatibleStack, JudgeError, PromptError
from parsedec.sessions import kv
from parsedec.sessions.branches import Branches, PaddedBranches
from parsedec.sessions.decoding import DecodingSession
from parsedec.sessions.staged import JudgeRows, ProbeRows, check_cuts, joined, stage_draft
from parsedec.types import JudgePath

# Each forked probe copies the cache: the most cached positions that the copies of one batch may add up to
FORKED_COLUMNS = 1 << 16
# The most rows of one packed pass: its mask has a line per row, as wide as the cache and the pass together
PACKED_ROWS = 4096


class Session(DecodingSession):
    """Eager backend: any Hugging Face causal LM, CPU or CUDA, batch 1."""

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
        """Read a draft and, after each probed cut, the verification suffix. Nothing is committed.

        draft    N tokens that would follow the committed ones
        cuts     ascending positions in 1..N at which the draft may be kept; the logits there are remembered
        suffix   S tokens appended to each probe; if empty, probes report what the draft's own rows show at their cuts
        probes   the cuts to judge in this pass (default: all)
        wanted   ids whose logits the caller will read, the one in favour of the draft first. Only remote sessions,
                 which cannot get all logits, use it
        path     PACKED: one pass over N + K*S rows and the pending ones. FORKED: a pass over the draft, then a batch of
                 K suffixes. Without a suffix or probes it does not matter: the N draft rows are read causally

        If the draft begins with the staged one, only its new rows and those of the probes are computed.
        Raises PromptError on an empty session or a full context, and JudgeError for cuts or a path that cannot be used.
        """
        if not self.tokens:
            raise PromptError("a draft was judged on an empty session; feed the prompt first.")
        probes = list(cuts if probes is None else probes)
        check_cuts(len(draft), cuts, probes)
        if not suffix or not probes:
            path = JudgePath.CAUSAL
        elif path not in (JudgePath.PACKED, JudgePath.FORKED):
            raise JudgeError(f"path={path} with a suffix of {len(suffix)} tokens; expected packed or forked.")
        self._check_room(len(draft) + len(suffix))
        before = self.rows
        done = self._staged.reusable(draft, cuts) if self._staged else 0
        if not done:
            self._drop_staged()
        if path is JudgePath.PACKED:
            logits, taps = self._read_packed(draft, cuts, suffix, probes, done)
        elif done < len(draft):
            self._read_causally(draft, cuts, done)
        staged = self._staged
        assert staged is not None
        assert staged.logprobs is not None
        at_cuts = staged.taps_at(probes)
        if path is JudgePath.FORKED:
            logits, taps = self._probe_forked(suffix, probes)
        elif path is JudgePath.CAUSAL:
            logits, taps = staged.logits_at(probes), at_cuts
        return JudgeRows(logits.float(), staged.logprobs, self.rows - before, path, taps, at_cuts)

    def keep_draft(self, cut: int) -> None:
        """Commit the first `cut` tokens of the judged draft: 0, or one of the cuts given to `judge`."""
        if self._staged is None or self._staged.logprobs is None:
            raise ValueError(f"keep_draft({cut}) needs a judged draft; call judge() first")
        if cut and cut - 1 not in self._staged.known:
            raise ValueError(f"keep_draft({cut}): the logits there are not known; expected 0 or one of the cuts")
        self._keep_rows(list(range(cut)))

    def fan_out(self, draft: Sequence[int], cuts: Sequence[int]) -> Branches:
        """Read a draft and open a branch behind each of `cuts`; cut 0 branches before the draft. Nothing is committed.

        `keep_draft` can then commit up to one of the cuts, or the whole draft. Branches never change the session.
        """
        self._drop_staged()
        self._check_room(len(draft))
        n = len(draft)
        self._read_causally(draft, sorted({*cuts, n} - {0}), 0)
        assert self._staged is not None and self._logits is not None  # noqa: PT018
        return self._branches(cuts, torch.stack([self._staged.known[cut - 1] if cut else self._logits for cut in cuts]))

    def _branches(self, cuts: Sequence[int], logits: Tensor) -> Branches:
        """Branches behind cuts of the staged draft, whose logits there are `logits` [B, V]."""
        return self._copies(cuts, logits)

    def _copies(self, cuts: Sequence[int], logits: Tensor) -> PaddedBranches:
        assert self._staged is not None
        n = len(self._staged.tokens)
        states = [self._staged.snapshots[cut] for cut in cuts] if self.model.recurrent else []
        wide = kv.widen(self._cache, states, [n - cut for cut in cuts])
        return PaddedBranches(self.model, wide, self.cached + n, [self.cached + cut for cut in cuts], logits)

    def _read_packed(
        self, draft: Sequence[int], cuts: Sequence[int], suffix: Sequence[int], probes: list[int], done: int
    ) -> ProbeRows:
        """One pass over the part of the draft that is not staged yet (from `done` on) and all probes.

        Stages that part and returns the last row of every probe.
        """
        if obstacle := self.model.mask_obstacle:
            raise IncompatibleStack(
                f"{self.model.name} has {obstacle}; the packed judge pass would be wrong on it. "
                "Use judge.path=auto or forked."
            )
        lead = len(self.pending)  # 0 once a part of the draft is staged
        tokens = [*self.pending, *draft[done:]]
        if len(tokens) + len(suffix) * len(probes) > PACKED_ROWS and (tokens or len(probes) > 1):
            return self._read_in_blocks(draft, cuts, suffix, probes, done)
        ends = [lead + cut for cut in probes]  # every probe also sees the pending tokens, which come first
        n, new, s = lead + len(draft), len(tokens), len(suffix)
        positions = masks.probe_positions(self.cached, n, ends, s)  # includes staged rows: they are columns
        verdicts = [new + s * (k + 1) - 1 for k in range(len(probes))]
        logits, taps = self._forward(
            tokens + list(suffix) * len(probes),
            keep=torch.tensor([*range(new), *verdicts]),
            positions=positions[done:],
            mask=self._mask(masks.probe_mask(self.cached, n, ends, s, first=done), positions),
        )
        kv.cut_tail(self._cache, s * len(probes))
        read = self._commit_read(lead, logits, None if taps is None else taps[:new])
        if done < len(draft):
            self._staged = stage_draft(self._staged, self._logits, draft[done:], cuts, logits[lead:new], read)
        return logits[new:], None if taps is None else taps[verdicts]

    def _read_in_blocks(
        self, draft: Sequence[int], cuts: Sequence[int], suffix: Sequence[int], probes: list[int], done: int
    ) -> ProbeRows:
        """As `_read_packed`, in passes of at most PACKED_ROWS rows: the draft causally, then the probes in groups."""
        for stop in [*range(done + PACKED_ROWS, len(draft), PACKED_ROWS), len(draft)]:
            if done < stop:
                self._read_causally(draft[:stop], [cut for cut in cuts if cut <= stop], done)
                done = stop
        step = max(1, PACKED_ROWS // len(suffix))
        groups = [probes[i : i + step] for i in range(0, len(probes), step)]
        return joined([self._read_packed(draft, cuts, suffix, group, done) for group in groups])

    def _read_causally(self, draft: Sequence[int], cuts: Sequence[int], done: int) -> None:
        """Read and stage the draft from `done` on, and any pending tokens before it.

        Recurrent models read it in segments, and a snapshot of their state is taken at every cut.
        """
        recurrent = self.model.recurrent
        if recurrent and not done:
            self.feed([])  # the snapshots start behind the committed tokens
        stops = sorted({*(cut for cut in cuts if cut > done), len(draft)}) if recurrent else [len(draft)]
        snapshots = dict(self._staged.snapshots) if self._staged else {}
        if recurrent and not done:
            snapshots[0] = kv.snapshot(self._cache)
        lead, parts, start = len(self.pending), [], done
        for stop in stops:
            tokens = [*self.pending, *draft[start:stop]] if start == done else list(draft[start:stop])
            parts.append(self._forward(tokens, keep=len(tokens)))
            if recurrent:
                snapshots[stop] = kv.snapshot(self._cache)
            start = stop
        logits, taps = joined(parts)
        taps = self._commit_read(lead, logits, taps)
        self._staged = stage_draft(self._staged, self._logits, draft[done:], cuts, logits[lead:], taps)
        self._staged.snapshots = snapshots

    def _probe_forked(self, suffix: Sequence[int], probes: list[int]) -> ProbeRows:
        """Read the suffixes in batches, each on a copy of the cache that ends at its cut; the probes' last rows."""
        assert self._staged is not None
        at_once = max(1, FORKED_COLUMNS // (self.cached + len(self._staged.tokens) + len(suffix)))
        return joined([self._probe_batch(suffix, probes[i : i + at_once]) for i in range(0, len(probes), at_once)])

    def _probe_batch(self, suffix: Sequence[int], probes: list[int]) -> ProbeRows:
        assert self._staged is not None
        copies = self._copies(probes, self._staged.logits_at(probes))
        self.calls += 1
        self.rows += len(suffix) * len(probes)
        return copies.read([list(suffix)] * len(probes), self.taps)

    def _commit_read(self, rows: int, logits: Tensor, taps: Tensor | None) -> Tensor | None:
        """Note that the first `rows` rows of a pass were the pending tokens. Returns the taps of the other rows."""
        if rows:
            self.cached += rows
            self._logits = logits[rows - 1].clone()
        if taps is None:
            return None
        self._tap_rows.append(taps[:rows].clone())  # a view would keep the whole pass alive
        return taps[rows:]
