"""The training loop of every recipe: schedule, steps, progress, and checkpoints that resume a run bit for bit.

What is learnt is an `Objective`: the target's solving and judging (`solve_judge`), or a speculator's head (`heads`).
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.models.language_model import LanguageModel
from parsedec.training.checkpoint import load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)


class Objective(Protocol):
    """What a recipe trains, and the losses of one batch."""

    @property
    def trained(self) -> nn.Module:
        """The module whose weights are the result."""

    @property
    def helpers(self) -> nn.Module:
        """Modules that learn beside it and are thrown away; without parameters if there are none."""

    def losses(self, batch: Any) -> Iterator[Loss]:
        """A loss for each kind of label in the batch."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One kind of loss of a batch.

    weight  of its mean in the sum that is minimised
    total   sum over the labels, with a gradient
    hits    how many labels were the model's first choice
    labels  how many labels there are
    """

    kind: str
    weight: float
    total: Tensor
    hits: Tensor
    labels: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """AdamW; the rate rises linearly, stays at its peak, and falls along a cosine to `final` times the peak.

    hold     share of the steps at the peak. 0: a plain cosine. Above 0, the number of steps can still be changed while
             a run is at the peak, which helps if nobody knows how fast the machine will be
    clip     largest norm of the gradient
    Raises ConfigError for settings out of range.
    """

    steps: int
    rate: float
    warmup: int = 100
    hold: float = 0.0
    final: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0 or self.warmup < 0 or self.clip <= 0:
            raise ConfigError(f"{self} is unusable; expected steps >= 0, warmup >= 0, rate and clip > 0.")
        if not 0 <= self.hold < 1 or not 0 <= self.final <= 1:
            raise ConfigError(f"{self} is unusable; expected hold from 0 to below 1 and final from 0 to 1.")

    def rate_at(self, step: int) -> float:
        """Learning rate of step number `step`, from 0."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        fallen = max(0.0, (step / self.steps - self.hold) / (1 - self.hold))  # 0 at the peak, 1 at the end
        return self.rate * rise * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * fallen)))


@dataclass(slots=True)
class Tally:
    """Loss, hits and labels by kind, summed over the steps since the last progress line."""

    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: dict[str, list[float]]) -> None:
        for kind, values in step.items():
            before = self.sums.get(kind, [0.0, 0.0, 0.0])
            self.sums[kind] = [a + b for a, b in zip(before, values, strict=True)]

    def read(self) -> dict[str, float]:
        """Means per label of what was added since the last call; resets the sums."""
        out = {}
        for kind, (loss, hits, labels) in self.sums.items():
            if labels:
                out[f"{kind}_loss"] = loss / labels
                out[f"{kind}_accuracy"] = hits / labels
        self.sums = {}
        return out


class Trainer:
    """An objective in training: its weights (in float32), the optimiser, and the step."""

    def __init__(self, objective: Objective, schedule: Schedule) -> None:
        self.objective = objective
        self.schedule = schedule
        self.step = 0
        self.history: list[dict[str, float]] = []
        parameters = [*objective.trained.parameters(), *objective.helpers.parameters()]
        learnt = [p for p in parameters if p.requires_grad]
        matrices = [p for p in learnt if p.dim() > 1]
        vectors = [p for p in learnt if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(
            groups, lr=schedule.rate, betas=schedule.betas, weight_decay=schedule.weight_decay
        )

    def train_step(self, batch: Any) -> dict[str, list[float]]:
        """One update; returns [sum of the loss, hits, labels] by kind. ConfigError for a batch without losses."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(self.step)
        self.objective.trained.train()
        losses = list(self.objective.losses(batch))
        if not losses:
            raise ConfigError(
                f"batch {self.step} has nothing to learn from: none of its tokens can be guessed. Enlarge the draft "
                "vocabulary if there is one; else look at the answers."
            )
        mean = torch.stack([loss.weight * loss.total / max(1, loss.labels) for loss in losses]).sum()
        self.optimiser.zero_grad()
        torch.autograd.backward(mean)
        torch.nn.utils.clip_grad_norm_(self.objective.trained.parameters(), self.schedule.clip)
        self.optimiser.step()
        self.step += 1
        return {loss.kind: [float(loss.total.detach()), float(loss.hits), float(loss.labels)] for loss in losses}

    def train(
        self,
        batches: Iterable[Any],
        *,
        checkpoint: Path | None = None,
        checkpoint_minutes: float = 5.0,
        report_steps: int = 20,
        on_report: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Train on `batches`, which begin at this trainer's step, with a checkpoint every few minutes and at the end.

        Ctrl-C and SIGTERM take effect once the current step is done. An error in the middle of a step leaves the
        checkpoint before it: weights may have moved, and random numbers have been drawn that a resumed run would draw
        again.
        """
        tally, saved = Tally(), time.monotonic()
        started, first, whole = time.monotonic(), self.step, True
        try:
            for batch in batches:
                with _interruptions_wait():
                    whole = False
                    tally.add(self.train_step(batch))
                    whole = True
                if self.step % report_steps == 0 or self.step == self.schedule.steps:
                    entry = self._report(tally, (time.monotonic() - started) / (self.step - first))
                    if on_report:
                        on_report(entry)
                if checkpoint and time.monotonic() - saved > checkpoint_minutes * 60:
                    self.save(checkpoint)
                    saved = time.monotonic()
        finally:
            self.objective.trained.eval()
            if checkpoint and whole:
                self.save(checkpoint)

    def save(self, path: Path) -> None:
        save_checkpoint(
            path, step=self.step, modules=self._modules, optimiser=self.optimiser, facts={"history": self.history}
        )

    def restore(self, path: Path) -> None:
        """Restore weights, optimiser, random generators and step from a checkpoint."""
        self.step, facts = load_checkpoint(path, modules=self._modules, optimiser=self.optimiser)
        self.history = facts["history"]
        log.info("going on from step %d of %s", self.step, path)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.objective.trained, "probes": self.objective.helpers}

    def _report(self, tally: Tally, step_s: float) -> dict[str, float]:
        entry = {"step": self.step, "rate": self.schedule.rate_at(self.step - 1), "step_s": step_s, **tally.read()}
        self.history.append(entry)
        left = (self.schedule.steps - self.step) * step_s
        facts = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in entry.items() if "loss" in k or "accuracy" in k)
        log.info("step %d/%d  %s  %.2f s/step  %.0f min left", self.step, self.schedule.steps, facts, step_s,
                 left / 60)  # fmt: skip
        return entry


@contextmanager
def _interruptions_wait() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block, where Python handles them; a second one acts at once."""
    own = threading.current_thread() is threading.main_thread()  # signals go to no other
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if own else {}
    handlers = {number: handler for number, handler in usual.items() if callable(handler)}
    held: list[tuple[int, Any]] = []

    def hold(number: int, frame: Any) -> None:
        if held:
            raise KeyboardInterrupt
        held.append((number, frame))

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for sent, frame in held:
        handlers[signal.Signals(sent)](sent, frame)


def check_output(model: LanguageModel) -> None:
    """Raise IncompatibleStack for a model whose logits are more than output matrix times last hidden state, which is
    all that the loop computes."""
    config = model.hf.config.get_text_config()
    extra = [
        name for name in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(config, name, None)
    ]
    if extra:
        raise IncompatibleStack(
            f"{model.name} changes its logits by {extra}, which the training loop does not do; expected a model whose "
            "logits are its output matrix times the last hidden state. Choose another target."
        )
