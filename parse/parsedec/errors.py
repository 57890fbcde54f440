"""What can go wrong in a way the user can act on. Every message says what was wrong, the value, what was
expected and what to do; anything else that escapes the engine is a defect, of ours or of what it was given, or a
want of memory."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import get_annotations
from numbers import Integral, Real
from traceback import format_tb
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from parsedec.types import Result

LONGEST_SHOWN = 80  # characters of a value in a message


class ParsedecError(Exception):
    """Base of every error the user can act on. Only `PassFailed` may stand for a bug, one request's among others that
    have none; its text and its cause name it."""


class ModelLoadError(ParsedecError):
    """A checkpoint, tokenizer or device could not be used."""


class PromptError(ParsedecError):
    """A request cannot be run: empty, longer than the context, or in a form the model pair cannot share."""


class PromptTooLong(PromptError):
    """A prompt leaves no room for an answer in a model's context."""


class ChatTemplateError(ParsedecError):
    """The tokenizer has no chat template, or it cannot express the turns the judge needs."""


class JudgeError(ParsedecError):
    """The judge's question, labels or cuts are unusable."""


class IncompatibleStack(ParsedecError):
    """Two layers of one stack cannot work together; found when the stack is built, not at token 400."""


class ConfigError(ParsedecError):
    """A configuration value is outside what it may be."""


class LogitsError(ParsedecError):
    """The logits a model gave are no numbers, mostly because they overflow in its dtype."""


class OutputExistsError(ParsedecError):
    """The output folder already holds a record that would be overwritten."""


class FileNotWritten(ParsedecError, OSError):
    """A file of a run could not be written, mostly because the disk is full. What it held before is kept."""


class PassFailed(ParsedecError):
    """One of several requests failed by what is its own, where the others go on: a forward, a judge, a speculator. Its
    cause is what was raised there."""


class ServerError(ParsedecError):
    """A model server could not be reached, was busy, or answered with nonsense. Asking again may help, and is wanted
    only after `retry_after_s` seconds where the server has said so."""

    retry_after_s: float | None = None


class ServerRefused(ServerError):
    """A model server understood a request and will not serve it (an HTTP status of 4xx). `said` is what it gave as its
    reason, without its address."""

    def __init__(self, message: str, status: int, said: str = "") -> None:
        super().__init__(message)
        self.status, self.said = status, said


class TargetLost(ServerError):
    """The target's server went away in the middle of a request. `partial` is the answer as far as it had come."""

    partial: Result | None = None


class TargetRefused(ServerRefused):
    """The target's server will not serve a request of ours, and would not if it were asked again. `partial` is the
    answer as far as it had come."""

    partial: Result | None = None


def shown(value: object) -> str:
    """A value for a message, not the whole of a long one."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}... ({type(value).__name__})"


def first_line(error: BaseException) -> str:
    """What an error says, in one line without its full stop; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def without_frames(error: BaseException) -> BaseException:
    """The same error with its chain of causes, but without tracebacks: their frames hold the caches of its request.

    Where a defect was raised is then a note of it, which Python prints below its message.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            if one.__traceback__ is not None and not isinstance(one, ParsedecError):
                one.add_note("It was raised at\n" + "".join(format_tb(one.__traceback__)).rstrip())
            one.__traceback__ = None
            waiting += [one.__cause__, one.__context__]
    return error


def require_part(name: str, part: object, kind: type, example: str) -> None:
    """Raise ConfigError for a part of a stack that is not of the kind its slot is for, or only the name of one.

    kind     a protocol, all of whose members the part must have, or a base class of which it must be
    example  what would be right
    """
    if isinstance(part, str):
        there = name.replace("_", ".")
        raise ConfigError(f"{name}={part!r}; expected an object. Names are for the command line: {there}={part}.")
    if isinstance(part, type):
        raise ConfigError(f"{name} is the class {part.__name__}; expected an object of it: {part.__name__}(…).")
    where = f"{kind.__module__}.{kind.__name__}"
    if Protocol not in kind.__bases__:
        if not isinstance(part, kind):
            raise ConfigError(
                f"{name}={shown(part)} is no {kind.__name__}; expected {example}, or an object of a class of your own "
                f"derived from {where}."
            )
    elif missing := [member for member in _members(kind) if _lacks(part, member, kind)]:
        raise ConfigError(
            f"{name}={shown(part)} has no {', '.join(missing)}; expected {example}, or an object of your own with all "
            f"that {where} lists."
        )


def _members(protocol: type) -> list[str]:
    """What a protocol that derives from no other asks for, in its order."""
    return [name for name in {**get_annotations(protocol), **vars(protocol)} if not name.startswith("_")]


def _lacks(part: object, member: str, protocol: type) -> bool:
    """Whether there is no such member, or only the protocol's own, which does nothing.

    A property is looked for in the class: its value may be known only once the part is bound.
    """
    found = getattr(type(part), member, None)
    return found is vars(protocol).get(member) if found is not None else not hasattr(part, member)


def require_kind(name: str, value: object, kind: type, example: str) -> None:
    """Raise ConfigError for a setting that is not of a class."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r}; expected a {kind.__name__}: {example}.")


def require_number(
    name: str, value: object, *, whole: bool = False, low: float | None = None, high: float | None = None
) -> None:
    """Raise ConfigError for a setting that is no number from `low` to `high`, or has to be a whole one and is not."""
    # bool is a subclass of int, yet `n: true` in a YAML is surely a slip
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if number and (low is None or value >= low) and (high is None or value <= high):  # type: ignore[operator]
        return
    reach = f" from {low} to {high}" if high is not None else f", at least {low}" if low is not None else ""
    raise ConfigError(f"{name}={value!r}; expected a {'whole ' if whole else ''}number{reach}.")


def require_numbers(name: str, value: object) -> None:
    """Raise ConfigError for a setting that is no list of whole numbers from 0 on."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{name}={value!r}; expected a list of whole numbers: {name}=[…].")
    for i, one in enumerate(value):
        require_number(f"{name}[{i}]", one, whole=True, low=0)


def require_texts(
    name: str,
    value: object,
    *,
    count: int | None = None,
    wanted: str = "a list of strings",
    empty: str = "which says nothing",
) -> None:
    """Raise ConfigError for a setting that is no list of (`count`) texts, none of them empty. One text is a list of its
    letters to Python, which nobody means.

    wanted, empty  what the message calls what was expected, and what it says of an empty text
    """
    if isinstance(value, str):
        raise ConfigError(
            f"{name}={value!r} is one string, which would be read letter by letter; expected {wanted}. Give a list: "
            f"{name}=[…]."
        )
    if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{name}={value!r}; expected {wanted}.")
    if "" in value:
        raise ConfigError(f"{name}={list(value)} holds an empty string, {empty}. Remove it, or write what is meant.")
    if count is not None and len(value) != count:
        raise ConfigError(f"{name}={list(value)}; expected {wanted}.")
