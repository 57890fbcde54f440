"""The server, asked by OpenAI's own client over the embedded pair: each answer is the one `Parse.generate` gives."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest

import tiny
from parsedec import Delta, Limits, Parse, Result, Sampling, StopReason, load
from parsedec.batching import joint
from parsedec.errors import JudgeError, PromptError, ServerRefused, TargetLost, TargetRefused
from parsedec.serve.asked import ChatAsked, Defaults, tasks_of
from parsedec.serve.desk import Desk
from parsedec.serve.jobs import FairQueue, Job, Task
from parsedec.serve.refusals import Refusal, refusal
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.text.prompt import NewTurn
from parsedec.types import Author, Counters, PhaseTimes
from serving import listening, process

openai = pytest.importorskip("openai", reason="the official client; pip install -e '.[dev]'")
MODEL = "zoo:target"
LIMITS = Limits(max_new_tokens=96)
PROBLEMS = list(ZooArithmetic(n=4, seed=5).problems())


@pytest.fixture(scope="module")
def engine():
    return Parse(load("zoo:target", dtype="float32", device="cpu"), load("zoo:draft", dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def server(engine):
    with listening(engine, limits=LIMITS, max_request_bytes=1_000_000) as (address, gateway):
        yield address, gateway


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def asked(problem):
    return [{"role": "user", "content": problem.prompt}]


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def counts(result):
    kept = result.counters.kept_draft_tokens
    return result.prompt_tokens, result.new_tokens, kept, result.counters.draft_tokens - kept


def told(usage):
    details = usage.completion_tokens_details
    predicted = details.accepted_prediction_tokens, details.rejected_prediction_tokens
    return usage.prompt_tokens, usage.completion_tokens, *predicted


def test_chat_is_the_engines_answer(client, engine):
    for problem in PROBLEMS[:2]:
        result = engine.generate(problem.prompt, max_new_tokens=96)
        answer = client.chat.completions.create(model=MODEL, messages=asked(problem))
        (choice,) = answer.choices
        assert (choice.message.content, choice.message.role, choice.finish_reason) == (result.text, "assistant", "stop")
        assert told(answer.usage) == counts(result)
        spans = choice.model_extra["parsedec"]["spans"]
        assert [(s["author"], s["text"]) for s in spans] == [(s.author, s.text) for s in result.spans]


def test_a_last_turn_of_the_assistants_is_followed_by_another_as_openai_does(client, engine):
    messages = [*asked(PROBLEMS[0]), {"role": "assistant", "content": "I do not know."}]
    result = engine.generate(NewTurn(messages), max_new_tokens=96)
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    assert (answer.choices[0].message.content, told(answer.usage)) == (result.text, counts(result))
    assert result.prompt_tokens > engine.generate(messages, max_new_tokens=1).prompt_tokens


def test_streamed_chat_is_the_same_and_names_authors(client, engine):
    result = engine.generate(PROBLEMS[2].prompt, max_new_tokens=96)
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=asked(PROBLEMS[2]), stream=True, stream_options=options)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == result.text
    assert deltas[0].role == "assistant"
    by_author = dict.fromkeys(Author, "")
    for delta in deltas:
        if extra := (delta.model_extra or {}).get("parsedec"):
            by_author[extra["author"]] += delta.content
    assert by_author == {a: "".join(s.text for s in result.spans if s.author is a) for a in Author}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert told(chunks[-1].usage) == counts(result)
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_completion_goes_on_with_text_or_ids(client, engine):
    ids = engine.target.tokenizer.encode("12 + 30 = ")
    result = engine.generate(ids, max_new_tokens=8)
    for prompt in ("12 + 30 = ", ids):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (result.text, "length")
        assert told(answer.usage) == counts(result)
    streamed = client.completions.create(model=MODEL, prompt=ids, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == result.text
    two = client.completions.create(model=MODEL, prompt=["12 + 30 = ", "12 + 31 = "], max_tokens=4)
    other = engine.generate(engine.target.tokenizer.encode("12 + 31 = "), max_new_tokens=4)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[1].text == other.text
    assert two.usage.prompt_tokens == 2 * len(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_follow_their_seeds(client, engine, stream):
    sampling = Sampling(temperature=1.0, top_p=0.95)
    tasks = [Task(prompt="", max_new_tokens=40, sampling=sampling, seed=7, choice=i) for i in range(2)]
    prompt = PROBLEMS[0].prompt
    expected = [
        engine.generate(prompt, max_new_tokens=40, sampling=sampling, generator=task.generator()) for task in tasks
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=asked(PROBLEMS[0]), n=2, seed=7, temperature=1.0, top_p=0.95, max_completion_tokens=40,
        stream=stream)  # fmt: skip
    if stream:
        texts = {0: "", 1: ""}
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = {choice.index: choice.message.content for choice in answer.choices}
        assert answer.usage.prompt_tokens == expected[0].prompt_tokens
        assert answer.usage.completion_tokens == sum(result.new_tokens for result in expected)
    assert texts == {i: result.text for i, result in enumerate(expected)}
    assert tasks[0].generator().initial_seed() != tasks[1].generator().initial_seed()


def test_stop_strings_end_answers(client, engine):
    whole = engine.generate(PROBLEMS[1].prompt, max_new_tokens=96).text
    stop = whole[len(whole) // 2 :][:6]
    result = engine.generate(PROBLEMS[1].prompt, max_new_tokens=96, stop=[stop])
    assert result.stop is StopReason.STOP_STRING
    for given in (stop, ["never said", stop]):
        answer = client.chat.completions.create(model=MODEL, messages=asked(PROBLEMS[1]), stop=given)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (result.text, "stop")
    streamed = client.chat.completions.create(model=MODEL, messages=asked(PROBLEMS[1]), stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == result.text


def test_many_clients_each_get_their_own_answer(client, engine):
    expected = [engine.generate(problem.prompt, max_new_tokens=96).text for problem in PROBLEMS]

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as many:
            made = [many.chat.completions.create(model=MODEL, messages=asked(p)) for p in PROBLEMS * 3]
            return await asyncio.gather(*made)

    answers = asyncio.run(all_at_once())
    assert [answer.choices[0].message.content for answer in answers] == expected * 3


def test_models(client, server):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "parsedec"
    with pytest.raises(openai.NotFoundError, match=r"zoo:target"):
        client.models.retrieve("another")


HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
WRONG = [
    ({**HELLO, "model": "another"}, 404, "model"),
    ({**HELLO, "logprobs": True}, 400, "logprobs"),
    ({**HELLO, "tools": [{"type": "function"}]}, 400, "tools"),
    ({**HELLO, "tempreature": 0}, 400, "tempreature"),
    ({**HELLO, "temperature": 3}, 400, "temperature"),
    ({**HELLO, "temperature": "warm"}, 400, "temperature"),
    ({**HELLO, "top_p": 0}, 400, "top_p"),
    ({**HELLO, "max_tokens": 0}, 400, "max_tokens"),
    ({**HELLO, "max_completion_tokens": 10**9}, 400, "max_completion_tokens"),
    ({**HELLO, "n": 99}, 400, "n"),
    ({**HELLO, "n": 0}, 400, "n"),
    ({**HELLO, "stop": [""]}, 400, "stop"),
    ({**HELLO, "messages": []}, 400, "messages"),
    ({**HELLO, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ({**HELLO, "messages": [{"role": "user", "content": ""}]}, 400, "messages"),
    ({**HELLO, "messages": [{"role": "user", "content": "word " * 5000}], "stream": True}, 400, "messages"),
    ({**HELLO, "messages": [{"role": "banana", "content": "Hello"}]}, 400, "messages"),
    ({**HELLO, "top_k": -2}, 400, "top_k"),
    ({**HELLO, "repetition_penalty": 1.1}, 400, "repetition_penalty"),
    ({**HELLO, "ignore_eos": True}, 400, "ignore_eos"),
    ({"messages": HELLO["messages"]}, 400, "model"),
]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "it is null"), ([{"type": "text", "text": "a"}, {"type": "image_url"}], "a part of type 'image_url'"),
     (["a"], "a part of type 'str'"), (3, "a valid string")],
)  # fmt: skip
def test_a_wrong_place_is_named_as_the_client_wrote_it(server, content, said):
    wrong = {**HELLO, "messages": [*HELLO["messages"], {"role": "assistant", "content": content}]}
    answer = httpx.post(f"{server[0]}/v1/chat/completions", json=wrong, timeout=60)
    message = answer.json()["error"]["message"]
    assert message.startswith("'messages.1.content' is not what it should be")
    assert said in message


def test_a_temperature_of_nearly_nothing_is_greedy(client):
    answers = [
        client.chat.completions.create(model=MODEL, messages=asked(PROBLEMS[0]), temperature=temperature, seed=seed)
        for seed, temperature in enumerate((0, 1e-6, 1e-6))
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.parametrize(("body", "status", "param"), WRONG)
def test_wrong_requests_are_named(server, body, status, param):
    answer = httpx.post(f"{server[0]}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert len(error["message"]) > 20


def test_other_bodies_are_refused_and_the_server_lives(server, client, engine):
    send = {"url": f"{server[0]}/v1/chat/completions", "headers": {"Content-Type": "application/json"}, "timeout": 60}
    for content in (b"{not json", b"", b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800", "messages": []}'):
        answer = httpx.post(content=content, **send)
        assert answer.status_code == 400, content[:20]
        assert answer.json()["error"]["message"]
    half = json.dumps({**HELLO, "messages": [{"role": "user", "content": "\ud800"}]})
    assert httpx.post(content=half, **send).status_code == 400
    long = json.dumps({**HELLO, "messages": [{"role": "user", "content": "x" * 2_000_000}]}).encode()
    assert httpx.post(content=long, **send).status_code == 413
    assert httpx.post(content=iter([long[:1_500_000], long[1_500_000:]]), **send).status_code == 413  # no length told
    assert httpx.get(f"{server[0]}/nowhere").json()["error"]["code"] == "unknown_url"
    wrong_way = httpx.get(send["url"])
    assert (wrong_way.status_code, wrong_way.headers["Allow"]) == (405, "POST")
    text = engine.generate(PROBLEMS[0].prompt, max_new_tokens=96).text
    assert client.chat.completions.create(model=MODEL, messages=asked(PROBLEMS[0])).choices[0].message.content == text


def result(text="done"):
    times = PhaseTimes(prefill_s=0, draft_s=0, judge_s=0, decode_s=0, wall_s=0, first_token_s=0)
    return Result(text=text, tokens=(1,), prompt_tokens=1, stop=StopReason.END_TOKEN, spans=(), rounds=(),
                  counters=Counters(), times=times)  # fmt: skip


class Slow:
    """An engine that writes a word each time it is let; it knows what was closed."""

    def __init__(self, words=1000):
        self.words, self.go, self.closed, self.begun = words, threading.Semaphore(0), 0, []

    def stream(self, prompt, *, max_new_tokens=256, stop=(), sampling=None, generator=None, top=None):
        self.begun.append(prompt[-1]["content"])
        try:
            for i in range(self.words):
                self.go.acquire()
                yield Delta(text=f"w{i} ", tokens=(i,), author=Author.TARGET)
            yield Delta(text="", tokens=(), author=Author.TARGET, result=result())
        finally:
            self.closed += 1


SLOW = {"model": "slow", "messages": HELLO["messages"]}


def test_overflow_gets_429_at_once():
    slow = Slow(words=1)
    with listening(slow, model="slow", at_once=1, queue=2, run="threads") as (address, gateway):
        answers = []
        ask = lambda: answers.append(httpx.post(f"{address}/v1/chat/completions", json=SLOW, timeout=60))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: (gateway.desk.running, gateway.desk.waiting) == (1, 2))
        begun = time.monotonic()
        refused = httpx.post(f"{address}/v1/chat/completions", json=SLOW)
        assert time.monotonic() - begun < 5
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        with pytest.raises(openai.RateLimitError), openai.OpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0) as plain:  # fmt: skip
            plain.chat.completions.create(**SLOW)
        for _ in range(3):
            slow.go.release()
        for thread in threads:
            thread.join(30)
        assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == ["done"] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(stream):
    slow = Slow()
    with listening(slow, model="slow", at_once=1, run="threads") as (address, gateway):
        body = json.dumps({**SLOW, "stream": stream}).encode()
        with socket.create_connection(address.removeprefix("http://").split(":")) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
            slow.go.release()
            if stream:
                assert b"200" in raw.recv(15)
            until(lambda: slow.begun)
        until(lambda: slow.go.release() or slow.closed == 1)
        until(lambda: gateway.desk.running == 0)
        assert 'parsedec_answers_total{end="dropped"} 1.0' in gateway.metrics.page().decode()


def test_one_that_leaves_a_batch_takes_nothing_from_the_others(server, client, engine):
    address, gateway = server
    text = engine.generate(PROBLEMS[3].prompt, max_new_tokens=96).text
    body = {"model": MODEL, "messages": asked(PROBLEMS[0]), "stream": True}
    dropped = 'parsedec_answers_total{end="dropped"}'
    with httpx.Client(timeout=60) as leaving:
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(f"{address}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=0.05))
            answer = client.chat.completions.create(model=MODEL, messages=asked(PROBLEMS[3]))
            assert answer.choices[0].message.content == text
    until(lambda: gateway.desk.running == 0)
    assert f"{dropped} 2.0" in gateway.metrics.page().decode()


def test_a_queue_is_fair_between_clients():
    queue, loop = FairQueue(), asyncio.new_event_loop()
    task = Task(prompt="x", max_new_tokens=1, sampling=Sampling())
    jobs = [Job(task, client, loop, asyncio.Queue()) for client in "aaaabbc"]
    for job in jobs:
        queue.put(job)
    assert queue.remove(jobs[1])
    assert not queue.remove(jobs[1])
    assert "".join(queue.take().client for _ in range(len(queue))) == "abcaba"
    loop.close()


def test_a_client_that_fills_the_room_keeps_nobody_out():
    slow, task = Slow(words=1), Task(prompt=HELLO["messages"], max_new_tokens=1, sampling=Sampling())

    async def all_of_it():
        desk = Desk(slow, at_once=1, queue=3, run="threads")
        desk.submit([task] * 4, "greedy")
        taken, statuses = {"greedy": 4}, set()
        for client in ("greedy", "second", "second", "second", "third", "third", "fourth", "fifth"):
            try:
                desk.submit([task], client)
            except Refusal as refused:
                statuses.add(refused.status)
            else:
                taken[client] = taken.get(client, 0) + 1
        for _ in range(8):
            slow.go.release()
        await desk.drain(10)
        return taken, statuses

    # shares of the 4 places: 2 among two clients, then 1; 8 are the most there can be
    assert asyncio.run(all_of_it()) == ({"greedy": 4, "second": 2, "third": 1, "fourth": 1}, {429})


def test_the_most_tokens_bound_answers_nobody_bounded():
    asked = ChatAsked.model_validate(HELLO)
    for most, given in ((10, 10), (1000, 256)):
        defaults = Defaults(limits=Limits(max_new_tokens=256), sampling=Sampling(), max_tokens=most, max_choices=1)
        assert tasks_of(asked, defaults)[0].max_new_tokens == given


def test_keys_guard_all_but_the_page_and_health(monkeypatch):
    monkeypatch.setenv("PARSEDEC_API_KEY", "first, zweiter-schlüssel")
    slow = Slow(words=0)
    with listening(slow, model="slow", api_key="env", run="threads") as (address, _):
        for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"},
                     {"Authorization": "Bearer"}, {"Authorization": b"Bearer \xff\xfe"}):  # fmt: skip
            for path in ("/v1/models", "/metrics"):
                refused = httpx.get(address + path, headers=sent)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{address}/health").json()["status"] == "ok"
        assert httpx.get(address).status_code == 200
        for key in ("first", "zweiter-schlüssel"):
            headers = {b"Authorization": f"Bearer {key}".encode()}
            answer = httpx.post(f"{address}/v1/chat/completions", json=SLOW, headers=headers)
            assert answer.json()["choices"][0]["message"]["content"] == "done"
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(
            base_url=f"{address}/v1", api_key="wrong", max_retries=0) as plain:  # fmt: skip
            plain.models.list()


def test_a_failing_engine_fails_its_request_alone():
    class Broken(Slow):
        def stream(self, prompt, **options):
            if prompt[-1]["content"] == "Break":
                raise RuntimeError("secret detail")
            return super().stream(prompt, **options)

    with listening(Broken(words=0), model="slow", run="threads") as (address, _):
        body = {**SLOW, "messages": [{"role": "user", "content": "Break"}]}
        for stream in (False, True):
            answer = httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": stream})
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
            assert "secret" not in answer.text
        assert httpx.post(f"{address}/v1/chat/completions", json=SLOW).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "retry", "logged"),
    [
        (TargetLost("http://10.0.0.7:9 was lost"), 503, "5", True),
        (ServerRefused("http://10.0.0.7:9 answered 401", 401), 502, None, True),
        (TargetRefused("http://10.0.0.7:9 refused the request (400)", 400), 502, None, True),
        (TargetRefused("http://10.0.0.7:9 refused the request (400)", 400, "too long"), 400, None, True),
        *((ServerRefused(f"http://10.0.0.7:9 said {n}", n, "why"), 400, None, True) for n in (400, 413, 422)),
        *((ServerRefused(f"http://10.0.0.7:9 said {n}", n, "why"), 502, None, True) for n in (401, 403, 404)),
        (JudgeError("the weights at http://10.0.0.7:9 are unusable"), 500, None, True),
        (PromptError("the prompt is too long"), 400, None, False),
    ],
)
def test_what_lies_behind_the_server_is_for_its_log(caplog, error, status, retry, logged):
    class Behind(Slow):
        def stream(self, prompt, **options):
            raise error

    with listening(Behind(), model="slow", run="threads") as (address, _):
        for stream in (False, True):
            answer = httpx.post(f"{address}/v1/chat/completions", json={**SLOW, "stream": stream})
            assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry)
            assert (str(error) in answer.text) is not logged
            assert "10.0.0.7" not in answer.text
            assert (str(error) in caplog.text) is logged


def test_a_failing_pass_ends_those_in_it_and_no_others(monkeypatch):
    engine = Parse(tiny.model("llama"))
    failing = threading.Event()

    def fails(forward):
        def forwarded(*args, **options):
            if failing.is_set():
                raise RuntimeError("out of memory")
            return forward(*args, **options)

        return forwarded

    async def ask(desk, n=1):
        tasks = [Task(prompt=[5, 6], max_new_tokens=4, sampling=Sampling(), choice=i) for i in range(n)]
        ticket, ends = desk.submit(tasks, "a"), []
        while len(ends) < n:
            _, event = await ticket.next()
            if isinstance(event, Exception) or event.result:
                ends.append(event)
        return ends

    async def all_of_it():
        desk = Desk(engine, at_once=2, queue=2)
        (before,) = await ask(desk)
        failing.set()
        (alone,), together = await ask(desk), await ask(desk, 2)
        failing.clear()
        (after,) = await ask(desk)
        await desk.drain(5)
        return before, alone, together, after, desk.alive

    expected = engine.generate([5, 6], max_new_tokens=4).tokens
    monkeypatch.setattr(type(engine.target), "forward", fails(type(engine.target).forward))
    monkeypatch.setattr(joint, "_forward", fails(joint._forward))
    before, alone, together, after, alive = asyncio.run(all_of_it())
    assert isinstance(alone, RuntimeError)
    told = [(refusal(error).status, refusal(error).retry, str(error)) for error in together]
    assert [(status, retry) for status, retry, _ in told] == [(503, 1)] * 2
    assert all("Send it again" in text and "out of memory" not in text for _, _, text in told)
    assert before.result.tokens == after.result.tokens == expected
    assert not alive


def test_a_drain_lets_answers_end_refuses_new_ones_and_tells_those_that_are_late():
    slow = Slow(words=2)
    with listening(slow, model="slow", run="threads", at_once=2) as (address, gateway):
        url, body, drained = f"{address}/v1/chat/completions", {**SLOW, "stream": True}, []
        slow.go.release()
        with httpx.stream("POST", url, json=body, timeout=30) as late:
            lines = late.iter_lines()
            assert "w0" in "".join(next(lines) for _ in range(3))
            draining = threading.Thread(target=lambda: drained.append(asyncio.run(gateway.desk.drain(0.3))))
            draining.start()
            until(lambda: gateway.desk.closed)
            refused = httpx.post(url, json=SLOW)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
            assert httpx.get(f"{address}/health").status_code == 503
            said = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(said[0])["error"]["code"] == "shutting_down"
        assert said[1:] == ["[DONE]"]
        slow.go.release()
        draining.join(30)
        assert drained == [1]
        assert slow.closed == 1


def test_sigterm_in_mid_stream_lets_the_answer_end(engine):
    expected = engine.generate(PROBLEMS[0].prompt, max_new_tokens=96)
    overrides = ["outer=none", "draft=none", "target.dtype=float32", "max_new_tokens=96"]
    alone = Parse(engine.target).generate(PROBLEMS[0].prompt, max_new_tokens=96)
    assert alone.tokens
    assert expected.text
    with process(*overrides) as (address, started), httpx.stream(
        "POST", f"{address}/v1/chat/completions", json={"model": MODEL, "messages": asked(PROBLEMS[0]), "stream": True},
        timeout=120) as answer:  # fmt: skip
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        first = next(lines)
        started.terminate()
        rest = list(lines)
        assert rest.pop() == "[DONE]"
        choices = [json.loads(line)["choices"][0] for line in (first, *rest)]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == alone.text
        assert choices[-1]["finish_reason"] == "stop"
        assert started.wait(60) == 0
