"""Attention masks and position ids of the two passes that are not simply causal: tree passes and judge passes.

Every builder returns True where a row may attend. `for_model` turns that into the form the model accepts:
an additive float mask (eager attention would silently *add* a boolean one), with sliding windows applied by
position distance, and one mask per layer kind where the model mixes kinds.

Shapes in this file:  C cached columns before the pass, N draft rows, K probes, S rows a probe, R = rows of the pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor


def probe_mask(context: int, draft: int, cuts: Sequence[int], suffix: int, first: int = 0) -> Tensor:
    """Let K probes, each judging a longer prefix of one draft, share a single forward pass (PARSE, design 3).

    Columns are context | draft | probe 0 | probe 1 | …; rows are the draft and then the probes.
    Draft rows are causal. Probe k sees the context, the first cuts[k] draft tokens, and itself causally -
    never another probe, never the draft after its cut.

        context=2, draft=3, cuts=[1, 3], suffix=2
                   ctx    draft    probe0   probe1
        draft      x x    x . .    . .      . .
                   x x    x x .    . .      . .
                   x x    x x x    . .      . .
        probe0     x x    x . .    x .      . .
                   x x    x . .    x x      . .
        probe1     x x    x x x    . .      x .
                   x x    x x x    . .      x x

    Returns [N + K*S, C + N + K*S] bool, without the `first` rows of the draft, if they were read before.
    """
    probes = len(cuts)
    causal = torch.arange(draft) <= torch.arange(first, draft)[:, None]  # [N - first, N]
    top = torch.cat([causal, torch.zeros(draft - first, probes * suffix, dtype=torch.bool)], dim=1)
    reads_draft = torch.arange(draft) < torch.tensor(cuts, dtype=torch.long)[:, None]  # [K, N]
    own = torch.ones(suffix, suffix, dtype=torch.bool).tril()  # [S, S]
    bottom = torch.cat(
        [reads_draft.repeat_interleave(suffix, 0), torch.kron(torch.eye(probes, dtype=torch.bool), own)], dim=1
    )
    rows = torch.cat([top, bottom])
    return torch.cat([torch.ones(rows.shape[0], context, dtype=torch.bool), rows], dim=1)


def probe_positions(context: int, draft: int, cuts: Sequence[int], suffix: int) -> Tensor:
    """Position ids of the same pass, [N + K*S]: probe k restarts right after its cut, as a separate call would."""
    starts = torch.tensor(cuts, dtype=torch.long)[:, None] + context  # [K, 1]
    return torch.cat([torch.arange(context, context + draft), (starts + torch.arange(suffix)).flatten()])


def tree_mask(context: int, parents: Sequence[int]) -> Tensor:
    """Let every node of a token tree see the context, its ancestors and itself (SpecInfer, EAGLE, Medusa).

        context=2, parents=[-1, 0, 0, 1]
                   ctx    node0..3
        node0      x x    x . . .
        node1      x x    x x . .
        node2      x x    x . x .
        node3      x x    x x . x

    Returns [N, C + N] bool.
    """
    n, root = len(parents), bytearray(context + 1).replace(b"\0", b"\1") + bytes(len(parents) - 1)
    rows = [root]
    for node in range(1, n):  # in bytes: one tensor operation per node would cost more than the draft
        row = rows[parents[node]].copy()
        row[context + node] = 1
        rows.append(row)
    return torch.frombuffer(bytearray().join(rows), dtype=torch.bool).view(n, context + n)


def for_model(
    allowed: Tensor,
    rows_at: Tensor,
    columns_at: Tensor,
    *,
    windows: Mapping[str, int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | dict[str, Tensor]:
    """The mask as `attention_mask` of a Hugging Face causal LM.

    allowed     [R, C + R] bool
    rows_at     [R] position ids of the rows; columns_at [C + R] position ids of the columns. A sliding window limits
                the distance between *positions*: a probe comes right after its cut, wherever its row is in the pass.
    windows     layer kind -> window in tokens, None for full attention; one entry per kind the model has

    Returns [1, 1, R, C + R] additive in `dtype`, or one such mask per layer kind where there are several.
    """
    allowed = allowed.to(device)
    masks = {}
    for kind, window in windows.items():
        visible = allowed
        if window is not None:
            distance = rows_at.to(device)[:, None] - columns_at.to(device)[None, :]  # [R, C + R]
            visible = allowed & (distance < window)
        masks[kind] = torch.where(visible, *_added(dtype, device)).view(1, 1, *visible.shape)
    return masks if len(masks) > 1 else next(iter(masks.values()))


@cache
def _added(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is added to the scores of visible and of hidden columns, [] each."""
    with torch.inference_mode(False):  # made only once, so it has to serve training passes as well
        zero = torch.zeros((), dtype=dtype, device=device)
        return zero, torch.full_like(zero, torch.finfo(dtype).min)
