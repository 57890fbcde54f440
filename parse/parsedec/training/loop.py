"""The training loop: solving text and verdicts in one loss, checkpoints from which a run goes on bit for bit.

    loss = solve_weight · mean CE over taught text + verdict_weight · mean CE over verdicts
         + hint_weight · mean CE over line ends of linear probes on inner layers

A verdict is several steps of reasoning away from the token that is wrong, so it teaches slowly. The hints say at once,
at the end of each line and in the layers before the last, whether that line is wrong; the probes are thrown away.

Shapes in this file:  B rows of a batch, R positions of a row, T positions with a label, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.model import LanguageModel
from parsedec.training.checkpoint import load_checkpoint, save_checkpoint
from parsedec.training.packing import IGNORED, Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW; the rate rises linearly, stays at its peak, and falls by a cosine to `final` of it.

    hold     share of the steps at the peak. 0: a plain cosine. Above 0 a run can still be given another number of
             steps while it is at the peak, which helps where nobody knows how fast the machine will be
    clip     largest norm of the gradient
    hints    layers that get hints, as in `output_hidden_states` (0 = embeddings)
    """

    steps: int
    rate: float
    warmup: int = 100
    hold: float = 0.0
    final: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0
    solve_weight: float = 1.0
    verdict_weight: float = 1.0
    hint_weight: float = 0.0
    hints: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0 or self.warmup < 0 or self.clip <= 0:
            raise ConfigError(f"{self} is unusable; expected steps >= 0, warmup >= 0, rate and clip > 0.")
        if not 0 <= self.hold < 1 or not 0 <= self.final <= 1:
            raise ConfigError(f"{self} is unusable; expected hold from 0 to below 1 and final from 0 to 1.")
        if min(self.solve_weight, self.verdict_weight, self.hint_weight) < 0 or not (
            self.solve_weight or self.verdict_weight
        ):
            raise ConfigError(f"{self} weighs nothing; expected weights of at least 0, one of them positive.")

    def rate_at(self, step: int) -> float:
        """Learning rate of step number `step`, from 0."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        fallen = max(0.0, (step / self.steps - self.hold) / (1 - self.hold))  # 0 at the peak, 1 at the end
        return self.rate * rise * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * fallen)))


@dataclass(slots=True)
class Tally:
    """Sums over the steps since the last progress line."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    def add(self, step: dict[str, Tensor]) -> None:
        for name, value in step.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means of what was added, per label; the sums start again."""
        out = {}
        for kind in ("solve", "verdict", "hint"):
            if count := self.sums.get(f"{kind}_labels", 0.0):
                out[f"{kind}_loss"] = self.sums[f"{kind}_loss"] / count
                out[f"{kind}_accuracy"] = self.sums[f"{kind}_hits"] / count
        self.sums, self.steps = {}, 0
        return out


class Trainer:
    """A model in training: weights, optimiser, step.

    model       its weights are trained in float32; autocast computes in bfloat16
    compiled    torch.compile the decoder: several times faster on a CPU, a minute per batch shape to compile
    """

    def __init__(
        self, model: LanguageModel, optimisation: Optimisation, *, autocast: bool = True, compiled: bool = False
    ) -> None:
        _check_head(model)
        if any(not 0 < layer < model.num_layers for layer in optimisation.hints):
            raise ConfigError(
                f"hints={list(optimisation.hints)} for the {model.num_layers} layers of {model.name}; expected layers "
                f"from 1 to {model.num_layers - 1}: the last one is what the verdict itself is read from."
            )
        self.model = model
        self.optimisation = optimisation
        self.autocast = autocast
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.probes = nn.ModuleList(_Probe(model.hidden_size) for _ in optimisation.hints).to(model.device)
        parameters = [*model.hf.parameters(), *self.probes.parameters()]
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(
            groups,
            lr=optimisation.rate,
            betas=optimisation.betas,
            weight_decay=optimisation.weight_decay,
        )
        decoder = model.hf.base_model
        self._decoder: Any = torch.compile(decoder, dynamic=False) if compiled else decoder

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; returns sums of loss and hits and the number of labels, by kind."""
        optimisation = self.optimisation
        for group in self.optimiser.param_groups:
            group["lr"] = optimisation.rate_at(self.step)
        self.model.hf.train()
        loss = torch.zeros((), device=self.model.device)
        sums: dict[str, Tensor] = {}
        for kind, weight, logits, labels in self._predictions(batch.to(self.model.device)):
            total = nn.functional.cross_entropy(logits, labels, reduction="sum")
            loss = loss + weight * total / max(1, len(labels))
            hits = (logits.argmax(-1) == labels).sum()
            counted = {"loss": total.detach(), "hits": hits, "labels": torch.tensor(len(labels))}
            sums |= {f"{kind}_{name}": value for name, value in counted.items()}
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.hf.parameters(), optimisation.clip)
        self.optimiser.step()
        self.step += 1
        return sums

    def train(
        self,
        batches: Iterable[Batch],
        *,
        checkpoint: Path | None = None,
        checkpoint_minutes: float = 5.0,
        report_steps: int = 20,
        on_report: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Train on `batches`, which begin at this trainer's step; a checkpoint every few minutes and at the end."""
        tally, saved = Tally(), time.monotonic()
        started, first = time.monotonic(), self.step
        try:
            for batch in batches:
                tally.add(self.train_step(batch))
                if self.step % report_steps == 0 or self.step == self.optimisation.steps:
                    entry = self._report(tally, (time.monotonic() - started) / (self.step - first))
                    if on_report:
                        on_report(entry)
                if checkpoint and time.monotonic() - saved > checkpoint_minutes * 60:
                    self.save(checkpoint)
                    saved = time.monotonic()
        finally:
            self.model.hf.eval()
            if checkpoint:  # also after Ctrl-C: between two steps nothing is half done
                self.save(checkpoint)

    def save(self, path: Path) -> None:
        modules = {"model": self.model.hf, "probes": self.probes}
        save_checkpoint(
            path, step=self.step, modules=modules, optimiser=self.optimiser, facts={"history": self.history}
        )

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: weights, optimiser, random generators and step are as they were."""
        modules = {"model": self.model.hf, "probes": self.probes}
        self.step, facts = load_checkpoint(path, modules=modules, optimiser=self.optimiser)
        self.history = facts["history"]
        log.info("going on from step %d of %s", self.step, path)

    def _predictions(self, batch: Batch) -> Iterator[tuple[str, float, Tensor, Tensor]]:
        """(kind, weight in the loss, logits [T, V], labels [T]) of everything the batch has labels for."""
        optimisation, device = self.optimisation, self.model.device
        labels, lines = batch.labels.flatten(), batch.lines.flatten()  # [B*R]
        text = ((labels != IGNORED) & ~batch.verdicts.flatten()).nonzero().flatten()
        verdicts = batch.verdicts.flatten().nonzero().flatten()
        ends = (lines != IGNORED).nonzero().flatten()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            out = self._decoder(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                output_hidden_states=list(optimisation.hints) or None,
            )
            hidden, head = out.last_hidden_state.flatten(0, 1), self.model.hf.get_output_embeddings()
            text_logits, verdict_logits = head(hidden[text]), head(hidden[verdicts])
        yield "solve", optimisation.solve_weight, text_logits.float(), labels[text]
        yield "verdict", optimisation.verdict_weight, verdict_logits.float(), labels[verdicts]
        if optimisation.hints:
            inner = [out.hidden_states[layer].flatten(0, 1)[ends].float() for layer in optimisation.hints]
            logits = torch.cat([probe(rows) for probe, rows in zip(self.probes, inner, strict=True)])
            yield "hint", optimisation.hint_weight, logits, lines[ends].repeat(len(inner))

    def _report(self, tally: Tally, step_s: float) -> dict[str, float]:
        entry = {"step": self.step, "rate": self.optimisation.rate_at(self.step - 1), "step_s": step_s, **tally.read()}
        self.history.append(entry)
        left = (self.optimisation.steps - self.step) * step_s
        facts = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in entry.items() if "loss" in k or "accuracy" in k)
        log.info("step %d/%d  %s  %.2f s/step  %.0f min left", self.step, self.optimisation.steps, facts, step_s,
                 left / 60)  # fmt: skip
        return entry


class _Probe(nn.Sequential):
    """Right or wrong, read off one hidden state."""

    def __init__(self, hidden: int) -> None:
        read = nn.Linear(hidden, 2)
        nn.init.zeros_(read.weight)  # no draw: the weights of a run do not depend on whether it has probes
        nn.init.zeros_(read.bias)
        super().__init__(nn.LayerNorm(hidden, elementwise_affine=False), read)


def _check_head(model: LanguageModel) -> None:
    """The loop applies decoder and output matrix by itself; a model that does more in between is refused."""
    config = model.hf.config.get_text_config()
    extra = [
        name for name in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(config, name, None)
    ]
    if extra:
        raise IncompatibleStack(
            f"{model.name} changes its logits by {extra}, which the training loop does not do; expected a model whose "
            "logits are its output matrix times the last hidden state. Choose another target."
        )
