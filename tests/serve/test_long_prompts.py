"""A prompt that is long to read delays its own answer and no other."""

import threading
import time

import httpx
import pytest

import tiny
from parsedec import Limits, Parse
from parsedec.text.prompt import ReadPrompt
from serving import listening

HOLD_S = 30.0  # at most


def body(text):
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


@pytest.fixture
def engine():
    return Parse(tiny.model("llama"), tiny.model("llama", seed=5, layers=2))


def test_a_read_prompt_has_the_same_answer_and_is_read_no_more(engine, monkeypatch):
    expected, read = engine.generate("w1w2", max_new_tokens=8), engine.read("w1w2")
    monkeypatch.setattr(type(engine.target), "encode", None)
    assert isinstance(read, ReadPrompt)
    assert engine.generate(read, max_new_tokens=8).tokens == expected.tokens


@pytest.mark.parametrize("run", ["batch", "threads"])
def test_while_one_prompt_is_read_others_are_answered(engine, monkeypatch, run):
    """The reader of a long one is held; it waits beside the answers, not among them."""
    begun, released, plain = threading.Event(), threading.Event(), type(engine.target).encode

    def encode(self, text, **how):
        if "w50" in text:
            begun.set()
            released.wait(HOLD_S)
        return plain(self, text, **how)

    monkeypatch.setattr(type(engine.target), "encode", encode)
    with listening(engine, limits=Limits(max_new_tokens=8), model="m", run=run) as (address, gateway):
        url, answers = f"{address}/v1/chat/completions", []
        ask = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body("w50"), timeout=60)))
        ask.start()
        assert begun.wait(30)
        start = time.monotonic()
        assert httpx.post(url, json=body("w1w2"), timeout=60).status_code == 200
        assert time.monotonic() - start < HOLD_S / 2
        released.set()
        ask.join()
        assert answers[0].status_code == 200
        too_long = httpx.post(url, json=body("w1" * 600), timeout=60)
        assert (too_long.status_code, gateway.desk.running) == (400, 0)
