"""Arms over problems: every problem, or every batch of them, goes through all arms before the next one does, so that a
machine that gets slower or faster does so for all arms alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from parsedec.engine import Parse
from parsedec.errors import ConfigError, ParsedecError, require_number
from parsedec.experiment.record import to_json
from parsedec.gate import GateHistory
from parsedec.sampling import request_generator
from parsedec.tasks.base import Problem, Task
from parsedec.types import Limits, Result, Sampling

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
    """What all arms share: limits, sampling and seeds.

    seeds   every problem is answered once with each of them; if there are none, once with `seed`
    """

    limits: Limits
    sampling: Sampling
    seed: int
    seeds: Sequence[int] = ()
    warmup: int  # requests answered before counting, not recorded
    batch: int = 1  # requests answered at a time; arms then alternate by batches

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("warmup", 0), ("batch", 1)):
            require_number(name, getattr(self, name), whole=True, low=least)
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


class Asked(NamedTuple):
    """A problem, its number in the task, and the seed it is answered with."""

    number: int
    problem: Problem
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.problem.id, self.seed

    def next_turn(self, result: dict[str, Any] | None) -> Asked | None:
        """The next turn of a conversation, after this answer; None if there is none."""
        problem = self.problem.next_turn(result["text"]) if result else None
        return None if problem is None else self._replace(problem=problem)


def run_arms(
    arms: Sequence[Arm],
    task: Task,
    problems: Sequence[Problem],
    settings: Settings,
    after_each: Callable[[str], None],
) -> None:
    """Answer every problem with every arm. Requests that an earlier, interrupted run has answered are skipped.

    after_each  called with the arm's name after every request, e.g. to save and to show progress

    A request that cannot be run (too long, say) is recorded with its error and counts as wrong. In a conversation, each
    turn follows the arm's own answers to those before it; after an error there is no next turn.
    """
    seeds = settings.all_seeds
    answered = {(arm.name, r["id"], r.get("seed", seeds[0])): r for arm in arms for r in arm.requests}
    for arm in arms:
        for problem in problems[: settings.warmup]:
            for _ in _answers(arm, task, [Asked(0, problem, seeds[0])], settings):
                pass
        arm.engine.history = GateHistory()  # the gate, too, forgets the warm-up
    asked = [Asked(index, problem, seed) for index, problem in enumerate(problems) for seed in seeds]
    # a single arm has nothing to alternate with: all problems are one batch, whose seats are refilled as they get free
    together = settings.batch if len(arms) > 1 or settings.batch == 1 else max(1, len(asked))
    for turn, start in enumerate(range(0, len(asked), together)):
        for i in range(len(arms)):
            arm = arms[(turn + i) % len(arms)]  # rotating: no arm always runs on warmer caches
            some = asked[start : start + together]
            while some:
                left = [one for one in some if (arm.name, *one.key) not in answered]
                order, before = {one.key: place for place, one in enumerate(left)}, len(arm.requests)
                for request in _answers(arm, task, left, settings):
                    answered[arm.name, request["id"], request["seed"]] = request
                    arm.requests.append(request)
                    after_each(arm.name)
                arm.requests[before:] = sorted(arm.requests[before:], key=lambda r: order[r["id"], r["seed"]])
                some = [turned for one in some if (turned := one.next_turn(answered[arm.name, *one.key]["result"]))]


def _answers(arm: Arm, task: Task, asked: Sequence[Asked], settings: Settings) -> Iterator[dict[str, Any]]:
    """The requests of some problems, in the order in which they are answered."""
    options: dict[str, Any] = {
        "max_new_tokens": settings.limits.max_new_tokens,
        "stop": settings.limits.stop,
        "sampling": settings.sampling,
    }
    generators = [request_generator(one.seed, one.number) for one in asked]
    prompts, started = [one.problem.asked for one in asked], time.time()
    if settings.batch > 1:
        for i, answer in arm.engine.stream_batch(prompts, size=settings.batch, generators=generators, **options):
            yield _request(arm, task, asked[i], answer, started)
        return
    for one, generator in zip(asked, generators, strict=True):
        started = time.time()
        try:
            answer = arm.engine.generate(one.problem.asked, generator=generator, **options)
        except ParsedecError as error:
            answer = error
        yield _request(arm, task, one, answer, started)


def _request(arm: Arm, task: Task, asked: Asked, answer: Result | ParsedecError, at: float) -> dict[str, Any]:
    problem = asked.problem
    request: dict[str, Any] = {"id": problem.id, "prompt": problem.prompt, "reference": problem.reference}
    request["seed"] = asked.seed
    if isinstance(answer, ParsedecError):
        log.warning("%s, %s: %s", arm.name, problem.id, answer)
        wrong = None if task.score(problem, "").correct is None else False  # open-ended: nothing is wrong or right
        return request | {"correct": wrong, "detail": "", "error": f"{type(answer).__name__}: {answer}", "result": None}
    score = task.score(problem, answer.text)
    return request | {
        "correct": score.correct,
        "detail": score.detail,
        "error": None,
        "at": at,
        "first_wrong_line": score.first_wrong_line,
        "result": to_json(answer),
    }
