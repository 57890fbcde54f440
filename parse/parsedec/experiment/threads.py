"""How many CPU threads a process computes with, where `runtime.threads=auto`: tried on the target when it is there.

More are not always quicker. What a step of a small model asks of each core is done before another thread is awake; of a
large one it is most of the time, and all cores read its weights faster than one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from parsedec.errors import ConfigError, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.remote.model import RemoteModel
from parsedec.sessions.backends import open_session
from parsedec.sessions.reference import random_tokens

log = logging.getLogger(__name__)

ROUNDS = 5
HOPELESS = 1.5  # times the quickest in the first round: not tried again, since with a large model that takes long
CLOSE = 1.05  # times the quickest: then the fewer threads, which leave the other cores to others
CONTEXT = 16  # tokens before the one that is timed

_torchs: int | None = None  # what torch had chosen before any setting was applied
_recorded: int | None = None
_settled: int | None = None


def settled_threads() -> int | None:
    """What `settle_threads` chose for the run under way, if it did."""
    return _settled


def recall_threads(recorded: int | None) -> None:
    """For "auto" in a run that is resumed: what its first part was computed with, since rounding depends on it. Where
    that was on a larger machine, it is tried anew."""
    global _recorded
    _recorded = recorded


def set_threads(threads: int | str | None) -> None:
    """Apply runtime.threads as far as can be without a model: a number, "auto", or None for torch's choice. What an
    earlier run in this process had is forgotten.

    Raises ConfigError for anything else.
    """
    global _torchs, _recorded, _settled
    if isinstance(threads, str) and threads != "auto":
        raise ConfigError(f"runtime.threads='{threads}'; expected a number of CPU threads, auto, or null.")
    if threads is not None and threads != "auto":
        require_number("runtime.threads", threads, whole=True, low=1)
    _torchs = _torchs or torch.get_num_threads()
    _recorded = _settled = None
    torch.set_num_threads(_torchs if threads in (None, "auto") else int(threads))


def settle_threads(threads: int | str | None, target: LanguageModel) -> None:
    """For "auto": as many threads as make a decode step of `target` quickest. The first local target on the CPU decides
    for the run, so that the arms of a comparison run alike; one that is divided among processes keeps torch's."""
    global _settled
    local = not isinstance(target, RemoteModel) and target.device.type == "cpu" and not target.shared
    most = torch.get_num_threads()
    if threads != "auto" or _settled is not None or not local or most == 1:
        return
    if _recorded is not None and _recorded <= most:
        _settled, why = _recorded, "as the run began"
    else:
        seconds = time_threads(_step_of(target), [max(1, most >> i) for i in range(most.bit_length())])
        tried = ", ".join(f"{n}: {1000 * s:.2f} ms" for n, s in seconds.items())
        _settled, why = quickest(seconds), f"a token of {target.name} takes, by their number, {tried}"
    torch.set_num_threads(_settled)
    log.info("CPU threads: %d (%s)", _settled, why)


def _step_of(target: LanguageModel) -> Callable[[], object]:
    """A decode step, to be called again and again."""
    context = max(1, min(CONTEXT, target.context_limit - 1))
    session, ids = open_session(target), random_tokens(target, context + 1, 0)
    session.feed(ids[:context])

    def step() -> None:
        session.rewind(context)
        session.feed(ids[context:])

    return step


def time_threads(step: Callable[[], object], counts: Sequence[int]) -> dict[int, float]:
    """Median seconds of a step by number of threads, which take turns; of those that are hopeless the first time."""

    def timed(count: int) -> float:
        torch.set_num_threads(count)
        step()  # threads are started, and what the others left in caches is gone
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    first = {count: timed(count) for count in counts}
    hopeful = [count for count, seconds in first.items() if seconds <= HOPELESS * min(first.values())]
    rounds = [first, *({count: timed(count) for count in hopeful} for _ in range(ROUNDS - 1))]
    return {count: median(each[count] for each in rounds if count in each) for count in counts}


def quickest(seconds: dict[int, float]) -> int:
    """The fewest threads that are as good as the quickest."""
    return min(count for count, each in seconds.items() if each <= CLOSE * min(seconds.values()))
