"""The rows that a step reads: a pure function of (seed, step), so a resumed run needs to know only its step.

Each row is one problem with fresh solutions, fresh injected errors and some of the pool's drafts. Rows are grouped by
expected length, so that batches have only a few shapes (a compiled model is compiled once per shape).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.utils.data import DataLoader, Dataset

from parsedec.errors import ConfigError
from parsedec.models.language_model import LanguageModel
from parsedec.tasks.base import Problem, Task
from parsedec.training.answers import Solution, clean, injected, mark
from parsedec.training.drafts import Pool
from parsedec.training.generation import prompts
from parsedec.training.packing import Answer, Batch, Packer, Row


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The answers of one row.

    clean     right solutions
    injected  solutions with one injected error
    drafts    answers from the pool, wrong and right ones in turn, to be judged but not learnt as text; a solution where
              the pool has none left
    """

    clean: int = 1
    injected: int = 1
    drafts: int = 2

    def __post_init__(self) -> None:
        if min(self.clean, self.injected, self.drafts) < 0 or self.size < 1:
            raise ConfigError(f"mix={self}; expected counts of at least 0, one of them positive.")

    @property
    def size(self) -> int:
        return self.clean + self.injected + self.drafts


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Training rows by (epoch, index).

    judged  False leaves out verdicts, for models that only solve
    """

    model: LanguageModel
    task: Task
    problems: Sequence[Problem]
    solution: Solution
    pool: Pool
    mix: Mix
    judged: bool = True
    seed: int = 0
    contexts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "contexts", prompts(self.model, self.problems))

    def row(self, epoch: int, index: int) -> Row:
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        problem = self.problems[index]
        answers = [clean(self.model, self.task, problem, self.solution, rng) for _ in range(self.mix.clean)]
        answers += [injected(self.model, self.task, problem, self.solution, rng) for _ in range(self.mix.injected)]
        answers += self._drafts(problem, index, rng)
        if not self.judged:
            answers = [Answer(answer.tokens, (), (), answer.taught) for answer in answers]
        # random order, since answers at the end may not fit, and the last right answer teaches the first token
        rng.shuffle(answers)
        return Row(tuple(self.contexts[index]), tuple(answers))

    def _drafts(self, problem: Problem, index: int, rng: random.Random) -> list[Answer]:
        if not self.mix.drafts:
            return []
        marked = [mark(self.model, self.task, problem, *written) for written in (self.pool[index] if self.pool else [])]
        wrong = [answer for answer in marked if not answer.taught]
        right = [answer for answer in marked if answer.taught]
        chosen = []
        for i in range(self.mix.drafts):
            first, second = (wrong, right) if i % 2 == 0 else (right, wrong)
            source = first or second
            if source:
                # never learnt as text, right or wrong: a target with its draft's habits would write the same tokens
                chosen.append(replace(source.pop(rng.randrange(len(source))), taught=0))
            else:
                write = injected if i % 2 == 0 else clean
                chosen.append(write(self.model, self.task, problem, self.solution, rng))
        return chosen


@dataclass(frozen=True, kw_only=True)
class Batches(Dataset[Batch]):
    """Batch number `step` of the whole training.

    lengths    lengths to which rows are padded, ascending; a row gets the first that it is expected to fit into
    positions  about how many positions a batch has: it has positions // length rows
    """

    rows: Rows
    packer: Packer
    lengths: Sequence[int]
    positions: int
    groups: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.positions < self.lengths[-1]:
            raise ConfigError(
                f"lengths={list(self.lengths)}, positions={self.positions}; expected ascending lengths and at least "
                "as many positions as the longest."
            )
        groups: list[list[int]] = [[] for _ in self.lengths]
        for index in range(len(self.rows.problems)):
            group = next((g for g, length in enumerate(self.lengths) if self._expected(index) <= length), -1)
            groups[group].append(index)
        object.__setattr__(self, "groups", groups)
        if not self.per_epoch:
            raise ConfigError(
                f"{len(self.rows.problems)} problems do not fill one batch of {self.positions} positions. Raise the "
                "number of problems or lower positions."
            )

    @property
    def per_epoch(self) -> int:
        return sum(len(group) // self._size(length) for group, length in zip(self.groups, self.lengths, strict=True))

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.per_epoch)
        length, indices = self._plan(epoch)[place]
        rows = (self.packer.fit(self.rows.row(epoch, index), length) for index in indices)
        kept = [row for row in rows if row is not None]
        return self.packer.pack(kept, length)

    def _size(self, length: int) -> int:
        return self.positions // length

    def _expected(self, index: int) -> float:
        """The expected length of a row, estimated from one solution to its problem."""
        rng = random.Random(index)
        rows = self.rows
        answer = clean(rows.model, rows.task, rows.problems[index], rows.solution, rng)
        if not rows.judged:
            answer = Answer(answer.tokens, (), (), answer.taught)
        return len(rows.contexts[index]) + rows.mix.size * self.packer.width(answer)

    def _plan(self, epoch: int) -> list[tuple[int, list[int]]]:
        """(length, indices) of every batch of an epoch."""
        rng = random.Random(f"{self.rows.seed}/order/{epoch}")
        plan = []
        for group, length in zip(self.groups, self.lengths, strict=True):
            order, size = rng.sample(group, len(group)), self._size(length)
            plan += [(length, order[i : i + size]) for i in range(0, len(order) - size + 1, size)]
        rng.shuffle(plan)
        return plan


def stream(batches: Batches, start: int, stop: int, workers: int) -> Iterator[Batch]:
    """Batches start..stop-1, made by `workers` other processes (0: by this one)."""
    own = torch.Generator()  # drawing from the global one would shift a resumed run
    yield from DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=workers, generator=own)
