"""Word problems whose answer has one checkable line per step: the task of the zoo models.

    Mia has 12 cards. Omar gives Mia 30 cards. Mia sells 7 of the cards. How many cards are left for Mia?

    12 + 30 = 42.
    So, taking 7 from 42 leaves 35.
    The answer is 35.

The checker looks lines up among the right ones (`zoo_base`). The zoo models were trained on these wordings, names and
objects, so changing one changes the language they know. Their judge was trained on wrong numbers only, so a wrong name
or object in the last line counts as an error only on request.

A problem's facts, which decide its split, are its numbers and operations, not its names and wording.
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
    SPLITS,
    Fault,
    RightLines,
    ZooTask,
    first_fault,
    join,
    problem_id,
    require_line,
    slip,
    split_by,
)

__all__ = ["SPLITS", "ZooArithmetic", "draw_problem", "first_wrong_line", "solution", "split_of"]

NAMES = (
    "Tom",
    "Ana",
    "Raj",
    "Lena",
    "Omar",
    "Mia",
    "Kofi",
    "Yuki",
    "Ivan",
    "Sara",
    "Noah",
    "Zoe",
    "Hugo",
    "Nina",
    "Paul",
    "Ella",
)
OBJECTS = ("apples", "coins", "books", "stamps", "marbles", "shells", "cards", "pens", "beads", "stones")

# {n} name, {f} friend, {o} objects, {x} value before the step, {b} operand, {r} value after it
STORY = {
    "+": ("{n} buys {b} more {o}.", "{f} gives {n} {b} {o}.", "{n} finds {b} {o}.", "Another {b} {o} arrive for {n}."),
    "-": (
        "{n} loses {b} {o}.",
        "{n} gives {b} {o} to {f}.",
        "{n} sells {b} of the {o}.",
        "{b} of the {o} are thrown away.",
    ),
    "*": ("Then the number of {o} is multiplied by {b}.", "{n} trades and now has {b} times as many {o}."),
    "/": (
        "{n} puts the {o} into {b} equal boxes and keeps one box.",
        "The {o} are shared equally by {b} people and {n} keeps one share.",
    ),
}
QUESTIONS = (
    "How many {o} does {n} have now?",
    "How many {o} are left for {n}?",
    "What is the number of {o} that {n} has at the end?",
)
STEPS = {
    "+": (
        "{x} + {b} = {r}.",
        "{x} plus {b} is {r}.",
        "Adding {b} to {x} gives {r}.",
        "With {b} more than {x} there are {r}.",
    ),
    "-": (
        "{x} - {b} = {r}.",
        "{x} minus {b} is {r}.",
        "Taking {b} from {x} leaves {r}.",
        "Without {b} of the {x} there are {r}.",
    ),
    "*": ("{x} * {b} = {r}.", "{x} times {b} is {r}.", "Multiplying {x} by {b} gives {r}.", "{b} times {x} makes {r}."),
    "/": (
        "{x} / {b} = {r}.",
        "{x} divided by {b} is {r}.",
        "Dividing {x} by {b} gives {r}.",
        "One of {b} equal parts of {x} is {r}.",
    ),
}
ENDINGS = ("The answer is {r}.", "So {n} has {r} {o}. The answer is {r}.", "{n} ends with {r} {o}. The answer is {r}.")
_LOOKS_LIKE = {"+": "-", "-": "+", "*": "+", "/": "-"}  # the operation a careless reader takes one for
_FINAL = re.compile(r"The answer is ([0-9]+)\.")

Operation = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class ZooArithmetic(ZooTask):
    """`n` distinct problems of one split; the first k are the same for every `n`.

    operations  fewest and most steps of a problem. The shipped models know 2 to 5
    max_number  largest number that occurs. The shipped models know 99
    names       whether a name and object in the last line must be the problem's own
    """

    name: ClassVar[str] = "zoo_arithmetic"
    names: bool = False

    def draw(self, rng: random.Random) -> Problem:
        return draw_problem(rng, operations=self.operations, max_number=self.max_number)

    def split_of(self, meta: Mapping[str, Any]) -> str:
        return split_of(meta)

    def fault(self, meta: Mapping[str, Any], text: str) -> Fault | None:
        return first_fault(text, _rights(meta, self.names))

    def final_answer(self, text: str) -> str | None:
        finals = _FINAL.findall(text)
        return str(finals[-1]) if finals else None


def split_of(meta: Mapping[str, Any]) -> str:
    """The split a problem belongs to: decided by its numbers and operations, blind to names and wording."""
    start, operations, _, _ = _facts(meta)
    return split_by([start, operations])


def draw_problem(rng: random.Random, *, operations: Sequence[int] = (2, 5), max_number: int = 99) -> Problem:
    """A random problem of any split, with its text and facts."""
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(OBJECTS)
    start = value = rng.randint(2, max_number)
    told, steps = [f"{name} has {start} {things}."], []
    for _ in range(rng.randint(operations[0], operations[1])):
        kind, operand = _draw_operation(rng, value, max_number)
        told.append(rng.choice(STORY[kind]).format(n=name, f=friend, b=operand, o=things))
        steps.append([kind, operand])
        value = _apply(kind, value, operand)
    told.append(rng.choice(QUESTIONS).format(n=name, o=things))
    prompt = " ".join(told)
    meta = {"start": start, "operations": steps, "name": name, "object": things}
    identity = problem_id(ZooArithmetic.name, split_of(meta), prompt)
    return Problem(id=identity, prompt=prompt, reference=str(value), meta=meta)


def solution(problem: Problem, rng: random.Random, error_at: int | None = None) -> list[str]:
    """The lines of an answer in random wordings, right or with one error.

    error_at  line that gets the error: a slip in the result, a misread number or a mistaken operation (in the
              last line: a wrong number). The lines after it carry on from the wrong value, as a writer would.
    """
    value, operations, name, things = _facts(problem.meta)
    require_line(error_at, len(operations))
    lines = []
    for index, (kind, operand) in enumerate(operations):
        if index == error_at:
            line, value = _wrong_step(rng, kind, value, operand)
        else:
            line, value = _write_step(rng, kind, value, operand, _apply(kind, value, operand))
        lines.append(line)
    if error_at == len(operations):
        value = slip(rng, value)
    lines.append(rng.choice(ENDINGS).format(n=name, o=things, r=value))
    return lines


def first_wrong_line(meta: Mapping[str, Any], text: str, *, names: bool = False) -> int | None:
    """0-based line of `zoo_base.first_fault`. With `names`, a name and object in the last line must be the problem's
    own."""
    fault = first_fault(text, _rights(meta, names))
    return None if fault is None else fault.line


def _rights(meta: Mapping[str, Any], names: bool) -> Iterator[RightLines]:
    value, operations, name, things = _facts(meta)
    for kind, operand in operations:
        yield partial(_step_lines, kind, value, operand)
        value = _apply(kind, value, operand)
    yield partial(_last_lines, value, name, things, names)


def _step_lines(kind: str, value: int, operand: int, _line: str) -> set[str]:
    return _right_lines(kind, value, operand)


def _last_lines(value: int, name: str, things: str, names: bool, line: str) -> set[str]:
    """Every right last line. Without `names`, any name and object will do, so the line's own words are tried."""
    who = {name} if names else {name, *re.findall("[A-Z][a-z]+", line)}
    what = {things} if names else {things, *re.findall("[a-z]+", line)}
    return {ending.format(n=n, o=o, r=value) for ending, n, o in product(ENDINGS, who, what)}


def _facts(meta: Mapping[str, Any]) -> tuple[int, list[Operation], str, str]:
    """Start value, operations, name and object from a problem's meta, which may have been through JSON."""
    try:
        operations = [(str(kind), int(operand)) for kind, operand in meta["operations"]]
        return int(meta["start"]), operations, str(meta["name"]), str(meta["object"])
    except (KeyError, TypeError, ValueError) as bad:
        raise ValueError(
            f"not the meta of an arithmetic problem: {meta!r}; expected start, operations as "
            "[[kind, number], ...], name and object. Pass a Problem's meta."
        ) from bad


def _draw_operation(rng: random.Random, value: int, max_number: int) -> Operation:
    """A step from `value` that stays within max_number; drawn again until one does."""
    divisors = [k for k in range(2, 10) if value % k == 0]
    kinds = ["+", "-"] + ["*"] * (2 * value <= max_number) + ["/"] * (value > 9 and bool(divisors))
    while True:
        kind = rng.choice(kinds)
        if kind == "-" and value < 3:
            kind = "+"  # taking something away would leave too little to talk about
        if kind == "+":
            operand = rng.randint(2, max_number)
        elif kind == "-":
            operand = rng.randint(1, value - 1)
        else:
            operand = rng.choice(divisors) if kind == "/" else rng.randint(2, 9)
        if _apply(kind, value, operand) <= max_number:
            return kind, operand


def _apply(kind: str, value: int, operand: int) -> int:
    """The value after a step. After an injected error it could be a fraction or negative: it is then rounded down or
    set to 0, since the language of the answers has neither fractions nor signs."""
    if kind == "+":
        return value + operand
    if kind == "-":
        return max(0, value - operand)
    return value * operand if kind == "*" else value // operand


def _right_lines(kind: str, value: int, operand: int) -> set[str]:
    """Every right line for one step. The operands of + and * may be swapped."""
    result = _apply(kind, value, operand)
    orders = [(value, operand), (operand, value)] if kind in "+*" else [(value, operand)]
    lines = set()
    for wording, lead, (x, b) in product(STEPS[kind], LEADS, orders):
        lines.add(join(lead, wording.format(x=x, b=b, r=result)))
    return lines


def _write_step(rng: random.Random, kind: str, value: int, operand: int, result: int) -> tuple[str, int]:
    wording = rng.choice(STEPS[kind]).format(x=value, b=operand, r=result)
    return join(rng.choice(LEADS), wording), result


def _wrong_step(rng: random.Random, kind: str, value: int, operand: int) -> tuple[str, int]:
    """A line with one error of a kind that weak models make, and the resulting value."""
    accepted = _right_lines(kind, value, operand)
    while True:
        x, b, op, result = value, operand, kind, _apply(kind, value, operand)
        fault = rng.choices(("result", "operand", "value", "operation"), weights=(65, 15, 10, 10))[0]
        if fault == "operand":
            b = max(1, slip(rng, operand))
        elif fault == "value":
            x = slip(rng, value)
        elif fault == "operation":
            op = _LOOKS_LIKE[kind]
        result = slip(rng, result) if fault == "result" else _apply(op, x, b)
        line, result = _write_step(rng, op, x, b, result)
        # a fault can undo itself, e.g. if max(1, ...) turns a misread operand back into the right one
        if line not in accepted:
            return line, result
