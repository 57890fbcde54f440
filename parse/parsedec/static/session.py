"""The static backend: a session whose cache is a lease on preallocated buffers.

The interface and all bookkeeping - committed, pending and staged tokens, counters, taps - are those of `Session`. Only
what touches keys and values is replaced; the base class's cache stays empty.

A long pass is cut into blocks of rows, each of which runs through all layers before the next. Rows of probes are not
kept, so the probes of a block overwrite those of the block before.

Shapes in this file:  R rows, N draft rows, K probes, S suffix rows a probe, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parsedec import masks
from parsedec.batching import fibers
from parsedec.batching.joint import Output
from parsedec.models.language_model import LanguageModel
from parsedec.sessions.branches import Branches
from parsedec.sessions.session import Session
from parsedec.sessions.staged import ProbeRows, joined, stage_draft
from parsedec.static.joint import StaticBranches, StaticPass
from parsedec.static.judging import Block, attention_behind
from parsedec.static.memory import Lease, Pool
from parsedec.static.network import Network
from parsedec.static.steps import ROWS, Readback, Steps
from parsedec.static.weights import Weights, read_weights
from parsedec.types import Tree

log = logging.getLogger(__name__)

BLOCK = {"cpu": 512, "cuda": 2048}  # most rows of a block: enough to be bound by arithmetic, few enough for a mask


@dataclass(frozen=True, slots=True)
class Machine:
    """What the sessions of one model share.

    block       most rows of a block
    steps       whether steps are compiled -> the decode steps in buckets; None: passes run as they are
    prefetches  whether a session reads a token ahead while the host waits for its value
    """

    network: Network
    pool: Pool
    block: int
    steps: dict[bool, Steps | None]
    prefetches: bool

    @classmethod
    def of(cls, weights: Weights) -> Machine:
        network, graphs = Network(weights), weights.device.type == "cuda"
        if graphs and torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]
            # on Hopper, torch prefers cuDNN's attention, which makes a new plan for every length of a text
            torch.backends.cuda.enable_cudnn_sdp(False)
            log.info(
                "the static backend turns cuDNN's attention off for this process: it is slow on lengths that change"
            )
        plain = Steps(network, compiled=False) if graphs else None
        steps = {False: plain, True: Steps(network, compiled=True)}
        return cls(network, Pool(weights), BLOCK[weights.device.type], steps, prefetches=graphs)


_machines: WeakKeyDictionary[PreTrainedModel, Machine] = WeakKeyDictionary()


def machine_of(model: LanguageModel) -> Machine:
    """The machine of a model that qualifies: made once, and again when the model's parameters have changed."""
    machine = _machines.get(model.hf)
    if machine is None or not machine.network.weights.fresh:
        machine = _machines[model.hf] = Machine.of(read_weights(model.hf))
    return machine


def forget_machine(model: LanguageModel) -> None:
    """To be called when modules or parameters of a model were replaced. Open sessions go on with the old machine."""
    _machines.pop(model.hf, None)


@dataclass(slots=True)
class Prefetched:
    """A token that was read ahead, but is neither committed nor counted. Its row is the last one of the lease.

    token  None until the host knows it
    """

    token: int | None
    output: Output


class StaticSession(Session):
    """A session of a model for which `static_obstacle` is None."""

    def __init__(self, model: LanguageModel, taps: tuple[int, ...] = (), *, ids: int = 0) -> None:
        super().__init__(model, taps, ids=ids)
        self._machine = machine_of(model)
        self._steps = self._machine.steps[model.compiled]
        self._lease = Lease(self._machine.pool)  # the cached rows, then the staged ones or a prefetched one
        self._prefetched: Prefetched | None = None
        self._readback = Readback(model.device)

    def fork(self) -> Self:
        self._forget_prefetched()
        twin = super().fork()
        twin._lease = self._lease.fork()
        return twin

    @property
    def prefetches(self) -> bool:
        return self._machine.prefetches and self._steps is not None and fibers.current() is None

    @torch.inference_mode()
    def prefetch(self, token: Tensor) -> int:
        """If another token is committed in the end, the prefetched row is forgotten and overwritten."""
        if not self.prefetches:
            return int(token)
        if self.next_logits is None:
            raise ValueError(f"prefetch() in a session with {len(self.pending)} pending tokens; expected none")
        assert self._steps is not None
        self._drop_staged()
        self._forget_prefetched()
        self._readback.begin(token)
        output = self._steps.run(self._lease, token.view(1), None, None, self.taps)
        self._prefetched = Prefetched(None, output)  # set before the wait, which may be interrupted
        self._prefetched.token = known = self._readback.wait()
        return known

    def _forget_prefetched(self) -> None:
        if self._prefetched is not None:
            self._prefetched = None
            self._lease.rows -= 1

    @torch.inference_mode()
    def _forward(
        self,
        ids: list[int],
        *,
        keep: int | Tensor,
        positions: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Causal rows behind the cache, in blocks. Only the last `keep` of them give logits."""
        assert isinstance(keep, int)
        assert positions is None
        assert mask is None
        self.calls += 1
        self.rows += len(ids)
        if self._prefetched is not None and [self._prefetched.token] == ids:
            output, self._prefetched = self._prefetched.output, None
            return output
        wanted, parts = len(ids) - keep, []
        for start in range(0, len(ids), self._machine.block):
            block = ids[start : start + self._machine.block]
            parts.append(self.run(block, keep=min(len(block), max(0, start + len(block) - wanted))))
        return parts[0] if len(parts) == 1 else joined(parts)

    @property
    def network(self) -> Network:
        return self._machine.network

    @torch.inference_mode()
    def _read_branching(self, tree: Tree) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        self.rows += tree.size
        positions = torch.tensor([self.cached + depth for depth in tree.depths()])
        return self.run(list(tree.tokens), positions=positions, allowed=masks.tree_mask(self.cached, tree.parents))

    def _read_packed(
        self, draft: Sequence[int], cuts: Sequence[int], suffix: Sequence[int], probes: list[int], done: int
    ) -> ProbeRows:
        """In blocks, each staged as soon as it is read: the logits of all rows at once would be [N, V]."""
        tokens = [*self.pending, *draft[done:]]
        ends = [self.cached + len(self.pending) + cut for cut in probes]
        self.calls += 1
        self.rows += len(tokens) + len(suffix) * len(probes)
        verdicts = []
        for rows, logits, taps in self._judge_blocks(tokens, suffix, ends):
            lead = min(len(self.pending), rows)
            verdicts.append(_verdicts(rows, len(suffix), logits, taps))
            if rows:
                taps = self._commit_read(lead, logits, None if taps is None else taps[:rows])
            if rows > lead:
                stop = done + rows - lead
                within = [cut for cut in cuts if cut <= stop]
                self._staged = stage_draft(
                    self._staged, self._logits, draft[done:stop], within, logits[lead:rows], taps
                )
                done = stop
        return joined(verdicts)

    def _branches(self, cuts: Sequence[int], logits: Tensor) -> Branches:
        leases = [self._lease.fork() for _ in cuts]
        for lease, cut in zip(leases, cuts, strict=True):
            lease.rows = self.cached + cut
        return StaticBranches(self, leases, logits)

    def _probe_batch(self, suffix: Sequence[int], probes: list[int]) -> ProbeRows:
        self.calls += 1
        self.rows += len(suffix) * len(probes)  # nothing is copied: a block of a judge pass reads them in place
        blocks = self._judge_blocks([], suffix, [self.cached + cut for cut in probes])
        return joined([_verdicts(rows, len(suffix), logits, taps) for rows, logits, taps in blocks])

    @torch.inference_mode()
    def _judge_blocks(
        self, tokens: list[int], suffix: Sequence[int], ends: list[int]
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Read a draft, whose rows stay in the cache, and a probe behind each of the columns `ends`, which do not stay.

        Yields for every block: how many rows of the draft it has; their logits, followed by those of its probes' last
        rows [rows + probes, V]; and the taps of all its rows.
        """
        self._forget_prefetched()  # a block begins where the lease ends
        size, first, start = self._machine.block, 0, 0
        while start < len(tokens) or first < len(ends):
            text = tokens[start : start + size]
            start += len(text)
            # the draft's last rows share a block with the first probes
            room = 0 if start < len(tokens) else max(0 if text else 1, (size - len(text)) // len(suffix))
            some = ends[first : first + room]
            first += len(some)
            block = Block(self._lease.rows, len(text), tuple(some), len(suffix))
            last = range(len(text) + len(suffix) - 1, block.rows, len(suffix))
            logits, taps = self.run(
                text + list(suffix) * len(some), block=block, keep=torch.tensor([*range(len(text)), *last])
            )
            self._lease.rows = block.text
            yield len(text), logits, taps

    def run(
        self,
        ids: list[int],
        *,
        positions: Tensor | None = None,
        allowed: Tensor | None = None,
        block: Block | None = None,
        keep: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block of rows behind those of the lease, which grows by it. In a batch, it may share a forward (`joint`).

        positions  [R]; None: counting on from the end of the lease
        allowed    [R, columns] bool, which columns a row may attend to; None: causal
        block      for rows of a judge pass, in place of positions and allowed
        keep       which rows to give logits for: indices, or how many of the last ones; None: all
        """
        self._forget_prefetched()
        if self._maps_ids:
            ids = self.model.readable(ids)
        if block is not None:
            positions = block.positions()
        if (request := fibers.current()) is not None:
            joint: Output = request.ask(StaticPass(self, self._lease, ids, positions, allowed, block, keep, self.taps))
            return joint
        network, lease, rows = self._machine.network, self._lease, len(ids)
        weights, start = network.weights, lease.rows
        if self._steps is not None and rows <= ROWS[-1] and not isinstance(keep, Tensor):
            at = None if positions is None else positions.tolist()
            logits, taps = self._steps.run(lease, ids, at, None if allowed is None else allowed[:, start:], self.taps)
            return logits[rows - (rows if keep is None else keep) :], taps
        network.positions.reach(start + rows)
        attend = attention_behind(network, lease, rows, allowed, block, self.model.judge_kernel)
        if isinstance(keep, Tensor):
            keep = keep.to(weights.device)
        out = network.forward(
            network.embed(ids),
            network.angles(start if positions is None else positions.to(weights.device), rows),
            attend,
            rows if keep is None else keep,
            self.taps,
        )
        lease.rows = start + rows
        return out

    def _keep_rows(self, rows: list[int]) -> None:
        self._forget_prefetched()
        if rows and rows[-1] != len(rows) - 1:
            self._lease.gather(self.cached, rows)
        super()._keep_rows(rows)
        self._lease.rows = self.cached

    def _go_back(self, length: int) -> None:
        self._forget_prefetched()
        super()._go_back(length)
        self._lease.rows = self.cached


def _verdicts(text: int, suffix: int, logits: Tensor, taps: Tensor | None) -> ProbeRows:
    """The last rows of the probes in a block that begins with `text` rows of the draft."""
    return logits[text:], None if taps is None else taps[text + suffix - 1 :: suffix]
