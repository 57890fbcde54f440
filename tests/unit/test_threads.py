"""`runtime.threads=auto`: the number of CPU threads is tried on the target, by a clock that is scripted here."""

import json

import pytest
import torch

import tiny
from parsedec.errors import OutputExistsError
from parsedec.experiment import threads
from parsedec.experiment.record import earlier_record, write_record
from parsedec.experiment.threads import quickest, set_threads, settle_threads, settled_threads, time_threads
from parsedec.models.language_model import LanguageModel
from parsedec.remote.model import RemoteModel
from parsedec.sessions.session import Session


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process in which torch has chosen four threads, and nobody has chosen others."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    for name in ("_torchs", "_recorded", "_settled"):
        monkeypatch.setattr(threads, name, None)
    yield
    torch.set_num_threads(before)


class Clock:
    """A step takes as long as is told for the threads that compute at the time; the first one ten times as long."""

    def __init__(self, monkeypatch, costs):
        self.now, self.costs, self.steps = 0.0, costs, []
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)

    def step(self, *_):
        self.now += self.costs[torch.get_num_threads()] * (1 if self.steps else 10)
        self.steps.append(torch.get_num_threads())


def test_numbers_take_turns_and_hopeless_ones_are_tried_once(monkeypatch):
    clock = Clock(monkeypatch, {4: 1.0, 2: 1.2, 1: 2.0})
    seconds = time_threads(clock.step, [4, 2, 1])
    assert seconds == pytest.approx({4: 1.0, 2: 1.2, 1: 2.0})
    assert clock.steps == [4, 4, 2, 2, 1, 1] + [4, 4, 2, 2] * (threads.ROUNDS - 1), "the first of two is not counted"


def test_a_slow_round_decides_nothing():
    slow = iter([1.0] * 4 + [50.0] + [1.0] * 5)
    now = 0.0

    def step():
        nonlocal now
        now += next(slow)

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(threads.time, "perf_counter", lambda: now)
        assert time_threads(step, [2]) == {2: 1.0}


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [({4: 1.0, 2: 1.2, 1: 2.0}, 4), ({4: 3.0, 2: 2.5, 1: 1.0}, 1), ({4: 1.0, 2: 1.04, 1: 1.06}, 2), ({1: 9.0}, 1)],
)
def test_the_fewest_that_are_as_good_as_the_quickest(seconds, chosen):
    assert quickest(seconds) == chosen


def timed_by(monkeypatch, clock):
    feed = Session.feed
    monkeypatch.setattr(Session, "feed", lambda session, ids: clock.step() or feed(session, ids))


def state():
    return settled_threads(), torch.get_num_threads()


def test_the_first_target_decides_for_the_run(monkeypatch, tiny_target, tiny_draft, tmp_path):
    clock = Clock(monkeypatch, {4: 1.3, 2: 1.0, 1: 1.4})  # the last one that is tried is not the one that is chosen
    timed_by(monkeypatch, clock)
    set_threads("auto")
    settle_threads(None, tiny_target)
    settle_threads(3, tiny_target)
    assert state() == (None, 4), "only where it is asked for"
    write_record({"provenance": {"threads": 4}}, tmp_path / "before.json")
    settle_threads("auto", tiny_target)
    assert state() == (2, 2)
    clock.costs = {4: 1.0, 2: 2.0, 1: 3.0}
    settle_threads("auto", tiny_draft)
    assert state() == (2, 2)
    write_record({"provenance": {"threads": 4}}, tmp_path / "after.json")
    said = [json.loads((tmp_path / f"{name}.json").read_text())["provenance"] for name in ("before", "after")]
    assert said == [{"threads": 4}, {"threads": 2}]
    set_threads("auto")  # another run of a sweep
    assert state() == (None, 4)
    settle_threads("auto", tiny_draft)
    assert state() == (4, 4)
    set_threads(1)
    write_record({"provenance": {"threads": 1}}, tmp_path / "number.json")
    assert json.loads((tmp_path / "number.json").read_text())["provenance"] == {"threads": 1}
    set_threads(None)
    assert state() == (None, 4)


def test_a_resumed_run_goes_on_with_as_many(monkeypatch, tiny_target, tmp_path):
    config = {"runtime": {"threads": "auto"}}
    write_record({"schema_version": 1, "config": config, "provenance": {"threads": 3}}, tmp_path / "record.json")
    write_record({"schema_version": 1, "config": config, "provenance": {"threads": 64}}, tmp_path / "larger.json")
    monkeypatch.setattr(threads, "open_session", lambda model: pytest.fail("tried"))
    set_threads("auto")
    assert earlier_record(tmp_path / "record.json", config, resume=True)
    settle_threads("auto", tiny_target)
    assert state() == (3, 3)
    set_threads("auto")
    assert earlier_record(tmp_path / "larger.json", config, resume=True)
    with pytest.raises(pytest.fail.Exception, match="tried"):
        settle_threads("auto", tiny_target)
    changed = {"runtime": {"threads": None}}
    with pytest.raises(OutputExistsError, match=r'runtime\.threads: "auto", now null\)'):
        earlier_record(tmp_path / "record.json", changed, resume=True)


@pytest.mark.parametrize("elsewhere", ["cuda", "shared", "server"])
def test_models_that_compute_elsewhere_decide_nothing(monkeypatch, elsewhere):
    monkeypatch.setattr(threads, "open_session", lambda model: pytest.fail("tried"))
    device = torch.device("cuda" if elsewhere == "cuda" else "cpu")
    model = RemoteModel.__new__(RemoteModel) if elsewhere == "server" else LanguageModel.__new__(LanguageModel)
    model.__dict__.update(device=device, shared=elsewhere == "shared")
    settle_threads("auto", model)
    assert state() == (None, 4)


def test_a_short_context_is_enough():
    settle_threads("auto", tiny.model("llama", context_limit=2))
    assert settled_threads() in (1, 2, 4)


def test_a_choice_leaves_the_model_as_it_was(tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target)
    settle_threads("auto", tiny_target)
    assert settled_threads() in (1, 2, 4)
    assert tiny.plain_answer(tiny_target) == (prompt, tokens)


def test_one_thread_leaves_nothing_to_choose(monkeypatch, tiny_target):
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "open_session", lambda model: pytest.fail("tried"))
    set_threads("auto")
    settle_threads("auto", tiny_target)
    assert state() == (None, 1)
