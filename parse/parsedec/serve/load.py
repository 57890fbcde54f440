"""Load on a server: many streaming clients for a while, each answer compared with the one its prompt alone gets.

First every prompt is asked once with nothing else going on; greedy decoding then has one answer for it. Under load a
client asks for one prompt after another. Its answer is the prompt's `own`, `anothers` (mixed up), `other` (neither:
shared passes round differently, so near ties can flip), or `lost`. Some clients leave in mid-stream; nothing may wait
for them.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import psutil

from parsedec.errors import ParsedecError
from parsedec.remote.event_lines import EventLines

MEGABYTE = 2**20
PATIENCE = httpx.Timeout(600, connect=60)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """clients ask for `seconds`; a share `leave` of the requests is left in mid-stream; at the end `overflow` more than
    the server has room for come at once.

    address     of the server, e.g. http://127.0.0.1:8000
    room        answers the server holds, being written and waiting
    pid         the server's process, whose memory is watched; None: it is not
    """

    address: str
    model: str
    clients: int
    seconds: float
    leave: float
    overflow: int
    room: int
    max_tokens: int
    pid: int | None
    seed: int = 0


@dataclass(slots=True)
class Seen:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)


async def apply_load(load: Load, prompts: Sequence[str]) -> dict[str, Any]:
    """The summary of one run of load; the figures' names carry their units."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.clients)
    async with httpx.AsyncClient(base_url=load.address, timeout=PATIENCE, limits=limits) as client:
        alone = {prompt: (await _ask(client, load, prompt))[0] for prompt in prompts}
        seen, start = Seen(), time.perf_counter()
        watching = asyncio.create_task(_watch(load.pid, seen))
        clients = [_client(client, load, list(prompts), alone, seen, i) for i in range(load.clients)]
        await asyncio.gather(*clients)
        wall = time.perf_counter() - start
        watching.cancel()
        idle = await _until_idle(client)
        overflow = await _overflow(client, load, prompts[0])
    return {
        "clients": load.clients,
        "seconds": wall,
        "requests": sum(seen.outcomes.values()),
        "outcomes": {name: seen.outcomes[name] for name in ("own", "other", "anothers", "lost", "left")},
        "errors": seen.errors[:20],
        "tokens_per_s": seen.tokens / wall,
        "first_piece_s": _percentiles(seen.first_s),
        "answer_s": _percentiles(seen.whole_s),
        "memory_mb": _memory(seen.memory_mb),
        "idle_after_s": idle,
        "overflow": overflow,
    }


def sound(summary: dict[str, Any]) -> list[str]:
    """What a run of load shows that must not be; nothing if all is well."""
    outcomes, overflow = summary["outcomes"], summary["overflow"]
    wrong = [f"{outcomes[kind]} answers {kind}" for kind in ("lost", "anothers") if outcomes[kind]]
    if not outcomes["own"]:
        wrong.append("no answer was the prompt's own")
    if overflow["refused"] < overflow["beyond"] or set(overflow["statuses"]) - {"200", "429"}:
        wrong.append(f"of {overflow['beyond']} requests beyond the queue {overflow['refused']} got 429")
    return wrong


async def _client(
    client: httpx.AsyncClient, load: Load, prompts: list[str], alone: dict[str, str], seen: Seen, number: int
) -> None:
    draw = random.Random(load.seed * 1_000_003 + number)
    draw.shuffle(prompts)
    until = time.perf_counter() + load.seconds
    for prompt in itertools.cycle(prompts):
        if time.perf_counter() >= until:
            return
        leaves = draw.random() < load.leave
        start = time.perf_counter()
        try:
            text, first, tokens = await _ask(client, load, prompt, leaves=leaves)
        except (httpx.HTTPError, ParsedecError, ValueError) as error:
            seen.outcomes["lost"] += 1
            seen.errors.append(f"{type(error).__name__}: {error}")
            continue
        if leaves:
            seen.outcomes["left"] += 1
            continue
        seen.first_s.append(first - start)
        seen.whole_s.append(time.perf_counter() - start)
        seen.tokens += tokens
        others = text in alone.values()
        seen.outcomes["own" if text == alone[prompt] else "anothers" if others else "other"] += 1


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a streamed answer that are not empty."""
    lines = EventLines()
    async for part in answer.aiter_bytes():
        for line in filter(None, lines.push(part)):
            yield line


async def _ask(client: httpx.AsyncClient, load: Load, prompt: str, leaves: bool = False) -> tuple[str, float, int]:
    """(text, when its first piece came, tokens) of a streamed answer. Raises for one that is not whole."""
    body = {"model": load.model, "messages": [{"role": "user", "content": prompt}], "stream": True,
            "temperature": 0, "max_tokens": load.max_tokens, "stream_options": {"include_usage": True}}  # fmt: skip
    text, first, tokens, finish = "", 0.0, 0, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            raise ParsedecError(f"status {answer.status_code}: {answer.text[:200]}")
        async for line in _lines(answer):
            if leaves and text:
                return text, first, 0
            if line == b"data: [DONE]" and finish:
                return text, first, tokens
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise ParsedecError(event["error"]["message"])
            for choice in event["choices"]:
                text += choice["delta"].get("content", "")
                first = first or (time.perf_counter() if text else 0.0)
                finish = choice["finish_reason"] or finish
            tokens = event.get("usage", {}).get("completion_tokens", tokens)
    raise ParsedecError("the stream ended before the answer did")


async def _overflow(client: httpx.AsyncClient, load: Load, prompt: str) -> dict[str, Any]:
    """What becomes of more requests at once than the server holds: those beyond get 429, and get it soon."""
    body = {"model": load.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": load.max_tokens}

    async def one() -> tuple[int, float]:
        start = time.perf_counter()
        answer = await client.post("/v1/chat/completions", json=body)
        return answer.status_code, time.perf_counter() - start

    done = await asyncio.gather(*(one() for _ in range(load.room + load.overflow)))
    refused = [seconds for status, seconds in done if status == 429]
    served = [seconds for status, seconds in done if status == 200]
    return {
        "beyond": load.overflow if len(done) > load.room else 0,
        "statuses": {str(status): count for status, count in Counter(status for status, _ in done).items()},
        "refused": len(refused),
        "refused_s": _percentiles(refused),
        "served_s": _percentiles(served),
    }


async def _until_idle(client: httpx.AsyncClient) -> float:
    """Seconds until the server has nothing left to do: those who left are not written for."""
    start = time.perf_counter()
    while time.perf_counter() - start < 60:
        health = (await client.get("/health")).json()
        if not health.get("running") and not health.get("waiting"):
            return time.perf_counter() - start
        await asyncio.sleep(0.05)
    raise ParsedecError("the server is still busy a minute after its last client; expected it to be idle.")


async def _watch(pid: int | None, seen: Seen) -> None:
    while pid is not None:
        seen.memory_mb.append(psutil.Process(pid).memory_info().rss / MEGABYTE)
        await asyncio.sleep(0.5)


def _memory(samples: Sequence[float]) -> dict[str, float] | None:
    """Resident memory: first and last, and the mean of the second and of the last quarter, between which it is flat if
    nothing leaks (in the first quarter the server still warms up)."""
    if len(samples) < 4:
        return None
    quarter = len(samples) // 4
    return {
        "first": samples[0],
        "last": samples[-1],
        "second_quarter": float(np.mean(samples[quarter : 2 * quarter])),
        "last_quarter": float(np.mean(samples[-quarter:])),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 100)}
