"""Stages under a clock: what does not fit is skipped; what raises, or takes too long, costs no other; all is said."""

import os
import signal
import time

import pytest

from parsedec.errors import ConfigError
from parsedec.experiment.cli import interrupted_by_sigterm
from parsedec.hardware.stages import Clock, Stage, run_stages


def clock(seconds):
    return Clock(time.monotonic() + seconds)


def run(stages, seconds=60):
    saved = []
    run_stages(stages, clock(seconds), saved.append)
    return saved


def test_stages_run_in_order_and_what_became_of_them_is_saved_after_each():
    order = []
    stages = [Stage(name=name, seconds=1, call=lambda name=name: order.append(name)) for name in "abc"]
    saved = run(stages)
    assert order == ["a", "b", "c"]
    assert [[one["name"] for one in done] for done in saved] == [[], ["a"], ["a", "b"], ["a", "b", "c"]]
    assert {one["status"] for one in saved[-1]} == {"finished"}


def test_a_stage_without_its_time_is_skipped_and_later_shorter_ones_are_not():
    ran = []
    done = run(
        [
            Stage(name="long", seconds=100, call=lambda: ran.append("long")),
            Stage(name="polite", seconds=50, call=lambda: ran.append("polite"), yields_to=("worthy",)),
            Stage(name="worthy", seconds=20, call=lambda: ran.append("worthy")),
        ]
    )[-1]
    assert ran == ["worthy"]
    assert [one["status"] for one in done] == ["skipped", "skipped", "finished"]
    assert "expected to take 100 s" in done[0]["note"]
    assert "beside the 20 s of stages behind it" in done[1]["note"]


def test_a_stage_that_raises_costs_no_other():
    def fail():
        raise RuntimeError("no compiler")

    done = run([Stage(name="bad", seconds=1, call=fail), Stage(name="good", seconds=1, call=lambda: None)])[-1]
    assert [one["status"] for one in done] == ["failed", "finished"]
    assert done[0]["note"] == "RuntimeError: no compiler"


def test_a_stage_that_takes_too_long_is_stopped_before_the_time_of_those_it_yields_to():
    ran = []
    slow = Stage(name="slow", seconds=0.1, call=lambda: time.sleep(30), yields_to=("next",))
    start = time.monotonic()
    done = run([slow, Stage(name="next", seconds=1, call=lambda: ran.append(1))], seconds=1.4)[-1]
    assert time.monotonic() - start < 10
    assert [one["status"] for one in done] == ["stopped", "skipped"] or ran == [1]
    assert done[0]["note"].startswith("stopped after")


@pytest.mark.parametrize("terminated", [False, True])
def test_an_interruption_is_saved_and_passes_through(terminated):
    saved = []

    def stop():
        if not terminated:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    stages = [Stage(name="a", seconds=1, call=stop), Stage(name="b", seconds=1, call=lambda: None)]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm():
        run_stages(stages, clock(60), saved.append)
    assert [(one["name"], one["status"]) for one in saved[-1]] == [("a", "interrupted")]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("yields_to", [("nobody",), ("a",)])
def test_what_cannot_be_yielded_to_is_refused(yields_to):
    stages = [Stage(name="a", seconds=1, call=lambda: None), Stage(name="b", seconds=1, call=lambda: None)]
    with pytest.raises(ConfigError, match="yields_to"):
        run([*stages, Stage(name="c", seconds=1, call=lambda: None, yields_to=yields_to)])
    with pytest.raises(ConfigError, match="minutes=0"):
        Clock.of(0, time.monotonic())
