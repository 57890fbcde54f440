"""Reading a token before it is known on the host changes when work is done, and nothing else.

On CUDA plain decoding always prefetches. The code is the same here, where it gains nothing.
"""

import random

import pytest
import torch

import oracle.test_judge_pass as judging
import oracle.test_session as walks
import tiny
from every_draw import relative
from parsedec import Parse, Sampling, TargetOnly
from parsedec.acceptance import Nucleus, Typical
from parsedec.errors import LogitsError
from parsedec.hardware.scripted import ScriptedAcceptance
from parsedec.sampling import request_generator
from parsedec.static.session import StaticSession
from parsedec.static.steps import Readback, Steps
from parsedec_adapters.draft_model import DraftModel
from static.test_static_session import FAMILIES, Replayed, in_steps, on

SUFFIX = [1, 2, 7, 3]


class Counting(Steps):
    """Steps that count how often they run."""

    runs = 0

    def run(self, *args):
        self.runs += 1
        return super().run(*args)


class Hasty(StaticSession):
    """Before whatever comes next it prefetches a token, the right one half of the time."""

    rng = random.Random(0)
    right = wrong = 0

    def feed(self, tokens):
        self.guess(tokens)
        return super().feed(tokens)

    def append(self, token):
        self.guess([token])
        super().append(token)

    def tree(self, tree):
        self.guess([])
        return super().tree(tree)

    def judge(self, *args, **kwargs):
        if self._staged is None:  # else it may go on from what is staged
            self.guess([])
        return super().judge(*args, **kwargs)

    def rewind(self, length):
        self.guess([])
        super().rewind(length)

    def fork(self):
        self.guess([])
        return super().fork()

    def guess(self, tokens):
        if not self.prefetches or self.next_logits is None:
            return
        right = bool(tokens) and self.rng.random() < 0.5
        Hasty.right, Hasty.wrong = Hasty.right + right, Hasty.wrong + (not right)
        token = tokens[0] if right else self.rng.randrange(tiny.VOCAB)
        assert self.prefetch(torch.tensor(token)) == token


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_done_to_a_session_that_prefetches_it_equals_a_plain_forward(monkeypatch, family):
    in_steps(monkeypatch, tiny.model(family), Replayed, prefetches=True)
    monkeypatch.setattr(walks, "Session", Hasty)
    monkeypatch.setattr(judging, "Session", Hasty)
    before = Hasty.right, Hasty.wrong
    for seed in range(6):
        walks.test_a_random_walk_equals_a_plain_forward(family, seed)
    judging.test_packed_scores_equal_separate_forwards(family, "sdpa")
    judging.test_two_passes_reuse_the_draft_rows(family)
    assert Hasty.right > before[0] + 5
    assert Hasty.wrong > before[1] + 15


@pytest.mark.parametrize("settings", [Sampling(), Sampling(temperature=0.8, top_k=20)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_request_is_the_same_with_and_without(monkeypatch, family, settings):
    """Of both models, at both levels: text, counters, rounds. And nothing is read twice."""
    monkeypatch.setattr("parsedec.sampling.Sampler._is_beside", lambda *_: False)  # as with CUDA
    target = on(tiny.model(family), "static")
    draft = on(relative(tiny.model(family), noise=0.1), "static")
    engines = [  # making one tries its models out
        Parse(target, outer=TargetOnly()),
        Parse(target, draft),
        Parse(target, draft, inner=DraftModel(length=3), outer=TargetOnly()),
    ]
    prompt, _ = tiny.plain_answer(target)
    results, made = [], []
    for prefetches in (False, True):
        with monkeypatch.context() as patch:
            steps = [in_steps(patch, model, Counting, prefetches=prefetches) for model in (target, draft)]
            for engine in engines:
                generator = None if settings.greedy else request_generator(3, 0)
                results.append(engine.generate(prompt, max_new_tokens=40, sampling=settings, generator=generator))
            made.append(sum(step.runs for step in steps))
    for without, having in zip(results[:3], results[3:], strict=True):
        assert without.tokens == having.tokens
        assert without.counters == having.counters
        assert without.rounds[0].segments == having.rounds[0].segments
    assert made[0] <= made[1] <= made[0] + 3, "one row may be in vain where an answer or a draft ends"


@pytest.mark.parametrize("rule", [Typical(), Nucleus(), ScriptedAcceptance()], ids=lambda rule: type(rule).__name__)
def test_greedy_tokens_are_read_ahead_whatever_accepts_guesses(monkeypatch, rule):
    """A token by itself is then the most likely one under every rule; sampled, these have their own way."""
    target = on(tiny.model("llama"), "static")
    engine = Parse(target, acceptance=rule, outer=TargetOnly())
    prompt, tokens = tiny.plain_answer(target)
    in_steps(monkeypatch, target, prefetches=True)
    ahead = []
    prefetch = StaticSession.prefetch
    monkeypatch.setattr(StaticSession, "prefetch", lambda self, token: ahead.append(token) or prefetch(self, token))
    assert list(engine.generate(prompt, max_new_tokens=len(tokens)).tokens) == tokens
    assert len(ahead) == len(tokens) - 1
    sampling = Sampling(temperature=0.8)
    engine.generate(prompt, max_new_tokens=8, sampling=sampling, generator=request_generator(3, 0))
    assert len(ahead) == len(tokens) - 1


def test_a_token_is_read_before_the_host_knows_it(monkeypatch, tiny_target):
    """What makes it worth while: the step is under way when the host asks for the number."""
    order = []
    steps = in_steps(monkeypatch, tiny_target, Counting, prefetches=True)
    begin, wait = Readback.begin, Readback.wait
    monkeypatch.setattr(Readback, "begin", lambda self, number: order.append("begun") or begin(self, number))
    monkeypatch.setattr(Readback, "wait", lambda self: order.append(steps.runs) or wait(self))
    session = StaticSession(tiny_target)
    logits = session.feed(walks.tokens(70))
    steps.runs = 0
    token = session.prefetch(logits.argmax())
    assert order == ["begun", 1]
    assert (session.length, session.cached, session.rows, session.calls) == (70, 70, 70, 1)
    after = session.feed([token])
    assert (steps.runs, session.cached, session.rows, session.calls) == (1, 71, 71, 2)
    walks.close(after, walks.plain(tiny_target, session.tokens)[0][-1])


def test_it_needs_all_tokens_to_be_read(monkeypatch, tiny_target):
    in_steps(monkeypatch, tiny_target, prefetches=True)
    session = StaticSession(tiny_target)
    session.feed(walks.tokens(5))
    session.append(7)
    with pytest.raises(ValueError, match="1 pending"):
        session.prefetch(torch.tensor(8))


def test_logits_that_are_no_numbers_end_the_request(monkeypatch, tiny_target):
    """And what is looked up in the embeddings meanwhile is a token all the same."""
    in_steps(monkeypatch, tiny_target, prefetches=True)
    monkeypatch.setattr("parsedec.sampling.Sampler._is_beside", lambda *_: False)  # as with CUDA
    monkeypatch.setattr(
        "parsedec.sampling.Sampler.log_distribution", lambda self, logits: torch.full_like(logits, torch.nan)
    )
    engine = Parse(on(tiny_target, "static"), outer=TargetOnly())
    with pytest.raises(LogitsError, match="not numbers"):
        engine.generate(
            walks.tokens(5), max_new_tokens=8, sampling=Sampling(temperature=1.0), generator=request_generator(0, 0)
        )
