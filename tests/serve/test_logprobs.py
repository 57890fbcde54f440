"""Log-probabilities of an answer that the target wrote alone: those of a plain forward over prompt and answer."""

import json

import httpx
import pytest
import torch

import tiny
from parsedec import Limits, Parse, Sampling, load
from parsedec.errors import IncompatibleStack
from parsedec.inner import NoSpeculation
from parsedec.remote import connect
from parsedec.serve.logprobs import Book
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.types import Author, Delta, Shown, StopReason
from parsedec_adapters.ngram import Ngram
from parsedec_adapters.scripted import Scripted
from serving import listening

openai = pytest.importorskip("openai", reason="the official client; pip install -e '.[dev]'")
MODEL = "zoo:target"
PROBLEM = next(iter(ZooArithmetic(n=1, seed=5).problems()))
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": PROBLEM.prompt}]}


def plain(model, prompt, tokens):
    """[N, V] log-probabilities of a forward of its own, at the places of `tokens`."""
    with torch.inference_mode():
        logits = model.hf(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("inner", [NoSpeculation(), Ngram(), Scripted(rate=0.7)], ids=["none", "ngram", "scripted"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_every_token_has_the_targets_own(inner, temperature):
    """Whichever guesses stood: one entry a token, at temperature 1, the likeliest others first."""
    target = tiny.model("llama")
    prompt, _ = tiny.plain_answer(target)
    warm, generator = Sampling(temperature=temperature, top_k=9), torch.Generator().manual_seed(3)
    stream = Parse(target, inner=inner).stream(prompt, max_new_tokens=20, sampling=warm, generator=generator, top=4)
    deltas = list(stream)
    assert all(len(delta.shown) == len(delta.tokens) for delta in deltas)
    shown = [entry for delta in deltas for entry in delta.shown]
    tokens = deltas[-1].result.tokens
    assert tuple(entry.token for entry in shown) == tokens
    expected = plain(target, prompt, tokens)
    best = expected.topk(4)
    for i, entry in enumerate(shown):
        assert entry.logprob == pytest.approx(float(expected[i, entry.token]), abs=2e-4)
        assert [token for token, _ in entry.top] == best.indices[i].tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best.values[i].tolist(), abs=2e-4)


def test_they_are_refused_where_a_draft_may_stand():
    engine = Parse(tiny.model("llama"), tiny.model("llama", seed=5, layers=2))
    with pytest.raises(IncompatibleStack, match="two authors"):
        engine.stream([5, 6], top=0)
    assert not any(delta.shown for delta in engine.stream([5, 6], max_new_tokens=4))


@pytest.fixture(scope="module")
def engine():
    return Parse(load(MODEL, dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def client(engine):
    with listening(engine, limits=Limits(max_new_tokens=40)) as (address, _), openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as made:  # fmt: skip
        yield made


def test_chats_and_completions_show_them(client, engine):
    choice = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    assert all(bytes(entry.bytes).decode() == entry.token for entry in content)
    result = engine.generate(PROBLEM.prompt, max_new_tokens=40)
    shown = [t for t in result.tokens if t not in engine.target.end_ids]
    expected = plain(engine.target, engine.target_ids(PROBLEM.prompt), shown)
    own = [float(row[token]) for row, token in zip(expected, shown, strict=True)]
    assert [entry.logprob for entry in content] == pytest.approx(own, abs=1e-3)
    for entry, row in zip(content, expected, strict=True):
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        assert entry.top_logprobs[0].token == entry.token, "greedy: the token is the likeliest"
    without = client.chat.completions.create(**ASKED, logprobs=False).choices[0]
    assert (without.logprobs, without.message.content) == (None, choice.message.content)

    ids = engine.target_ids(PROBLEM.prompt)
    text = client.completions.create(model=MODEL, prompt=ids, max_tokens=40, logprobs=2).choices[0]
    assert text.logprobs.token_logprobs == pytest.approx(own, abs=1e-3)
    places = zip(text.logprobs.text_offset, text.logprobs.tokens, strict=True)
    assert all(text.text[at : at + len(token)] == token for at, token in places)
    assert all(len(top) == 2 and max(top.values()) == top[token] for token, top in zip(
        text.logprobs.tokens, text.logprobs.top_logprobs, strict=True))  # fmt: skip


def test_streamed_and_with_choices_they_are_the_same(client):
    stop = {"stop": ["="], "n": 2, "seed": 1, "temperature": 0.9}
    whole = client.chat.completions.create(**ASKED, **stop, logprobs=True, top_logprobs=1).choices
    streamed = {0: [], 1: []}
    for chunk in client.chat.completions.create(**ASKED, **stop, logprobs=True, top_logprobs=1, stream=True):
        choice = chunk.choices[0]
        if choice.logprobs:
            streamed[choice.index] += choice.logprobs.content
    for choice in whole:
        assert streamed[choice.index] == choice.logprobs.content
        text, tokens = choice.message.content, [entry.token for entry in choice.logprobs.content]
        assert "".join(tokens).startswith(text)
        assert len("".join(tokens[:-1])) < len(text), "only the last token may reach into the stop string"
        assert "=" not in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
     ({"logprobs": 3}, "logprobs")],
)  # fmt: skip
def test_wrong_ones_are_named(client, fields, param):
    answer = httpx.post(f"{client.base_url}chat/completions", json={**ASKED, **fields}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_answer_that_ends_at_once_shows_the_token_that_ended_it(client, engine):
    ids = engine.target_ids(PROBLEM.prompt)
    asked = {
        "model": MODEL,
        "prompt": [*ids, *engine.generate(PROBLEM.prompt).tokens[:-1]],
        "max_tokens": 1,
        "logprobs": 2,
    }
    (choice,) = client.completions.create(**asked).choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    end = engine.target.tokenizer.convert_ids_to_tokens(list(engine.target.end_ids))
    assert choice.logprobs.tokens[0] in end
    assert len(choice.logprobs.top_logprobs[0]) == 2
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert [one.logprobs.tokens for one in chunks if one.logprobs] == [choice.logprobs.tokens]
    assert (
        client.completions.create(**asked | {"prompt": ids, "max_tokens": 40}).choices[0].logprobs.tokens[-1] not in end
    )


def test_an_engine_whose_target_is_here_decides_as_with_its_own(client, engine):
    """Judging asks for one token and its rivals; where that token has no text they are told all the same."""
    there = connect(str(client.base_url).rstrip("/").removesuffix("/v1"), tokenizer=MODEL)
    draft = load("zoo:draft", dtype="float32", device="cpu")
    for problem in ZooArithmetic(n=2, seed=5).problems():
        own, remote = (
            Parse(target, draft).generate(problem.prompt, max_new_tokens=60) for target in (engine.target, there)
        )
        assert remote.text == own.text
        assert [s.score for s in remote.rounds[0].segments] == pytest.approx(
            [s.score for s in own.rounds[0].segments], abs=1e-3
        )


def test_parts_of_a_character_and_control_tokens_are_named_without_bytes():
    """Nothing is shown before its text is out, and what stands behind a stop string never is."""
    target = tiny.model("llama")
    book = Book(target)
    seven, eight = (target.encode(word)[0] for word in ("w7", "w8"))
    top = ((1, -0.1), (seven, -2.0))
    book.push(0, Delta(text="", tokens=(seven,), author=Author.TARGET, shown=(Shown(seven, -2.0, top),)))
    assert book.page(0, chat=True)["content"] == []
    book.push(0, Delta(text="w7", tokens=(eight,), author=Author.TARGET, shown=(Shown(eight, -3.0, ()),)))
    (entry,) = book.page(0, chat=True)["content"]
    assert (entry["token"], entry["logprob"], bytes(entry["bytes"]).decode()) == ("w7", -2.0, "w7")
    assert [(other["token"], other["bytes"]) for other in entry["top_logprobs"]] == [
        ("<|end|>", None), ("w7", [119, 55])]  # fmt: skip
    assert json.dumps(book.page(0, chat=False)) == json.dumps(
        {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )
    assert book.page(0, chat=True, ended=StopReason.STOP_STRING)["content"] == []
    left = book.page(0, chat=True, ended=StopReason.TOKEN_LIMIT)["content"]
    assert [entry["token"] for entry in left] == ["w8"], "what has no text yet when there is no more"
    assert book.page(0, chat=True, ended=StopReason.TOKEN_LIMIT)["content"] == []
