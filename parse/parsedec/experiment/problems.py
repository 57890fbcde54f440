"""What the answers of a record are answers to: a run is not gone on with when its problems are others by now.

A record holds a digest of every problem. The file of a task may be edited between a run and its resumption; the
configuration, which names the file, does not show that.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import InstantiationException

from parsedec.errors import OutputExistsError, ParsedecError, first_line
from parsedec.tasks.base import Problem

log = logging.getLogger(__name__)

LENGTH = 16  # hexadecimal digits of a digest
T = TypeVar("T")


def digest(*facts: Any) -> str:
    """A short name of JSON-serialisable facts, the same in every process."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def digests(problems: Mapping[str, Problem]) -> dict[str, str]:
    """Of every problem, by name, the digest of all that is asked and all that a scorer reads."""
    return {
        name: digest(one.prompt, one.reference, dict(one.meta), list(one.history), list(one.follow_ups))
        for name, one in problems.items()
    }


def refuse_other_problems(
    path: Path, known: Mapping[str, str], now: Mapping[str, str], answered: Collection[str]
) -> None:
    """Raise OutputExistsError where a record would lose answers, or mix them with those to other problems.

    known     digests in the record at `path`; empty for one of a version that kept none
    now       those of what is asked now
    answered  names of the problems that need not be answered again; the others may have been repaired
    """
    if gone := set(answered) - set(now):
        raise OutputExistsError(
            f"{path} holds answers to {len(gone)} problems that are not asked now, such as {min(gone)!r}; resuming "
            "would lose them. Ask at least as many problems as before (task.n), put the task's data back as they "
            "were, or choose another folder (output=DIR)."
        )
    if changed := {name for name in answered if known.get(name, now[name]) != now[name]}:
        raise OutputExistsError(
            f"{path} holds answers to {len(changed)} problems that are others now, such as {min(changed)!r}: the "
            "prompt, the reference or what else the task's data say of it has changed since, and resuming would mix "
            "answers to both. Put the data back as they were, or choose another folder (output=DIR)."
        )


def read_now(path: Path, read: Callable[[], T]) -> T | None:
    """What a finished run at `path` would be asked now; None where that cannot be read any more, which is logged and no
    error: the run has no need of it."""
    try:
        return read()
    except (ParsedecError, InstantiationException) as error:
        why = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        log.warning(
            "%s is finished; whether its problems have changed since is not known, for they cannot be read now: %s",
            path,
            first_line(why),
        )
        return None
