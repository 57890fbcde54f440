"""The pool of drafts a judge learns from: answers that the draft model, and weaker copies of it, really write."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from parsedec.errors import OutputExistsError
from parsedec.experiment.cli import progress
from parsedec.experiment.record import write_text
from parsedec.model import LanguageModel
from parsedec.tasks.base import Problem, Task
from parsedec.training.generation import Written, noised, prompts, write_answers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DraftPass:
    """One answer per problem.

    temperature  0: greedy, what the engine drafts with by default
    noise        noise on the draft model's weights, as a share of their standard deviation: a weaker checkpoint
    """

    temperature: float = 0.0
    noise: float = 0.0


Pool = list[list[Written]]  # per problem its different answers


def sample_pool(
    draft: LanguageModel,
    problems: Sequence[Problem],
    passes: Sequence[DraftPass],
    *,
    max_new_tokens: int,
    batch: int,
    seed: int,
) -> Pool:
    """What the draft model writes for every problem, each different answer once."""
    contexts = prompts(draft, problems)
    pool: Pool = [[] for _ in problems]
    with progress(len(passes) * len(problems)) as step:
        for i, one in enumerate(passes):
            started = time.monotonic()
            generator = torch.Generator().manual_seed(seed * 1009 + i)
            model = noised(draft, one.noise, generator) if one.noise else draft
            written = write_answers(
                model,
                contexts,
                max_new_tokens=max_new_tokens,
                temperature=one.temperature,
                batch=batch,
                generator=generator,
                after_each=step,
            )
            for answers, answer in zip(pool, written, strict=True):
                if answer[0] and answer not in answers:
                    answers.append(answer)
            log.info("%d drafts by %s at %s in %.0f s", len(written), model.name, one, time.monotonic() - started)
    return pool


def load_or_sample(path: Path, draft: LanguageModel, problems: Sequence[Problem], passes: Sequence[DraftPass],
                   *, max_new_tokens: int, batch: int, seed: int) -> Pool:  # fmt: skip
    """The pool of an interrupted run, or a new one, stored at `path` with what it is an answer to."""
    asked = hashlib.sha256(repr([draft.name, [p.prompt for p in problems], passes, max_new_tokens, seed]).encode())
    if path.exists():
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict) or stored.get("asked") != asked.hexdigest():
            raise OutputExistsError(
                f"{path} holds answers to other prompts, or by another model or settings. Choose another folder "
                "(output=DIR), or delete the file."
            )
        return [[(tuple(tokens), ended) for tokens, ended in answers] for answers in stored["answers"]]
    pool = sample_pool(draft, problems, passes, max_new_tokens=max_new_tokens, batch=batch, seed=seed)
    write_text(json.dumps({"asked": asked.hexdigest(), "answers": pool}, separators=(",", ":")), path)
    return pool


def share_wrong(pool: Pool, problems: Sequence[Problem], task: Task, draft: LanguageModel) -> float:
    """Share of the pool's answers that are wrong somewhere."""
    marks = [
        bool(task.score(problem, draft.decode(tokens)).correct)
        for problem, answers in zip(problems, pool, strict=True)
        for tokens, _ in answers
    ]
    return 1 - sum(marks) / max(1, len(marks))
