"""What `overhead` counts: parts of a request that add up, networks at their outermost call, and nothing left behind."""

import time
from dataclasses import dataclass
from functools import wraps

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from eagle3_heads import tiny_head
from medusa_heads import random_heads
from parallel_heads import new_head
from parsedec import Parse, TargetOnly
from parsedec.errors import ConfigError
from parsedec.experiment import overhead
from parsedec.experiment.overhead import PARTS, Stopwatch, measure_steps, summarise_steps, time_request
from parsedec.inner import NoSpeculation
from parsedec.types import Tree
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.early_exit import SelfEarlyExit
from parsedec_adapters.hf_assisted import HfAssisted
from parsedec_adapters.medusa import Medusa
from parsedec_adapters.ngram import Ngram
from parsedec_adapters.parallelspec import ParallelSpec
from parsedec_adapters.pard import Pard

PROMPT = [5, 6, 7, 5, 6, 7]
INNERS = {
    "none": NoSpeculation,
    "draft_model": lambda: DraftModel(length=3),
    "ngram": Ngram,
    "early_exit": lambda: SelfEarlyExit(layers=1),
    "pard": lambda: Pard(length=3, mask_token=4),
    "hf_assisted": lambda: HfAssisted(length=3),
    "medusa": lambda: Medusa(heads=random_heads(), nodes=6),
    "parallelspec": lambda: ParallelSpec(head=new_head(tiny.model("llama")), tokens=6),
    "eagle3": lambda: Eagle3(head=tiny_head(), tokens=6, depth=2, top_k=2),
}


def engine_with(inner):
    target, draft = tiny.model("llama"), tiny.model("llama", seed=7, layers=1)
    return Parse(target, draft, inner=inner, outer=TargetOnly())


@pytest.fixture
def clock(monkeypatch):
    """Time that only passes where a test says so."""

    class Clock:
        now = 0.0

        def passes(self, seconds):
            self.now += seconds

    made = Clock()
    monkeypatch.setattr(overhead, "perf_counter", lambda: made.now)
    return made


# --- the stopwatch ---


def test_time_goes_to_whoever_is_at_work(clock):
    watch = Stopwatch(torch.device("cpu"))
    inside = watch.timed(lambda: clock.passes(8), "drafter")

    def network():
        clock.passes(2)
        inside()  # what a network calls is the network's
        clock.passes(4)

    def propose():
        clock.passes(16)
        borrowed()
        inside()
        clock.passes(32)

    forward, borrowed = watch.timed(network, "target"), watch.timed(network, "target")
    proposing = watch.timed(propose, "speculator")
    clock.passes(1000)
    watch.start()
    forward()  # the first one is the prefill
    clock.passes(64)
    forward()
    proposing()  # the target asked by a speculator drafts
    clock.passes(128)
    watch.stop()
    assert watch.seconds == {"prefill": 14, "target": 14, "drafter": 22, "speculator": 48, "engine": 192}


def test_time_goes_on_after_an_error(clock):
    watch = Stopwatch(torch.device("cpu"))

    def fails():
        clock.passes(1)
        raise ValueError("no")

    watch.start()
    with pytest.raises(ValueError, match="no"):
        watch.timed(fails, "target")()
    clock.passes(2)
    watch.stop()
    assert (watch.seconds["prefill"], watch.seconds["engine"]) == (1, 2)


# --- what is wrapped ---


def wrapped(engine):
    return {(type(owner).__name__, name) for owner, name, _ in overhead._calls(engine)}


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("medusa", {("MedusaHeads", "forward")}),
        ("parallelspec", {("ParallelHead", "draft")}),
        ("eagle3", {("EagleHead", "fuse"), ("EagleHead", "advance"), ("EagleHead", "logits")}),
    ],
)
def test_networks_of_a_speculator_are_found(inner, expected):
    assert expected <= wrapped(engine_with(INNERS[inner]()))


@pytest.mark.parametrize("inner", INNERS)
def test_parts_are_the_whole_and_nothing_is_left_behind(inner):
    engine = engine_with(INNERS[inner]())
    calls = overhead._calls(engine)
    assert len(calls) == len({(id(owner), name) for owner, name, _ in calls})
    before = [vars(owner).copy() for owner, _, _ in calls]
    plain = engine.generate(PROMPT, max_new_tokens=12)
    start = time.perf_counter()
    row = time_request(engine, PROMPT, 12)
    took = time.perf_counter() - start
    assert row["tokens"] == plain.tokens
    assert row["steps"] == plain.counters.inner_steps > 0
    assert row["wall_s"] == pytest.approx(sum(row[f"{part}_s"] for part in PARTS))
    assert 0.5 * took < row["wall_s"] <= took
    drafts = inner not in ("none", "ngram")
    assert all(row[f"{part}_s"] > 0 for part in PARTS if part != "drafter")
    assert (row["drafter_s"] > 0) is drafts
    assert [vars(owner) for owner, _, _ in calls] == before


def test_what_stood_on_an_object_is_put_back_after_an_error():
    engine = engine_with(NoSpeculation())

    def broken(*_, **__):
        raise RuntimeError("broken")

    engine.target.hf.forward = broken
    try:
        with pytest.raises(RuntimeError, match="broken"):
            time_request(engine, PROMPT, 5)
        assert engine.target.hf.forward is broken
    finally:
        del engine.target.hf.forward


@dataclass(frozen=True)
class Nested:
    network: nn.Module


@dataclass(frozen=True, kw_only=True)
class Waits:
    """A speculator that guesses nothing and takes its time: in its network, and outside."""

    clock: object
    held: Nested
    needs = NoSpeculation.needs
    lossless = True
    bind, start, commit, rewind = (getattr(NoSpeculation, name) for name in ("bind", "start", "commit", "rewind"))

    def propose(self, state, budget):
        self.held.network(torch.zeros(1, 2))
        self.clock.passes(5)
        return Tree.chain(state[-1:])


def test_seconds_are_the_right_ones(clock):
    """With time passing in known places only, every part of every step is known."""

    class Slow(nn.Linear):
        def forward(self, x):
            clock.passes(2)
            return super().forward(x)

    engine = engine_with(Waits(clock=clock, held=Nested(Slow(2, 2))))
    target, forward = engine.target.hf, engine.target.hf.forward

    @wraps(forward)
    def slow(*args, **kwargs):
        clock.passes(10)
        return forward(*args, **kwargs)

    target.forward = slow
    try:
        row = time_request(engine, PROMPT, 5)
    finally:
        del target.forward
    assert row["steps"] == 4
    assert {part: row[f"{part}_s"] for part in PARTS} == {
        "prefill": 10, "target": 40, "drafter": 8, "speculator": 20, "engine": 0}  # fmt: skip
    summary = summarise_steps({"waits": [row | {"equal": True}]})["waits"]
    assert (summary["step_s"], summary["target_s"], summary["drafter_s"]) == (17, 10, 2)
    assert [summary[f"overhead_s{end}"] for end in ("", "_low", "_high")] == [5, 5, 5]
    assert summary["overhead_share"] == 0.5


# --- measuring and summing ---


def test_every_engine_answers_every_prompt_and_the_fastest_run_counts(monkeypatch):
    made, order = [], []

    def fake(engine, ids, max_new_tokens):
        order.append((engine, tuple(ids)))
        wall = float(np.random.default_rng(len(order)).random())
        made.append((engine, tuple(ids), wall))
        tokens = (1, 2) if engine != "b" or ids != [8] else (1, 3)
        return {"tokens": tokens, "steps": 1, "wall_s": wall}

    monkeypatch.setattr(overhead, "time_request", fake)
    done = []
    rows = measure_steps(
        {"a": "a", "b": "b"}, {"x": [7], "y": [8]}, max_new_tokens=4, repeats=3, after_each=done.append
    )
    assert done == ["x", "y"]
    assert order[:2] == [("a", (7,)), ("b", (7,))]  # warm-up
    counted = made[2:]
    for name in ("a", "b"):
        assert [row["id"] for row in rows[name]] == ["x", "y"]
        for row, ids in zip(rows[name], ((7,), (8,)), strict=True):
            assert row["wall_s"] == min(wall for engine, of, wall in counted if (engine, of) == (name, ids))
            assert row["tokens"] == 2
    assert [row["equal"] for row in rows["b"]] == [True, False]
    firsts = {engine for engine, _ in order[2::2]}
    assert firsts == {"a", "b"}  # the order rotates


def row(steps, **seconds):
    return {"steps": steps, "equal": True, **dict.fromkeys((f"{part}_s" for part in PARTS), 0.0), **seconds}


def test_shares_are_of_the_step_without_speculation():
    rows = {
        "none": [row(10, target_s=20.0, engine_s=1.0), row(30, target_s=60.0, engine_s=3.0)],
        "tree": [row(5, target_s=20.0, drafter_s=5.0, speculator_s=1.0, engine_s=1.0, prefill_s=99.0)] * 2,
    }
    summary = summarise_steps(rows)
    assert summary["none"]["overhead_share"] == pytest.approx(0.05)
    assert summary["tree"]["step_s"] == pytest.approx(5.4)
    assert summary["tree"]["overhead_s"] == pytest.approx(0.4)
    assert summary["tree"]["overhead_share"] == pytest.approx(0.2)
    assert summary["tree"]["overhead_share_low"] == pytest.approx(0.2)  # alike in every problem


def test_intervals_hold_the_truth_as_often_as_they_say():
    """40 experiments with a true share of 0.25: right 95 % intervals miss 8 or more of them once in 1,400 seed sets."""
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        noise = rng.uniform(0.5, 1.5, size=(2, 40))
        rows = {
            "none": [row(20, target_s=20 * 2.0 * x) for x in noise[0]],
            "tree": [row(10, target_s=30.0, engine_s=10 * 0.5 * x) for x in noise[1]],
        }
        made = summarise_steps(rows, seed=seed)["tree"]
        hits += made["overhead_share_low"] <= 0.25 <= made["overhead_share_high"]
        assert made["overhead_share_low"] < made["overhead_share"] < made["overhead_share_high"]
    assert hits > 32


def test_answers_too_short_for_a_tree_are_refused():
    with pytest.raises(ConfigError, match=r"no tree was verified.*Raise max_new_tokens"):
        summarise_steps({"none": [row(0)]})


def test_the_table_has_a_row_for_every_inner():
    summaries = summarise_steps({
        "none": [row(10, target_s=0.02, engine_s=0.001)],
        "eagle3 inner.tokens=8": [row(5, target_s=0.02, speculator_s=0.001) | {"equal": False}]})  # fmt: skip
    record = {
        "title": "Engine overhead", "config": {"repeats": 3, "max_new_tokens": 9, "target": {"source": "zoo:target"}},
        "provenance": {
            "git_sha": "abc", "git_dirty": False, "packages": {"torch": "1", "transformers": "2"}, "device": "CPU",
            "command": "overhead.py"},
        "summary": {
            "ratio": 1.01, "ratio_low": 1.0, "ratio_high": 1.02, "equal": True, "tokens": 10, "problems": 1},
        "inners": [{"name": name, "summary": summary} for name, summary in summaries.items()],
    }  # fmt: skip
    text = overhead.markdown(record)
    assert "| none | 10 | 2.10 | 2.00 | 0.00 | 0.00 | 0.10 | 0.10 [0.10, 0.10] | 5.0 % [5.0, 5.0] |" in text
    assert "| eagle3 inner.tokens=8 (other tokens) | 5 | 4.20 | 4.00 | 0.00 | 0.20 | 0.00 |" in text
    assert "1.010 [1.000, 1.020], 10 tokens, same tokens: yes" in text
    assert overhead.terminal(record).row_count == 2
    assert "| inner |" not in overhead.markdown(record | {"inners": []})
