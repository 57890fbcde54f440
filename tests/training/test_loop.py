"""Training learns, and goes on after a kill as if nothing had happened: same weights, bit for bit."""

import copy
import dataclasses
import os
import signal

import pytest
import torch

import tiny
from parsedec.errors import ConfigError, IncompatibleStack, ParsedecError
from parsedec.experiment.cli import interrupted_by_sigterm
from parsedec.training.loop import Trainer
from parsedec.training.packing import Answer, Packer, Row
from parsedec.training.solve_judge import Optimisation, SolveAndJudge

STEPS = 8
OPTIMISATION = Optimisation(steps=STEPS, rate=2e-3, warmup=1, hint_weight=1.0, hints=[1])


def batch(model, seed=0):
    """Answers that count up; a prefix is right while it counts."""
    packer, rows = Packer.of(model), []
    for start in range(10 + seed % 3, 40, 6):
        right = Answer(tuple(range(start, start + 8)), (4, 8), (True, True), 9, 8)
        wrong = Answer((*range(start, start + 5), 60, 61, 62), (4, 8), (True, False), 0, 5, True)
        rows.append(Row((2, start - 1, 3), (right, wrong)))
    return packer.pack(rows)


def fresh():
    return dataclasses.replace(tiny.model("llama"), hf=copy.deepcopy(tiny.model("llama", layers=2).hf))


def trainer_of(model, optimisation=OPTIMISATION, autocast=False):
    return Trainer(SolveAndJudge(model, optimisation, autocast=autocast), optimisation)


class Killed(Exception):
    pass


def batches(model, start, stop, killed_at=None):
    for step in range(start, stop):
        if step == killed_at:
            raise Killed
        yield batch(model, step)


def test_loss_of_solving_and_of_judging_falls():
    model = fresh()
    trainer = trainer_of(model, dataclasses.replace(OPTIMISATION, steps=25))
    trainer.train((batch(model) for _ in range(25)), report_steps=5)
    first, last = trainer.history[0], trainer.history[-1]
    assert last["solve_loss"] < 0.5 * first["solve_loss"]
    assert last["verdict_loss"] < 0.5 * first["verdict_loss"]
    assert last["hint_loss"] < 0.5 * first["hint_loss"]
    assert not model.hf.training


@pytest.mark.parametrize("autocast", [False, True])
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, autocast):
    unbroken = trainer_of(fresh(), autocast=autocast)
    unbroken.train(batches(unbroken.objective.model, 0, STEPS), report_steps=2)

    killed = trainer_of(fresh(), autocast=autocast)
    with pytest.raises(Killed):
        killed.train(
            batches(killed.objective.model, 0, STEPS, killed_at=5), checkpoint=tmp_path / "c.pt", checkpoint_minutes=0,
            report_steps=2)  # fmt: skip

    resumed = trainer_of(fresh(), autocast=autocast)
    resumed.restore(tmp_path / "c.pt")
    assert resumed.step == 5
    resumed.train(batches(resumed.objective.model, resumed.step, STEPS), report_steps=2)
    ours, theirs = resumed.objective.model.hf.state_dict(), unbroken.objective.model.hf.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    strip = [[{k: v for k, v in entry.items() if k != "step_s"} for entry in t.history] for t in (resumed, unbroken)]
    assert strip[0][-1]["step"] == strip[1][-1]["step"] == STEPS


class Drawing:
    """An objective that draws numbers, as those of heads do; it is interrupted behind some of its draws."""

    def __init__(self, model, at=None, presses=1, sent=signal.SIGINT):
        self.inner = SolveAndJudge(model, OPTIMISATION, autocast=False)
        self.trained, self.helpers, self.model = self.inner.trained, self.inner.helpers, model
        self.at, self.presses, self.sent = at, presses, sent

    def losses(self, batch):
        share = float(torch.rand(()))
        if self.at == 0:
            for _ in range(self.presses):
                os.kill(os.getpid(), self.sent)
        self.at = None if self.at is None else self.at - 1
        for loss in self.inner.losses(batch):
            yield dataclasses.replace(loss, weight=loss.weight * (0.5 + share))


@pytest.mark.parametrize(("presses", "step"), [(1, 6), (2, 5)])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_the_middle_of_a_step_leaves_nothing_half_done(tmp_path, sent, presses, step):
    """Once, the step is ended first. A second time, the checkpoint before the step stands."""

    def drawing(**when):
        torch.manual_seed(0)
        return Trainer(Drawing(fresh(), **when), OPTIMISATION)

    def train(trainer, **how):
        trainer.train(batches(trainer.objective.model, trainer.step, STEPS), report_steps=2, **how)

    unbroken, broken, resumed = drawing(), drawing(at=5, presses=presses, sent=sent), drawing()
    usual = signal.getsignal(signal.SIGINT)
    torch.manual_seed(1)
    train(unbroken)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm():  # as every command runs
        train(broken, checkpoint=tmp_path / "c.pt", checkpoint_minutes=0)
    assert signal.getsignal(signal.SIGINT) is usual
    resumed.restore(tmp_path / "c.pt")
    assert resumed.step == step
    train(resumed)
    ours, theirs = resumed.objective.model.hf.state_dict(), unbroken.objective.model.hf.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_verdicts_weigh_nothing_when_told_so():
    model = fresh()
    still = trainer_of(model, dataclasses.replace(OPTIMISATION, verdict_weight=0.0))
    right, wrong = Packer.of(model).label_ids
    before = [p.clone() for p in model.hf.parameters()]
    only = batch(model)
    only.labels[~only.verdicts] = -100
    sums = still.train_step(only)
    assert sums["verdict"][2] == 4 * 5
    assert sums["solve"][2] == 0
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
        trainer_of(capped)
    with pytest.raises(ConfigError, match="hints"):
        trainer_of(fresh(), dataclasses.replace(OPTIMISATION, hints=[2]))  # of two layers, the last
    (tmp_path / "half.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(ParsedecError, match="checkpoint"):
        trainer_of(fresh()).restore(tmp_path / "half.pt")
