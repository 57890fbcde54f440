"""The gateway over models on servers, and what goes wrong there: every request ends, with its own answer or an error.

Oracle: the local engine on the same weights. The judge decides by place alone, so an answer that had to be asked for
again is the same one, and one that broke off is a beginning of it.
"""

import asyncio
import json
import random
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

openai = pytest.importorskip("openai", reason="the official client; pip install -e '.[dev]'")
NEW = 16
PROMPTS = ["w1w2", "w3?", "w5w6w7", "w8.w9", "w10", "w11w12"]
PASSING = ["500", "busy", "malformed", "reset", "reset_stream", "broken_stream", "empty"]
FAST = {"retries": 2, "backoff_s": 0.01, "read_timeout_s": 1.5, "connect_timeout_s": 1.0, "cooldown_s": 0.0}
SOON_S = 120.0  # for what takes a few seconds where nothing else runs
MODEL = "tiny"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, gateway, target's server, {prompt: its text}); the first prompt's answer has two authors"""
    target, draft = tiny.model("llama"), tiny.model("llama", seed=5, layers=2)
    folder = tiny.saved(target, tmp_path_factory.mktemp("spoken"))
    outer = PrefixVerification(judge=tiny.ScriptedJudge(seed=1), segmenter=EveryTokens(delta=4),
                               boundary=FirstFailure(threshold=0.3, full_threshold=0.9))  # fmt: skip
    local = Parse(target, draft, outer=outer)
    results = {prompt: local.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS}
    mixed = [p for p, result in results.items() if 0 < result.counters.kept_draft_tokens < result.new_tokens]
    texts = {prompt: results[prompt].text for prompt in sorted(PROMPTS, key=lambda p: p not in mixed)}
    assert mixed
    assert len(set(texts.values())) == len(PROMPTS)
    with FakeServer(target) as first, FakeServer(draft) as second:
        engine = Parse(*(connect(server.url, tokenizer=folder, **FAST) for server in (first, second)), outer=outer)
        with listening(engine, limits=Limits(max_new_tokens=NEW), model=MODEL, at_once=4) as (address, gateway):
            yield address, gateway, first, texts


def asked(prompt, **fields):
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **fields}


def streamed(address, prompt):
    """(text, the error that ended it or None) of a streamed answer; (None, error) where it did not begin."""
    answer = httpx.post(f"{address}/v1/chat/completions", json=asked(prompt, stream=True), timeout=SOON_S)
    if answer.status_code != 200:
        return None, answer.json()["error"]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    error = events.pop()["error"] if "error" in events[-1] else None
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events), error


def until_idle(gateway):
    end = time.monotonic() + SOON_S
    while gateway.desk.running:
        assert time.monotonic() < end, "an answer is still being written"
        time.sleep(0.01)


def test_answers_are_the_local_ones(served):
    address, _, _, texts = served
    for prompt in PROMPTS[:3]:
        answer = httpx.post(f"{address}/v1/chat/completions", json=asked(prompt), timeout=SOON_S).json()
        assert answer["choices"][0]["message"]["content"] == texts[prompt]
        assert streamed(address, prompt) == (texts[prompt], None)


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_not_seen(served, fault):
    address, _, server, texts = served
    prompt = next(iter(texts))
    for when in ([fault], [None, fault]):  # as it judges, as it writes
        server.faults.extend(when)
        assert streamed(address, prompt) == (texts[prompt], None)
        assert not server.faults


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [("malformed", 503, "model_server_lost"), ("slow", 503, "model_server_lost"), ("reset", 503, "model_server_lost"),
     ("400", 400, "model_server_refused")],
)  # fmt: skip
def test_a_fault_that_stays_ends_its_request_alone(served, fault, status, code):
    """Before the answer has begun by its status, after that by the last event of the stream; never by silence."""
    address, gateway, server, texts = served
    tries = 1 if fault == "400" else 3
    prompt = next(iter(texts))
    begun = time.monotonic()
    server.faults.extend([fault] * tries)
    answer = httpx.post(f"{address}/v1/chat/completions", json=asked(prompt), timeout=SOON_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert server.url not in answer.text
    assert ("this adapter is not allowed" in answer.text) == (fault == "400")
    server.faults.extend([None] + [fault] * tries)
    text, error = streamed(address, prompt)
    assert error["code"] == code
    assert text
    assert texts[prompt].startswith(text)
    assert time.monotonic() - begun < SOON_S
    assert streamed(address, prompt) == (texts[prompt], None)
    until_idle(gateway)


def test_many_users_under_faults_get_their_own_text_or_an_error(served):
    """Nothing hangs, nothing is silently lost, and no other user's text is ever returned."""
    address, gateway, server, texts = served
    pick = random.Random(4)
    server.faults.extend(pick.choice([None, None, *PASSING, "400"]) for _ in range(30))
    ends = {"whole": 0, "error": 0}

    async def ask(client, prompt):
        text = ""
        try:
            async for chunk in await client.chat.completions.create(**asked(prompt, stream=True)):
                text += chunk.choices[0].delta.content or ""
        except openai.APIError:
            assert texts[prompt].startswith(text)
            ends["error"] += 1
        else:
            assert text == texts[prompt]
            ends["whole"] += 1

    async def all_of_it():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            await asyncio.wait_for(asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS * 2)), SOON_S)

    asyncio.run(all_of_it())
    assert sum(ends.values()) == len(PROMPTS) * 2
    assert min(ends.values()) > 0
    server.faults.clear()
    assert [streamed(address, prompt) for prompt in PROMPTS] == [(texts[prompt], None) for prompt in PROMPTS]
    until_idle(gateway)


def test_a_client_that_leaves_is_left_by_the_model_server_too(served):
    address, gateway, server, _ = served
    server.hung_up.clear()
    server.pace_s = 0.01  # the judge has to be done before a time-out
    try:
        with httpx.stream("POST", f"{address}/v1/chat/completions", timeout=SOON_S,
                          json=asked(PROMPTS[0], stream=True, max_tokens=400)) as answer:  # fmt: skip
            assert any('"author"' in line for line in answer.iter_lines())  # text stands: the stream may begin before
        assert server.hung_up.wait(SOON_S)
    finally:
        server.pace_s = 0.0
    until_idle(gateway)


def test_a_key_that_is_withdrawn_is_for_the_log(served, caplog):
    address, _, server, texts = served
    server.api_key = "another"
    try:
        answer = httpx.post(f"{address}/v1/chat/completions", json=asked(PROMPTS[0]), timeout=SOON_S)
    finally:
        server.api_key = None
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "model_server_refused")
    assert "Check the key" in caplog.text
    assert streamed(address, PROMPTS[0]) == (texts[PROMPTS[0]], None)


def test_log_probabilities_that_stop_coming_are_named(served, caplog):
    """They were there when the server was asked what it can do."""
    address, _, server, texts = served
    server.logprobs = False
    try:
        answer = httpx.post(f"{address}/v1/chat/completions", json=asked(PROMPTS[0]), timeout=SOON_S)
    finally:
        server.logprobs = True
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_server_lost")
    assert "sent no log-probabilities" in caplog.text
    assert streamed(address, PROMPTS[0]) == (texts[PROMPTS[0]], None)


def test_logprobs_are_refused_by_name(served):
    answer = httpx.post(f"{served[0]}/v1/chat/completions", json=asked(PROMPTS[0], logprobs=True), timeout=SOON_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")
    assert "two authors" in answer.json()["error"]["message"]
