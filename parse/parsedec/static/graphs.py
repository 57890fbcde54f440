"""CUDA graphs of what runs again and again on tensors that stay where they are.

A graph is captured at the first call and replayed from then on: the host then launches one graph instead of some
hundred kernels. Where there is no CUDA the same code is called directly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch

log = logging.getLogger(__name__)

WARM_UPS = 3  # calls before a capture, in which libraries allocate and choose kernels

Output = TypeVar("Output")


class Graphs:
    """The graphs of one network. They share memory, so one of them is replayed at a time.

    what      they are of, for a warning
    captures  how many there are
    device    a context in which streams and graphs are those of the network's device
    """

    def __init__(self, device: torch.device, what: str) -> None:
        on_cuda = device.type == "cuda"
        self.what = what
        self.captures = 0
        self.device: AbstractContextManager[Any] = torch.cuda.device(device) if on_cuda else nullcontext()
        self._memory = torch.cuda.graph_pool_handle() if on_cuda else None

    def captured(self, body: Callable[[], Output]) -> tuple[Callable[[], object], Output] | None:
        """(replay, its outputs) of a CUDA graph of `body`, its inputs in place; None where there are no graphs."""
        if self._memory is None:
            return None
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                body()  # what this raises - a compiler's error, too little memory - has nothing to do with graphs
        torch.cuda.current_stream().wait_stream(aside)
        try:
            graph = torch.cuda.CUDAGraph()
            # the judge may work in another thread meanwhile: what it allocates is none of the capture's business
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                outputs = body()
        except RuntimeError as error:
            log.warning("%s could not be captured in a CUDA graph and runs without one: %s", self.what, error)
            self._memory = None
            return None
        self.captures += 1
        return graph.replay, outputs


class Replayed(Generic[Output]):
    """A computation without arguments, captured when it is first called. Its outputs are overwritten by the next call.

    begun  whether it has run once, as far as it could: what failed before, in a compiler say, is tried again
    """

    def __init__(self, graphs: Graphs, body: Callable[[], Output]) -> None:
        self._graphs, self._body = graphs, body
        self._graph: tuple[Callable[[], object], Output] | None = None
        self.begun = False

    def __call__(self) -> Output:
        if not self.begun:
            self._graph = self._graphs.captured(self._body)
            self.begun = True
        if self._graph is None:
            return self._body()
        replay, outputs = self._graph
        replay()
        return outputs
