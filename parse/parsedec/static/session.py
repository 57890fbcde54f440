"""The static backend: a session whose cache is a lease on preallocated buffers.

Everything a session promises, and the books it keeps - committed, pending and staged tokens, counters, taps - are those
of `Session`. Only what touches keys and values is replaced; the cache of the base class stays empty.

Passes longer than a block of rows are cut into blocks, each run through all layers before the next. A probe of a judge
pass is not kept, so the probes of a later block are written where those of the block before were.

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

BLOCK = {"cpu": 512, "cuda": 2048}  # most rows at a time: enough to be bound by arithmetic, few enough to mask


@dataclass(frozen=True, slots=True)
class Machine:
    """What the sessions of one model share.

    steps       decode steps in buckets, by whether they are compiled; None where passes run as they are
    prefetches  whether the device works on while the host looks at a token
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
            # on Hopper torch takes cuDNN's attention before all others, and plans it anew for every length of a text
            torch.backends.cuda.enable_cudnn_sdp(False)
            log.info(
                "the static backend turns cuDNN's attention off for this process: it is slow on lengths that change"
            )
        plain = Steps(network, compiled=False) if graphs else None
        steps = {False: plain, True: Steps(network, compiled=True)}
        return cls(network, Pool(weights), BLOCK[weights.device.type], steps, prefetches=graphs)


_machines: WeakKeyDictionary[PreTrainedModel, Machine] = WeakKeyDictionary()


def machine_of(model: LanguageModel) -> Machine:
    """The machine of a model without an obstacle, made once; made anew if its parameters are not what was read."""
    machine = _machines.get(model.hf)
    if machine is None or not machine.network.weights.fresh:
        machine = _machines[model.hf] = Machine.of(read_weights(model.hf))
    return machine


def forget_machine(model: LanguageModel) -> None:
    """For a model whose modules or parameters are others now; sessions that are open go on with what they hold."""
    _machines.pop(model.hf, None)


@dataclass(slots=True)
class Prefetched:
    """A token that is read, but neither committed nor counted: its row is behind those of the session's books.

    token  None while the host does not know it
    """

    token: int | None
    output: Output


class StaticSession(Session):
    """A session of a model that `static_obstacle` has nothing against."""

    def __init__(self, model: LanguageModel, taps: tuple[int, ...] = (), *, ids: int = 0) -> None:
        super().__init__(model, taps, ids=ids)
        self._machine = machine_of(model)
        self._steps = self._machine.steps[model.compiled]
        self._lease = Lease(self._machine.pool)  # rows: cached ones, and staged ones or a prefetched one behind them
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
        """What is read in the end need not be this token: the row is then forgotten, and written over."""
        if not self.prefetches:
            return int(token)
        if self.next_logits is None:
            raise ValueError(f"prefetch() in a session with {len(self.pending)} pending tokens; expected none")
        assert self._steps is not None
        self._drop_staged()
        self._forget_prefetched()
        self._readback.begin(token)
        output = self._steps.run(self._lease, token.view(1), None, None, self.taps)
        self._prefetched = Prefetched(None, output)  # already here: the wait may be interrupted
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
        """Causal rows behind the cache, in blocks; only the last `keep` of them give logits."""
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
        """In blocks of rows, each staged when it was read: logits of all rows at once would be [N, V]."""
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
        self.rows += len(suffix) * len(probes)  # and nothing is copied for the branches
        blocks = self._judge_blocks([], suffix, [self.cached + cut for cut in probes])
        return joined([_verdicts(rows, len(suffix), logits, taps) for rows, logits, taps in blocks])

    @torch.inference_mode()
    def _judge_blocks(
        self, tokens: list[int], suffix: Sequence[int], ends: list[int]
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Rows of a draft, which stay in the cache, and probes behind columns `ends`, which do not.

        Yields for every block how many rows of the draft it holds, their logits and then those of its probes' last rows
        [rows + probes, V], and taps [all rows, L, H].
        """
        self._forget_prefetched()  # blocks are laid out behind what the lease holds
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
        """One block of rows behind those of the lease, which grows by it.

        positions  [R], None: plainly onwards;  allowed  [R, columns] bool, None: causal;  keep  None: logits of all
        block      rows of a judge pass, in place of positions and allowed
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
    """The last rows of a block's probes, which stand behind `text` rows of the draft."""
    return logits[text:], None if taps is None else taps[text + suffix - 1 :: suffix]
