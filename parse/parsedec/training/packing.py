"""Packed training rows: one problem, several answers to it, and every line end of each answer judged, in one sequence.

    prompt | answer 1, its probes | answer 2, its probes | …

An answer and its probes see the prompt and each other through `masks.probe_mask`, exactly as in a judge pass, and
nothing of the other answers; their position ids are those of a judge pass, too. So the prompt is read only once.

Shapes in this file:  B rows of a batch, R positions of a row, P prompt, N answer, K probes, S suffix rows a probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parsedec import masks
from parsedec.errors import IncompatibleStack
from parsedec.judge import how_to_ask
from parsedec.models.language_model import LanguageModel
from parsedec.text.chat import closing_token, label_tokens, suffix_text

IGNORED = -100  # the label that cross_entropy skips
RIGHT, WRONG = 0, 1


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and what is to be learnt from it.

    tokens  N ids, without the end token
    cuts    K ascending positions in 1..N at which it is judged
    right   K verdicts: whether tokens[:cut] is free of errors
    taught  how many leading tokens are learnt as text; N + 1: all of them and the end token
    sound   how many leading tokens are known to begin a right answer
    slips   whether the token after those is known to be the first wrong one
    """

    tokens: tuple[int, ...]
    cuts: tuple[int, ...]
    right: tuple[bool, ...]
    taught: int
    sound: int = 0
    slips: bool = False

    def __post_init__(self) -> None:
        n = len(self.tokens)
        sorted_cuts = sorted(set(self.cuts))
        if list(self.cuts) != sorted_cuts or (sorted_cuts and not 1 <= sorted_cuts[0] <= sorted_cuts[-1] <= n):
            raise ValueError(f"Answer.cuts={self.cuts} for {n} tokens; expected strictly ascending, each from 1 to {n}")
        if len(self.right) != len(self.cuts) or not 0 <= self.taught <= n + 1:
            raise ValueError(
                f"Answer has {len(self.cuts)} cuts, {len(self.right)} verdicts and taught={self.taught} of {n} tokens; "
                f"expected one verdict a cut and taught from 0 to {n + 1}"
            )
        if not 0 <= self.sound <= n - self.slips:
            raise ValueError(f"Answer has sound={self.sound}, slips={self.slips} for {n} tokens; expected at most {n}")


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and the answers that share it."""

    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.answers:
            raise ValueError(f"Row has {len(self.prompt)} prompt tokens and {len(self.answers)} answers; expected both")


@dataclass(frozen=True, slots=True)
class Batch:
    """The input and labels of one step.

    attention_mask  additive [B, 1, R, R], or a dictionary of one for each layer kind
    labels          [B, R] the token that each position has to predict; IGNORED if none
    verdicts        [B, R] whether that token is a verdict
    slips           [B, R] RIGHT at tokens up to which the answer is right, WRONG at the first wrong one, IGNORED
                    elsewhere
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | dict[str, Tensor]
    labels: Tensor
    verdicts: Tensor
    slips: Tensor

    def to(self, device: torch.device) -> Batch:
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            {kind: m.to(device) for kind, m in mask.items()} if isinstance(mask, dict) else mask.to(device),
            self.labels.to(device, non_blocking=True),
            self.verdicts.to(device, non_blocking=True),
            self.slips.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class Packer:
    """Turns rows into batches for one model.

    suffix      S ids of the verification suffix
    label_ids   (right, wrong)
    end_id      the token that closes an answer
    dtype       of the additive mask: the one that attention computes in
    """

    suffix: tuple[int, ...]
    label_ids: tuple[int, int]
    end_id: int
    pad_id: int
    windows: tuple[tuple[str, int | None], ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, model: LanguageModel, dtype: torch.dtype = torch.float32) -> Packer:
        if obstacle := model.mask_obstacle:
            raise IncompatibleStack(
                f"{model.name} has {obstacle}, so its judge cannot be trained in packed rows. Load it with "
                "attention=sdpa or eager, or choose a model with full or sliding attention."
            )
        question, labels = how_to_ask(model)
        text = suffix_text(model, question)
        right, wrong = label_tokens(model, text, labels)
        return cls(
            suffix=tuple(model.encode(text)),
            label_ids=(right, wrong),
            end_id=closing_token(model),
            pad_id=model.tokenizer.pad_token_id or 0,
            windows=tuple(model.windows.items()),
            dtype=dtype,
        )

    def width(self, answer: Answer) -> int:
        """How many positions an answer takes, its probes included."""
        return len(answer.tokens) + len(answer.cuts) * len(self.suffix)

    def length(self, row: Row) -> int:
        return len(row.prompt) + sum(map(self.width, row.answers))

    def fit(self, row: Row, length: int) -> Row | None:
        """The row without the answers that do not fit into `length` positions; None if no answer fits."""
        room, kept = length - len(row.prompt), []
        for answer in row.answers:
            if self.width(answer) <= room:
                kept.append(answer)
                room -= self.width(answer)
        return Row(row.prompt, tuple(kept)) if kept else None

    def pack(self, rows: Sequence[Row], length: int | None = None) -> Batch:
        """A batch of rows, padded to `length` positions (default: the longest row)."""
        length = length or max(map(self.length, rows))
        parts = [self._pack_one(row, length) for row in rows]
        additive: list[Any] = [part[2] for part in parts]
        mask = (
            {kind: torch.cat([m[kind] for m in additive]) for kind in additive[0]}
            if isinstance(additive[0], dict)
            else torch.cat(additive)
        )
        ids, positions, labels, verdicts, slips = (torch.stack([part[i] for part in parts]) for i in (0, 1, 3, 4, 5))
        return Batch(ids, positions, mask, labels, verdicts, slips)

    def verdict_positions(self, row: Row) -> list[list[int]]:
        """The positions in the packed row at which verdicts are read, one list per answer."""
        found, start = [], len(row.prompt)
        for answer in row.answers:
            first = start + len(answer.tokens) + len(self.suffix) - 1
            found.append([first + k * len(self.suffix) for k in range(len(answer.cuts))])
            start += self.width(answer)
        return found

    def _pack_one(self, row: Row, length: int) -> tuple[Tensor, Tensor, Any, Tensor, Tensor, Tensor]:
        total, p = self.length(row), len(row.prompt)
        if total > length:
            raise ValueError(f"a row of {total} positions does not fit into {length}; call fit() first")
        ids = list(row.prompt)
        positions = torch.zeros(length, dtype=torch.long)
        positions[:p] = torch.arange(p)
        # a padded position sees itself: softmax over a row of the mask that allows nothing is undefined
        allowed = torch.eye(length, dtype=torch.bool)
        allowed[:p, :p] = torch.ones(p, p, dtype=torch.bool).tril()
        labels = torch.full((length,), IGNORED)
        slips = torch.full((length,), IGNORED)
        verdicts = torch.zeros(length, dtype=torch.bool)
        for answer, judged in zip(row.answers, self.verdict_positions(row), strict=True):
            at, n = len(ids), len(answer.tokens)
            branch = slice(at, at + self.width(answer))
            block = masks.probe_mask(p, n, answer.cuts, len(self.suffix))  # [N + K*S, P + N + K*S]
            allowed[branch, :p], allowed[branch, branch] = block[:, :p], block[:, p:]
            positions[branch] = masks.probe_positions(p, n, answer.cuts, len(self.suffix))
            ids += [*answer.tokens, *(self.suffix * len(answer.cuts))]
            if answer.taught:
                # all answers share the last prompt position, which predicts the first token: the last answer wins
                text = torch.tensor([*answer.tokens, self.end_id][: answer.taught])
                labels[p - 1] = text[0]
                labels[at : at + answer.taught - 1] = text[1:]
            if judged:
                labels[judged] = torch.tensor([self.label_ids[0 if right else 1] for right in answer.right])
                verdicts[judged] = True
            slips[at : at + answer.sound] = RIGHT
            if answer.slips:
                slips[at + answer.sound] = WRONG
        ids += [self.pad_id] * (length - total)
        mask = masks.for_model(
            allowed, positions, positions, windows=dict(self.windows), dtype=self.dtype, device=torch.device("cpu")
        )
        return torch.tensor(ids), positions, mask, labels, verdicts, slips
