"""Training learns, and goes on after a kill as if nothing had happened: same weights, bit for bit."""

import copy
import dataclasses

import pytest
import torch

import tiny
from parsedec.errors import ConfigError, IncompatibleStack, ParsedecError
from parsedec.training.loop import Optimisation, Trainer
from parsedec.training.packing import Answer, Packer, Row

STEPS = 8
OPTIMISATION = Optimisation(steps=STEPS, rate=2e-3, warmup=1, hint_weight=1.0, hints=[1])


def batch(model, seed=0):
    """Answers that count up; a prefix is right while it counts."""
    packer, rows = Packer.of(model), []
    for start in range(10 + seed % 3, 40, 6):
        right = Answer(tuple(range(start, start + 8)), (4, 8), (True, True), 9)
        wrong = Answer((*range(start, start + 5), 60, 61, 62), (4, 8), (True, False), 0)
        rows.append(Row((2, start - 1, 3), (right, wrong)))
    return packer.pack(rows)


def fresh():
    return dataclasses.replace(tiny.model("llama"), hf=copy.deepcopy(tiny.model("llama", layers=2).hf))


class Killed(Exception):
    pass


def batches(model, start, stop, killed_at=None):
    for step in range(start, stop):
        if step == killed_at:
            raise Killed
        yield batch(model, step)


def test_loss_of_solving_and_of_judging_falls():
    model = fresh()
    trainer = Trainer(model, dataclasses.replace(OPTIMISATION, steps=25), autocast=False)
    trainer.train((batch(model) for _ in range(25)), report_steps=5)
    first, last = trainer.history[0], trainer.history[-1]
    assert last["solve_loss"] < 0.5 * first["solve_loss"]
    assert last["verdict_loss"] < 0.5 * first["verdict_loss"]
    assert last["hint_loss"] < 0.5 * first["hint_loss"]
    assert not model.hf.training


@pytest.mark.parametrize("autocast", [False, True])
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, autocast):
    unbroken = Trainer(fresh(), OPTIMISATION, autocast=autocast)
    unbroken.train(batches(unbroken.model, 0, STEPS), report_steps=2)

    killed = Trainer(fresh(), OPTIMISATION, autocast=autocast)
    with pytest.raises(Killed):
        killed.train(
            batches(killed.model, 0, STEPS, killed_at=5), checkpoint=tmp_path / "c.pt", checkpoint_minutes=0,
            report_steps=2)  # fmt: skip

    resumed = Trainer(fresh(), OPTIMISATION, autocast=autocast)
    resumed.restore(tmp_path / "c.pt")
    assert resumed.step == 5
    resumed.train(batches(resumed.model, resumed.step, STEPS), report_steps=2)
    ours, theirs = resumed.model.hf.state_dict(), unbroken.model.hf.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    strip = [[{k: v for k, v in entry.items() if k != "step_s"} for entry in t.history] for t in (resumed, unbroken)]
    assert strip[0][-1]["step"] == strip[1][-1]["step"] == STEPS


def test_verdicts_weigh_nothing_when_told_so():
    model = fresh()
    still = Trainer(model, dataclasses.replace(OPTIMISATION, verdict_weight=0.0), autocast=False)
    right, wrong = Packer.of(model).label_ids
    before = [p.clone() for p in model.hf.parameters()]
    only = batch(model)
    only.labels[~only.verdicts] = -100
    sums = still.train_step(only)
    assert sums["verdict_labels"] == 4 * 5
    assert sums["solve_labels"] == 0
    # no gradient at all: only weight decay moved the matrices
    for old, new in zip(before, model.hf.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-2, atol=1e-6)
    assert right != wrong


def test_rate_rises_and_falls():
    plan = Optimisation(steps=100, rate=1.0, warmup=10, final=0.1)
    rates = [plan.rate_at(step) for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert rates[0] == pytest.approx(1 / 11, rel=1e-2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-2)


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="steps"):
        Optimisation(steps=-1, rate=1e-3)
    with pytest.raises(ConfigError, match="weighs nothing"):
        Optimisation(steps=1, rate=1e-3, solve_weight=0, verdict_weight=0)
    capped = fresh()
    capped.hf.config.final_logit_softcapping = 30.0
    with pytest.raises(IncompatibleStack, match="softcapping"):
        Trainer(capped, OPTIMISATION)
    with pytest.raises(ConfigError, match="hints"):
        Trainer(fresh(), dataclasses.replace(OPTIMISATION, hints=[2]))  # of two layers, the last
    (tmp_path / "half.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(ParsedecError, match="checkpoint"):
        Trainer(fresh(), OPTIMISATION).restore(tmp_path / "half.pt")
