"""The static backend: a session whose cache is a lease on preallocated buffers.

Everything a session promises, and the books it keeps - committed, pending and staged tokens, counters, taps - are those
of `Session`. Only what touches keys and values is replaced; the cache of the base class stays empty.

Passes longer than a block of rows are cut into blocks, each run through all layers before the next. A probe of a judge
pass is not kept, so the probes of a later block are written where those of the block before were.

Shapes in this file:  R rows, N draft rows, K probes, S suffix rows a probe, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parsedec import masks
from parsedec.model import LanguageModel
from parsedec.session import Session
from parsedec.staged import ProbeRows, joined, stage_draft
from parsedec.static.attention import Rows, additive, causal_mask, probes_allowed
from parsedec.static.memory import Lease, Pool
from parsedec.static.network import Network
from parsedec.static.steps import ROWS, Steps
from parsedec.static.weights import Weights, read_weights
from parsedec.types import Tree

BLOCK = {"cpu": 512, "cuda": 1024}  # most rows at a time: enough to be bound by arithmetic, few enough to mask


@dataclass(frozen=True, slots=True)
class Machine:
    """What the sessions of one model share.

    steps  decode steps in buckets, by whether they are compiled; None where passes run as they are
    """

    network: Network
    pool: Pool
    block: int
    steps: dict[bool, Steps | None]

    @classmethod
    def of(cls, weights: Weights) -> Machine:
        network, graphs = Network(weights), weights.device.type == "cuda"
        plain = Steps(network, compiled=False) if graphs else None
        steps = {False: plain, True: Steps(network, compiled=True)}
        return cls(network, Pool(weights), BLOCK[weights.device.type], steps)


_machines: WeakKeyDictionary[PreTrainedModel, Machine] = WeakKeyDictionary()


def machine_of(model: LanguageModel) -> Machine:
    """The machine of a model without an obstacle, made once; made anew if its parameters are not what was read."""
    machine = _machines.get(model.hf)
    if machine is None or not machine.network.weights.fresh:
        machine = _machines[model.hf] = Machine.of(read_weights(model.hf))
    return machine


class StaticSession(Session):
    """A session of a model that `static_obstacle` has nothing against."""

    def __init__(self, model: LanguageModel, taps: tuple[int, ...] = ()) -> None:
        super().__init__(model, taps)
        self._machine = machine_of(model)
        self._steps = self._machine.steps[model.compiled]
        self._lease = Lease(self._machine.pool)  # rows: the cached ones, and the staged ones behind them

    def fork(self) -> Session:
        twin = super().fork()
        assert isinstance(twin, StaticSession)
        twin._lease = self._lease.fork()
        return twin

    @torch.inference_mode()
    def _forward(
        self,
        ids: list[int],
        *,
        keep: int | Tensor,
        positions: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Causal rows behind the cache, in blocks; only the last `keep` of them give logits."""
        assert isinstance(keep, int)
        assert positions is None
        assert mask is None
        self.calls += 1
        self.rows += len(ids)
        wanted, parts = len(ids) - keep, []
        for start in range(0, len(ids), self._machine.block):
            block = ids[start : start + self._machine.block]
            parts.append(self._run(block, keep=min(len(block), max(0, start + len(block) - wanted))))
        return parts[0] if len(parts) == 1 else joined(parts)

    @torch.inference_mode()
    def _read_branching(self, tree: Tree) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        self.rows += tree.size
        positions = torch.tensor(tree.depths()) + self.cached
        return self._run(list(tree.tokens), positions=positions, allowed=masks.tree_mask(self.cached, tree.parents))

    def _read_packed(
        self, draft: Sequence[int], cuts: Sequence[int], suffix: Sequence[int], probes: list[int], done: int
    ) -> ProbeRows:
        lead = len(self.pending)
        tokens = [*self.pending, *draft[done:]]
        self.calls += 1
        self.rows += len(tokens) + len(suffix) * len(probes)
        ends = [self.cached + lead + cut for cut in probes]
        logits, taps, verdicts = self._run_probes(tokens, suffix, ends)
        taps = self._commit_read(lead, logits, taps)
        if done < len(draft):
            self._staged = stage_draft(self._staged, self._logits, draft[done:], cuts, logits[lead:], taps)
        return verdicts

    def _probe_batch(self, suffix: Sequence[int], probes: list[int]) -> ProbeRows:
        self.calls += 1
        self.rows += len(suffix) * len(probes)  # and nothing is copied for the branches
        return self._run_probes([], suffix, [self.cached + cut for cut in probes])[2]

    @torch.inference_mode()
    def _run_probes(
        self, tokens: list[int], suffix: Sequence[int], ends: list[int]
    ) -> tuple[Tensor, Tensor | None, ProbeRows]:
        """Rows of a draft, which stay in the cache, and probes behind columns `ends`, which do not.

        Returns logits [N, V] and taps [N, L, H] of the draft rows, and the probes' last rows.
        """
        block, size = self._machine.block, len(suffix)
        texts, verdicts = [], []
        last = len(tokens) % block  # the draft's last rows share a block with the first probes
        for start in range(0, len(tokens) - last, block):
            texts.append(self._run(tokens[start : start + block]))
        first = 0
        while last or first < len(ends):
            room = max(0 if last else 1, (block - last) // size)
            some = ends[first : first + room]
            ids = tokens[len(tokens) - last :] + list(suffix) * len(some)
            before = self._lease.rows
            logits, taps = self._run(
                ids,
                positions=_block_positions(before, last, some, size),
                allowed=probes_allowed(before, last, some, size),
                keep=torch.tensor([*range(last), *(last + size * (k + 1) - 1 for k in range(len(some)))]),
            )
            self._lease.rows = before + last
            if last:
                texts.append((logits[:last], None if taps is None else taps[:last]))
            verdicts.append((logits[last:], None if taps is None else taps[last + size - 1 :: size]))
            first, last = first + len(some), 0
        text_logits, text_taps = joined(texts) if texts else (verdicts[0][0][:0], None)
        return text_logits, text_taps, joined(verdicts)

    def _run(
        self,
        ids: list[int],
        *,
        positions: Tensor | None = None,
        allowed: Tensor | None = None,
        keep: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block of rows behind those of the lease, which grows by it.

        positions  [R], None: plainly onwards;  allowed  [R, columns] bool, None: causal;  keep  None: logits of all
        """
        network, lease, rows = self._machine.network, self._lease, len(ids)
        weights, start = network.weights, lease.rows
        if self._steps is not None and rows <= ROWS[-1] and not isinstance(keep, Tensor):
            at = None if positions is None else positions.tolist()
            logits, taps = self._steps.run(lease, ids, at, None if allowed is None else allowed[:, start:], self.taps)
            return logits[rows - (rows if keep is None else keep) :], taps
        network.positions.reach(start + rows)
        buffers = lease.writable(rows)
        mask = None
        if allowed is not None:
            mask = additive(allowed, weights.dtype, weights.device)
        elif rows > 1 and start:
            mask = causal_mask(start, rows, weights.dtype, weights.device)
        if isinstance(keep, Tensor):
            keep = keep.to(weights.device)
        out = network.forward(
            network.embed(ids),
            network.angles(start if positions is None else positions.to(weights.device), rows),
            Rows(buffers, start, rows, weights.scale, mask),
            rows if keep is None else keep,
            self.taps,
        )
        lease.rows = start + rows
        return out

    def _keep_rows(self, rows: list[int]) -> None:
        if rows and rows[-1] != len(rows) - 1:
            self._lease.gather(self.cached, rows)
        super()._keep_rows(rows)
        self._lease.rows = self.cached

    def _go_back(self, length: int) -> None:
        super()._go_back(length)
        self._lease.rows = self.cached


def _block_positions(before: int, drafted: int, ends: Sequence[int], suffix: int) -> Tensor:
    """Positions of a block of a judge pass [R]: the draft goes on, each probe starts right behind its end."""
    probes = torch.tensor(ends, dtype=torch.long)[:, None] + torch.arange(suffix)
    return torch.cat([torch.arange(before, before + drafted), probes.flatten()])
