"""List puzzles whose answer has one checkable line per step: a second task like that of the zoo models.

    Start with the list 7 3 9. Remove the largest number. Reverse the list. Append 4. What is the list now?

    Without the largest number the list is 7 3.
    Then, turned around it is 3, 7.
    Appending 4 gives 3 7 4.
    The answer is 3 7 4.

Right answers differ in words, in lead-ins and in how they write a list (`3 7 4` or `3, 7, 4`), but not in meaning. The
checker looks lines up among the right ones (`zoo_base`). All numbers of a list differ, so that "the largest" and every
order are unambiguous; every step changes the list.

A problem's facts, which decide its split, are its first list and its operations, not its wording.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

from parsedec.tasks.base import Problem
from parsedec.tasks.zoo_base import (
    LEADS,
    Fault,
    RightLines,
    ZooTask,
    first_fault,
    join,
    problem_id,
    require_line,
    require_range,
    slip,
    split_by,
)

__all__ = ["ZooLists", "draw_problem", "first_wrong_line", "solution", "split_of"]

# {l} the first list, {b} the operation's number, {r} the list after the step
STARTS = ("Start with the list {l}.", "The list is {l}.", "Write down {l}.")
QUESTIONS = ("What is the list now?", "What does the list look like at the end?", "Which list is left?")
TOLD = {
    "append": ("Append {b}.", "Put {b} at the end.", "Add {b} behind the last number."),
    "prepend": ("Prepend {b}.", "Put {b} at the front.", "Insert {b} before the first number."),
    "first": ("Remove the first number.", "Drop the number at the front."),
    "last": ("Remove the last number.", "Drop the number at the end."),
    "largest": ("Remove the largest number.", "Take out the highest number."),
    "smallest": ("Remove the smallest number.", "Take out the lowest number."),
    "reverse": ("Reverse the list.", "Turn the list around."),
    "rising": ("Sort the list from low to high.", "Put the numbers in rising order."),
    "falling": ("Sort the list from high to low.", "Put the numbers in falling order."),
    "swap": ("Swap the first and the last number.", "Exchange the numbers at both ends."),
    "back": ("Move the first number to the end.", "Take the first number and put it behind the last."),
    "forth": ("Move the last number to the front.", "Take the last number and put it before the first."),
    "raise": ("Add {b} to every number.", "Make each number larger by {b}."),
}
STEPS = {
    "append": ("Appending {b} gives {r}.", "With {b} at the end it is {r}.", "{b} goes last: {r}."),
    "prepend": ("Prepending {b} gives {r}.", "With {b} at the front it is {r}.", "{b} goes first: {r}."),
    "first": ("Removing the first number leaves {r}.", "Without its first number the list is {r}."),
    "last": ("Removing the last number leaves {r}.", "Without its last number the list is {r}."),
    "largest": ("Removing the largest number leaves {r}.", "Without the largest number the list is {r}."),
    "smallest": ("Removing the smallest number leaves {r}.", "Without the smallest number the list is {r}."),
    "reverse": ("Reversing gives {r}.", "Turned around it is {r}.", "From back to front: {r}."),
    "rising": ("Sorting upwards gives {r}.", "From low to high it is {r}.", "In rising order: {r}."),
    "falling": ("Sorting downwards gives {r}.", "From high to low it is {r}.", "In falling order: {r}."),
    "swap": ("Swapping both ends gives {r}.", "With first and last exchanged it is {r}."),
    "back": ("Moving the first number to the end gives {r}.", "With the first number last it is {r}."),
    "forth": ("Moving the last number to the front gives {r}.", "With the last number first it is {r}."),
    "raise": ("Adding {b} to each gives {r}.", "With every number {b} higher it is {r}.", "All grow by {b}: {r}."),
}
ENDINGS = ("The answer is {r}.", "So the list is {r}. The answer is {r}.", "That leaves {r}. The answer is {r}.")
SEPARATORS = (" ", ", ")
MAX_LENGTH = 8

_GROWS, _SHRINKS = ("append", "prepend"), ("first", "last", "largest", "smallest")
_TAKES_NUMBER = (*_GROWS, "raise")
_LOOKS_LIKE = {  # the operation a careless reader takes one for
    "append": "prepend",
    "prepend": "append",
    "first": "last",
    "last": "first",
    "largest": "smallest",
    "smallest": "largest",
    "reverse": "swap",
    "rising": "falling",
    "falling": "rising",
    "swap": "reverse",
    "back": "forth",
    "forth": "back",
    "raise": "append",
}
_FINAL = re.compile(r"The answer is ([0-9]+(?:,? [0-9]+)*)\.")

Values = tuple[int, ...]
Operation = tuple[str, int | None]


@dataclass(frozen=True, kw_only=True)
class ZooLists(ZooTask):
    """`n` distinct problems of one split; the first k are the same for every `n`.

    operations  fewest and most steps of a problem
    max_number  largest number that occurs
    length      fewest and most numbers the list ever has
    """

    name: ClassVar[str] = "zoo_lists"
    answer: ClassVar[str] = "list"
    max_number: int = 20
    length: Sequence[int] = (2, 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("length", self.length, 2, MAX_LENGTH, "[fewest, most] numbers of a list, such as [2, 5]")

    def draw(self, rng: random.Random) -> Problem:
        return draw_problem(rng, operations=self.operations, max_number=self.max_number, length=self.length)

    def split_of(self, meta: Mapping[str, Any]) -> str:
        return split_of(meta)

    def fault(self, meta: Mapping[str, Any], text: str) -> Fault | None:
        return first_fault(text, _rights(meta))

    def final_answer(self, text: str) -> str | None:
        finals = _FINAL.findall(text)
        return str(finals[-1]).replace(",", "") if finals else None


def split_of(meta: Mapping[str, Any]) -> str:
    """The split a problem belongs to: decided by its first list and operations, blind to wording."""
    start, operations = _facts(meta)
    return split_by([start, operations])


def draw_problem(
    rng: random.Random,
    *,
    operations: Sequence[int] = (2, 5),
    max_number: int = 20,
    length: Sequence[int] = (2, 5),
) -> Problem:
    """A random problem of any split, with its text and facts."""
    values = tuple(rng.sample(range(max_number + 1), rng.randint(length[0], length[1])))
    meta: dict[str, Any] = {"start": list(values), "operations": []}
    told = [rng.choice(STARTS).format(l=_written(values))]
    for _ in range(rng.randint(operations[0], operations[1])):
        kind, number = _draw_operation(rng, values, max_number, length)
        told.append(rng.choice(TOLD[kind]).format(b=number))
        meta["operations"].append([kind, number])
        values = _apply(kind, values, number)
    told.append(rng.choice(QUESTIONS))
    prompt = " ".join(told)
    identity = problem_id(ZooLists.name, split_of(meta), prompt)
    return Problem(id=identity, prompt=prompt, reference=_written(values), meta=meta)


def solution(problem: Problem, rng: random.Random, error_at: int | None = None) -> list[str]:
    """The lines of an answer in random wordings, right or with one error.

    error_at  line that gets the error: a list copied badly, a misread number or a mistaken operation (in the last
              line: a list copied badly). The lines after it carry on from the wrong list, as a writer would.
    """
    values, operations = _facts(problem.meta)
    require_line(error_at, len(operations))
    lines = []
    for index, (kind, number) in enumerate(operations):
        if index == error_at:
            line, values = _wrong_step(rng, kind, values, number)
        else:
            values = _apply(kind, values, number)
            line = _write_step(rng, kind, number, values)
        lines.append(line)
    if error_at == len(operations):
        values = _miscopied(rng, values)
    lines.append(rng.choice(ENDINGS).format(r=_written(values, rng.choice(SEPARATORS))))
    return lines


def first_wrong_line(meta: Mapping[str, Any], text: str) -> int | None:
    """0-based line of `zoo_base.first_fault`."""
    fault = first_fault(text, _rights(meta))
    return None if fault is None else fault.line


def _rights(meta: Mapping[str, Any]) -> Iterator[RightLines]:
    values, operations = _facts(meta)
    for kind, number in operations:
        values = _apply(kind, values, number)
        yield partial(_right_lines, STEPS[kind], LEADS, number, values)
    yield partial(_right_lines, ENDINGS, ("",), None, values)


def _right_lines(
    wordings: Sequence[str], leads: Sequence[str], number: int | None, values: Values, _line: str
) -> set[str]:
    """Every wording with the right list in it, after each of the leads."""
    return {
        join(lead, wording.format(b=number, r=_written(values, separator)))
        for wording, lead, separator in product(wordings, leads, SEPARATORS)
    }


def _facts(meta: Mapping[str, Any]) -> tuple[Values, list[Operation]]:
    """First list and operations from a problem's meta, which may have been through JSON."""
    try:
        operations = [(str(kind), None if number is None else int(number)) for kind, number in meta["operations"]]
        start = tuple(int(value) for value in meta["start"])
        if any(kind not in STEPS or (kind in _TAKES_NUMBER) == (number is None) for kind, number in operations):
            raise ValueError("operations this task does not know")
    except (KeyError, TypeError, ValueError) as bad:
        raise ValueError(
            f"not the meta of a list problem: {meta!r}; expected start as [number, ...] and operations as "
            "[[kind, number or null], ...]. Pass a Problem's meta."
        ) from bad
    return start, operations


def _draw_operation(rng: random.Random, values: Values, max_number: int, length: Sequence[int]) -> Operation:
    """A step from `values` that stays within the bounds and changes the list; drawn again until one does."""
    kinds = [
        kind
        for kind in STEPS
        if not (kind in _GROWS and len(values) == length[1])
        and not (kind in _SHRINKS and len(values) == length[0])
        and not (kind == "raise" and max(values) == max_number)
    ]
    while True:
        kind, number = rng.choice(kinds), None
        if kind in _GROWS:
            number = rng.choice([new for new in range(max_number + 1) if new not in values])
        elif kind == "raise":
            number = rng.randint(1, min(9, max_number - max(values)))
        if _apply(kind, values, number) != values:
            return kind, number


def _apply(kind: str, values: Values, number: int | None) -> Values:
    """The list after a step. After an injected error a number may occur twice; the first of them is then removed."""
    operand = number if number is not None else 0
    if kind in ("largest", "smallest"):
        gone = values.index(max(values) if kind == "largest" else min(values))
        return values[:gone] + values[gone + 1 :]
    if kind == "swap":
        return values if len(values) < 2 else (values[-1], *values[1:-1], values[0])
    results: dict[str, Values] = {
        "append": (*values, operand),
        "prepend": (operand, *values),
        "first": values[1:],
        "last": values[:-1],
        "reverse": values[::-1],
        "rising": tuple(sorted(values)),
        "falling": tuple(sorted(values, reverse=True)),
        "back": (*values[1:], *values[:1]),
        "forth": (*values[-1:], *values[:-1]),
        "raise": tuple(value + operand for value in values),
    }
    return results[kind]


def _written(values: Values, separator: str = " ") -> str:
    return separator.join(map(str, values))


def _write_step(rng: random.Random, kind: str, number: int | None, result: Values) -> str:
    wording = rng.choice(STEPS[kind]).format(b=number, r=_written(result, rng.choice(SEPARATORS)))
    return join(rng.choice(LEADS), wording)


def _wrong_step(rng: random.Random, kind: str, values: Values, number: int | None) -> tuple[str, Values]:
    """A line with one error of a kind that weak models make, and the resulting list."""
    right = _apply(kind, values, number)
    while True:
        said, operand, result = kind, number, right
        fault = rng.choices(("result", "number", "operation", "nothing"), weights=(60, 15, 15, 10))[0]
        if fault == "result":
            result = _miscopied(rng, right)
        elif fault == "operation":
            said = _LOOKS_LIKE[kind]
            result = _apply(said, values, operand)
        elif fault == "number" and number is not None:
            operand = slip(rng, number)
            result = _apply(kind, values, operand)
        elif fault == "nothing":
            result = values  # the step is announced but not done
        # a fault may change nothing, e.g. if a list of two has its ends swapped instead of being reversed
        if result != right:
            return _write_step(rng, said, operand, result), result


def _miscopied(rng: random.Random, values: Values) -> Values:
    """A list other than `values`: with a number wrong, two swapped, one lost or one written twice. Never empty."""
    while True:
        how = rng.choices(("number", "order", "lost", "twice"), weights=(40, 30, 15, 15))[0]
        copied, at = list(values), rng.randrange(len(values))
        if how == "number":
            copied[at] = slip(rng, copied[at])
        elif how == "order":
            copied[at - 1], copied[at] = copied[at], copied[at - 1]
        elif how == "lost":
            del copied[at]
        else:
            copied.insert(at, copied[at])
        if copied and tuple(copied) != values:
            return tuple(copied)
