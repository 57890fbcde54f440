"""The analysis of a record against figures worked out by hand, plain forwards and scipy-free references."""

import copy
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

import tiny
from parsedec import Parse, PrefixVerification, TargetOnly
from parsedec.errors import ConfigError, PromptError
from parsedec.experiment import job
from parsedec.experiment.analysis import (
    engine_facts,
    flops,
    measure_entropy,
    model_facts,
    predict,
    rows_per_tree,
    token_ceiling,
    work,
)
from parsedec.experiment.runner import Arm, Settings, run_arms
from parsedec.experiment.summary import again, attended, compare, mcnemar, summarise, wilson
from parsedec.experiment.table import markdown, sections
from parsedec.tasks.base import Problem, Score, is_later_turn
from parsedec.types import Limits, Sampling


def answered(name="a", *, tokens=11, wall=1.0, decode=0.5, correct=True, prompt=4, seed=None, **counters):
    """A request as a run stores it."""
    path = counters.pop("path", None)
    times = {"prefill_s": 0.1, "draft_s": counters.pop("draft", 0.0), "judge_s": counters.pop("judge", 0.0),
             "decode_s": decode, "wall_s": wall, "first_token_s": wall / 10}  # fmt: skip
    result = {"tokens": [7] * tokens, "prompt_tokens": prompt, "rounds": [{"accepted_whole": False}],
              "judge_path": path, "times": times, "counters": {"target_rows": prompt + tokens} | counters}  # fmt: skip
    return {"id": name, "prompt": "p", "correct": correct, "error": None, "result": result} | (
        {} if seed is None else {"seed": seed}
    )


# --- statistics ---


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (1, 6), (3, 3), (9, 4), (0, 12)])
def test_mcnemar_is_the_share_of_as_uneven_coin_tosses(better, worse):
    """Every sequence of so many tosses is looked at."""
    n = better + worse
    uneven = sum(abs(2 * sum(t) - n) >= abs(better - worse) for t in itertools.product((0, 1), repeat=n))
    assert mcnemar(better, worse) == pytest.approx(uneven / 2**n)


def test_mcnemar_is_taken_over_paired_problems():
    right = [(True, True), (True, False), (False, True), (False, True), (False, False), (False, True)]
    base = [answered(str(i), correct=a) for i, (a, _) in enumerate(right)]
    arm = [answered(str(i), correct=b) for i, (_, b) in enumerate(right)]
    row = compare(base, arm)
    assert (row["better"], row["worse"], row["problems"]) == (3, 1, 6)
    assert row["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 16)


def test_several_answers_to_a_problem_are_one_draw():
    """Answering every problem four times the same way tells nothing new: intervals and tests stay as they are."""
    rng = random.Random(0)
    facts = [(str(i), rng.uniform(1, 3), rng.random() < 0.7, rng.random() < 0.8) for i in range(25)]
    once = [[answered(name, wall=wall / k, correct=(a, b)[k - 1]) for name, wall, a, b in facts] for k in (1, 2)]
    often = [[dict(request, seed=seed) for request in arm for seed in range(4)] for arm in once]
    single, several = compare(*once), compare(*often)
    for count in ("requests", "scored"):
        assert several.pop(count) == 4 * single.pop(count)
    assert several == pytest.approx(single)
    assert summarise(often[0])["accuracy_interval"] == pytest.approx(summarise(once[0])["accuracy_interval"])
    assert (summarise(often[0])["problems"], summarise(often[0])["requests"]) == (25, 100)


def test_seeds_are_paired_with_themselves():
    base = [answered("a", wall=w, seed=s) for s, w in ((0, 1.0), (1, 3.0))]
    arm = [answered("a", wall=w, seed=s) for s, w in ((1, 1.0), (2, 50.0))]
    row = compare(base, arm)
    assert (row["requests"], row["time_ratio"]) == (1, pytest.approx(3.0))


def test_the_interval_of_problems_answered_both_ways():
    requests = [answered(str(i), correct=s == 0, seed=s) for i in range(10) for s in (0, 1)]
    assert summarise(requests)["accuracy_interval"] == wilson(5, 10)


def test_latencies_are_quantiles_over_requests():
    walls = [random.Random(1).uniform(0, 9) for _ in range(40)]
    summary = summarise([answered(str(i), wall=wall) for i, wall in enumerate(walls)])
    for q in (50, 95, 99):
        assert summary[f"latency_s_p{q}"] == pytest.approx(np.percentile(walls, q))
        assert summary[f"first_token_s_p{q}"] == pytest.approx(np.percentile(walls, q) / 10)


def test_what_a_request_is_charged_for_in_a_batch_is_not_its_latency():
    """Its seconds are a share; what passed until the answer is known from now on, and not of older records."""
    old = [answered(str(i), wall=1.0 + i) for i in range(4)]
    new = copy.deepcopy(old)
    for i, one in enumerate(new):
        one["result"]["times"]["elapsed_s"] = 10.0 + i
    found = {(name, batch): summarise(requests, batch=batch)["latency_s_p50"]
             for name, requests in (("old", old), ("new", new)) for batch in (1, 4)}  # fmt: skip
    assert found == {("old", 1): 2.5, ("old", 4): None, ("new", 1): 11.5, ("new", 4): 11.5}
    assert summarise([*new, old[0]], batch=4)["latency_s_p50"] is None, "a mixture of both would be of neither"
    assert summarise(old, batch=4)["first_token_s_p50"] == 0.25

    record = {"config": {"batch": 4}, "summary": summarise(old), "arms": [arm_of("a", old, "outer=none")]}
    made = again(record)
    assert made["arms"][0]["summary"] == made["summary"] == summarise(old, batch=4)
    ((_, heads, (cells,), note),) = sections(made)
    assert cells[heads.index("latency p50 / p95 / p99, s")] == "-"
    assert "among the 4 answered at a time" in note
    assert "at a time" not in sections(record | {"config": {}})[0][3]


class Echo:
    """A task whose problems are token ids."""

    def score(self, problem, text):
        return Score(correct=bool(text), detail="")


def test_a_run_answers_every_problem_with_every_seed_and_goes_on_where_it_stopped():
    problems = [Problem(id=str(i), prompt=[9, 30 + i], reference="") for i in range(2)]
    options = dict(limits=Limits(max_new_tokens=3), sampling=Sampling(temperature=2.0), seed=0, warmup=0)
    engine = Parse(tiny.model("llama"), outer=TargetOnly())

    def run(arm):
        run_arms([arm], Echo(), problems, Settings(**options, seeds=(3, 5)), lambda _: None)
        return {(r["id"], r["seed"]): r["result"]["tokens"] for r in arm.requests}

    whole = run(Arm("run", engine))
    assert set(whole) == {("0", 3), ("0", 5), ("1", 3), ("1", 5)}
    assert whole["0", 3] != whole["0", 5]
    half = Arm("run", engine)
    run_arms([half], Echo(), problems[:1], Settings(**options, seeds=(3, 5)), lambda _: None)
    assert run(half) == whole
    with pytest.raises(ConfigError, match="same answer"):
        Settings(**options | {"sampling": Sampling()}, seeds=(0, 1))
    with pytest.raises(ConfigError, match="each once"):
        Settings(**options, seeds=(1, 1))


# --- work ---


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3", "qwen3_next"])
def test_row_parameters_are_those_of_the_products_of_a_row(family):
    """Counted from the shapes: every matrix once per row, the routed experts of a mixture as often as they are used."""
    model = tiny.model(family)
    embedding = model.hf.get_input_embeddings().weight
    tied = embedding is model.hf.get_output_embeddings().weight
    expected = 0
    for name, weight in model.hf.named_parameters():
        share = 2 / 4 if ".experts." in name else 1  # two of four experts
        expected += weight.numel() * share
    facts = model_facts(model)
    assert facts["row_parameters"] == expected - (0 if tied else embedding.numel())
    layers = {"qwen3_next": 2}.get(family, 4)
    assert facts["attention_width"] == layers * 4 * 16
    assert facts["devices"] == ["cpu"]


def test_flops_are_close_to_what_torch_counts():
    """torch's own counter over a plain forward of a dense model."""
    from torch.utils.flop_counter import FlopCounterMode

    model, n = tiny.model("llama", attention="eager"), 40
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.hf(input_ids=torch.arange(n)[None] % tiny.VOCAB, use_cache=False)
    ours = flops(model_facts(model), n, n * n)  # eager attention computes all pairs
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_pairs_are_estimated_from_rows():
    request = answered(tokens=10, prompt=6, target_rows=6 + 9)["result"]
    causal = sum(range(1, 6 + 10))  # the prompt and nine tokens, each over all before it
    assert attended(request, "target_rows") == pytest.approx(causal, rel=0.1)
    assert attended(request, "draft_rows") == 0


def test_work_of_an_arm_counts_both_models_and_their_devices():
    arm = {
        "models": {"target": {"row_parameters": 100, "attention_width": 5, "devices": ["cuda:0", "cuda:1"]},
                   "draft": {"row_parameters": 10, "attention_width": 1, "devices": ["cuda:0"]}},
        "summary": {"target_rows": 7, "target_pairs": 30, "draft_rows": 9, "draft_pairs": 20, "wall_s": 3.0},
    }  # fmt: skip
    assert work(arm) == {"target_flops": 2 * 100 * 7 + 4 * 5 * 30, "draft_flops": 2 * 10 * 9 + 4 * 1 * 20,
                         "device_s": 6.0, "cpu": False}  # fmt: skip


def test_engines_without_a_draft_have_none_in_their_work(tiny_target, tiny_draft):
    judge = tiny.ScriptedJudge()
    assert engine_facts(Parse(tiny_target, tiny_draft, outer=TargetOnly()))["draft"] is None
    facts = engine_facts(Parse(tiny_target, tiny_draft, outer=PrefixVerification(judge=judge)))
    assert facts["draft"]["parameters"] < facts["target"]["parameters"]
    assert json.loads(json.dumps(facts)) == facts


# --- ceilings ---


def test_entropy_is_that_of_plain_forwards(tiny_target):
    engine = Parse(tiny_target, outer=TargetOnly())
    prompt = [9, 30, 12]
    tokens = list(engine.generate(prompt, max_new_tokens=6).tokens)
    request = answered() | {"prompt": prompt}
    request["result"]["tokens"] = tokens
    got = measure_entropy(engine, [request, {"result": None}], Sampling(temperature=0.7))
    nats = squared = 0.0
    for i in range(6):
        with torch.inference_mode():
            logits = tiny_target.hf(input_ids=torch.tensor([prompt + tokens[:i]])).logits[0, -1].double() / 0.7
        p = logits.softmax(-1).tolist()
        nats += -sum(x * math.log(x) for x in p if x)
        squared += sum(x * math.log(x) ** 2 for x in p if x)
    assert (got["tokens"], got["requests"], got["temperature"]) == (6, 1, 0.7)
    assert got["nats"] == pytest.approx(nats, rel=1e-4)
    assert got["squared"] == pytest.approx(squared, rel=1e-4)
    assert measure_entropy(engine, [request], Sampling())["temperature"] == 1.0
    assert measure_entropy(engine, [], Sampling()) is None


def test_entropy_of_a_conversation_is_that_of_its_first_turn(tiny_target):
    """A later turn's request holds no history: a forward of its prompt alone would be of another context."""
    problem = Problem(id="talk/1", prompt="w9", reference="", follow_ups=("w3", "w4"))
    second = problem.next_turn("w1")
    third = second.next_turn("w2")
    assert [is_later_turn(p.id) for p in (problem, second, third)] == [False, True, True]
    requests = [answered(p.id, tokens=70) | {"prompt": [9, 30, 12]} for p in (problem, second, third)]
    engine = Parse(tiny_target, outer=TargetOnly())
    assert measure_entropy(engine, requests, Sampling()) == measure_entropy(engine, requests[:1], Sampling())
    assert measure_entropy(engine, requests, Sampling())["tokens"] == 70  # more than one chunk of rows
    assert measure_entropy(engine, requests[1:], Sampling()) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), PromptError("too long")], ids=repr)
def test_an_entropy_that_fails_is_said_and_fails_no_run(monkeypatch, caplog, tiny_target, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(job, "measure_entropy", fail)
    arm = Arm("target", Parse(tiny_target, outer=TargetOnly()))
    settings = Settings(limits=Limits(max_new_tokens=4), sampling=Sampling(), seed=0, warmup=0)
    assert job._entropy(arm, settings) is None
    assert f"{type(error).__name__}: {error}" in caplog.text


def test_the_ceiling_is_reached_up_to_a_constant_where_it_is_known():
    """A target that chooses among b tokens with equal chances: the full b-ary tree always holds the right path, so
    that its depth is reached with P guesses; the bound is above it and grows with ln P as it does."""
    for b in (2, 4):
        m = math.log(b)
        entropy = {"tokens": 3, "nats": 3 * m, "squared": 3 * m * m}
        for depth in (2, 5, 9):
            guesses = sum(b**level for level in range(1, depth + 1))
            bound = token_ceiling(entropy, guesses)
            assert bound == pytest.approx((1 + m) * math.log(guesses) / m)
            assert depth <= bound
    assert token_ceiling({"tokens": 1, "nats": 1.0, "squared": 2.0}, 1.0) is None


def test_rows_per_tree_leaves_out_prompts_and_judge_passes():
    summary = summarise([answered(prompt=10, target_rows=10 + 25 + 8 * 5, judge_rows=25, inner_steps=8)])
    assert rows_per_tree(summary) == 5.0


# --- the cost model ---


def arm_of(name, requests, description, draft=None, target="big"):
    facts = {"row_parameters": 1, "attention_width": 1, "devices": ["cpu"]}
    models = {"target": facts | {"name": target}, "draft": draft and facts | {"name": draft}}
    return {
        "name": name,
        "description": description,
        "models": models,
        "summary": summarise(requests),
        "requests": requests,
    }


def comparison(inner="inner=none", alone=True):
    """A target at 0.1 s a token, a draft model at 0.01 s, an inner level that doubles the target's pace."""
    base = arm_of("target", [answered(tokens=101, wall=10.2, decode=10.0)], "outer=none inner=none")
    fast = arm_of("fast", [answered(tokens=101, wall=5.2, decode=5.0)], "outer=none inner=pard")
    draft = arm_of("draft", [answered(tokens=101, wall=1.1, decode=1.0)], "outer=none", target="small")
    parse = arm_of("parse", [answered(
        tokens=101, wall=5.0, decode=2.0, draft=1.5, judge=0.3, path="packed", draft_tokens=100, kept_draft_tokens=61,
        judge_passes=1, judge_rows=120)], f"outer=parse {inner}", draft="small")  # fmt: skip
    arms = [base, fast, parse] + [draft] * alone
    rows = [{"arm": arm["name"], **compare(base["requests"], arm["requests"])} for arm in arms[1:]]
    return {"arms": arms, "baseline": "target", "comparison": rows}, parse


def test_prediction_from_the_paces_of_the_arms_alone():
    record, parse = comparison()
    said = predict(record, parse)
    # two prefills of 0.1 s, 100 drafted tokens, the judge's pass, 40 tokens the target wrote
    assert said["speedup"] == pytest.approx(10.2 / (0.1 + 0.1 + 100 * 0.01 + 0.3 + 40 * 0.1))
    assert said["ceiling"] == pytest.approx(10)
    assert (said["draft_of"], said["rho_of"]) == ("draft arm", "target")


def test_prediction_takes_the_inner_level_from_the_arm_that_runs_it_alone():
    record, parse = comparison(inner="inner=pard")
    said = predict(record, parse)
    assert said["speedup"] == pytest.approx(10.2 / (0.1 + 0.1 + 100 * 0.01 + 0.3 + 40 * 0.05))
    assert said["rho_of"] == "fast"


DRAFT_INNER = "inner=pard inner@draft.inner=pard draft.inner.model=zoo:pard"


def test_no_prediction_from_a_draft_arm_without_the_inner_level_that_drafts_here():
    record, parse = comparison(inner=DRAFT_INNER)
    assert predict(record, parse) is None
    ((_, heads, cells, _),) = [section for section in sections(record | {"config": {}}) if "ceiling" in section[1]]
    found = dict(zip(heads, next(row for row in cells if row[0] == "parse"), strict=True))
    assert (found["cost model"], found["ceiling"]) == ("-", "-")


@pytest.mark.parametrize("spelt", ["outer=none inner@draft.inner=pard draft.inner.model=zoo:pard",
                                   "outer=none inner=pard inner.model=zoo:pard"])  # fmt: skip
def test_prediction_from_the_draft_arm_with_the_same_inner_level(spelt):
    record, parse = comparison(inner=DRAFT_INNER)
    quick = arm_of("quick", [answered(tokens=101, wall=0.6, decode=0.5)], spelt, target="small")
    said = predict(record | {"arms": [*record["arms"], quick]}, parse)
    assert said["ceiling"] == pytest.approx(20), "0.005 s a token, not the 0.01 s of the draft model without it"
    assert (said["draft_of"], said["rho_of"]) == ("draft arm", "fast")
    plain, without = comparison()
    assert predict(plain | {"arms": [*plain["arms"][:3], quick]}, without) is None, "nor the other way round"


def test_prediction_is_over_the_requests_that_all_of_its_arms_answered():
    """A long one that only the baseline answers is time that the arm did not take."""
    record, parse = comparison()
    long, drafted = (answered("b", tokens=1001, wall=1000 * pace + 0.2, decode=1000 * pace) for pace in (0.1, 0.01))
    failed = {"id": "b", "prompt": "p", "correct": False, "error": "PromptError: too long", "result": None}
    base, fast, _, draft = record["arms"]
    arms = [arm_of(arm["name"], [*arm["requests"], one], arm["description"],
                   arm["models"]["draft"] and arm["models"]["draft"]["name"], arm["models"]["target"]["name"])
            for arm, one in ((base, long), (fast, long), (parse, failed), (draft, drafted))]  # fmt: skip
    assert predict(record | {"arms": arms}, arms[2])["speedup"] == pytest.approx(predict(record, parse)["speedup"])
    nothing = arm_of("parse", [failed], parse["description"], draft="small")
    nothing["summary"] = parse["summary"]
    assert predict(record | {"arms": [*arms[:2], nothing, draft]}, nothing) is None


def test_prediction_without_such_arms_takes_the_arms_own_paces():
    record, parse = comparison(inner="inner=eagle3", alone=False)
    said = predict(record, parse)
    assert said["speedup"] == pytest.approx(10.2 / (0.1 + 100 * 0.015 + 0.3 + 2.0))
    assert (said["draft_of"], said["rho_of"]) == ("own", "own")


def test_no_prediction_for_arms_that_do_not_draft():
    record, _ = comparison()
    assert [predict(record, arm) is None for arm in record["arms"]] == [True, True, False, True]


def test_the_tables_of_a_record():
    record, _ = comparison()
    record |= {
        "title": "Four arms", "entropy": {"tokens": 2, "nats": 1.0, "squared": 1.0, "temperature": 1.0, "requests": 1},
        "config": {"seed": 0, "seeds": [0, 1], "max_new_tokens": 10, "target": {"source": "zoo:target"}},
        "provenance": {"git_sha": "abc", "git_dirty": False, "packages": {"torch": "1", "transformers": "2"},
                       "device": "CPU", "command": "compare.py"},
    }  # fmt: skip
    text = markdown(record)
    assert "| McNemar p |" in text
    assert "n = 1 problems, seeds 0, 1" in text
    row = next(line for line in text.split("## Cost model")[1].splitlines() if line.startswith("| parse |"))
    assert row.split(" | ")[2:5] == ["1.85", "10.00", "61.00"]
    assert "1 / 1 / 1" not in text
    assert "5 / 5 / 5" in text.split("## Latency and work")[1]
    for arm in record["arms"]:
        del arm["models"]
    assert "Latency" not in markdown(record)
