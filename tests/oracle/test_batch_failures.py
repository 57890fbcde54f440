"""What fails for one request of a batch ends that request, and what fails for all of them is raised.

Oracle: `generate` for each of the others by itself.
"""

import dataclasses
import gc
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

import tiny
from parsedec import Parse, PrefixVerification, Result, TargetOnly
from parsedec.batching.batch import in_company
from parsedec.batching.joint import joint_obstacle
from parsedec.boundary import FirstFailure
from parsedec.errors import JudgeError, PassFailed, PromptError
from parsedec.inner import NoSpeculation
from parsedec.models.language_model import LanguageModel
from parsedec.segmenters import EveryTokens
from parsedec.sessions.backends import runs_static
from parsedec.sessions.session import Session
from parsedec.static.session import machine_of

NEW = 20
POISON = 63
SHARED = {"segmenter": EveryTokens(delta=4), "boundary": FirstFailure(threshold=0.4, full_threshold=0.8)}


def prompts(n=6, seed=0):
    """Token ids of very different lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (n,), generator=draw).tolist()
    return [torch.randint(5, tiny.VOCAB, (length,), generator=draw).tolist() for length in lengths]


@contextmanager
def poisoned(target, token=POISON):
    """Forwards of rows that hold `token` break off half way through the layers, where some caches have grown."""
    if runs_static(target):
        network = machine_of(target).network
        plain = network.embed

        def embed(ids):
            if token in ids:
                raise RuntimeError("poison")
            return plain(ids)

        network.embed = embed
        try:
            yield
        finally:
            del network.embed
        return
    held = []
    layers = target.hf.model.layers

    def check(*_):
        if held[-1]:
            raise RuntimeError("poison")

    hooks = [
        target.hf.get_input_embeddings().register_forward_pre_hook(
            lambda _, rows: held.append(bool((rows[0] == token).any()))
        ),
        layers[len(layers) // 2].register_forward_pre_hook(check),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def harmless(engine, n=5):
    """Prompts without the token that is poison, nor in what is written behind them."""
    given = [[token for token in prompt if token != POISON] for prompt in prompts(2 * n)]
    fine = [p for p in given if p and POISON not in engine.generate(p, max_new_tokens=NEW).tokens]
    return fine[:n]


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_only_the_culprit_of_a_failed_pass_fails(backend, caplog):
    """The others' caches are as before it: they get what they get alone."""
    target = dataclasses.replace(tiny.model("qwen3"), backend=backend)
    assert joint_obstacle(target) is None  # found out before the model is poisoned
    engine = Parse(target)
    fine = harmless(engine)
    alone = [engine.generate(prompt, max_new_tokens=NEW).tokens for prompt in fine]
    given = [*fine[:2], [5, 6, POISON, 7], *fine[2:]]
    with poisoned(target):
        batch = engine.generate_batch(given, size=len(given), max_new_tokens=NEW)
    assert list(batch.errors) == [2]
    with pytest.raises(PassFailed, match=r"request 2: .*RuntimeError: poison"):
        raise batch.errors[2]
    assert [batch.answers[i].tokens for i in range(len(given)) if i != 2] == alone
    assert "poison" in caplog.text
    assert [r.tokens for r in engine.generate_batch(fine, max_new_tokens=NEW).results] == alone


def test_a_pass_that_fails_for_all_is_raised(tiny_target):
    engine = Parse(tiny_target)
    assert joint_obstacle(tiny_target) is None
    before = threading.active_count()
    with poisoned(tiny_target), pytest.raises(RuntimeError, match="poison"):
        engine.generate_batch([[5, POISON], [6, POISON, 7]], max_new_tokens=NEW)
    assert threading.active_count() == before


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_a_culprit_that_is_left_alone_costs_no_answer(tiny_target, size, place):
    engine = Parse(tiny_target)
    assert joint_obstacle(tiny_target) is None
    fine = harmless(engine, 2)
    alone = [engine.generate(prompt, max_new_tokens=NEW).tokens for prompt in fine]
    with poisoned(tiny_target):
        batch = engine.generate_batch([*fine[:place], [5, POISON], *fine[place:]], size=size, max_new_tokens=NEW)
    assert [answer.tokens for answer in batch.answers if isinstance(answer, Result)] == alone
    with pytest.raises(PassFailed, match=rf"request {place}: .*RuntimeError: poison"):
        raise batch.errors[place]


def test_an_error_holds_nothing_of_its_request(tiny_target):
    """Neither its own tracebacks nor those of its causes lead to caches."""

    @dataclasses.dataclass(frozen=True)
    class Broken(tiny.ScriptedJudge):
        def score(self, session, draft, cuts, probes):
            super().score(session, draft, cuts, probes)
            try:
                raise ValueError("an inner reason")
            except ValueError as error:
                if session.length % 2:
                    raise  # a bug, not an error of ours
                raise JudgeError("no score") from error

    def held():
        gc.collect()
        return sum(type(one) in (DynamicCache, Session) for one in gc.get_objects())

    engine = Parse(tiny_target, tiny.model(seed=5, layers=2), outer=PrefixVerification(judge=Broken(), **SHARED))
    before = held()
    batch = engine.generate_batch(prompts(3), max_new_tokens=NEW)
    assert held() == before
    assert len(batch.errors) == 3
    assert str(batch.errors[1]) == "request 1: no score"
    assert str(batch.errors[1].__cause__.__cause__) == "an inner reason"
    assert {type(error) for error in batch.errors.values()} == {JudgeError, PassFailed}


class Head(NoSpeculation):
    """A speculator whose own work raises `error` for requests that begin with POISON, four tokens on."""

    def __init__(self, error=RuntimeError):
        self.error = error

    def propose(self, state, budget):
        if state[0] == POISON and len(state) > 5:
            raise self.error("no room for my head")
        return super().propose(state, budget)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("culprit", [0, 2, 4])
@pytest.mark.parametrize("backend", ["eager", "static"])
def test_what_a_request_computes_by_itself_ends_no_other(backend, culprit, size, caplog):
    target = dataclasses.replace(tiny.model("llama"), backend=backend)
    engine = Parse(target, inner=Head())
    given = [[POISON, 7] if i == culprit else [8 + i, 7] for i in range(5)]
    before = threading.active_count()
    batch = engine.generate_batch(given, size=size, max_new_tokens=NEW)
    assert threading.active_count() == before
    assert list(batch.errors) == [culprit]
    for i in range(5):
        if i != culprit:
            assert batch.answers[i].tokens == Parse(target).generate(given[i], max_new_tokens=NEW).tokens
    with pytest.raises(PassFailed, match=rf"request {culprit}: .*RuntimeError: no room for my head") as raised:
        _ = batch.results
    (note,) = raised.value.__cause__.__notes__
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert "in propose" in note
    assert "no room for my head" in caplog.text


def test_a_judge_of_ones_own_that_cannot_count_is_seen(tiny_target):
    """Its bug ends all requests that were judged; where it is all there are, it is raised as it is."""

    @dataclasses.dataclass(frozen=True)
    class Mistaken(tiny.ScriptedJudge):
        def score(self, session, draft, cuts, probes):
            if session.length > 2:
                return 1 / 0
            return super().score(session, draft, cuts, probes)

    engine = Parse(tiny_target, tiny.model(seed=5, layers=2), outer=PrefixVerification(judge=Mistaken(), **SHARED))
    batch = engine.generate_batch([[5, 6, 7], [5, 6], [7, 6, 5]], max_new_tokens=NEW)
    assert list(batch.errors) == [0, 2]
    assert "ZeroDivisionError: division by zero" in str(batch.errors[2])
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError) as raised:
        engine.generate_batch([[5, 6, 7], [7, 6, 5]], size=1, max_new_tokens=NEW)
    assert "in score" in raised.value.__notes__[0]
    assert threading.active_count() == before


def test_failures_wait_until_something_is_answered(tiny_target):
    """The refusal of a prompt says nothing of what others fail by."""
    engine = Parse(tiny_target, inner=Head())
    ended = [i for i, _ in engine.stream_batch([[POISON, 7], [8, 7], [9, 7]], size=1, max_new_tokens=NEW)]
    assert ended == [0, 1, 2]
    refused = engine.generate_batch([[POISON, 7], []], size=1, max_new_tokens=NEW)
    assert [type(error) for error in refused.errors.values()] == [PassFailed, PromptError]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_whoever_ends_the_program_ends_a_batch(tiny_target, error):
    before = threading.active_count()
    engine = Parse(tiny_target, inner=Head(error))
    with pytest.raises(error, match="no room"):
        engine.generate_batch([[8, 7], [POISON, 7], [9, 7]], size=2, max_new_tokens=NEW)
    assert threading.active_count() == before


def test_processes_that_share_a_model_do_not_part(tiny_target, monkeypatch):
    """A request may have failed in one of them alone, and the others would wait for its passes for ever."""
    engine = Parse(tiny_target, inner=Head())
    monkeypatch.setattr("parsedec.models.ranks.check_same", lambda model, device, what: None)
    monkeypatch.setattr("parsedec.models.ranks.share_generator", lambda generator, device: None)
    monkeypatch.setitem(tiny_target.__dict__, "shared", True)
    with pytest.raises(RuntimeError, match="no room for my head"):
        engine.generate_batch([[8, 7], [POISON, 7], [9, 7]], size=1, max_new_tokens=NEW)


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_forked_probes_that_find_no_memory_end_their_own_request(family, monkeypatch):
    judge = tiny.ScriptedJudge(seed=3, path="forked")
    engine = Parse(tiny.model(family), tiny.model(seed=5, layers=2), outer=PrefixVerification(judge=judge, **SHARED))
    given = prompts(5)
    alone = [engine.generate(prompt, max_new_tokens=NEW).tokens for prompt in given]
    plain, batches = LanguageModel.forward, []

    def forward(self, ids, *args, **options):
        if len(ids) > 1:
            batches.append(len(ids))
            if len(batches) == 2:
                raise torch.OutOfMemoryError("no memory for the copies")
        return plain(self, ids, *args, **options)

    monkeypatch.setattr(LanguageModel, "forward", forward)
    batch = engine.generate_batch(given, size=2, max_new_tokens=NEW)
    ((culprit, error),) = batch.errors.items()
    assert "no memory for the copies" in str(error)
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert [batch.answers[i].tokens for i in range(5) if i != culprit] == [alone[i] for i in range(5) if i != culprit]


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_a_request_that_asks_for_a_pass_as_it_is_ended_is_ended(backend):
    """Here the last `finally` clause of an outer level of one's own; nobody would make the pass it asks for."""
    ended = []

    class Tidies(TargetOnly):
        def run(self, work):
            try:
                yield from work.target_writes()
            finally:
                try:
                    work.target.session.feed([9])
                finally:
                    ended.append(True)

    before = threading.active_count()
    engine = Parse(dataclasses.replace(tiny.model("llama"), backend=backend), outer=Tidies())
    stream = engine.stream_batch([[5], [6] * 500], size=2, max_new_tokens=40)  # the second has less room
    assert next(stream)[0] == 1
    assert ended == [True]
    closing = threading.Thread(target=stream.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive(), "it waits for ever"
    assert ended == [True, True]
    assert threading.active_count() == before


def test_a_defect_is_not_swallowed_and_leaves_no_thread(tiny_target):
    before = threading.active_count()
    engine = Parse(tiny_target)

    def broken():
        engine.target.forward  # noqa: B018 - it gets as far as the model
        raise RuntimeError("a defect")

    def fine():
        return engine.generate([5, 6, 7], max_new_tokens=8)

    with pytest.raises(RuntimeError, match="a defect"):
        list(in_company([fine, fine, broken], size=3))
    assert threading.active_count() == before
