"""List puzzles: the checker against the writer and against Python's own list operations, the splits, the YAML."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from parsedec.errors import ConfigError
from parsedec.models.language_model import load
from parsedec.tasks import Problem, Task, ZooLists, zoo_base
from parsedec.tasks.zoo_base import LEADS, SPLITS
from parsedec.tasks.zoo_lists import STEPS, TOLD, draw_problem, first_wrong_line, solution, split_of
from parsedec.training.answers import clean, injected

CONF = Path(__file__).resolve().parents[2] / "conf"

SEVEN = Problem(
    id="seven",
    prompt="Start with the list 7 3 9. Remove the largest number. Reverse the list. Append 4. What is the list now?",
    reference="3 7 4",
    meta={"start": [7, 3, 9], "operations": [["largest", None], ["reverse", None], ["append", 4]]},
)
RIGHT = [
    "Without the largest number the list is 7 3.",
    "Then, turned around it is 3, 7.",
    "Appending 4 gives 3 7 4.",
    "The answer is 3 7 4.",
]

seeds = st.integers(0, 2**32)
steps = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(sorted)
lengths = st.tuples(st.integers(2, 8), st.integers(2, 8)).map(sorted)
largest = st.integers(10, 99)
quick = settings(deadline=None, max_examples=150)


def drawn(seed: int, operations: list[int], length: list[int], max_number: int) -> tuple[random.Random, Problem]:
    rng = random.Random(seed)
    return rng, draw_problem(rng, operations=operations, length=length, max_number=max_number)


def by_hand(values: list[int], kind: str, number: int | None) -> list[int]:
    """One step with the list operations of Python: an oracle that shares nothing with the task."""
    values = list(values)
    if number is not None and kind == "raise":
        return [value + number for value in values]
    match kind:
        case "append":
            values.append(number)
        case "prepend":
            values.insert(0, number)
        case "first":
            values.pop(0)
        case "last":
            values.pop()
        case "largest":
            values.remove(max(values))
        case "smallest":
            values.remove(min(values))
        case "reverse":
            values.reverse()
        case "rising":
            values.sort()
        case "falling":
            values.sort(reverse=True)
        case "swap":
            values[0], values[-1] = values[-1], values[0]
        case "back":
            values.append(values.pop(0))
        case "forth":
            values.insert(0, values.pop())
        case _:
            raise AssertionError(kind)
    return values


@quick
@given(seeds, seeds, steps, lengths, largest)
def test_two_wordings_of_a_right_solution_check_clean(
    seed: int, other: int, operations: list[int], length: list[int], max_number: int
) -> None:
    rng, problem = drawn(seed, operations, length, max_number)
    for source in (rng, random.Random(other)):
        text = "\n".join(solution(problem, source))
        assert first_wrong_line(problem.meta, text) is None
        assert ZooLists().score(problem, text).correct


@quick
@given(seeds, steps, lengths, largest, st.data())
def test_injected_error_is_found_at_its_line(
    seed: int, operations: list[int], length: list[int], max_number: int, data: st.DataObject
) -> None:
    rng, problem = drawn(seed, operations, length, max_number)
    error_at = data.draw(st.integers(0, len(problem.meta["operations"])))
    lines = solution(problem, rng, error_at)
    assert len(lines) == len(problem.meta["operations"]) + 1
    assert first_wrong_line(problem.meta, "\n".join(lines)) == error_at
    # every prefix is judged as the labels of a training set would need it
    for k in range(1, len(lines) + 1):
        wrong = first_wrong_line(problem.meta, "\n".join(lines[:k]))
        assert (wrong is None or wrong >= k) == (k <= error_at)


@quick
@given(seeds, steps, lengths, largest)
def test_problem_is_what_python_makes_of_it_and_stays_within_its_bounds(
    seed: int, operations: list[int], length: list[int], max_number: int
) -> None:
    _, problem = drawn(seed, operations, length, max_number)
    values, told = problem.meta["start"], problem.meta["operations"]
    assert operations[0] <= len(told) <= operations[1]
    for kind, number in [(None, None), *told]:
        after = by_hand(values, kind, number) if kind else values
        assert kind is None or after != values, "a step that changes nothing"
        values = after
        assert length[0] <= len(values) <= length[1]
        assert len(set(values)) == len(values), "which of two equal numbers is the largest?"
        assert min(values) >= 0
        assert max(values) <= max_number
        assert number is None or str(number) in problem.prompt
    assert problem.reference == " ".join(map(str, values))


@pytest.mark.parametrize("kind", STEPS)
def test_every_wording_of_a_step_is_accepted_and_holds_the_list(kind: str) -> None:
    number = 4 if any("{b}" in wording for wording in STEPS[kind]) else None
    meta = {"start": [5, 9, 7], "operations": [[kind, number]]}
    values = by_hand([5, 9, 7], kind, number)
    assert len(set(STEPS[kind])) >= 2
    assert len(set(TOLD[kind])) >= 2
    for wording in STEPS[kind]:
        for lead in LEADS:
            for separator in (" ", ", "):
                line = wording.format(b=number, r=separator.join(map(str, values)))
                line = lead + line[0].lower() + line[1:] if lead else line
                assert first_wrong_line(meta, line) == 1, line  # right: the first missing line is the last one
                assert first_wrong_line(meta, line.replace(str(values[-1]), "8")) == 0, line


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (RIGHT, None),
        (["Removing the largest number leaves 7, 3.", "From back to front: 3 7.", "4 goes last: 3, 7, 4.",
          "So the list is 3, 7, 4. The answer is 3, 7, 4."], None),
        (["Without the largest number the list is 3 7.", *RIGHT[1:]], 0),
        (["Without the smallest number the list is 7 3.", *RIGHT[1:]], 0),
        ([RIGHT[0], "Turned around it is 7 3.", *RIGHT[2:]], 1),
        ([RIGHT[0], "Then, Turned around it is 3, 7.", *RIGHT[2:]], 1),
        ([RIGHT[0], "", *RIGHT[1:]], 1),
        ([*RIGHT[:2], "Appending 5 gives 3 7 4.", RIGHT[3]], 2),
        ([*RIGHT[:2], "Appending 4 gives 3 74.", RIGHT[3]], 2),
        (RIGHT[:2], 2),
        ([*RIGHT[:3], "The answer is 3 7 5."], 3),
        ([*RIGHT[:3], "So the list is 3 7. The answer is 3 7 4."], 3),
        ([*RIGHT[:3], "Then, the answer is 3 7 4."], 3),
        ([*RIGHT, RIGHT[3]], 4),
        ([*RIGHT, "", "  "], None),
        ([""], 0),
    ],
)  # fmt: skip
def test_checker_cases(lines: list[str], wrong: int | None) -> None:
    text = "\n".join(lines)
    assert first_wrong_line(SEVEN.meta, text) == wrong
    score = ZooLists().score(SEVEN, text)
    assert (score.correct, score.first_wrong_line) == (wrong is None, wrong)


@pytest.mark.parametrize(
    ("lines", "detail"),
    [
        (RIGHT, "all lines are right; final list 3 7 4 is right"),
        ([*RIGHT[:2], "No.", "The answer is 3, 7, 4."], "line 3 is wrong: 'No.'; final list 3 7 4 is right"),
        (["The answer is 3, 74."], "line 1 is wrong: 'The answer is 3, 74.'; predicted 3 74, expected 3 7 4"),
        (RIGHT[:3], "line 4 is missing; no final answer, expected 3 7 4"),
    ],
)
def test_detail_tells_a_wrong_line_from_a_wrong_list(lines: list[str], detail: str) -> None:
    assert ZooLists().score(SEVEN, "\n".join(lines)).detail == detail


def test_errors_are_of_many_kinds() -> None:
    """A number, the order, a lost or doubled number, a misread or mistaken step, a step not done: all do occur."""
    rng = random.Random(0)
    meta = {"start": [5, 9, 7], "operations": [["append", 4]]}
    problem = Problem(id="a", prompt="?", reference="5 9 7 4", meta=meta)
    found = {solution(problem, rng, 0)[0].replace(",", "") for _ in range(600)}
    for part in ("5 7 9 4", "9 7 4.", "5 5 9 7 4", "Appending 5 gives 5 9 7 5", "Prepending 4 gives 4 5 9 7", "5 9 7."):
        assert any(part in line for line in found), part


def test_splits_share_no_facts() -> None:
    facts: dict[str, set[str]] = {}
    for split in SPLITS:
        tasks = [ZooLists(n=300, split=split), ZooLists(n=300, split=split, seed=1, operations=[1, 3], length=[2, 3])]
        found = [problem for task in tasks for problem in task.problems()]
        assert all(problem.id.startswith(f"zoo_lists/{split}/") for problem in found)
        facts[split] = {json.dumps([p.meta["start"], p.meta["operations"]]) for p in found}
    assert not facts["train"] & facts["calibration"]
    assert not facts["train"] & facts["test"]
    assert not facts["calibration"] & facts["test"]


def test_problems_are_the_same_every_time() -> None:
    task = ZooLists(n=50)
    assert task.problems() == ZooLists(n=50).problems()
    assert ZooLists(n=20).problems() == task.problems()[:20]
    assert task.problems() != ZooLists(n=50, seed=1).problems()
    assert len({problem.prompt for problem in ZooLists(n=500, operations=[1, 1], max_number=10).problems()}) == 500
    # pinned: a changed stream or hash would silently move every published number to other problems
    assert task.problems()[0].id == "zoo_lists/test/0714933f0e96"


@quick
@given(seeds, seeds, steps)
def test_meta_survives_json(seed: int, other: int, operations: list[int]) -> None:
    _, problem = drawn(seed, operations, [2, 5], 20)
    meta = json.loads(json.dumps(problem.meta))
    assert meta == problem.meta
    assert split_of(meta) == split_of(problem.meta)
    assert first_wrong_line(meta, "\n".join(solution(problem, random.Random(other)))) is None


def test_exhausted_space_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_base, "_BARREN_DRAWS", 300)
    task = ZooLists(n=100_000, operations=[1, 1], max_number=10, length=[2, 2], split="calibration")
    with pytest.raises(ConfigError, match=r"n=100000 is more than the \d+ different problems .* Lower n"):
        task.problems()


def test_error_outside_the_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 to 3"):
        solution(SEVEN, random.Random(0), error_at=4)


@pytest.mark.parametrize(
    "meta",
    [{"start": [3]}, {"start": 3, "operations": []}, {"start": [3, 4], "operations": [["shuffle", None]]},
     {"start": [3, 4], "operations": [["append", None]]}, {"start": [3, 4], "operations": [["reverse", 2]]}],
)  # fmt: skip
def test_meta_of_something_else_is_refused(meta: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Pass a Problem's meta"):
        first_wrong_line(meta, "")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"n": 0}, "n=0"),
        ({"split": "dev"}, "train, calibration, test"),
        ({"seed": -1}, "seed=-1"),
        ({"operations": [2, 9]}, "from 2 to 8"),
        ({"max_number": 5}, "max_number=5"),
        ({"length": [1, 4]}, r"length\[0\]=1"),
        ({"length": [4, 3]}, "from 4 to 8"),
        ({"length": [2, 9]}, "from 2 to 8"),
        ({"length": 3}, "fewest, most"),
        ({"length": True}, "fewest, most"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        ZooLists(**arguments)


def test_yaml_lists_every_knob_with_its_default() -> None:
    config = OmegaConf.load(CONF / "task" / "zoo_lists.yaml")
    task: Task = instantiate(config)
    assert task.name == "zoo_lists"
    default = ZooLists()
    knobs = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    assert OmegaConf.create(knobs) == {key: value for key, value in config.items() if key != "_target_"}


# --- training: a recipe learns this task by configuration alone ---


def test_recipe_takes_the_task_by_configuration() -> None:
    overrides = [
        "output=unused", "recipe=zoo_draft", "~recipe.task.names", "recipe.task.max_number=20",
        "recipe.task._target_=parsedec.tasks.zoo_lists.ZooLists", "+recipe.task.length=[2,4]", "recipe.task.n=3",
        "recipe.solution.path=parsedec.tasks.zoo_lists.solution",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        recipe = compose("train", overrides).recipe
    task, write = instantiate(recipe.task), instantiate(recipe.solution)
    model = load("zoo:draft", device="cpu")
    rng = random.Random(0)
    for problem in task.problems():
        lines = len(problem.meta["operations"]) + 1
        right = clean(model, task, problem, write, rng)
        assert right.right == (True,) * lines
        wrong = injected(model, task, problem, write, rng)
        assert len(wrong.right) == lines
        assert not wrong.right[-1]
        assert list(wrong.right) == sorted(wrong.right, reverse=True), "right up to the error, wrong from it on"


# --- where an answer goes wrong, to the character: what a training that labels tokens needs ---


@pytest.mark.parametrize(
    ("lines", "shared"),
    [
        ([*RIGHT[:2], "Appending 5 gives 3 7 5."], [*RIGHT[:2], "Appending "]),
        ([*RIGHT[:2], "Appending 4 gives 3 74."], [*RIGHT[:2], "Appending 4 gives 3 7"]),
        ([*RIGHT[:2], "Appending 4"], [*RIGHT[:2], "Appending 4"]),  # ends too early
        (["Without the", *RIGHT[1:]], ["Without the"]),  # a line does: its line break is wrong
        (RIGHT[:2], RIGHT[:2]),
        ([RIGHT[0], "", *RIGHT[1:]], [RIGHT[0], ""]),
        ([*RIGHT, RIGHT[3]], [*RIGHT, ""]),
        (["The answer is 3 7 4."], ["The"]),  # "Then, …" begins so, too
        ([""], [""]),
    ],
)
def test_error_is_located_to_the_character(lines: list[str], shared: list[str]) -> None:
    assert ZooLists().score(SEVEN, "\n".join(lines)).error_at == len("\n".join(shared))


@quick
@given(seeds, steps, st.data())
def test_character_is_the_last_that_some_right_answer_shares(
    seed: int, operations: list[int], data: st.DataObject
) -> None:
    """By enumeration: of all right lines in the faulty one's place, the one that agrees longest."""
    rng, problem = drawn(seed, operations, [2, 5], 20)
    error_at = data.draw(st.integers(0, len(operations := problem.meta["operations"]) - 1))
    text = "\n".join(lines := solution(problem, rng, error_at))
    values = problem.meta["start"]
    for kind, number in operations[: error_at + 1]:
        values = by_hand(values, kind, number)
    rights = [
        lead + wording[0].lower() + wording[1:] if lead else wording
        for lead in LEADS
        for separator in (" ", ", ")
        for template in STEPS[kind]
        for wording in [template.format(b=number, r=separator.join(map(str, values)))]
    ]
    before = len("\n".join([*lines[:error_at], ""]))
    at = ZooLists().score(problem, text).error_at
    assert at is not None
    assert any(right.startswith(text[before:at]) for right in rights)
    assert not any(right.startswith(text[before : at + 1]) for right in rights)
    assert ZooLists().score(problem, "\n".join(solution(problem, rng))).error_at is None
