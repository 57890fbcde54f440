"""Many requests at a time: each is the ordinary one, and their passes are made together.

A request runs until it needs a pass of a model that takes several requests' rows (`joint`), and waits. When all wait,
the passes of one model and kind are made as one forward: those that most requests wait for, so that few forwards are
made and well filled; the others gather company meanwhile. A request that has ended leaves, and the next one takes its
seat. So every outer level, judge and speculator works in a batch as it is. What is not a pass of such a model - a
speculator's head, a recurrent model, `model.generate` - is computed for one request after another.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from parsedec.errors import ConfigError, ParsedecError
from parsedec.fibers import Fiber
from parsedec.joint import Pass
from parsedec.streamed import StreamedVerification
from parsedec.types import Limits, Result, Sampling

if TYPE_CHECKING:
    from parsedec.engine import Parse, Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What became of the requests of a batch.

    answers  per prompt, in their order: its result, or the error that names the request
    wall_s   seconds from the first request's beginning to the last one's end
    """

    answers: tuple[Result | ParsedecError, ...]
    wall_s: float

    @property
    def results(self) -> tuple[Result, ...]:
        """The results of all requests; raises the first error, if there is one."""
        for answer in self.answers:
            if isinstance(answer, ParsedecError):
                raise answer
        return tuple(answer for answer in self.answers if isinstance(answer, Result))

    @property
    def errors(self) -> dict[int, ParsedecError]:
        """The errors by the place of their prompt."""
        return {i: answer for i, answer in enumerate(self.answers) if isinstance(answer, ParsedecError)}

    @property
    def tokens_per_s(self) -> float:
        tokens = sum(answer.new_tokens for answer in self.answers if isinstance(answer, Result))
        return tokens / self.wall_s if self.wall_s > 0 else 0.0


def answers(
    engine: Parse,
    prompts: Sequence[Prompt],
    *,
    size: int,
    limits: Limits,
    sampling: Sampling,
    generators: Sequence[torch.Generator] | None,
) -> Iterator[tuple[int, Result | ParsedecError]]:
    """(place, answer) of every prompt, as they are finished. What is wrong with all of them is raised at once."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ConfigError(f"prompts={prompts!r}; expected a list of prompts. Use generate for a single one.")
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"size={size!r}; expected the number of requests answered at a time, at least 1.")
    if generators is None and not sampling.greedy:
        raise ConfigError(
            f"temperature={sampling.temperature} needs a torch.Generator for every request: generators=[…]."
        )
    if generators is not None and (len(generators) != len(prompts) or len(set(map(id, generators))) < len(prompts)):
        raise ConfigError(
            f"{len(set(map(id, generators)))} generators for {len(prompts)} prompts; expected one of its own for each, "
            "so that no request's text depends on the others."
        )
    own = _for_batches(engine)

    def answering(i: int) -> Callable[[], Result | ParsedecError]:
        def answer() -> Result | ParsedecError:
            try:
                result = own.generate(
                    prompts[i],
                    max_new_tokens=limits.max_new_tokens,
                    stop=limits.stop,
                    sampling=sampling,
                    generator=generators[i] if generators else None,
                )
            except ParsedecError as error:
                return _named(error, i)
            return replace(result, notes=tuple(sorted({*result.notes, *_notes(engine, size)})))

        return answer

    return in_company([answering(i) for i in range(len(prompts))], size)


def in_company(bodies: Sequence[Callable[[], T]], size: int) -> Iterator[tuple[int, T]]:
    """(place, result) of every body as it ends; at most `size` run at a time, their passes made together.

    What a body raises ends all of them.
    """
    waiting = deque(enumerate(bodies))
    seats: dict[int, Fiber[T]] = {}
    try:
        while waiting or seats:
            while waiting and len(seats) < size:
                i, body = waiting.popleft()
                seats[i] = Fiber(body)
                seats[i].resume()
            ended = [i for i, fiber in seats.items() if fiber.ended]
            for i in ended:
                yield i, seats.pop(i).result
            if not ended:
                _make_passes(list(seats.values()))
    finally:
        for fiber in seats.values():
            fiber.close()


def _make_passes(fibers: Sequence[Fiber[Any]]) -> None:
    """One forward, of what most of the requests wait for; those that waited for it run on."""
    groups: dict[object, list[Fiber[Any]]] = {}
    for fiber in fibers:
        groups.setdefault(fiber.question.group, []).append(fiber)
    chosen = max(groups.values(), key=len)  # the first of several
    passes: list[Pass] = [fiber.question for fiber in chosen]
    start = time.perf_counter()
    outputs = passes[0].together(passes)
    if passes[0].device.type == "cuda":
        torch.cuda.synchronize(passes[0].device)  # what it took is shared out here
    per_row = (time.perf_counter() - start) / sum(one.rows for one in passes)
    for fiber, one in zip(chosen, passes, strict=True):
        fiber.charge(per_row * one.rows)
    for fiber, out in zip(chosen, outputs, strict=True):
        fiber.resume(out)


def _for_batches(engine: Parse) -> Parse:
    """The engine, its outer level without threads of its own: in a batch others' passes fill the gaps."""
    if not isinstance(engine.outer, StreamedVerification):
        return engine
    twin = copy.copy(engine)
    twin.outer = replace(engine.outer, overlap="never")
    return twin


def _notes(engine: Parse, size: int) -> list[str]:
    return [f"answered in a batch of up to {size}: seconds but those to the first token are this request's share"]


def _named(error: ParsedecError, i: int) -> ParsedecError:
    """The error with the place of its request in front."""
    named = type(error)(f"request {i}: {error}")
    named.__cause__ = error
    return named
