"""`runtime.threads=auto`: the number of CPU threads is tried on the target, by a clock that is scripted here."""

import json

import pytest
import torch

import tiny
from parsedec.experiment import threads
from parsedec.experiment.record import write_record
from parsedec.experiment.threads import quickest, set_threads, settle_threads, settled_threads, time_threads
from parsedec.session import Session


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process of four threads in which nothing is settled."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_settled", None)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Clock:
    """A step takes as long as is told for the threads that compute at the time."""

    def __init__(self, monkeypatch, costs):
        self.now, self.costs, self.steps = 0.0, costs, []
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)

    def step(self, *_):
        self.steps.append(torch.get_num_threads())
        self.now += self.costs[self.steps[-1]]


def test_numbers_take_turns_and_hopeless_ones_are_tried_once(monkeypatch):
    clock = Clock(monkeypatch, {4: 1.0, 2: 1.2, 1: 2.0})
    seconds = time_threads(clock.step, [4, 2, 1])
    assert seconds == pytest.approx({4: 1.0, 2: 1.2, 1: 2.0})
    assert clock.steps == [4, 4, 2, 2, 1, 1] + [4, 4, 2, 2] * (threads.ROUNDS - 1), "the first of two is not counted"


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [({4: 1.0, 2: 1.2, 1: 2.0}, 4), ({4: 3.0, 2: 2.5, 1: 1.0}, 1), ({4: 1.0, 2: 1.04, 1: 1.06}, 2), ({1: 9.0}, 1)],
)
def test_the_fewest_that_are_as_good_as_the_quickest(seconds, chosen):
    assert quickest(seconds) == chosen


def test_the_first_target_decides_for_the_process(monkeypatch, tiny_target, tiny_draft, tmp_path):
    clock = Clock(monkeypatch, {4: 3.0, 2: 1.0, 1: 2.0})
    feed = Session.feed
    monkeypatch.setattr(Session, "feed", lambda session, ids: clock.step() or feed(session, ids))
    settle_threads(None, tiny_target)
    settle_threads(3, tiny_target)
    assert (settled_threads(), torch.get_num_threads()) == (None, 4), "only where it is asked for"
    write_record({"provenance": {"threads": 4}}, tmp_path / "before.json")
    settle_threads("auto", tiny_target)
    assert (settled_threads(), torch.get_num_threads()) == (2, 2)
    clock.costs = {4: 1.0, 2: 2.0, 1: 3.0}
    settle_threads("auto", tiny_draft)
    assert (settled_threads(), torch.get_num_threads()) == (2, 2)
    write_record({"provenance": {"threads": 4}}, tmp_path / "after.json")
    said = [json.loads((tmp_path / f"{name}.json").read_text())["provenance"] for name in ("before", "after")]
    assert said == [{"threads": 4}, {"threads": 2}]


def test_a_choice_leaves_the_model_as_it_was(tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target)
    settle_threads("auto", tiny_target)
    assert settled_threads() in (1, 2, 4)
    assert tiny.plain_answer(tiny_target) == (prompt, tokens)


def test_one_thread_leaves_nothing_to_choose(monkeypatch, tiny_target):
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "open_session", lambda model: pytest.fail("tried"))
    settle_threads("auto", tiny_target)
    assert settled_threads() is None
    set_threads(2)
    set_threads("auto")
    set_threads(None)
    assert torch.get_num_threads() == 2
