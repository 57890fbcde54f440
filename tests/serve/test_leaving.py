"""A client that leaves before the first piece frees its place soon, whatever its answer waits for: a model server that
hangs, one that is asked again after a pause, a draft that a model here still writes."""

import time

import httpx
import pytest

import tiny
from fake_server import FakeServer
from parsedec import Limits, Parse, PrefixVerification
from parsedec.boundary import FirstFailure
from parsedec.remote import connect
from parsedec.segmenters import EveryTokens
from serving import listening

LONG_S = 60.0  # what the model servers' time-outs and pauses would take
SOON_S = 10.0
BODY = {"model": "m", "messages": [{"role": "user", "content": "w1w2"}]}


def outer():
    return PrefixVerification(judge=tiny.ScriptedJudge(seed=1), segmenter=EveryTokens(delta=4),
                              boundary=FirstFailure(threshold=0.3, full_threshold=0.9))  # fmt: skip


def until(condition, seconds=SOON_S):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def left_at_once(address, gateway, stream, began):
    """Ask, leave once `began`, and return the seconds until the place is free."""
    with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{address}/v1/chat/completions", json={**BODY, "stream": stream}, timeout=1.0)
    until(began)
    start = time.monotonic()
    until(lambda: gateway.desk.running == 0)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    target, draft = tiny.model("llama"), tiny.model("llama", seed=5, layers=2)
    folder = tiny.saved(target, tmp_path_factory.mktemp("spoken"))
    with FakeServer(target) as first, FakeServer(draft) as second:
        waits = {"read_timeout_s": LONG_S, "retries": 5, "backoff_s": 8.0}
        engine = Parse(*(connect(server.url, tokenizer=folder, **waits) for server in (first, second)), outer=outer())
        with listening(engine, limits=Limits(max_new_tokens=16), model="m", at_once=1) as (address, gateway):
            yield address, gateway, {"target": first, "draft": second}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("which", "fault"),
    [("draft", "slow"), ("draft", "slow_stream"), ("draft", "500"), ("target", "slow"), ("target", "500")],
)
def test_one_that_waits_for_a_model_server_leaves_at_once(servers, which, fault, stream):
    address, gateway, by_name = servers
    server = by_name[which]
    server.faults.append(fault)
    assert left_at_once(address, gateway, stream, lambda: not server.faults) < SOON_S
    answer = httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=LONG_S)
    assert answer.status_code == 200  # and the next one is served


def test_a_draft_that_is_written_here_is_left_between_two_of_its_steps(monkeypatch):
    engine = Parse(tiny.model("llama"), tiny.model("llama", seed=5, layers=2), outer=outer())
    from parsedec import drafter

    steps, step = [], drafter.Writing.step

    def slow_step(self):
        steps.append(time.sleep(0.1))
        return step(self)

    monkeypatch.setattr(drafter.Writing, "step", slow_step)
    with listening(engine, limits=Limits(max_new_tokens=400), model="m", run="threads", at_once=1) as running:
        assert left_at_once(*running, False, lambda: steps) < 2.0
        assert 5 <= len(steps) <= 30
