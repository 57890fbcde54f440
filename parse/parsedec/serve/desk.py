"""Where answers wait and are written: a bounded queue, fair between clients, and the threads that run the engine.

No two threads run the engine at the same time, unless its models compute elsewhere:

    batch    one thread, in which answers share the models' passes (`batch.Company`); they join and leave between passes
    threads  one thread per answer: for models on servers, which batch by themselves

An answer that nobody waits for any more is dropped, with its caches: between two passes or pieces, or within a draft
(`wanted`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from parsedec.batching.batch import Company, for_batches
from parsedec.batching.wanted import Unwanted, unless
from parsedec.engine import Parse
from parsedec.errors import ParsedecError
from parsedec.models.language_model import LanguageModel
from parsedec.serve.jobs import Event, FairQueue, Job, Task
from parsedec.serve.refusals import OWN, Refusal, closing, given_up, refusal
from parsedec.text.prompt import Prompt
from parsedec.types import Delta, Sampling

log = logging.getLogger(__name__)
LONGEST_WAIT = 60  # the most seconds that a client is told to wait


class Engine(Protocol):
    """What the desk runs: `Parse`, or anything with its `stream`."""

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = ...,
        stop: Sequence[str] = ...,
        sampling: Sampling | None = ...,
        generator: torch.Generator | None = ...,
        top: int | None = ...,
    ) -> Iterator[Delta]: ...


@dataclass(frozen=True, slots=True)
class Ticket:
    """The answers to one request, on their way."""

    desk: Desk
    jobs: tuple[Job, ...]
    events: asyncio.Queue[tuple[int, Event]]

    async def next(self) -> tuple[int, Event]:
        """The next event and the choice it belongs to."""
        return await self.events.get()

    def drop(self) -> None:
        """Drop all answers that are not finished: nobody waits for them any more."""
        for job in self.jobs:
            self.desk.drop(job)


class Desk:
    """Takes in tasks, runs `at_once` of them at a time, and keeps at most `queue` waiting.

    If other clients fill all the room, a client that holds less than its share of it is still let in; the desk never
    holds more than twice as many.

    run      "batch", "threads" or "auto", see above
    on_end   called with every job that is over, in the thread that wrote it
    """

    def __init__(
        self,
        engine: Engine,
        *,
        at_once: int,
        queue: int,
        run: str = "auto",
        on_end: Callable[[Job], None] = lambda _: None,
    ) -> None:
        self.engine, self.at_once, self.queue, self.on_end = engine, at_once, queue, on_end
        self.running = 0
        self.closed = False
        self.mean_s = 1.0  # what an answer has taken lately
        self._waiting = FairQueue()
        self._jobs: set[Job] = set()
        self._changed = threading.Condition()
        shared = run == "batch" or (run == "auto" and computes_here(engine))
        batched = shared and at_once > 1
        self._threads = [
            threading.Thread(target=self._guarded, args=(body,), name=f"parsedec-desk-{i}", daemon=True)
            for i, body in enumerate(
                [partial(self._together, for_batches(engine) if isinstance(engine, Parse) else engine)]
                if batched
                else [partial(self._one_by_one, engine) for _ in range(1 if shared else at_once)]
            )
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    async def read(self, tasks: Sequence[Task], client: str) -> list[Task]:
        """The tasks with their prompts tokenized, in another thread: a long prompt must not delay others' answers.

        Raises Refusal, before that as `submit` would, and for a prompt that cannot be run.
        """
        with self._changed:
            self._check_room(len(tasks), client)
        if not isinstance(self.engine, Parse):
            return list(tasks)
        try:
            return await asyncio.to_thread(_with_read_prompts, self.engine, tasks)
        except ParsedecError as error:
            _log_failure(error)
            raise refusal(error) from error

    def submit(self, tasks: Sequence[Task], client: str) -> Ticket:
        """Take in all of these, or none. Raises Refusal: 503 once the desk is closing, 429 if there is no room."""
        loop = asyncio.get_running_loop()
        with self._changed:
            self._check_room(len(tasks), client)
            events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
            jobs = tuple(Job(task, client, loop, events) for task in tasks)
            for job in jobs:
                self._waiting.put(job)
            self._jobs.update(jobs)
            self._changed.notify_all()
        return Ticket(self, jobs, events)

    def _check_room(self, count: int, client: str) -> None:
        if self.closed or not self.alive:
            raise closing()
        room = self._room(client)
        if count > self.at_once + self.queue:
            raise Refusal(
                400,
                f"the request asks for {count} answers; this server holds {self.at_once + self.queue} at a time. Ask "
                "for fewer.",
                code="too_many_choices",
                param="n",
            )
        if count > room:
            wait = math.ceil(self.mean_s * (len(self._jobs) + count - self.queue) / self.at_once)
            raise Refusal(
                429,
                f"{self.running} answers are being written and {self.waiting} wait; there is room for {room} more. Try "
                "again later.",
                code="rate_limit_exceeded",
                retry=min(max(1, wait), LONGEST_WAIT),
            )

    def _room(self, client: str) -> int:
        """How many more tasks of this client are let in. Those who come first may fill the room, but cannot keep others
        out, each of whom may hold a share of it."""
        whole = self.at_once + self.queue
        clients = {job.client for job in self._jobs} | {client}
        held = sum(job.client == client for job in self._jobs)
        beyond = min(max(1, whole // len(clients)) - held, 2 * whole - len(self._jobs))
        return max(0, whole - len(self._jobs), beyond)

    def drop(self, job: Job) -> None:
        """Take a job whose events nobody reads any more out of the queue, or end it where it is."""
        job.left.set()
        with self._changed:
            waited = self._waiting.remove(job)
        if waited:
            self._end(job)

    async def drain(self, seconds: float) -> int:
        """Take in nothing new and let the rest finish; returns how many jobs had to be ended after `seconds`."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        until = time.perf_counter() + seconds
        while self._jobs and time.perf_counter() < until:
            await asyncio.sleep(0.02)
        with self._changed:
            late = list(self._jobs)
        for job in late:
            job.tell(closing())
            self.drop(job)
        for thread in self._threads:  # they end when nothing is left to do
            await asyncio.to_thread(thread.join, max(0.0, until + 5 - time.perf_counter()))
        return len(late)

    # what follows runs in the desk's own threads

    def _guarded(self, body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException:
            log.exception("a thread of the server ended; no further requests are taken")
            with self._changed:
                self.closed = True
                left = list(self._jobs)
            for job in left:
                job.tell(closing())
                self._end(job)
            raise

    def _next(self, block: bool) -> Job | None:
        """The next job to be run. None: there is none now or, if `block`, there will never be one."""
        with self._changed:
            while not self._waiting:
                if not block or self.closed:
                    return None
                self._changed.wait()
            job = self._waiting.take()
            self.running += 1
        job.began = time.perf_counter()
        return job

    def _end(self, job: Job) -> None:
        with self._changed:
            if job.over:
                return
            job.over = True
            self._jobs.discard(job)
            if job.began is not None:
                self.running -= 1
                if not job.dropped:
                    self.mean_s += 0.2 * (time.perf_counter() - job.began - self.mean_s)
        self.on_end(job)

    def _one_by_one(self, engine: Engine) -> None:
        while (job := self._next(block=True)) is not None:
            self._answer(engine, job)
            self._end(job)

    def _together(self, engine: Engine) -> None:
        company: Company[None] = Company()
        seated: set[Job] = set()
        while True:
            while len(seated) < self.at_once and (job := self._next(block=not seated)) is not None:
                seated.add(job)
                company.join(job, partial(self._answer, engine, job))
            if not seated:
                return  # closed, and nothing waits
            for job in [job for job in seated if job.dropped]:
                company.leave(job)
                seated.remove(job)
                self._end(job)
            try:
                for key, _ in company.advance():
                    assert isinstance(key, Job)
                    seated.remove(key)
                    self._end(key)
            except Exception as error:  # a pass failed, e.g. for want of memory: those that waited cannot go on
                log.exception("a pass failed; the %d answers in progress are given up", len(seated))
                company.close()
                for job in seated:
                    job.tell(error if len(seated) == 1 else given_up())  # one alone made its pass fail by itself
                    self._end(job)
                company, seated = Company(), set()

    def _answer(self, engine: Engine, job: Job) -> None:
        """Write one answer. Whatever goes wrong is its last event."""
        try:
            # what it holds is freed, however it ends
            with unless(job.left), contextlib.closing(_stream(engine, job.task)) as deltas:
                for delta in deltas:
                    if job.dropped:
                        return
                    job.tell(delta)
        except Unwanted:
            pass
        except ParsedecError as error:
            _log_failure(error)
            job.tell(error)
        except Exception as error:
            log.exception("a request failed")
            job.tell(error)


def computes_here(engine: Engine) -> bool:
    """Whether the engine's models compute in this process, so that only one thread at a time may run them."""
    models = [getattr(engine, name, None) for name in ("target", "draft")]
    return any(type(model) is LanguageModel for model in models)


def _log_failure(error: ParsedecError) -> None:
    """Log an error of which the client is told nothing, since it lies behind this server."""
    if not isinstance(error, (Refusal, *OWN)):
        log.error("a request failed: %s: %s", type(error).__name__, error)


def _with_read_prompts(engine: Parse, tasks: Sequence[Task]) -> list[Task]:
    """Choices share their prompt, which is read once."""
    read: dict[int, Prompt] = {}
    for task in tasks:
        if id(task.prompt) not in read:
            read[id(task.prompt)] = engine.read(task.prompt)
    return [replace(task, prompt=read[id(task.prompt)]) for task in tasks]


def _stream(engine: Engine, task: Task) -> Generator[Delta]:
    yield from engine.stream(
        task.prompt,
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        sampling=task.sampling,
        generator=None if task.sampling.greedy else task.generator(),
        top=task.top,
    )
