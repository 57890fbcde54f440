"""One forward of the static network for passes of several requests, as `batching.joint` makes them.

Their rows are concatenated. Each pass attends within its own buffers; everything else is one operation for all rows.

Shapes in this file:  n rows of a pass, R rows of all passes, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parsedec.batching.joint import Output
from parsedec.sessions.branches import Branches
from parsedec.static.judging import Block, attention_behind
from parsedec.static.memory import Lease
from parsedec.static.network import Attend

if TYPE_CHECKING:
    from parsedec.static.session import StaticSession


@dataclass(frozen=True, slots=True, eq=False)
class StaticPass:
    """A block of rows behind those of `lease`, which grows by them; arguments as of `StaticSession.run`."""

    session: StaticSession
    lease: Lease
    ids: list[int]
    positions: Tensor | None
    allowed: Tensor | None
    block: Block | None
    keep: Tensor | int | None
    taps: tuple[int, ...]

    @property
    def group(self) -> object:
        return id(self.session.network), self.taps

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        return self.session.model.device

    @property
    def separable(self) -> bool:
        return True

    @classmethod
    @torch.inference_mode()
    def together(cls, passes: Sequence[StaticPass]) -> list[Output]:
        return [passes[0].alone()] if len(passes) == 1 else _forward(passes)

    def alone(self) -> Output:
        return self.session.run(
            self.ids, positions=self.positions, allowed=self.allowed, block=self.block, keep=self.keep
        )

    def attention(self) -> Attend:
        session = self.session
        wanted = session.model.judge_kernel
        return attention_behind(session.network, self.lease, self.rows, self.allowed, self.block, wanted)

    def kept(self) -> Tensor:
        """The rows to give logits for."""
        if isinstance(self.keep, Tensor):
            return self.keep.cpu()
        return torch.arange(self.rows - (self.rows if self.keep is None else self.keep), self.rows)


class StaticBranches(Branches):
    """Branches that are leases on the buffers of `session`. A branch that reads on moves to buffers of its own."""

    def __init__(self, session: StaticSession, leases: Sequence[Lease], logits: Tensor) -> None:
        super().__init__(logits)
        self._session, self._leases = session, leases

    @torch.inference_mode()
    def _read(self, tokens: Sequence[int]) -> Tensor:
        passes = [
            StaticPass(self._session, lease, [token], None, None, None, 1, ())
            for lease, token in zip(self._leases, tokens, strict=True)
        ]
        return torch.cat([logits for logits, _ in _forward(passes)])


class JointRows:
    """Attention of a joint forward, in which rows bounds[i] to bounds[i + 1] attend by parts[i]."""

    def __init__(self, parts: Sequence[Attend], bounds: Sequence[int]) -> None:
        self._parts = [(part, a, b) for part, (a, b) in zip(parts, pairwise(bounds), strict=True)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([part(layer, q[a:b], k[a:b], v[a:b]) for part, a, b in self._parts])


def _forward(passes: Sequence[StaticPass]) -> list[Output]:
    network, device, taps = passes[0].session.network, passes[0].device, passes[0].taps
    bounds, kept, keep, positions = [0], [0], [], []
    for one in passes:
        start, n, which = one.lease.rows, one.rows, one.kept()
        network.positions.reach(start + n)
        positions.append(torch.arange(start, start + n) if one.positions is None else one.positions.cpu())
        keep.append(which + bounds[-1])
        bounds.append(bounds[-1] + n)
        kept.append(kept[-1] + len(which))
    logits, shown = network.forward(
        network.embed([i for one in passes for i in one.ids]),
        network.angles(torch.cat(positions).to(device), bounds[-1]),
        JointRows([one.attention() for one in passes], bounds),
        torch.cat(keep).to(device),
        taps,
    )
    for one in passes:
        one.lease.rows += one.rows
    # clones: a session keeps its taps, and a view would keep those of all requests alive
    own = [None if shown is None else shown[a:b].clone() for a, b in pairwise(bounds)]
    return [(logits[a:b], tap) for (a, b), tap in zip(pairwise(kept), own, strict=True)]
