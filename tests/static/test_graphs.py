"""Captures as CUDA wants them: what is held, kept and put off meanwhile. torch.cuda itself is played here."""

import contextlib
import gc
import itertools

import pytest
import torch

from parsedec import meter
from parsedec.meter import DEVICE_WIDE, Meter
from parsedec.static import graphs
from parsedec.static.graphs import ATTEMPTS, STREAMS, Graphs, own_stream

CUDA = torch.device("cuda", 0)


class Stream:
    """torch hands out so many of them in turn."""

    numbers = itertools.count()

    def __init__(self, device, priority=0):
        self.priority, self.stream_id = priority, next(Stream.numbers) % STREAMS

    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """What a capture ends in, if in an error: to be set to one."""
    monkeypatch.setattr(Stream, "numbers", itertools.count())
    graphs._streams.clear()
    ends = []

    @contextlib.contextmanager
    def capture(graph, memory, stream, capture_error_mode):
        assert DEVICE_WIDE.locked()
        assert not gc.isenabled()
        yield
        if ends:
            raise ends[0]

    played = {"Stream": Stream, "CUDAGraph": Graph, "graph": capture, "stream": contextlib.nullcontext,
              "graph_pool_handle": object, "current_stream": lambda *_: Stream(CUDA), "set_stream": lambda _: None,
              "device": lambda _: contextlib.nullcontext()}  # fmt: skip
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return ends


def test_a_stream_is_handed_out_once_while_it_is_held(cuda):
    held = [own_stream(CUDA) for _ in range(STREAMS - 1)]
    Stream(CUDA)  # somebody else's turn
    held.append(own_stream(CUDA))
    assert {stream.stream_id for stream in held} == set(range(STREAMS))
    assert {stream.priority for stream in held} == {-1}
    freed = held.pop(5).stream_id
    assert own_stream(CUDA).stream_id == freed
    assert own_stream(torch.device("cuda", 1)).stream_id in range(STREAMS), "those of another device are others"
    held.append(own_stream(CUDA))
    assert own_stream(CUDA).stream_id in range(STREAMS), "where all are held one is shared"


def test_what_failed_is_kept_as_long_as_the_others(cuda, caplog):
    """A graph that goes would clear what those before it still use."""
    network, calls = Graphs(CUDA, "a step"), itertools.count()
    assert network.captured(lambda: next(calls))[1] == graphs.WARM_UPS
    cuda.append(RuntimeError("out of memory"))
    for _ in range(ATTEMPTS):
        assert network.possible
        assert network.captured(lambda: next(calls)) is None
    assert not network.possible
    assert (network.captures, len(network._kept)) == (1, 1 + ATTEMPTS)
    assert gc.isenabled()
    assert not DEVICE_WIDE.locked()
    assert "runs without them from now on: out of memory" in caplog.text
    cuda[0] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        Graphs(CUDA, "a step").captured(lambda: next(calls))
    assert gc.isenabled()
    assert not DEVICE_WIDE.locked()


def test_garbage_stays_uncollected_if_it_was(cuda):
    gc.disable()
    try:
        Graphs(CUDA, "a step").captured(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_device_is_waited_for_when_nothing_is_captured(cuda, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append((device, DEVICE_WIDE.locked())))
    with Meter(CUDA).span("judge"):
        assert waited == [(0, True), (1, True)] * 2
    assert not meter.DEVICE_WIDE.locked()
