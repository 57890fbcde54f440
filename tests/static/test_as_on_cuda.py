"""Whole requests as they run on CUDA - steps and trees replayed, tokens prefetched, buffers cleared - and eagerly."""

import dataclasses
import weakref

import pytest

import cuda_graphs
import eagle3_heads
import tiny
from parsedec import LabelJudge, Parse, PrefixVerification, Sampling, TargetOnly
from parsedec.boundary import FirstFailure
from parsedec.loop import Rounds
from parsedec.sampling import request_generator
from parsedec.segmenters import EveryTokens
from parsedec.sessions.backends import runs_static
from parsedec.static import session as static
from parsedec.static.graphs import Graphs
from parsedec.static.steps import Steps
from parsedec.streamed import StreamedVerification
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.eagle3.graphed import drafting_of

JUDGING = dict(
    judge=LabelJudge(),
    segmenter=EveryTokens(delta=4),
    boundary=FirstFailure(threshold=0.25, full_threshold=0.5),
    loop=Rounds(rounds=3),
)
OUTERS = {
    "alone": TargetOnly(),
    "parse": PrefixVerification(**JUDGING),
    "streamed": StreamedVerification(**JUDGING, overlap="always"),
}
BACKENDS = "eager", "static"
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.8, top_k=20)


@pytest.fixture
def as_on_cuda(monkeypatch):
    of = static.Machine.of

    def machine(weights):
        made = of(weights)
        made.pool.clears = True
        steps = Steps(made.network, compiled=False)
        return dataclasses.replace(made, steps={False: steps, True: steps}, prefetches=True)

    monkeypatch.setattr(static.Machine, "of", machine)
    monkeypatch.setattr(static, "_machines", weakref.WeakKeyDictionary())
    cuda_graphs.replay(monkeypatch)
    monkeypatch.setattr("parsedec.sampling.Sampler._is_beside", lambda *_: False)


def pair(backend):
    models = tiny.model("llama", layers=8), tiny.model("llama", seed=7, layers=8)
    return [dataclasses.replace(model, backend=backend) for model in models]


def heads():
    """One that guesses the target's text, one that guesses what comes."""
    prompt, tokens = tiny.plain_answer(tiny.model("llama", layers=8))
    return eagle3_heads.taught_head(tiny.model("llama", layers=8), (*prompt, *tokens)), eagle3_heads.random_head(seed=2)


def answers(backend, outer, sampling):
    """Of one request, twice: then it finds the buffers and graphs of the first."""
    (target, draft), (of_target, of_draft) = pair(backend), heads()
    inner, draft_inner = (
        Eagle3(head=head, tokens=9, depth=3, top_k=3, graphed=backend == "static") for head in (of_target, of_draft)
    )
    engine = Parse(target, draft, inner=inner, draft_inner=draft_inner, outer=OUTERS[outer])
    prompt = tiny.plain_answer(tiny.model("llama", layers=8))[0]
    for _ in range(2):
        generator = None if sampling.greedy else request_generator(3, 0)
        yield engine.generate(prompt, max_new_tokens=24, sampling=sampling, generator=generator)


@pytest.mark.parametrize(
    ("outer", "sampling"),
    [("alone", GREEDY), ("parse", GREEDY), ("parse", SAMPLED), ("streamed", SAMPLED)],
    ids=["alone", "parse", "parse_sampled", "streamed_sampled"],
)
def test_requests_are_answered_as_by_the_eager_backend(as_on_cuda, outer, sampling):
    expected = next(answers("eager", outer, sampling))
    captured = []
    for ours in answers("static", outer, sampling):
        assert ours.tokens == expected.tokens
        if outer != "streamed":  # how far a draft was written when it was ended is a question of timing
            assert ours.counters == expected.counters
        captured.append(Graphs.total)
    assert all(map(runs_static, pair("static")))
    assert outer == "streamed" or captured[0] == captured[1], "the second time all is replayed"


def test_heads_of_both_models_draft_from_graphs_and_plain_decoding_prefetches(as_on_cuda):
    inner, draft_inner = (Eagle3(head=head, tokens=9, depth=2, top_k=2, graphed=True) for head in heads())
    engine = Parse(*pair("static"), inner=inner, draft_inner=draft_inner, outer=OUTERS["parse"])
    engine.generate([9, 30, 12], max_new_tokens=12)
    assert drafting_of(engine.draft_inner.head).graphs.captures == 2
    results = [Parse(*pair(name), outer=OUTERS["parse"]).generate([9, 30, 12], max_new_tokens=16) for name in BACKENDS]
    assert results[0].tokens == results[1].tokens
    assert results[0].counters == results[1].counters
