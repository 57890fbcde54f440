"""`parsedec serve engine=openai` in front of a real server, asked by OpenAI's own client.

Oracle: a float32 forward of the same weights here. Every token of an answer must be within GAP nats of the best one
behind its own prompt, and nearly all the best one: another prompt's answer is far from that.
"""

import json
import re
import threading
import time
import urllib.request

import httpx
import pytest
import torch

from parsedec.text.chat import prompt_ids
from serving import process

openai = pytest.importorskip("openai", reason="the official client; pip install -e '.[dev]'")
pytestmark = pytest.mark.server
GAP, TIES = 0.5, 0.1  # nats; share of tokens that need not be the best one, one at least
LIMIT_S = 120.0  # for what takes a few seconds where nothing else runs
QUESTIONS = (  # with answers that are encoded again into the tokens that were written
    "What is the capital of France?",
    "Count from one to ten in words.",
    "How many legs has a spider?",
    "What is 2 + 2?",
)


@pytest.fixture(scope="module")
def settings(server, folder):
    at = [f"engine.{model}.url={server.url}" for model in ("target", "draft")]
    quick = [f"engine.{model}.{name}" for model in ("target", "draft") for name in ("retries=1", "backoff_s=0.1")]
    return ["engine=openai", *at, f"engine.target.tokenizer={folder}", *quick, "max_new_tokens=40", "serve.model=smol",
            "serve.at_once=4", "segmenter=lines", "runtime.threads=1"]  # fmt: skip


@pytest.fixture(scope="module")
def gateway(settings):
    """(address, its process): the target alone on the server."""
    with process(*settings, "outer=none") as (address, started):
        assert address, started.stderr.read()
        yield address, started


@pytest.fixture(scope="module")
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway[0]}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as made:
        yield made


def asked(question):
    return {"model": "smol", "messages": [{"role": "user", "content": question}]}


def is_its_own(local, question, text):
    """Whether `text` is what the weights here write behind this question, up to near ties."""
    ids = prompt_ids(local, [{"role": "user", "content": question}])
    tokens = local.encode(text, plain=True)
    with torch.inference_mode():
        logits = local.hf(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
    gaps = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return float(gaps.max()) < GAP and int((gaps > 0).sum()) <= max(1, TIES * len(tokens))


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def busy(server, kind):
    """Requests the real server is working on."""
    page = "/metrics" if kind == "vllm" else "/slots"
    with urllib.request.urlopen(server.url + page, timeout=LIMIT_S) as answer:
        told = answer.read().decode()
    if kind == "vllm":
        return sum(
            float(line.split()[-1]) for line in told.splitlines() if line.startswith("vllm:num_requests_running")
        )
    return sum(slot["is_processing"] for slot in json.loads(told))


def until(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def answers(gateway):
    """{how they ended: how many}, as the gateway counts them."""
    page = httpx.get(f"{gateway[0]}/metrics", timeout=LIMIT_S).text
    return {end: float(n) for end, n in re.findall(r'parsedec_answers_total\{end="(\w+)"\} ([\d.]+)', page)}


def test_answers_whole_and_streamed_are_the_models_own(client, local):
    for question in QUESTIONS[:2]:
        whole = client.chat.completions.create(**asked(question))
        (choice,) = whole.choices
        assert choice.finish_reason in ("stop", "length")
        assert is_its_own(local, question, choice.message.content)
        assert not is_its_own(local, QUESTIONS[2], choice.message.content), "the oracle tells answers apart"
        assert whole.usage.prompt_tokens == len(prompt_ids(local, asked(question)["messages"]))
        chunks = list(
            client.chat.completions.create(**asked(question), stream=True, stream_options={"include_usage": True})
        )
        assert len(chunks) > 5, "it comes in pieces; a busy server may put several tokens in one"
        assert is_its_own(local, question, text_of(chunks))
        assert abs(chunks[-1].usage.completion_tokens - len(local.encode(text_of(chunks)))) <= 1
    bare = client.completions.create(model="smol", prompt="The capital of France is", max_tokens=4)
    assert "Paris" in bare.choices[0].text


@pytest.mark.parametrize(("threshold", "author"), [(0.0, "draft"), (1.0, "target")])
def test_the_whole_method_behind_openais_interface(settings, local, threshold, author):
    """Draft model and target on the server: below all scores the draft is the answer, above them it is refused."""
    rule = [f"boundary.threshold={threshold}", f"boundary.full_threshold={1.0 if threshold else 0.0}"]
    with process(*settings, *rule) as (address, started):
        assert address, started.stderr.read()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
            answer = client.chat.completions.create(**asked(QUESTIONS[1]))
            (choice,), details = answer.choices, answer.usage.completion_tokens_details
            spans = choice.model_extra["parsedec"]["spans"]
            assert {span["author"] for span in spans} == {author}
            assert "".join(span["text"] for span in spans) == choice.message.content
            assert is_its_own(local, QUESTIONS[1], choice.message.content)
            kept = (details.accepted_prediction_tokens > 0, details.rejected_prediction_tokens > 0)
            assert kept == (author == "draft", author == "target")
            chunks = list(client.chat.completions.create(**asked(QUESTIONS[1]), stream=True))
            told = [(chunk.choices[0].delta.model_extra or {}).get("parsedec") for chunk in chunks]
            assert {each["author"] for each in told if each} == {author}
            assert is_its_own(local, QUESTIONS[1], text_of(chunks))


def test_clients_at_the_same_time_get_their_own_answers(client, local):
    texts = {}

    def ask(question):
        texts[question] = text_of(client.chat.completions.create(**asked(question), stream=True))

    threads = [threading.Thread(target=ask, args=(question,)) for question in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert set(texts) == set(QUESTIONS)
    assert all(is_its_own(local, question, text) for question, text in texts.items())


def test_settings_of_a_request_reach_the_server(client, local):
    sampled = [
        client.chat.completions.create(
            **asked(QUESTIONS[3]), temperature=1.2, top_p=0.95, seed=seed, n=2, max_tokens=12
        )
        for seed in (1, 1, 2)
    ]
    texts = [[choice.message.content for choice in answer.choices] for answer in sampled]
    assert texts[0][0] != texts[0][1], "choices have seeds of their own"
    assert texts[0] != texts[2]
    assert all(answer.usage.completion_tokens <= 24 for answer in sampled)
    whole = client.chat.completions.create(**asked(QUESTIONS[1])).choices[0].message.content
    stop = whole[len(whole) // 2 :][:5]
    stopped = client.chat.completions.create(**asked(QUESTIONS[1]), stop=stop).choices[0]
    assert (stopped.finish_reason, stop in stopped.message.content) == ("stop", False)
    assert whole.startswith(stopped.message.content)


def test_a_client_that_leaves_frees_the_gateway_and_the_server_behind_it(client, gateway, server, kind):
    before = answers(gateway).get("dropped", 0)
    stream = client.chat.completions.create(**asked("Write a long story about a ship."), stream=True, max_tokens=1500)
    next(stream), next(stream)
    until(lambda: busy(server, kind))
    left = time.monotonic()
    stream.close()
    until(lambda: not busy(server, kind))
    until(lambda: httpx.get(f"{gateway[0]}/health").json()["running"] == 0)
    assert time.monotonic() - left < LIMIT_S / 4, "the answer would have taken longer"
    assert answers(gateway)["dropped"] == before + 1


def test_a_server_killed_in_mid_request_and_started_again(client, gateway, server, local):
    """A stream that had begun ends with an error, a request that had not begun gets 503; then all goes on."""
    stream = client.chat.completions.create(**asked("Write a long story about a ship."), stream=True, max_tokens=1500)
    begun = [next(stream), next(stream)]
    server.kill()
    with pytest.raises(openai.APIError, match="broke off") as broken:
        begun.extend(stream)
    assert broken.value.code == "model_server_lost"
    with pytest.raises(openai.InternalServerError) as lost:
        client.chat.completions.create(**asked(QUESTIONS[0]))
    assert (lost.value.status_code, lost.value.code) == (503, "model_server_lost")
    assert int(lost.value.response.headers["Retry-After"]) > 0
    for error in (broken.value, lost.value):
        assert server.url.rpartition("/")[2] not in str(error.body), "where the server is concerns nobody else"
    assert httpx.get(f"{gateway[0]}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    server.start()
    answer = client.chat.completions.create(**asked(QUESTIONS[0])).choices[0].message.content
    assert is_its_own(local, QUESTIONS[0], answer)


def test_sigterm_in_mid_stream_lets_the_answer_end(settings, local):
    with process(*settings, "outer=none") as (address, started):
        assert address, started.stderr.read()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
            stream = client.chat.completions.create(**asked(QUESTIONS[1]), stream=True)
            chunks = [next(stream), next(stream)]
            started.terminate()
            chunks.extend(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert is_its_own(local, QUESTIONS[1], text_of(chunks))
        assert started.wait(60) == 0
