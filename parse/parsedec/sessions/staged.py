"""The staged rows of a pass, which wait for `keep` or `keep_draft` to decide, and what a judge pass returns.

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
    """What a judge pass returns, besides staging the draft.

    probe_logits    [K, V] float32, the logits after each probe's last row; without a suffix, that is its cut's own row
    draft_logprobs  [N] float32, the model's log-probability of every draft token
    rows            token positions this pass computed
    probe_taps      [K, L, H] the session's taps at each probe's last row; None if the session has no taps
    cut_taps        [K, L, H] the same at the last token of every probed prefix
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

    tokens     N ids, one per row
    known      row -> logits after it, for the rows that may be kept last; of a tree all of them, [N, V]
    taps       [N, L, H]; of a tree [1 + N, L, H], beginning with the root's
    row_of     of a tree: node -> the row of the pass it was read in; the root's is 0
    logprobs   [N], of a judged draft
    last       [V], of a judged draft: the logits after its last row, from which a longer draft goes on
    snapshots  recurrent models: number of rows kept -> the cache after them
    before     recurrent models: the cache before the pass, and the committed tokens that the pass read first
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
        """How many staged rows a judge pass over `draft` can reuse: all if they are a judged prefix of it, else 0.

        Also 0 if the logits at one of its cuts were not remembered: the rows then have to be read once more.
        """
        n = len(self.tokens)
        begins = self.logprobs is not None and list(draft[:n]) == self.tokens
        return n if begins and all(cut - 1 in self.known for cut in cuts if cut <= n) else 0

    def kept_taps(self, rows: Sequence[int]) -> Tensor:
        """Taps of the rows that are kept; of a tree, with the root's in front."""
        assert self.taps is not None
        at = [0, *(row + 1 for row in rows)] if self.row_of else list(rows)
        if at == list(range(len(at))):
            kept = self.taps.narrow(0, 0, len(at))
            # a view would keep all rows of the pass alive, refused guesses and probes, as long as the request
            return kept if kept.nbytes == kept.untyped_storage().nbytes() else kept.clone()
        return self.taps.index_select(0, whole_numbers(at, self.taps.device))

    def logits_at(self, cuts: Sequence[int]) -> Tensor:
        """Logits at cuts of a judged draft [K, V]."""
        assert self.last is not None
        return torch.stack([self.known[cut - 1] for cut in cuts]) if cuts else self.last[None][:0]

    def taps_at(self, cuts: Sequence[int]) -> Tensor | None:
        """Taps of the last token before each cut [K, L, H]."""
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
    """What is staged once M more draft tokens have been read behind `before` (None: behind the committed tokens).

    first   [V], the logits after the last committed token
    cuts    counted from the beginning of the draft; the logits at those within the M rows are remembered
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
    """Log-probability of tokens[i] under logits[i] [N, V], as [N] float32; by chunks, as [N, V] float32 may not fit."""
    index = torch.tensor(list(tokens), device=logits.device)
    starts = range(0, len(index), chunk)
    parts = [logits[i : i + chunk].float().log_softmax(-1).gather(-1, index[i : i + chunk, None])[:, 0] for i in starts]
    return torch.cat(parts)


def check_cuts(n: int, cuts: Sequence[int], probes: Sequence[int]) -> None:
    """Raise JudgeError unless `cuts` and `probes`, some of them, are ascending positions in a draft of n tokens."""
    for name, positions in (("cuts", cuts), ("probes", probes)):
        ascending = list(positions) == sorted(set(positions)) and all(1 <= position <= n for position in positions)
        if not ascending or (not positions and name == "cuts"):
            raise JudgeError(
                f"{name}={list(positions)} for a draft of {n} tokens; expected strictly ascending ones, each from 1 to "
                f"{n}, and at least one cut. Check the segmenter."
            )
    if not set(probes) <= set(cuts):
        raise JudgeError(f"probes={list(probes)} are not all among the cuts {list(cuts)}.")
