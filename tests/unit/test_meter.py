"""Seconds go to the phase that took them, and to none where a reader did."""

import pytest
import torch

from parsedec.meter import Meter


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds

    def passes(self, seconds):
        self.seconds += seconds


@pytest.fixture
def clock():
    return Clock()


def steps(clock, *each, error=None):
    for seconds in each:
        clock.passes(seconds)
        yield seconds
    clock.passes(1)
    if error:
        raise error


def test_steps_are_counted_and_what_their_reader_does_between_is_not(clock):
    meter = Meter(torch.device("cpu"), clock)
    for step in meter.timed(steps(clock, 8, 16, 32), "decode"):
        assert meter.seconds("decode") == 2 * step - 8
        clock.passes(1000)
    assert meter.seconds("decode") == 8 + 16 + 32 + 1
    with meter.away():
        clock.passes(500)
    with meter.span("judge"):
        clock.passes(64)
    times = meter.times()
    assert (times.decode_s, times.judge_s, times.draft_s) == (57, 64, 0)
    assert times.wall_s == 57 + 3 * 1000 + 64


def test_a_reader_that_stops_early_and_a_step_that_fails(clock):
    meter = Meter(torch.device("cpu"), clock)
    for _ in meter.timed(steps(clock, 8, 16), "decode"):
        clock.passes(1000)
        break
    assert meter.seconds("decode") == 8
    with pytest.raises(OSError, match="gone"):
        list(meter.timed(steps(clock, 2, error=OSError("gone")), "decode"))
    assert meter.seconds("decode") == 8 + 3


def test_the_device_is_waited_for_where_a_phase_ends_and_not_between_its_steps(clock, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device) or clock.passes(0.25))
    meter = Meter(torch.device("cuda"), clock)
    waited.clear()
    for _ in meter.timed(steps(clock, 8, 16, 32), "decode"):
        pass
    assert waited == [0, 1, 0, 1]
    assert meter.seconds("decode") == 57.5  # what was still under way at the end is its own
