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
    """What all arms share: the same limits, sampling and seeds.

    seeds   every problem is answered once with each of them; none: once, with `seed`
    """

    limits: Limits
    sampling: Sampling
    seed: int
    seeds: Sequence[int] = ()
    warmup: int  # requests answered before counting, not recorded

    def __post_init__(self) -> None:
        for name in ("seed", "warmup"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r}; expected a whole number, 0 or more.")
        if len(set(self.seeds)) < len(self.seeds) or any(not isinstance(s, int) or s < 0 for s in self.seeds):
            raise ConfigError(f"seeds={list(self.seeds)}; expected whole numbers, 0 or more, each once.")
        if len(self.seeds) > 1 and self.sampling.greedy:
            raise ConfigError(
                f"seeds={list(self.seeds)} with temperature 0: every seed would give the same answer. Set "
                "sampling.temperature, or leave seeds out."
            )

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(self.seeds) or (self.seed,)


def run_arms(
    arms: Sequence[Arm],
    task: Task,
    problems: Sequence[Problem],
    settings: Settings,
    after_each: Callable[[str], None],
) -> None:
    """Answer every problem with every arm; requests that an earlier, interrupted run has answered are skipped.

    after_each  called with the arm's name after every request, e.g. to save and to show progress
    A request that cannot be run (too long, say) is recorded with its error and counts as wrong.
    """
    seeds = settings.all_seeds
    answered = {(arm.name, request["id"], request.get("seed", seeds[0])) for arm in arms for request in arm.requests}
    for arm in arms:
        for problem in problems[: settings.warmup]:
            _answer(arm, task, problem, settings, 0, seeds[0])
        arm.engine.history = GateHistory()  # warm-up is absent from what the gate has seen, too
    asked = ((index, problem, seed) for index, problem in enumerate(problems) for seed in seeds)
    for number, (index, problem, seed) in enumerate(asked):
        for turn in range(len(arms)):
            arm = arms[(number + turn) % len(arms)]  # rotating: no arm always runs on warmer caches
            if (arm.name, problem.id, seed) in answered:
                continue
            arm.requests.append(_answer(arm, task, problem, settings, index, seed))
            after_each(arm.name)


def _answer(arm: Arm, task: Task, problem: Problem, settings: Settings, index: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    request: dict[str, Any] = {"id": problem.id, "prompt": problem.prompt, "reference": problem.reference}
    request["seed"] = seed
    started = time.time()
    try:
        result = arm.engine.generate(
            problem.prompt,
            max_new_tokens=settings.limits.max_new_tokens,
            stop=settings.limits.stop,
            sampling=settings.sampling,
            generator=generator,
        )
    except ParsedecError as error:
        log.warning("%s, %s: %s", arm.name, problem.id, error)
        return request | {"correct": False, "detail": "", "error": f"{type(error).__name__}: {error}", "result": None}
    score = task.score(problem, result.text)
    return request | {
        "correct": score.correct,
        "detail": score.detail,
        "error": None,
        "at": started,
        "first_wrong_line": score.first_wrong_line,
        "result": to_json(result),
    }
