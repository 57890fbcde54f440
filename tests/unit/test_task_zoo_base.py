"""What the zoo's tasks share: where an answer goes wrong, splits, and both tasks under one contract."""

from __future__ import annotations

import random

import pytest

from parsedec.tasks import Task, ZooArithmetic, ZooLists, zoo_arithmetic, zoo_lists
from parsedec.tasks.zoo_base import SPLITS, Fault, RightLines, first_fault, slip, split_by

RIGHTS: list[RightLines] = [lambda line: {"one.", "only."}, lambda line: {"two."}]
TASKS = [(ZooArithmetic, zoo_arithmetic), (ZooLists, zoo_lists)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("one.\ntwo.", None),
        ("only.\ntwo. \n\n", None),  # blanks at the end are a habit
        ("", Fault(0, 0)),
        ("  ", Fault(0, 0)),
        ("o", Fault(0, 1)),
        ("onx.\ntwo.", Fault(0, 2)),
        ("onlx.\ntwo.", Fault(0, 3)),  # the wording that agrees longest counts
        ("on\ntwo.", Fault(0, 2)),  # its line break comes too early
        ("one.", Fault(1, 4)),
        ("one.\n", Fault(1, 5)),
        ("one.\n\ntwo.", Fault(1, 5)),
        ("one.\ntwx.", Fault(1, 7)),
        ("one.\ntwo.\nthree.", Fault(2, 10)),
    ],
)
def test_first_fault(text: str, fault: Fault | None) -> None:
    assert first_fault(text, RIGHTS) == fault


@pytest.mark.parametrize(
    ("lines", "shared"),
    [
        (["12 + 30 = 43.", "x"], "12 + 30 = 4"),
        (["12 - 30 = 42.", "x"], "12 "),
        (["12 + 30 = 42.", "So, taking 7 from 41 leaves 34."], "12 + 30 = 42.\nSo, taking 7 from 4"),
        (["12 + 30 = 42.", "42 - 7 = 35.", "So Tom has 36 pens. The answer is 36."],
         "12 + 30 = 42.\n42 - 7 = 35.\nSo Tom has 3"),
    ],
)  # fmt: skip
def test_arithmetic_error_is_located_to_the_character(lines: list[str], shared: str) -> None:
    meta = {"start": 12, "operations": [["+", 30], ["-", 7]], "name": "Mia", "object": "cards"}
    fault = ZooArithmetic().fault(meta, "\n".join(lines))
    assert fault is not None
    assert fault.at == len(shared)
    # with names the first word that is not the problem's own is the error
    strict = ZooArithmetic(names=True).fault(meta, "\n".join(lines))
    assert strict is not None
    assert strict.at == (len(shared[: shared.index("Tom")]) if "Tom" in shared else len(shared))


@pytest.mark.parametrize(("kind", "module"), TASKS)
def test_every_cut_of_a_right_answer_is_a_beginning(kind, module) -> None:
    """A right answer, cut at any character, goes wrong nowhere: its fault is its end."""
    task: Task = kind(n=20, operations=[1, 4])
    rng = random.Random(0)
    for problem in task.problems():
        text = "\n".join(module.solution(problem, rng))
        at = rng.randrange(len(text))
        assert task.score(problem, text[:at]).error_at == at
        assert task.score(problem, text).error_at is None


@pytest.mark.parametrize(("kind", "module"), TASKS)
def test_an_injected_error_lies_in_its_line(kind, module) -> None:
    task: Task = kind(n=60)
    rng = random.Random(0)
    for problem in task.problems():
        line = rng.randrange(len(problem.meta["operations"]) + 1)
        lines = module.solution(problem, rng, line)
        score = task.score(problem, "\n".join(lines))
        start = len("\n".join([*lines[:line], ""]))
        assert score.first_wrong_line == line
        assert score.error_at is not None
        assert start <= score.error_at <= start + len(lines[line])


def test_splits_have_their_shares() -> None:
    found = [split_by(["facts", i]) for i in range(4000)]
    for split, buckets in SPLITS.items():
        assert abs(found.count(split) / len(found) - len(buckets) / 100) < 0.02


@pytest.mark.parametrize("number", [0, 1, 9, 10, 99])
def test_slip_is_another_number_and_never_negative(number: int) -> None:
    rng = random.Random(0)
    slips = {slip(rng, number) for _ in range(300)}
    assert number not in slips
    assert min(slips) >= 0
    assert len(slips) > 10
