"""Errors that the user can act on, and checks of settings that raise them.

Every message says what was wrong, the value, what was expected and what to do. Any other exception that escapes the
engine is a bug, in it or in a part it was given, or a lack of memory.
"""

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
    """Base of all errors that the user can act on. Only `PassFailed` may stand for a bug, which its text and cause
    name: it keeps one request's bug from the others."""


class ModelLoadError(ParsedecError):
    """A checkpoint, tokenizer or device could not be used."""


class PromptError(ParsedecError):
    """A request cannot be run: it is empty, too long for the context, or in a form that target and draft model cannot
    share."""


class PromptTooLong(PromptError):
    """A prompt leaves no room for an answer in a model's context."""


class ChatTemplateError(ParsedecError):
    """The tokenizer has no chat template, or it cannot express the turns the judge needs."""


class JudgeError(ParsedecError):
    """The judge's question, labels or cuts are unusable."""


class IncompatibleStack(ParsedecError):
    """Two parts of a stack cannot work together. Found when the stack is built, not at token 400."""


class ConfigError(ParsedecError):
    """A setting has a value it cannot have."""


class LogitsError(ParsedecError):
    """A model's logits are not numbers, mostly because they overflow in its dtype."""


class OutputExistsError(ParsedecError):
    """The output folder already holds a record that would be overwritten."""


class FileNotWritten(ParsedecError, OSError):
    """A file of a run could not be written, mostly because the disk is full. Its previous content is kept."""


class PassFailed(ParsedecError):
    """One request of a batch failed in its own forward, judge or speculator; the others go on. `__cause__` is what was
    raised there."""


class ServerError(ParsedecError):
    """A model server could not be reached, was busy, or answered with nonsense. Asking again may help, but not before
    `retry_after_s` seconds have passed, if the server has named a time."""

    retry_after_s: float | None = None


class ServerRefused(ServerError):
    """A model server understood a request and will not serve it (HTTP status 4xx). `said` is the reason it gave,
    without its address."""

    def __init__(self, message: str, status: int, said: str = "") -> None:
        super().__init__(message)
        self.status, self.said = status, said


class TargetLost(ServerError):
    """The target's server was lost in the middle of a request. `partial` is what there is of the answer."""

    partial: Result | None = None


class TargetRefused(ServerRefused):
    """The target's server will not serve a request, and would not if it were asked again. `partial` is what there is of
    the answer."""

    partial: Result | None = None


def shown(value: object) -> str:
    """A value as a message shows it: a long one is cut short."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}... ({type(value).__name__})"


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, without its full stop; its class name if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def without_frames(error: BaseException) -> BaseException:
    """The same error, its chain of causes without tracebacks: their frames hold the caches of its request.

    Where a bug was raised is kept as a note of it, which Python prints below the message.
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
    """Raise ConfigError unless `part` can fill a slot of a stack; also for the name of a part, or its class.

    kind     a protocol, of which the part must have all members, or a class, of which it must be an instance
    example  a right value, for the message
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
    """The members of a protocol that derives from no other, in the order of its definition."""
    return [name for name in {**get_annotations(protocol), **vars(protocol)} if not name.startswith("_")]


def _lacks(part: object, member: str, protocol: type) -> bool:
    """Whether `part` lacks a member, or has only inherited the protocol's own, which does nothing.

    Looked up in the class first: a property may have no value before the part is bound.
    """
    found = getattr(type(part), member, None)
    return found is vars(protocol).get(member) if found is not None else not hasattr(part, member)


def require_kind(name: str, value: object, kind: type, example: str) -> None:
    """Raise ConfigError unless a setting is an instance of `kind`."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r}; expected a {kind.__name__}: {example}.")


def require_number(
    name: str, value: object, *, whole: bool = False, low: float | None = None, high: float | None = None
) -> None:
    """Raise ConfigError unless a setting is a number from `low` to `high`, and a whole one if it has to be."""
    # bool is a subclass of int, yet `n: true` in a YAML is surely a slip
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if number and (low is None or value >= low) and (high is None or value <= high):  # type: ignore[operator]
        return
    reach = f" from {low} to {high}" if high is not None else f", at least {low}" if low is not None else ""
    raise ConfigError(f"{name}={value!r}; expected a {'whole ' if whole else ''}number{reach}.")


def require_numbers(name: str, value: object) -> None:
    """Raise ConfigError unless a setting is a list of whole numbers, none of them negative."""
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
    """Raise ConfigError unless a setting is a list of texts (of `count` texts, if given), none of them empty.

    A single text is refused, too: to Python it is a list of its letters, which nobody means.

    wanted, empty  the message's words for what was expected, and for what is wrong with an empty text
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
