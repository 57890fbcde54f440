"""Many requests at a time: each runs the same code as it would alone, and their passes are made together.

A request runs until it needs a pass of a model that takes rows of several requests (`joint`), and then waits. When all
of them wait, the passes of one model and kind are made as one forward: those that most requests wait for, so that few
forwards are made and each is well filled. The others wait for more to join them, for about `PATIENCE` forwards at most.
If a forward fails, it is repeated for each request by itself, and only requests that fail again are ended. When a
request has ended, the next one takes its seat.

So every outer level, judge and speculator works in a batch as it is. Whatever is not a pass of such a model - a
speculator's head, a recurrent model, `model.generate` - is computed for one request after another, and if it fails, it
ends only its own request.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from traceback import format_exception
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from parsedec.batching.fibers import Fiber, current
from parsedec.batching.joint import Pass, joint_obstacle, settled
from parsedec.errors import ConfigError, ParsedecError, PassFailed, require_kind, require_number, without_frames
from parsedec.inner import NoSpeculation
from parsedec.sampling import chosen_generator
from parsedec.sessions.backends import runs_static
from parsedec.streamed import StreamedVerification
from parsedec.types import Limits, Result, Sampling

if TYPE_CHECKING:
    from parsedec.engine import Parse
    from parsedec.text.prompt import Prompt

log = logging.getLogger(__name__)

T = TypeVar("T")
# How many forwards may be made for others while a request waits for its own. A lower bound costs more forwards in all:
# 8 took 7 % more than no bound, on a batch of sixteen whose drafts end at different times; 32 took no more.
PATIENCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What became of the requests of a batch.

    answers  for every prompt, in order: its result, or an error that names the request
    wall_s   seconds from the beginning of the first request to the end of the last
    """

    answers: tuple[Result | ParsedecError, ...]
    wall_s: float

    @property
    def results(self) -> tuple[Result, ...]:
        """The results of all requests. Raises the first error, if there is one."""
        for answer in self.answers:
            if isinstance(answer, ParsedecError):
                raise answer
        return tuple(answer for answer in self.answers if isinstance(answer, Result))

    @property
    def errors(self) -> dict[int, ParsedecError]:
        """The errors, by the index of their prompt."""
        return {i: answer for i, answer in enumerate(self.answers) if isinstance(answer, ParsedecError)}

    @property
    def tokens_per_s(self) -> float:
        tokens = sum(answer.new_tokens for answer in self.answers if isinstance(answer, Result))
        return tokens / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The requests of a batch: their prompts, and settings that all share. `size` of them are answered at a time."""

    prompts: Sequence[Prompt]
    size: int
    limits: Limits
    sampling: Sampling
    seed: int | None = None
    generators: Sequence[torch.Generator] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not isinstance(self.prompts, Sequence):
            raise ConfigError(f"prompts={self.prompts!r}; expected a list of prompts. Use generate for a single one.")
        require_number("size", self.size, whole=True, low=1)
        require_kind("sampling", self.sampling, Sampling, "Sampling(temperature=…)")
        if self.generators is None:
            if self.seed is not None:
                require_number("seed", self.seed, whole=True)
            elif not self.sampling.greedy:
                raise ConfigError(
                    f"temperature={self.sampling.temperature} needs seed=…, or a torch.Generator for every request: "
                    "generators=[…]."
                )
            return
        if self.seed is not None:
            raise ConfigError(f"both seed={self.seed!r} and generators are given; expected one of the two.")
        if not isinstance(self.generators, Sequence):
            raise ConfigError(f"generators={self.generators!r}; expected a list of them, one torch.Generator a prompt.")
        for generator in self.generators:
            require_kind("generator", generator, torch.Generator, "torch.Generator().manual_seed(…)")
        own = len(set(map(id, self.generators)))
        if own != len(self.prompts) or len(self.generators) != own:
            raise ConfigError(
                f"{len(self.generators)} generators, {own} different ones, are given for {len(self.prompts)} prompts; "
                "expected one of its own for each, so that no request's text depends on the others."
            )

    def answers(self, engine: Parse) -> Iterator[tuple[int, Result | ParsedecError]]:
        """(index of the prompt, answer), as answers are finished.

        A `PassFailed` is held back until a request ends without one. If none does, the first one's cause is raised as
        it is: no answer is lost by that.
        """
        own = for_batches(engine)
        bodies = [partial(self._answer, own, i) for i in range(len(self.prompts))]
        waiting: list[tuple[int, Result | ParsedecError]] = []
        some_done = False
        with closing(in_company(bodies, self.size)) as ended:
            for i, answer in ended:
                some_done = some_done or not isinstance(answer, PassFailed)
                waiting.append((i, answer))
                if some_done:
                    yield from waiting
                    waiting.clear()
        for _, failed in waiting:
            assert isinstance(failed, PassFailed)
            raise failed.__cause__ or failed

    def _answer(self, engine: Parse, i: int) -> Result | ParsedecError:
        """The body of request `i`. If it fails, its error is the answer."""
        try:
            result = engine.generate(
                self.prompts[i],
                max_new_tokens=self.limits.max_new_tokens,
                stop=self.limits.stop,
                sampling=self.sampling,
                generator=chosen_generator(self.seed, self.generators[i] if self.generators else None, i),
            )
            return replace(result, notes=tuple(sorted({*result.notes, *self._notes(engine)})))
        except ParsedecError as error:
            return _named(error, i)
        except Exception as error:
            if any(model is not None and model.shared for model in (engine.target, engine.draft)):
                raise  # the other processes may not have failed, and would wait for passes of this one
            return _named(_failed("work of its own", error), i)

    def _notes(self, engine: Parse) -> Iterator[str]:
        """What a reader of a result should know. To be called at the request's end, in its own fiber."""
        yield f"answered in a batch, {self.size} at a time: all seconds but those to the first token are shares"
        fiber = current()
        if fiber is not None and not fiber.asked:
            yield "nothing of this request could be computed together with others"
        for model in (engine.target, engine.draft):
            if model is not None and not runs_static(model) and (obstacle := joint_obstacle(model)):
                yield f"{model.name} computes one request after another: it has {obstacle}"
        for inner in (engine.inner, engine.draft_inner):
            if inner is not None and not isinstance(inner, NoSpeculation):
                yield f"{type(inner).__name__} guesses for one request after another; passes of whole models are shared"


class Company(Generic[T]):
    """Bodies that run together: the passes they wait for are made together. They may join and leave at any time."""

    def __init__(self) -> None:
        self._seats: dict[Hashable, Fiber[T]] = {}

    def __len__(self) -> int:
        return len(self._seats)

    def join(self, key: Hashable, body: Callable[[], T]) -> None:
        """Start a body. It runs until it waits for a pass or ends."""
        self._seats[key] = Fiber(body)
        self._seats[key].resume()

    def advance(self, *, apart: bool = False) -> list[tuple[Hashable, Fiber[T]]]:
        """The bodies that have ended, which then leave. If there are none, one forward is made, and the list is empty.

        apart  raise a pass that fails in its body even if all fail. Otherwise the error is raised here if every pass of
               the company fails: nothing then says that any body could have been answered.
        """
        ended = [(key, fiber) for key, fiber in self._seats.items() if fiber.ended]
        for key, _ in ended:
            del self._seats[key]
        if not ended and self._seats:
            _make_passes(list(self._seats.values()), apart)
        return ended

    def leave(self, key: Hashable) -> None:
        """End a body where it is. Its `finally` clauses run."""
        self._seats.pop(key).close()

    def close(self) -> None:
        for key in list(self._seats):
            self.leave(key)


def in_company(bodies: Sequence[Callable[[], T]], size: int) -> Generator[tuple[int, T]]:
    """(index, result) of every body, as it ends. At most `size` run at a time, their passes made together.

    A pass that fails raises in the body that asked for it. What a body raises ends all of them.
    """
    waiting = deque(enumerate(bodies))
    company: Company[tuple[int, T]] = Company()
    try:
        while waiting or company:
            while waiting and len(company) < size:
                i, body = waiting.popleft()
                company.join(i, partial(_with_place, i, body))
            for _, fiber in company.advance(apart=True):
                yield fiber.result
    finally:
        company.close()


def _with_place(i: int, body: Callable[[], T]) -> tuple[int, T]:
    return i, body()


def _make_passes(fibers: Sequence[Fiber[Any]], apart: bool) -> None:
    """Make one forward, usually the one that most requests wait for. The requests that waited for it run on."""
    groups: dict[object, list[Fiber[Any]]] = {}
    for fiber in fibers:
        groups.setdefault(fiber.question.group, []).append(fiber)
    chosen = _next_group(list(groups.values()))
    for fiber in fibers:
        fiber.waited += fiber not in chosen
    passes: list[Pass] = [fiber.question for fiber in chosen]
    start = time.perf_counter()
    outputs = settled(passes)
    per_row = (time.perf_counter() - start) / sum(one.rows for one in passes)
    failures = [out for out in outputs if isinstance(out, Exception)]
    if len(failures) == len(fibers) and not apart:
        raise failures[0]
    for fiber, one in zip(chosen, passes, strict=True):
        fiber.charge(per_row * one.rows)
    for fiber, out in zip(chosen, outputs, strict=True):
        if isinstance(out, Exception):
            fiber.fail(_failed(f"a pass of {fiber.question.rows} rows", out))
        else:
            fiber.resume(out)


def _next_group(groups: Sequence[list[Fiber[Any]]]) -> list[Fiber[Any]]:
    """The largest group, or the one that has waited longest once that is too long."""
    oldest = max(groups, key=lambda group: max(fiber.waited for fiber in group))
    if max(fiber.waited for fiber in oldest) >= PATIENCE:
        return oldest
    return max(groups, key=len)  # the first of several that are as large


def _failed(what: str, error: Exception) -> ParsedecError:
    """The error that a request ends with after `what` - one of its passes, say - has failed by `error`."""
    if isinstance(error, ParsedecError):
        return error
    whole = "".join(format_exception(error)).rstrip()  # exc_info would leave its frames to handlers that keep records
    log.error("a request is ended: %s failed\n%s", what, whole)
    failed = PassFailed(
        f"{what} failed, where other requests go on: {type(error).__name__}: {error}. The log has the whole of it. If "
        "memory is short, use shorter prompts or a smaller batch."
    )
    failed.__cause__ = error
    return failed


def for_batches(engine: Parse) -> Parse:
    """The engine with an outer level that starts no threads: in a batch, passes of other requests fill the gaps."""
    if not isinstance(engine.outer, StreamedVerification):
        return engine
    twin = copy.copy(engine)
    twin.outer = replace(engine.outer, overlap="never")
    return twin


def _named(error: ParsedecError, i: int) -> ParsedecError:
    """The error with the index of its request in front, and without tracebacks that hold on to the request's work."""
    named = type(error).__new__(type(error))  # some take more than a message
    named.__dict__.update(error.__dict__)
    named.args = (f"request {i}: {error}",)
    cause = error.__cause__ if isinstance(error, PassFailed) else error
    named.__cause__ = without_frames(cause or error)
    return named
