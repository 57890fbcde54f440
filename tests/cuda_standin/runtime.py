"""torch.cuda over the stand-in. What is asked for is done at once, so streams and events have nothing to wait for."""

import contextlib
import itertools
import time
from types import SimpleNamespace

import torch

import cuda_graphs

GIB = 1 << 30
PROPERTIES = SimpleNamespace(
    name="stand-in", major=9, minor=0, total_memory=140 * GIB, multi_processor_count=132, warp_size=32,
    L2_cache_size=60 << 20,
)  # fmt: skip
STATE = torch.zeros(16, dtype=torch.uint8)


class Stream:
    _ids = itertools.count(1)
    current = None  # the device's module, which knows the stream of this thread

    def __init__(self, device=None, priority=0, number=None):
        self.number = self.stream_id = next(Stream._ids) if number is None else number

    def __eq__(self, other):
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self):
        return self.number

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return (later.at - self.at) * 1e3


@contextlib.contextmanager
def on_stream(stream):
    before = Stream.current.stream()
    Stream.current.set_stream(stream.number)
    try:
        yield
    finally:
        Stream.current.set_stream(before)


def install(device):
    """device  the module of `device.cpp`"""
    Stream.current = device
    said = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0,
        "get_device_name": PROPERTIES.name, "get_device_properties": PROPERTIES, "get_device_capability": (9, 0),
        "mem_get_info": (139 * GIB, 140 * GIB), "memory_allocated": 0, "memory_reserved": 0, "max_memory_allocated": 0,
        "graph_pool_handle": (0, 1), "get_rng_state": STATE, "get_rng_state_all": [STATE],
    }  # fmt: skip
    done = (
        "_lazy_init", "empty_cache", "init", "manual_seed", "manual_seed_all", "reset_peak_memory_stats", "set_device",
        "set_rng_state", "set_rng_state_all", "synchronize",
    )  # fmt: skip
    for name, answer in said.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in done:
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream = Stream, Event, on_stream
    torch.cuda.device = contextlib.nullcontext
    torch.cuda.current_stream = lambda device_=None: Stream(number=device.stream())
    torch.cuda.set_stream = lambda stream: device.set_stream(stream.number)
    torch.compile = lambda call=None, **_: call if call is not None else lambda later: later

    from parsedec.static.graphs import Graphs

    Graphs.captured = cuda_graphs.captured
