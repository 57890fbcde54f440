"""Word problems whose answer has one checkable line per step: the task of the zoo models.

    Mia has 12 cards. Omar gives Mia 30 cards. Mia sells 7 of the cards. How many cards are left for Mia?

    12 + 30 = 42.
    So, taking 7 from 42 leaves 35.
    The answer is 35.

A line is right exactly if it is one of the wordings below with the right numbers in it, so the checker needs
no parser: it writes the right lines and looks the given one up. The zoo models were trained on these
wordings, names and objects; changing one changes the language they speak. Their judge was trained on wrong
numbers only, so a wrong name or object in the last line counts as an error only on request.

Splits are disjoint by construction: a hash of a problem's numbers and operations (not of its names and
wording) decides its split, and a task draws until it has what belongs to its own. A model trained on
`split=train` has therefore never seen the arithmetic of a calibration or test problem, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from parsedec.errors import ConfigError
from parsedec.tasks.base import Problem, Score, require_int

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
LEADS = ("", "", "Next, ", "Then, ", "So, ", "Now, ")  # "" twice: a third of the lines start plainly
ENDINGS = ("The answer is {r}.", "So {n} has {r} {o}. The answer is {r}.", "{n} ends with {r} {o}. The answer is {r}.")

SPLITS = {"train": range(80), "calibration": range(80, 90), "test": range(90, 100)}  # buckets out of 100
MAX_STEPS = 8
# Draws in a row without a new problem after which the space counts as exhausted. A small split (a tenth of
# all draws) with a tenth of it still unseen would be given up by mistake once in 10^8 tries.
_BARREN_DRAWS = 2_000
_LOOKS_LIKE = {"+": "-", "-": "+", "*": "+", "/": "-"}  # the operation a careless reader takes one for
_FINAL = re.compile(r"The answer is ([0-9]+)\.")

Operation = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class ZooArithmetic:
    """`n` different problems of one split; the first k of a larger `n` are those of `n=k`.

    operations  fewest and most steps of a problem. The shipped models know 2 to 5
    max_number  largest number that occurs. The shipped models know 99
    names       whether the last line must also speak of the problem's own name and object
    """

    name: ClassVar[str] = "zoo_arithmetic"
    n: int = 200
    split: str = "test"
    seed: int = 0
    operations: Sequence[int] = (2, 5)
    max_number: int = 99
    names: bool = False

    def __post_init__(self) -> None:
        require_int("n", self.n, 1)
        require_int("seed", self.seed, 0)
        require_int("max_number", self.max_number, 10, 9999)
        if self.split not in SPLITS:
            raise ConfigError(
                f"split={self.split!r} does not exist; expected one of {', '.join(SPLITS)}. Change split."
            )
        if not isinstance(self.operations, Sequence) or len(self.operations) != 2:
            raise ConfigError(
                f"operations={self.operations!r} is not usable; expected [fewest, most] steps, "
                "such as [2, 5]. Change operations."
            )
        require_int("operations[0]", self.operations[0], 1, MAX_STEPS)
        require_int("operations[1]", self.operations[1], self.operations[0], MAX_STEPS)

    def problems(self) -> list[Problem]:
        rng = random.Random(self.seed)
        found: dict[str, Problem] = {}
        barren = 0
        while len(found) < self.n:
            problem = draw_problem(rng, operations=self.operations, max_number=self.max_number)
            if split_of(problem.meta) == self.split and problem.prompt not in found:
                found[problem.prompt] = problem
                barren = 0
                continue
            barren += 1
            if barren == _BARREN_DRAWS:
                raise ConfigError(
                    f"n={self.n} is more than the {len(found)} different problems found for "
                    f"{self}; expected at most as many. Lower n or widen operations."
                )
        return list(found.values())

    def score(self, problem: Problem, text: str) -> Score:
        """Right if every line is, the last one included. The detail counts lines from 1."""
        wrong = first_wrong_line(problem.meta, text, names=self.names)
        finals = _FINAL.findall(text)
        if not finals:
            final = f"no final answer, expected {problem.reference}"
        elif finals[-1] == problem.reference:
            final = f"final number {finals[-1]} is right"
        else:
            final = f"predicted {finals[-1]}, expected {problem.reference}"
        if wrong is None:
            return Score(True, f"all lines are right; {final}")
        lines = _lines(text)
        what = f"is wrong: {lines[wrong][:60]!r}" if wrong < len(lines) else "is missing"
        return Score(False, f"line {wrong + 1} {what}; {final}", wrong)


def split_of(meta: Mapping[str, Any]) -> str:
    """The split a problem belongs to: decided by its numbers and operations, blind to names and wording."""
    start, operations, _, _ = _facts(meta)
    key = json.dumps([start, operations]).encode()
    bucket = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def draw_problem(rng: random.Random, *, operations: Sequence[int] = (2, 5), max_number: int = 99) -> Problem:
    """A random problem of any split, its text and its facts."""
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
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    identity = f"{ZooArithmetic.name}/{split_of(meta)}/{digest}"
    return Problem(id=identity, prompt=prompt, reference=str(value), meta=meta)


def solution(problem: Problem, rng: random.Random, error_at: int | None = None) -> list[str]:
    """The lines of an answer in random wordings, right or with one error.

    error_at  line that gets the error: a slip in the result, a misread number or a mistaken operation (in the
              last line: a wrong number). The lines after it carry on from the wrong value, as a writer would.
    """
    value, operations, name, things = _facts(problem.meta)
    if error_at is not None and not 0 <= error_at <= len(operations):
        raise ValueError(
            f"error_at={error_at} is not a line of an answer with {len(operations) + 1} lines; "
            f"expected 0 to {len(operations)}, or None for no error. Change error_at."
        )
    lines = []
    for index, (kind, operand) in enumerate(operations):
        if index == error_at:
            line, value = _wrong_step(rng, kind, value, operand)
        else:
            line, value = _write_step(rng, kind, value, operand, _apply(kind, value, operand))
        lines.append(line)
    if error_at == len(operations):
        value = _slip(rng, value)
    lines.append(rng.choice(ENDINGS).format(n=name, o=things, r=value))
    return lines


def first_wrong_line(meta: Mapping[str, Any], text: str, *, names: bool = False) -> int | None:
    """0-based index of the first line of `text` that is wrong or superfluous; None: all right and complete.

    If every line given is right but some are missing, the index is that of the first missing one. A prefix of
    k whole lines is therefore right exactly if the result is None or at least k. With `names` the last line
    must also hold the problem's own name and object, if it holds any.
    """
    value, operations, name, things = _facts(meta)
    who, what = (re.escape(name), re.escape(things)) if names else ("[A-Z][a-z]+", "[a-z]+")
    lines = _lines(text)
    for index, line in enumerate(lines):
        if index > len(operations):
            return index
        if index == len(operations):
            patterns = (ending.replace(".", r"\.").format(n=who, o=what, r=value) for ending in ENDINGS)
            right = re.fullmatch("|".join(patterns), line) is not None
        else:
            kind, operand = operations[index]
            right = line in _right_lines(kind, value, operand)
            value = _apply(kind, value, operand)
        if not right:
            return index
    return None if len(lines) == len(operations) + 1 else len(lines)


def _lines(text: str) -> list[str]:
    # blanks at the end of the text are a habit of models, not a mistake; an empty line inside is a wrong line
    return [line.rstrip() for line in text.rstrip().split("\n")] if text.strip() else []


def _facts(meta: Mapping[str, Any]) -> tuple[int, list[Operation], str, str]:
    """Start value, operations, name and object of a problem's meta, which may have been through JSON."""
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
            kind = "+"  # taking something away would leave nothing to speak of
        if kind == "+":
            operand = rng.randint(2, max_number)
        elif kind == "-":
            operand = rng.randint(1, value - 1)
        else:
            operand = rng.choice(divisors) if kind == "/" else rng.randint(2, 9)
        if _apply(kind, value, operand) <= max_number:
            return kind, operand


def _apply(kind: str, value: int, operand: int) -> int:
    """The value after a step. After an injected error it might be a fraction or fall below 0: it is then
    rounded down or stays at 0, since the language of the answers has neither fractions nor signs."""
    if kind == "+":
        return value + operand
    if kind == "-":
        return max(0, value - operand)
    return value * operand if kind == "*" else value // operand


def _right_lines(kind: str, value: int, operand: int) -> set[str]:
    """Every line that is right for one step. The operands of + and * may change places."""
    result = _apply(kind, value, operand)
    orders = [(value, operand), (operand, value)] if kind in "+*" else [(value, operand)]
    lines = set()
    for wording, lead, (x, b) in product(STEPS[kind], LEADS, orders):
        lines.add(_join(lead, wording.format(x=x, b=b, r=result)))
    return lines


def _write_step(rng: random.Random, kind: str, value: int, operand: int, result: int) -> tuple[str, int]:
    wording = rng.choice(STEPS[kind]).format(x=value, b=operand, r=result)
    return _join(rng.choice(LEADS), wording), result


def _join(lead: str, sentence: str) -> str:
    return lead + sentence[0].lower() + sentence[1:] if lead else sentence


def _wrong_step(rng: random.Random, kind: str, value: int, operand: int) -> tuple[str, int]:
    """A line with one error of a kind that weak models make, and the value it leads to."""
    accepted = _right_lines(kind, value, operand)
    while True:
        x, b, op, result = value, operand, kind, _apply(kind, value, operand)
        fault = rng.choices(("result", "operand", "value", "operation"), weights=(65, 15, 10, 10))[0]
        if fault == "operand":
            b = max(1, _slip(rng, operand))
        elif fault == "value":
            x = _slip(rng, value)
        elif fault == "operation":
            op = _LOOKS_LIKE[kind]
        result = _slip(rng, result) if fault == "result" else _apply(op, x, b)
        line, result = _write_step(rng, op, x, b, result)
        # a fault can undo itself, as where a misread operand is the operand again after max(1, ...)
        if line not in accepted:
            return line, result


def _slip(rng: random.Random, number: int) -> int:
    """A number other than `number`, as a careless writer might put it: near, a digit changed, or far off."""
    while True:
        digits = list(str(number))
        how = rng.choices(("near", "digit", "far"), weights=(45, 35, 20))[0]
        if how == "near":
            slipped = number + rng.choice((1, -1, 10, -10))
        elif how == "digit":
            digits[rng.randrange(len(digits))] = str(rng.randrange(10))
            slipped = int("".join(digits))
        else:
            slipped = number + rng.randint(-50, 50)
        if slipped >= 0 and slipped != number:
            return slipped
