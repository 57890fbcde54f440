"""The interface between tasks and what runs them: problems, scores, and a protocol of two methods."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Protocol

from parsedec.errors import ConfigError, ParsedecError
from parsedec.types import Message


class TaskDataError(ParsedecError):
    """A task's data is missing, or a row does not have the expected form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question. It holds everything a scorer needs, so that stored answers can be scored again later.

    id          stable across runs and unique within a task
    prompt      bare text of the user's message; the model's own template adds the chat form
    reference   what an answer is compared with
    meta        JSON-serialisable facts for the scorer
    history     the messages before the prompt, in later turns of a conversation
    follow_ups  the user's later messages; each is a request of its own, sent after the answer before it
    """

    id: str
    prompt: str
    reference: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Message] = ()
    follow_ups: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.id or not self.prompt:
            raise ValueError(
                f"Problem has id={self.id!r} and prompt={self.prompt!r}; expected both to be "
                "non-empty. Give every problem an id and a question."
            )

    @property
    def asked(self) -> str | list[Message]:
        """The engine's input: the prompt, or the conversation that ends with it."""
        return [*self.history, {"role": "user", "content": self.prompt}] if self.history else self.prompt

    def next_turn(self, answer: str) -> Problem | None:
        """The next turn of the conversation, after the model's `answer`; None after the last one."""
        if not self.follow_ups:
            return None
        said: list[Message] = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": answer}]
        turn = len(self.history) // 2 + 2
        return replace(
            self,
            id=f"{self.id.removesuffix(f'/turn{turn - 1}')}/turn{turn}",
            prompt=self.follow_ups[0],
            history=(*self.history, *said),
            follow_ups=tuple(self.follow_ups[1:]),
        )


def is_later_turn(problem_id: str) -> bool:
    """Whether `Problem.next_turn` made this id, so that the problem has messages before its prompt."""
    return first_turn(problem_id) != problem_id


def first_turn(problem_id: str) -> str:
    """The id of the problem that began the conversation."""
    return re.sub(r"/turn\d+$", "", problem_id)


@dataclass(frozen=True, slots=True)
class Score:
    """Whether an answer is right, and a short reason for people (its wording is not an interface).

    correct           None: an open-ended question, which no program can score
    first_wrong_line  0-based line of the answer, for tasks that can check every line; None: no line is wrong,
                      or the task cannot tell
    error_at          offset of the first character at which the answer departs from every right one; the length of
                      the text if it ends too early; None: nothing is wrong, or the task cannot tell
    """

    correct: bool | None
    detail: str
    first_wrong_line: int | None = None
    error_at: int | None = None

    def __post_init__(self) -> None:
        if self.correct and (self.first_wrong_line, self.error_at) != (None, None):
            raise ValueError(
                f"Score is correct but names line {self.first_wrong_line}, character {self.error_at} as wrong; "
                "expected first_wrong_line=None and error_at=None. Set correct=False."
            )


class Task(Protocol):
    """A list of problems and a scorer. Both are deterministic: same arguments, same problems, same scores."""

    @property
    def name(self) -> str: ...

    def problems(self) -> list[Problem]: ...

    def score(self, problem: Problem, text: str) -> Score:
        """Score the answer `text`, the assistant's message without special tokens."""
        ...


def score_of_lines(task: Task, problem: Problem, text: str) -> Score:
    """The score of an answer whose prefixes are to be labelled: one that is not right has a first wrong line. Raises
    ConfigError if the task does not name that line; otherwise every prefix would pass for right."""
    score = task.score(problem, text)
    if not score.correct and score.first_wrong_line is None:
        said = "is wrong but not in which line" if score.correct is False else "is neither right nor wrong"
        raise ConfigError(
            f"{type(task).__name__} says that an answer to {problem.id} {said}, so it cannot label prefixes. Expected "
            "a task that checks every line. Choose one, or a file of labelled steps; experiments/calibrate.py also "
            "takes labels=answers."
        )
    return score


def require_extra(module: str, purpose: str, otherwise: str = "") -> None:
    """Raise ConfigError if the optional library that `purpose` needs is not installed."""
    if find_spec(module) is None:
        also = f", {otherwise}" if otherwise else ""
        raise ConfigError(f"{purpose} needs the library {module}; install it: pip install 'parsedec[eval]'{also}.")
