"""What a pass leaves behind until `Session.keep` decides: the staged rows, and what a judge pass reports.

Shapes in this file:  N staged rows, K probes, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from parsedec.errors import JudgeError
from parsedec.sessions.inference import whole_numbers
from parsedec.types import JudgePath

ProbeRows = tuple[Tensor, Tensor | None]  # logits [K, V] and taps [K, L, H]


@dataclass(frozen=True, slots=True)
class JudgeRows:
    """What one judge pass gives besides the staged draft.

    probe_logits    [K, V] float32, the logits after each probe's last row; without a suffix that is the cut's own row
    draft_logprobs  [N] float32, the model's log-probability of every draft token
    rows            token positions this pass computed
    probe_taps      [K, L, H] the session's taps at each probe's last row; None where it has none
    cut_taps        [K, L, H] those at the last token of every probed prefix
    """

    probe_logits: Tensor
    draft_logprobs: Tensor
    rows: int
    path: JudgePath
    probe_taps: Tensor | None = None
    cut_taps: Tensor | None = None


@dataclass(slots=True)
class Staged:
    """Rows in the cache behind the committed ones: the guesses of a tree, or a judged draft.

    tokens     N ids, row i holding tokens[i]
    known      row -> logits after it, where they may be needed; of a tree all of them, [N, V]
    taps       [N, L, H]; of a tree [1 + N, L, H], the root's first
    row_of     of a tree: the row of the pass in which every node was read, the root's being 0
    logprobs   [N] of a judged draft
    last       [V], logits after the last row of a judged draft: a longer draft goes on from there
    snapshots  recurrent models: rows kept -> cache after them
    before     recurrent models: the cache before the pass and the committed tokens it read first, to start again from
    """

    tokens: list[int]
    known: dict[int, Tensor] | Tensor
    taps: Tensor | None
    row_of: Sequence[int] = ()
    logprobs: Tensor | None = None
    last: Tensor | None = None
    snapshots: dict[int, DynamicCache] = field(default_factory=dict)
    before: tuple[DynamicCache, list[int]] | None = None

    def reusable(self, draft: Sequence[int], cuts: Sequence[int]) -> int:
        """Rows that a judge pass over `draft` need not read again: all, if they are a judged beginning of it.

        None, if the logits at one of its cuts are not known: they are gone, and the rows have to be read once more.
        """
        n = len(self.tokens)
        begins = self.logprobs is not None and list(draft[:n]) == self.tokens
        return n if begins and all(cut - 1 in self.known for cut in cuts if cut <= n) else 0

    def kept_taps(self, rows: Sequence[int]) -> Tensor:
        """Taps of the rows that are kept, those of a tree's root in front of them."""
        assert self.taps is not None
        at = [0, *(row + 1 for row in rows)] if self.row_of else list(rows)
        if at == list(range(len(at))):
            return self.taps.narrow(0, 0, len(at))
        return self.taps.index_select(0, whole_numbers(at, self.taps.device))

    def logits_at(self, cuts: Sequence[int]) -> Tensor:
        """Logits after the first so many tokens of a judged draft [K, V]."""
        assert self.last is not None
        return torch.stack([self.known[cut - 1] for cut in cuts]) if cuts else self.last[None][:0]

    def taps_at(self, cuts: Sequence[int]) -> Tensor | None:
        """Taps of the last of them [K, L, H]."""
        return None if self.taps is None else self.taps[[cut - 1 for cut in cuts]]


def joined(parts: Sequence[ProbeRows]) -> ProbeRows:
    """Rows of several passes as those of one."""
    taps = [tap for _, tap in parts if tap is not None]
    return torch.cat([logits for logits, _ in parts]), torch.cat(taps) if taps else None


def stage_draft(
    before: Staged | None,
    first: Tensor | None,
    tokens: Sequence[int],
    cuts: Sequence[int],
    logits: Tensor,
    taps: Tensor | None,
) -> Staged:
    """What is staged once M more draft tokens were read behind `before` (None: behind the committed tokens).

    first   [V], the logits after the last committed token
    cuts    counted from the draft's beginning; those within the M rows are remembered
    logits  [M, V] of the new rows; taps [M, L, H]
    """
    done = len(before.tokens) if before else 0
    entry = before.last if before else first
    assert entry is not None
    logprobs = token_logprobs(torch.cat([entry[None], logits[:-1]]), tokens)
    # clones: a view would keep the whole [M, V] matrix alive until the next pass
    known = {cut - 1: logits[cut - 1 - done].clone() for cut in cuts if cut > done}
    staged = Staged(list(tokens), known, taps, logprobs=logprobs, last=logits[-1].clone())
    if before is None:
        return staged
    assert before.logprobs is not None
    assert isinstance(before.known, dict)
    staged.tokens = before.tokens + staged.tokens
    staged.known = before.known | known
    staged.taps = None if before.taps is None or taps is None else torch.cat([before.taps, taps])
    staged.logprobs = torch.cat([before.logprobs, logprobs])
    return staged


def token_logprobs(logits: Tensor, tokens: Sequence[int], chunk: int = 128) -> Tensor:
    """Log-probability of tokens[i] under logits[i] ([N, V] -> [N] float32), in chunks: [N, V] float32 may not fit."""
    index = torch.tensor(list(tokens), device=logits.device)
    starts = range(0, len(index), chunk)
    parts = [logits[i : i + chunk].float().log_softmax(-1).gather(-1, index[i : i + chunk, None])[:, 0] for i in starts]
    return torch.cat(parts)


def check_cuts(n: int, cuts: Sequence[int], probes: Sequence[int]) -> None:
    for name, positions in (("cuts", cuts), ("probes", probes)):
        ascending = list(positions) == sorted(set(positions)) and all(1 <= position <= n for position in positions)
        if not ascending or (not positions and name == "cuts"):
            raise JudgeError(
                f"{name}={list(positions)} for a draft of {n} tokens; expected strictly ascending ones, each from 1 to "
                f"{n}, and at least one cut. Check the segmenter."
            )
    if not set(probes) <= set(cuts):
        raise JudgeError(f"probes={list(probes)} are not all among the cuts {list(cuts)}.")
