"""What other servers take, this one takes: values that change nothing, nulls, a context that is full, roles."""

import dataclasses

import httpx
import pytest
import torch

import tiny
from parsedec import Limits, Parse, hf_generate
from parsedec.text.chat import shows_role
from serving import listening

HELLO = {"model": "m", "messages": [{"role": "user", "content": "w1w2"}]}
NO_TOOLS = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def address():
    engine = Parse(tiny.model("llama"))
    with listening(engine, model="m", limits=Limits(max_new_tokens=4)) as (address, _):
        yield address


def chat(address, **fields):
    return httpx.post(f"{address}/v1/chat/completions", json={**HELLO, **fields}, timeout=60)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": None},
        {"stream": None, "stream_options": None, "n": None, "stop": None, "tools": None, "seed": None, "user": None},
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0},
        {"ignore_eos": False, "frequency_penalty": 0, "presence_penalty": 0.0, "min_tokens": 0, "stop_token_ids": []},
        {"skip_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0, "priority": 0},
        {"logprobs": True, "top_logprobs": 20},
    ],
)
def test_what_changes_nothing_is_taken(address, fields):
    answer = chat(address, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == chat(address).json()["choices"][0]["message"]["content"]


def test_usage_that_is_null_is_not_sent(address):
    answer = chat(address, stream=True, stream_options={"include_usage": None})
    assert answer.status_code == 200
    assert '"usage"' not in answer.text


def test_a_full_context_has_its_code_and_place(address):
    for path, field, prompt in (
        ("chat/completions", "messages", [{"role": "user", "content": "w1" * 600}]),
        ("completions", "prompt", "w1" * 600),
    ):
        answer = httpx.post(f"{address}/v1/{path}", json={"model": "m", field: prompt}, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)


def test_the_context_is_in_the_list_of_models(address):
    (model,) = httpx.get(f"{address}/v1/models").json()["data"]
    assert model["max_model_len"] == tiny.model("llama").context_limit


def test_most_log_probabilities_are_openais(address):
    assert chat(address, logprobs=True, top_logprobs=21).status_code == 400
    body = {"model": "m", "prompt": "w1", "logprobs": 6}
    assert httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code == 400


@pytest.mark.parametrize("kind", ["text/plain", None])
def test_a_body_that_is_not_said_to_be_json(address, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx.post(f"{address}/v1/chat/completions", content=b'{"model": "m"}', headers=headers)
    assert answer.status_code == 400
    said = answer.json()["error"]["message"]
    assert "Content-Type" in said
    assert "application/json" in said


def test_what_tools_said_is_refused_where_the_template_leaves_it_out():
    model = tiny.model("llama")
    deaf = dataclasses.replace(model, chat_template=NO_TOOLS)
    assert shows_role(model, "tool")
    assert not shows_role(deaf, "tool")
    messages = [*HELLO["messages"], {"role": "tool", "content": "w3"}]
    for target, status in ((model, 200), (deaf, 400)):
        with listening(Parse(target), model="m", limits=Limits(max_new_tokens=2)) as (address, _):
            answer = chat(address, messages=messages)
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["param"] == "messages"


def test_a_temperature_of_nearly_nothing_is_greedy_in_generate_too():
    model = tiny.model("llama")
    prompt, options = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 8}
    greedy = model.hf.generate(prompt, do_sample=False, **options)
    parse = hf_generate(target=model)
    cold = model.hf.generate(prompt, do_sample=True, temperature=1e-9, custom_generate=parse, **options)
    assert cold.tolist() == greedy.tolist()
