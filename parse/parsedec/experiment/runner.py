"""Arms over problems: every problem goes through every arm before the next one, so that drift hits all alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from parsedec.engine import Parse
from parsedec.errors import ConfigError, ParsedecError
from parsedec.experiment.record import to_json
from parsedec.gate import GateHistory
from parsedec.tasks.base import Problem, Task
from parsedec.types import Limits, Sampling

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Arm:
    """One configuration under test and the requests it has answered."""

    name: str
    engine: Parse
    description: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all arms share: the same limits, sampling and seeds."""

    limits: Limits
    sampling: Sampling
    seed: int
    warmup: int  # requests answered before counting, not recorded

    def __post_init__(self) -> None:
        for name in ("seed", "warmup"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r}; expected a whole number, 0 or more.")


def run_arms(
    arms: Sequence[Arm],
    task: Task,
    problems: Sequence[Problem],
    settings: Settings,
    after_each: Callable[[str], None],
) -> None:
    """Answer every problem with every arm; requests that an earlier, interrupted run has answered are skipped.

    after_each  called with the arm's name after every request, e.g. to save and to show progress
    A request that cannot be run (too long, say) is recorded with its error and counts as wrong. The turns of a
    conversation follow each other, each arm's with its own answers before them; after an error there is no next turn.
    """
    answered = {(arm.name, request["id"]): request for arm in arms for request in arm.requests}
    for arm in arms:
        for problem in problems[: settings.warmup]:
            _answer(arm, task, problem, settings, 0)
        arm.engine.history = GateHistory()  # warm-up is absent from what the gate has seen, too
    for index, problem in enumerate(problems):
        for turn in range(len(arms)):
            arm = arms[(index + turn) % len(arms)]  # rotating: no arm always runs on warmer caches
            asked: Problem | None = problem
            while asked is not None:
                request = answered.get((arm.name, asked.id))
                if request is None:
                    request = _answer(arm, task, asked, settings, index)
                    arm.requests.append(request)
                    after_each(arm.name)
                asked = asked.next_turn(request["result"]["text"]) if request["result"] else None


def _answer(arm: Arm, task: Task, problem: Problem, settings: Settings, index: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
    request: dict[str, Any] = {"id": problem.id, "prompt": problem.prompt, "reference": problem.reference}
    started = time.time()
    try:
        result = arm.engine.generate(
            problem.asked,
            max_new_tokens=settings.limits.max_new_tokens,
            stop=settings.limits.stop,
            sampling=settings.sampling,
            generator=generator,
        )
    except ParsedecError as error:
        log.warning("%s, %s: %s", arm.name, problem.id, error)
        wrong = None if task.score(problem, "").correct is None else False  # open-ended: nothing is wrong or right
        return request | {"correct": wrong, "detail": "", "error": f"{type(error).__name__}: {error}", "result": None}
    score = task.score(problem, result.text)
    return request | {
        "correct": score.correct,
        "detail": score.detail,
        "error": None,
        "at": started,
        "first_wrong_line": score.first_wrong_line,
        "result": to_json(result),
    }
