"""The pool of drafts a judge learns from: real answers of the draft model and of weaker copies of it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parsedec.errors import OutputExistsError
from parsedec.experiment.cli import progress
from parsedec.experiment.record import write_text
from parsedec.models.language_model import LanguageModel
from parsedec.tasks.base import Problem, Task
from parsedec.training.generation import Written, noised, prompts, write_answers

log = logging.getLogger(__name__)
SAVE_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class DraftPass:
    """One answer to every problem.

    temperature  0: greedy, the engine's default for drafts
    noise        noise on the draft model's weights, as a share of their standard deviation: makes a weaker model
    """

    temperature: float = 0.0
    noise: float = 0.0


Pool = list[list[Written]]  # for each problem, its distinct answers


@dataclass(frozen=True)
class Begun:
    """The part of a pool that has been written.

    written  for each pass that has begun, answers by the index of their problem
    state    of the random generator after the last of them, in hexadecimal digits
    """

    written: Sequence[Mapping[int, Written]] = ()
    state: str | None = None

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Begun:
        """The inverse of `asdict` after a round trip through JSON."""
        written = [{int(place): (tuple(tokens), ended) for place, (tokens, ended) in one.items()}
                   for one in data.get("written", ())]  # fmt: skip
        return cls(written, data.get("state"))


def sample_pool(
    draft: LanguageModel,
    problems: Sequence[Problem],
    passes: Sequence[DraftPass],
    *,
    max_new_tokens: int,
    batch: int,
    seed: int,
    begun: Begun | None = None,
    after_batch: Callable[[Begun], None] = lambda _: None,
) -> Pool:
    """The draft model's answers to every problem, each distinct answer once.

    begun        what an interrupted run has written; continuing it gives the same pool as a run without a break
    after_batch  called with all that has been written so far
    """
    contexts, begun = prompts(draft, problems), begun or Begun()
    pool: Pool = [[] for _ in problems]
    with progress(len(passes) * len(problems) - sum(map(len, begun.written))) as step:
        for i, one in enumerate(passes):
            started = time.monotonic()
            generator = torch.Generator().manual_seed(seed * 1009 + i)
            known = begun.written[i] if i < len(begun.written) else {}
            left = len(problems) - len(known)
            model = noised(draft, one.noise, generator) if one.noise and left else draft
            if known and begun.state and i == len(begun.written) - 1:
                generator.set_state(torch.tensor(list(bytes.fromhex(begun.state)), dtype=torch.uint8))
            told = partial(_told, begun.written[:i], generator, after_batch)
            written = write_answers(
                model,
                contexts,
                max_new_tokens=max_new_tokens,
                temperature=one.temperature,
                batch=batch,
                generator=generator,
                after_each=step,
                known=known,
                after_batch=told,
            )
            for answers, answer in zip(pool, written, strict=True):
                if answer[0] and answer not in answers:
                    answers.append(answer)
            begun = Begun([*begun.written[:i], dict(enumerate(written)), *begun.written[i + 1 :]], begun.state)
            log.info("%d drafts by %s at %s in %.0f s", left, model.name, one, time.monotonic() - started)
    return pool


def _told(
    before: Sequence[Mapping[int, Written]],
    generator: torch.Generator,
    after_batch: Callable[[Begun], None],
    written: Mapping[int, Written],
) -> None:
    after_batch(Begun([*before, written], bytes(generator.get_state().tolist()).hex()))


def load_or_sample(path: Path, draft: LanguageModel, problems: Sequence[Problem], passes: Sequence[DraftPass],
                   *, max_new_tokens: int, batch: int, seed: int) -> Pool:  # fmt: skip
    """The pool of an earlier run, or a new one, stored at `path` with a digest of what was asked.

    Answers are saved every few seconds in a file beside it, from which a killed run continues.
    Raises OutputExistsError for a file that holds answers to something else.
    """
    asked = hashlib.sha256(repr([draft.name, [p.prompt for p in problems], passes, max_new_tokens, seed]).encode())
    if (stored := _read(path, asked.hexdigest())) is not None:
        return [[(tuple(tokens), ended) for tokens, ended in answers] for answers in stored["answers"]]
    part = path.with_suffix(".part.json")
    begun = Begun.of_data(_read(part, asked.hexdigest()) or {})
    saved = time.monotonic()

    def save(so_far: Begun) -> None:
        nonlocal saved
        if time.monotonic() - saved >= SAVE_EVERY_S:
            write_text(_compact({"asked": asked.hexdigest(), **asdict(so_far)}), part)
            saved = time.monotonic()

    pool = sample_pool(draft, problems, passes, max_new_tokens=max_new_tokens, batch=batch, seed=seed,
                       begun=begun, after_batch=save)  # fmt: skip
    write_text(_compact({"asked": asked.hexdigest(), "answers": pool}), path)
    part.unlink(missing_ok=True)
    return pool


def _read(path: Path, asked: str) -> dict[str, Any] | None:
    """The contents of a file of answers to `asked`; None if there is no file."""
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    if not isinstance(stored, dict) or stored.get("asked") != asked:
        raise OutputExistsError(
            f"{path} holds answers to other prompts, or by another model or settings. Choose another folder "
            "(output=DIR), or delete the file."
        )
    return stored


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def share_wrong(pool: Pool, problems: Sequence[Problem], task: Task, draft: LanguageModel) -> float:
    """Share of the pool's answers that are wrong."""
    marks = [
        bool(task.score(problem, draft.decode(tokens)).correct)
        for problem, answers in zip(problems, pool, strict=True)
        for tokens, _ in answers
    ]
    return 1 - sum(marks) / max(1, len(marks))
