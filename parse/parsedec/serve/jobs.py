"""Tasks, the jobs they become, and the queue in which jobs wait."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from parsedec.sampling import request_generator
from parsedec.text.prompt import Prompt
from parsedec.types import Delta, Result, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One answer to be written, as `Parse.stream` takes it.

    top  how many log-probabilities are asked for, besides each token's own; None: not even its own
    """

    prompt: Prompt
    max_new_tokens: int
    stop: Sequence[str] = ()
    sampling: Sampling
    seed: int | None = None
    choice: int = 0
    top: int | None = None

    def generator(self) -> torch.Generator:
        """The random generator of this choice; without a seed, it differs each time."""
        return request_generator(secrets.randbits(62) if self.seed is None else self.seed, self.choice)


Event = Delta | Exception  # an exception is the last one of its job


@dataclass(eq=False, slots=True)
class Job:
    """A task that was taken in. Its events go to the queue of its ticket, which is read in the event loop."""

    task: Task
    client: str
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[tuple[int, Event]]
    came: float = field(default_factory=time.perf_counter)
    began: float | None = None
    first: float | None = None  # when its first text was certain
    outcome: Result | Exception | None = None
    left: threading.Event = field(default_factory=threading.Event)  # set when nobody reads its events any more
    over: bool = False

    @property
    def dropped(self) -> bool:
        return self.left.is_set()

    def tell(self, event: Event) -> None:
        """Hand over an event. To be called by the thread that writes the answer."""
        if isinstance(event, Exception):
            self.outcome = self.outcome or event
        else:
            self.first = self.first or time.perf_counter()
            self.outcome = event.result or self.outcome
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, (self.task.choice, event))


class FairQueue:
    """Jobs by client. The client that was served longest ago is next, so many requests of one delay only its own."""

    def __init__(self) -> None:
        self._by_client: OrderedDict[str, deque[Job]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, job: Job) -> None:
        self._by_client.setdefault(job.client, deque()).append(job)
        self._count += 1

    def take(self) -> Job:
        client, jobs = self._by_client.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._by_client[client] = jobs  # behind the others
        self._count -= 1
        return job

    def remove(self, job: Job) -> bool:
        """Take out a job; False if it is not waiting."""
        jobs = self._by_client.get(job.client, deque())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._by_client[job.client]
        self._count -= 1
        return True
