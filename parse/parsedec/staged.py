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
from parsedec.types import JudgePath


@dataclass(frozen=True, slots=True)
class JudgeRows:
    """What one judge pass gives besides the staged draft.

    probe_logits    [K, V] float32, the logits after each probe's last row
    draft_logprobs  [N] float32, the model's log-probability of every draft token
    rows            token positions this pass computed
    """

    probe_logits: Tensor
    draft_logprobs: Tensor
    rows: int
    path: JudgePath


@dataclass(slots=True)
class Staged:
    """Rows in the cache behind the committed ones: the guesses of a tree, or a judged draft.

    tokens     N ids, row i holding tokens[i]
    known      row -> logits after it, where they may be needed
    taps       [N, L, H]
    logprobs   [N] of a judged draft
    snapshots  recurrent models: rows kept -> cache after them
    before     recurrent models: the cache before the pass and the committed tokens it read first, to start again from
    """

    tokens: list[int]
    known: dict[int, Tensor]
    taps: Tensor | None
    logprobs: Tensor | None = None
    snapshots: dict[int, DynamicCache] = field(default_factory=dict)
    before: tuple[DynamicCache, list[int]] | None = None


def token_logprobs(logits: Tensor, tokens: Sequence[int], chunk: int = 128) -> Tensor:
    """Log-probability of tokens[i] under logits[i] ([N, V] -> [N] float32), in chunks: [N, V] float32 may not fit."""
    index = torch.tensor(list(tokens), device=logits.device)
    starts = range(0, len(index), chunk)
    parts = [logits[i : i + chunk].float().log_softmax(-1).gather(-1, index[i : i + chunk, None])[:, 0] for i in starts]
    return torch.cat(parts)


def check_cuts(n: int, cuts: Sequence[int], probes: Sequence[int], suffix: Sequence[int]) -> None:
    for name, positions in (("cuts", cuts), ("probes", probes)):
        if not positions or list(positions) != sorted(set(positions)) or not 1 <= positions[0] <= positions[-1] <= n:
            raise JudgeError(
                f"{name}={list(positions)} for a draft of {n} tokens; expected at least one, strictly "
                f"ascending, each from 1 to {n}. Check the segmenter."
            )
    if not set(probes) <= set(cuts):
        raise JudgeError(f"probes={list(probes)} are not all among the cuts {list(cuts)}.")
    if not suffix:
        raise JudgeError("the verification suffix is empty; expected at least one token. Check judge.question.")
