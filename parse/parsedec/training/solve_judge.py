"""The objective of a target: to solve, and to judge prefixes of answers, in one loss.

    loss = solve_weight · mean CE over taught text + verdict_weight · mean CE over verdicts
         + hint_weight · mean CE of linear probes on inner layers, at tokens of answers, both classes weighing the same

A verdict is several steps of reasoning away from the wrong token, so verdicts alone teach slowly. Hints tell layers
before the last, at the token itself, whether it is the first wrong one; their probes are thrown away after training.

Shapes in this file:  B rows of a batch, R positions of a row, T positions with a label, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parsedec.errors import ConfigError
from parsedec.models.language_model import LanguageModel
from parsedec.training.loop import Loss, Schedule, check_output
from parsedec.training.packing import IGNORED, Batch


@dataclass(frozen=True, kw_only=True)
class Optimisation(Schedule):
    """A schedule with the weights of the three losses.

    hints    layers that get hints, as in `output_hidden_states` (0 = embeddings)
    """

    solve_weight: float = 1.0
    verdict_weight: float = 1.0
    hint_weight: float = 0.0
    hints: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.solve_weight, self.verdict_weight, self.hint_weight) < 0 or not (
            self.solve_weight or self.verdict_weight
        ):
            raise ConfigError(f"{self} weighs nothing; expected weights of at least 0, one of them positive.")


class SolveAndJudge:
    """The objective of targets, and of draft models, which have no verdicts.

    autocast    compute in bfloat16
    compiled    torch.compile the decoder: faster with eager attention on a CPU, but takes a minute for each batch shape
    Raises ConfigError for hints in layers that the model lacks, IncompatibleStack as `loop.check_output` does.
    """

    def __init__(
        self, model: LanguageModel, weights: Optimisation, *, autocast: bool = True, compiled: bool = False
    ) -> None:
        check_output(model)
        if any(not 0 < layer < model.num_layers for layer in weights.hints):
            raise ConfigError(
                f"hints={list(weights.hints)} for the {model.num_layers} layers of {model.name}; expected layers "
                f"from 1 to {model.num_layers - 1}: the last one is what the verdict itself is read from."
            )
        self.model = model
        self.weights = weights
        self.autocast = autocast
        self.trained: nn.Module = model.hf
        self.helpers: nn.Module = nn.ModuleList(_Probe(model.hidden_size) for _ in weights.hints).to(model.device)
        decoder = model.hf.base_model
        self._decoder: Any = torch.compile(decoder, dynamic=False) if compiled else decoder

    def losses(self, batch: Batch) -> Iterator[Loss]:
        for kind, weight, logits, labels in self._predictions(batch.to(self.model.device)):
            balance = None
            if kind == "hint":  # one token in fifty is wrong
                balance = len(labels) / (2 * torch.bincount(labels, minlength=2).clamp(min=1))
            total = nn.functional.cross_entropy(logits, labels, weight=balance, reduction="sum")
            yield Loss(kind, weight, total, (logits.argmax(-1) == labels).sum(), len(labels))

    def _predictions(self, batch: Batch) -> Iterator[tuple[str, float, Tensor, Tensor]]:
        """(kind, weight in the loss, logits [T, V], labels [T]) for each kind of label in the batch."""
        weights, device = self.weights, self.model.device
        labels, slips = batch.labels.flatten(), batch.slips.flatten()  # [B*R]
        text = ((labels != IGNORED) & ~batch.verdicts.flatten()).nonzero().flatten()
        verdicts = batch.verdicts.flatten().nonzero().flatten()
        hinted = (slips != IGNORED).nonzero().flatten()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            out = self._decoder(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                output_hidden_states=list(weights.hints) or None,
            )
            hidden, head = out.last_hidden_state.flatten(0, 1), self.model.hf.get_output_embeddings()
            text_logits, verdict_logits = head(hidden[text]), head(hidden[verdicts])
        yield "solve", weights.solve_weight, text_logits.float(), labels[text]
        yield "verdict", weights.verdict_weight, verdict_logits.float(), labels[verdicts]
        if weights.hints:
            inner = [out.hidden_states[layer].flatten(0, 1)[hinted].float() for layer in weights.hints]
            logits = torch.cat([probe(rows) for probe, rows in zip(self._probes, inner, strict=True)])
            yield "hint", weights.hint_weight, logits, slips[hinted].repeat(len(inner))

    @property
    def _probes(self) -> nn.ModuleList:
        assert isinstance(self.helpers, nn.ModuleList)
        return self.helpers


class _Probe(nn.Sequential):
    """Reads right or wrong off one hidden state."""

    def __init__(self, hidden: int) -> None:
        read = nn.Linear(hidden, 2)
        nn.init.zeros_(read.weight)  # not random: the weights of a run do not depend on whether it has probes
        nn.init.zeros_(read.bias)
        super().__init__(nn.LayerNorm(hidden, elementwise_affine=False), read)
