"""The remote engine against a real server of the same weights: llama.cpp (make test-server) or vLLM (make test-vllm).

What the server computes differs from a float32 forward by its own numerics (4-bit weights with 8-bit activations in
llama.cpp, bfloat16 in vLLM). So greedy text may turn where two tokens nearly tie: every token it writes must be within
GAP nats of the best one of a plain float32 forward, and nearly all must be the best one.
"""

import dataclasses
import secrets
import sys
import time
from pathlib import Path

import pytest
import torch

from parsedec import LabelJudge, Parse, PrefixVerification
from parsedec.boundary import FirstFailure
from parsedec.errors import TargetLost
from parsedec.remote.session import RemoteSession
from parsedec.segmenters import Lines
from parsedec.sessions.session import Session
from parsedec.text.chat import prompt_ids
from parsedec.types import Author

pytestmark = pytest.mark.server
GAP, BEST_SHARE, MARGIN = 0.5, 0.9, 0.3  # nats, share of tokens, nats
QUESTIONS = (
    "What is the capital of France?",
    "List three animals that can swim, one per line.",
    "Write two sentences about rain.",
)


def test_server_is_understood(remote, kind):
    can = remote.can
    assert (can.kind, can.token_prompts, can.many_prompts, can.extensions) == (kind, True, True, True)
    assert remote.together == (kind == "vllm")
    print(can, file=sys.stderr)


def test_greedy_text_is_the_local_one_up_to_near_ties(remote, local):
    """The share of best tokens is that of all answers: a short one may happen to hold two near ties."""
    every = []
    for question in QUESTIONS:
        ids = prompt_ids(local, [{"role": "user", "content": question}])
        result = Parse(remote).generate(question, max_new_tokens=48)
        with torch.inference_mode():
            logits = local.hf(input_ids=torch.tensor([[*ids, *result.tokens]])).logits[0, len(ids) - 1 : -1]
        written = logits.gather(-1, torch.tensor(result.tokens)[:, None])[:, 0]
        every.append(logits.max(-1).values - written)
        assert result.prompt_tokens == len(ids)
    gaps = torch.cat(every)
    assert len(gaps) > 40
    assert float(gaps.max()) < GAP
    assert float((gaps == 0).float().mean()) >= BEST_SHARE


def test_label_margins_are_the_local_ones(remote, local):
    """Of every cut of a draft with a wrong line, packed in one pass here, as prompts over there."""
    judge = LabelJudge().bind(local)
    right, wrong = judge.label_ids
    prompt = prompt_ids(local, [{"role": "user", "content": "What is 2 + 2? And 3 + 3?"}])
    draft = local.encode("2 + 2 = 4.\n3 + 3 = 7.\nSo the answers are 4 and 7.")
    cuts = [len(draft) // 3, 2 * len(draft) // 3, len(draft)]
    margins = []
    for session in (Session(local), RemoteSession(remote)):
        session.feed(prompt)
        rows = session.judge(draft, cuts, judge.suffix, wanted=(right, wrong)).probe_logits
        margins.append(rows[:, right] - rows[:, wrong])
    assert float((margins[0] - margins[1]).abs().max()) < MARGIN


def test_parse_keeps_what_the_local_engine_keeps(remote, local):
    """A threshold below all scores keeps the draft, one above refuses it; the spans spell the answer."""
    for threshold, author in ((0.0, Author.DRAFT), (1.0, Author.TARGET)):
        rule = FirstFailure(threshold=threshold, full_threshold=1.0 if threshold else 0.0)
        outer = PrefixVerification(segmenter=Lines(), boundary=rule)
        result = Parse(remote, remote, outer=outer).generate(QUESTIONS[1], max_new_tokens=40)
        assert {span.author for span in result.spans} == {author}
        assert "".join(span.text for span in result.spans) == result.text
        assert result.rounds[0].segments


def test_killed_in_mid_request_and_started_again(server, remote):
    engine = Parse(remote)
    # long, so that the server is killed before it has sent the whole of it
    stream = engine.stream("Write a long story about a ship and every island that it sees.", max_new_tokens=800)
    pieces = [next(stream)]
    server.kill()
    with pytest.raises(TargetLost) as lost:
        pieces.extend(stream)
    assert lost.value.partial.tokens[: len(pieces)] == tuple(t for piece in pieces for t in piece.tokens)[: len(pieces)]
    server.start()
    assert engine.generate(QUESTIONS[0], max_new_tokens=8).new_tokens > 0


class Salted:
    """A server whose every request has a prefix cache of its own."""

    def __init__(self, server):
        self.url, self.server = server.url, server

    def post(self, path, body, read):
        return self.server.post(path, body | {"cache_salt": secrets.token_hex(8)}, read)


def probe_seconds(remote, attempts):
    """{way: least seconds of a judge pass of 8 probes behind 400 tokens nobody has read}, the ways alternating.

    Ways: one request; eight in turn, which find what the earlier ones read; eight that share nothing. The least of a
    few, since other work on the machine only ever adds.
    """
    judge = LabelJudge().bind(remote)
    draft = remote.encode(" and then it went on as before." * 60)[:400]
    ways = {"one": remote, "eight": dataclasses.replace(remote, together=False),
            "apart": dataclasses.replace(remote, together=False, server=Salted(remote.server))}  # fmt: skip
    seconds = {way: [] for way in ways}
    for attempt in range(attempts):
        for way, model in list(ways.items())[:: 1 if attempt % 2 else -1]:
            session = RemoteSession(remote)
            session.remote = model
            session.feed(prompt_ids(remote, [{"role": "user", "content": f"Question {attempt}, {way}: what then?"}]))
            started = time.perf_counter()
            session.judge(draft, [50 * (i + 1) for i in range(8)], judge.suffix, wanted=judge.label_ids)
            seconds[way].append(time.perf_counter() - started)
    return {way: min(found[1:]) for way, found in seconds.items()}  # the first warms up


def rows_are_cheap():
    """Whether this processor has matrix tiles: without them a row costs nearly what a pass does, and one request of
    eight probes has no fewer rows than eight requests that find each other's prefix."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "amx_bf16" in flags.read_text()


def test_probes_of_one_request_share_their_prefix(remote, kind):
    """Eight probes in one request take at most half the time of eight requests in turn: of eight that share nothing
    always, and of eight that find each other's prefix in the cache where passes cost more than rows."""
    if kind != "vllm":
        pytest.skip("llama.cpp keeps a cache per slot: prompts of one request share nothing")
    seconds = probe_seconds(remote, 10)
    print(f"seconds of 8 probes: {seconds}", file=sys.stderr)
    assert seconds["one"] <= 0.5 * seconds["apart"]
    assert seconds["one"] <= (0.5 if rows_are_cheap() else 1.2) * seconds["eight"]
