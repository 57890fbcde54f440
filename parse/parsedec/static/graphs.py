"""CUDA graphs of computations that are repeated on tensors that stay where they are.

A graph is captured at the first call and replayed from then on: the host launches one graph instead of some hundred
kernels. Without CUDA, the same code is called directly.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import ClassVar, Generic, TypeVar
from weakref import WeakValueDictionary

import torch

from parsedec.meter import DEVICE_WIDE
from parsedec.static.network import on_device

log = logging.getLogger(__name__)

WARM_UPS = 3  # calls before a capture, in which libraries allocate memory and choose kernels
ATTEMPTS = 3  # captures that may fail before a network goes on without graphs
STREAMS = 32  # torch hands out so many streams per device and priority, in turn

Output = TypeVar("Output")

_streams: WeakValueDictionary[tuple[int, int], torch.cuda.Stream] = WeakValueDictionary()


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other caller holds, as long as there are any left.

    It has priority: each of a decode step's few kernels then starts between two kernels of a judge's long pass, which
    runs on its caller's stream, instead of behind all of them.
    """
    for _ in range(STREAMS):
        stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        key = (device.index or 0, stream.stream_id)
        if key not in _streams:
            _streams[key] = stream
            break
    return stream


class Graphs:
    """The graphs of one network. They share memory: the output of one has to be read before the next is replayed.

    what      what they compute, for a warning
    captures  how many were captured
    device    a context in which the current device is the network's
    turn      a lock that threads running one model hold from a replay until its output is read
    total     captures of all networks so far
    """

    total: ClassVar[int] = 0

    def __init__(self, device: torch.device, what: str) -> None:
        on_cuda = device.type == "cuda"
        self.what = what
        self.captures = 0
        self.device = on_device(device)
        self.turn = RLock()
        self._attempts = ATTEMPTS if on_cuda else 0
        self._memory = torch.cuda.graph_pool_handle() if on_cuda else None
        # A stream of their own, for two reasons: torch's common one belongs to the device that captured first, and when
        # a graph is destroyed, the workspace for matrix products on its stream goes with it, whoever else uses that.
        self._stream = own_stream(device) if on_cuda else None
        self._kept: list[torch.cuda.CUDAGraph] = []  # destroyed together, those that failed as well

    @property
    def possible(self) -> bool:
        """Whether graphs can be captured here."""
        return self._attempts > 0

    def captured(self, body: Callable[[], Output]) -> tuple[Callable[[], object], Output] | None:
        """(replay, its outputs) of a CUDA graph of `body`, whose inputs are in place; None if it cannot be captured."""
        assert self._stream is not None
        callers = torch.cuda.current_stream()
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                body()  # an error here - a compiler's, a lack of memory - has nothing to do with graphs
        callers.wait_stream(self._stream)
        try:
            self._kept.append(graph := torch.cuda.CUDAGraph())
            # thread_local: a judge in another thread may allocate memory during the capture
            capture = torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local")
            with DEVICE_WIDE, _uncollected(), capture:
                outputs = body()
        except RuntimeError as error:
            torch.cuda.set_stream(callers)  # torch does not, if the end of a capture fails
            self._memory = torch.cuda.graph_pool_handle()  # the old pool may still count the capture as unfinished
            self._attempts -= 1
            lost = "runs without one this time" if self.possible else "runs without them from now on"
            log.warning("%s could not be captured in a CUDA graph and %s: %s", self.what, lost, error)
            return None
        self.captures += 1
        Graphs.total += 1
        return graph.replay, outputs


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: it would destroy graphs of models that are gone, which breaks a capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Replayed(Generic[Output]):
    """A computation without arguments, captured when it is first called. The next call overwrites its outputs.

    begun  whether a call has succeeded; one that failed, in a compiler say, is tried again
    """

    def __init__(self, graphs: Graphs, body: Callable[[], Output]) -> None:
        self._graphs, self._body = graphs, body
        self._graph: tuple[Callable[[], object], Output] | None = None
        self.begun = False

    def __call__(self) -> Output:
        if self._graph is None and self._graphs.possible:
            self._graph = self._graphs.captured(self._body)
        if self._graph is None:
            outputs = self._body()
        else:
            replay, outputs = self._graph
            replay()
        self.begun = True
        return outputs
