"""Two processes share a target over gloo: packed scores and whole answers are those of one process, on both ranks.

Oracle: the same checkpoint in one process.
"""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import tiny
from parsedec import LabelJudge, Parse, PrefixVerification, Sampling, TargetOnly, load
from parsedec.boundary import FirstFailure
from parsedec.errors import ConfigError, IncompatibleStack, ModelLoadError, PromptError
from parsedec.gate import Adaptive
from parsedec.loop import Rounds
from parsedec.segmenters import EveryTokens
from parsedec.sessions.session import Session
from parsedec.types import JudgePath
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.ngram import Ngram

PROMPT = [2, 20, 31, 12, 20, 31, 12, 40, 3]
DRAFT, CUTS, SUFFIX = [21, 14, 33, 52, 18, 9, 27, 44], [2, 3, 5, 8], [1, 2, 7, 1, 3]


def outer(**settings):
    judge = LabelJudge(question="?", labels=("Correct", "Incorrect"))
    rule = FirstFailure(threshold=0.4, full_threshold=0.99)
    return PrefixVerification(judge=judge, segmenter=EveryTokens(delta=3), boundary=rule, **settings)


def judged(target, path):
    session = Session(target)
    session.feed(PROMPT)
    return session.judge(DRAFT, CUTS, SUFFIX, path=path).probe_logits


def outcomes(target, draft, seed):
    """What is compared: logits, and the tokens of every kind of stack. Rank r samples with its own `seed`."""
    found = {str(path): judged(target, path) for path in (JudgePath.PACKED, JudgePath.FORKED)}
    stacks = {
        "plain": Parse(target),
        "ngram": Parse(target, inner=Ngram()),
        "draft_model": Parse(target, draft, inner=DraftModel(model=None, length=3), outer=TargetOnly()),
        "parse": Parse(target, draft, outer=outer(loop=Rounds(rounds=4))),
        "priced": Parse(target, draft, inner=Ngram(), outer=outer(gate=Adaptive(cost_per_token=0.2))),
    }
    for name, engine in stacks.items():
        for temperature in (0.0, 0.9):
            sampling = Sampling(temperature=temperature)
            generator = torch.Generator().manual_seed(seed)
            result = engine.generate(PROMPT, max_new_tokens=24, sampling=sampling, generator=generator)
            found[f"{name} {temperature}"] = list(result.tokens)
            found[f"{name} {temperature} passes"] = result.counters.judge_passes
    return found


def rank_main(rank, world, port, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    target = load(f"{folder}/target", device="cpu", tp_plan="auto")
    draft = load(f"{folder}/draft", device="cpu")
    found = outcomes(target, draft, seed=5 + rank)
    found["shared"] = target.shared, draft.shared
    found["share"] = tuple(target.hf.model.layers[0].self_attn.q_proj.weight.to_local().shape)
    refused = {
        "clock": lambda: Parse(target, draft, outer=outer(gate=Adaptive())),
        "prompt": lambda: Parse(target).generate([*PROMPT, 10 + rank], max_new_tokens=4),
        "limit": lambda: Parse(target).generate(PROMPT, max_new_tokens=4 + rank),
    }
    for name, attempt in refused.items():
        try:
            attempt()
        except (IncompatibleStack, PromptError) as error:
            found[name] = type(error).__name__, str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def runs(request, tmp_path_factory):
    """(what one process finds, what each of two ranks finds)."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, model in (("target", tiny.model(request.param)), ("draft", tiny.model(request.param, seed=7, layers=1))):
        model.hf.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, args=(2, port, str(folder)), nprocs=2)
    alone = outcomes(load(folder / "target", device="cpu"), load(folder / "draft", device="cpu"), seed=5)
    return alone, [torch.load(Path(folder) / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_packed_scores_are_those_of_one_process(runs):
    alone, ranks = runs
    for found in ranks:
        assert found["shared"] == (True, False)
        assert found["share"] == (32, 64)  # half of the four heads of 16
        for path in ("packed", "forked"):
            assert (found[path] - alone[path]).abs().max() < 1e-4
    assert torch.equal(ranks[0]["packed"], ranks[1]["packed"])


@pytest.mark.slow
def test_answers_are_those_of_one_process_on_both_ranks(runs):
    """The ranks sampled with seeds of their own, and the first one's counted."""
    alone, ranks = runs
    texts = [name for name in alone if name not in ("packed", "forked")]
    assert len(texts) == 20
    for found in ranks:
        assert {name: found[name] for name in texts} == {name: alone[name] for name in texts}
    assert alone["parse 0.0 passes"] >= 1
    assert alone["plain 0.0"] != alone["plain 0.9"]


@pytest.mark.slow
def test_ranks_that_would_part_are_stopped_on_all(runs):
    _, ranks = runs
    for found in ranks:
        assert found["clock"][0] == "IncompatibleStack"
        assert "cost_per_token" in found["clock"][1]
        for name in ("prompt", "limit"):
            assert found[name][0] == "PromptError"
            assert "same request" in found[name][1]


def test_tensor_parallelism_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ModelLoadError, match="torchrun"):
        load("zoo:draft", tp_plan="auto")
    for settings in ({"tp_plan": "rows"}, {"device_map": "auto"}, {"backend": "static"}):
        with pytest.raises(ConfigError, match="tp_plan=auto"):
            load("zoo:draft", **{"tp_plan": "auto", **settings})


def test_a_device_map_gives_the_same_answers():
    where = load("zoo:draft", dtype="float32", device_map="cpu")
    alone = load("zoo:draft", dtype="float32", device="cpu")
    assert not where.shared
    answers = [Parse(model, inner=Ngram()).generate("What is 3 plus 4?", max_new_tokens=24) for model in (where, alone)]
    assert answers[0].tokens == answers[1].tokens
