"""Tasks: the arithmetic checker against the arithmetic writer, reading JSONL, the seam, the YAMLs of the zoo."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from parsedec.errors import ConfigError
from parsedec.tasks import Choice, Code, OpenEnded, Problem, Score, Task, TaskDataError, ZooArithmetic, zoo_arithmetic
from parsedec.tasks.prompts import Prompts
from parsedec.tasks.steps import read_steps
from parsedec.tasks.zoo_arithmetic import SPLITS, draw_problem, first_wrong_line, solution, split_of

ROOT = Path(__file__).resolve().parents[2]

MIA = Problem(
    id="mia",
    prompt="Mia has 12 cards. Omar gives Mia 30 cards. Mia sells 7 of the cards. How many are left for Mia?",
    reference="35",
    meta={"start": 12, "operations": [["+", 30], ["-", 7]], "name": "Mia", "object": "cards"},
)
MIA_RIGHT = ["12 + 30 = 42.", "So, taking 7 from 42 leaves 35.", "The answer is 35."]
MIA_LONG_ENDING = "So Mia has 35 cards. The answer is 35."

seeds = st.integers(0, 2**32)
bounds = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(sorted)
quick = settings(deadline=None, max_examples=150)


def drawn(seed: int, operations: list[int], max_number: int) -> tuple[random.Random, Problem]:
    rng = random.Random(seed)
    return rng, draw_problem(rng, operations=operations, max_number=max_number)


# --- arithmetic: the writer and the checker keep each other honest ---


@quick
@given(seeds, bounds, st.integers(10, 999), st.booleans())
def test_clean_solution_checks_clean(seed: int, operations: list[int], max_number: int, names: bool) -> None:
    rng, problem = drawn(seed, operations, max_number)
    text = "\n".join(solution(problem, rng))
    assert first_wrong_line(problem.meta, text, names=names) is None
    assert ZooArithmetic(names=names).score(problem, text).correct


@quick
@given(seeds, bounds, st.integers(10, 999), st.data())
def test_injected_error_is_found_at_its_line(
    seed: int, operations: list[int], max_number: int, data: st.DataObject
) -> None:
    rng, problem = drawn(seed, operations, max_number)
    error_at = data.draw(st.integers(0, len(problem.meta["operations"])))
    lines = solution(problem, rng, error_at)
    assert first_wrong_line(problem.meta, "\n".join(lines)) == error_at
    # every prefix is judged as the labels of a training set would need it
    for k in range(1, len(lines) + 1):
        wrong = first_wrong_line(problem.meta, "\n".join(lines[:k]))
        assert (wrong is None or wrong >= k) == (k <= error_at)


@quick
@given(seeds, bounds, st.integers(10, 999))
def test_problem_stays_within_its_bounds(seed: int, operations: list[int], max_number: int) -> None:
    _, problem = drawn(seed, operations, max_number)
    value, steps = problem.meta["start"], problem.meta["operations"]
    assert operations[0] <= len(steps) <= operations[1]
    for kind, operand in steps:
        results = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value / operand}
        exact = results[kind]
        assert exact == int(exact)
        value = int(exact)
        assert 1 <= value <= max_number
        assert 1 <= operand <= max_number
    assert problem.reference == str(value)
    assert 2 <= problem.meta["start"] <= max_number
    assert all(str(operand) in problem.prompt for _, operand in steps)


@quick
@given(seeds, seeds, bounds)
def test_meta_survives_json(seed: int, other: int, operations: list[int]) -> None:
    _, problem = drawn(seed, operations, 99)
    meta = json.loads(json.dumps(problem.meta))
    assert meta == problem.meta
    assert split_of(meta) == split_of(problem.meta)
    assert first_wrong_line(meta, "\n".join(solution(problem, random.Random(other)))) is None


def test_splits_share_no_arithmetic() -> None:
    """From the same seed, with other names and wordings drawn, and across different bounds."""
    numbers: dict[str, set[str]] = {}
    for split in SPLITS:
        other = ZooArithmetic(n=300, split=split, seed=1, operations=[1, 3])
        tasks = [ZooArithmetic(n=300, split=split), other]
        found = [problem for task in tasks for problem in task.problems()]
        assert all(f"/{split}/" in problem.id for problem in found)
        numbers[split] = {json.dumps([p.meta["start"], p.meta["operations"]]) for p in found}
    assert not numbers["train"] & numbers["calibration"]
    assert not numbers["train"] & numbers["test"]
    assert not numbers["calibration"] & numbers["test"]


def test_split_is_blind_to_names_and_wording() -> None:
    assert split_of(MIA.meta) == split_of({**MIA.meta, "name": "Tom", "object": "pens"})


def test_problems_are_the_same_every_time() -> None:
    task = ZooArithmetic(n=50)
    assert task.problems() == ZooArithmetic(n=50).problems()
    assert ZooArithmetic(n=20).problems() == task.problems()[:20]
    assert task.problems() != ZooArithmetic(n=50, seed=1).problems()
    # pinned: a changed stream or hash would silently move every published number to other problems
    assert task.problems()[0].id == "zoo_arithmetic/test/7fb6047f76bd"


def test_problems_are_unique() -> None:
    problems = ZooArithmetic(n=500, operations=[1, 1], max_number=10).problems()
    assert len({problem.prompt for problem in problems}) == len({problem.id for problem in problems}) == 500


def test_exhausted_space_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_arithmetic, "NAMES", ("Tom", "Ana"))
    monkeypatch.setattr(zoo_arithmetic, "OBJECTS", ("pens",))
    with pytest.raises(ConfigError, match=r"n=10000 is more than the \d+ different problems .* Lower n"):
        ZooArithmetic(n=10_000, operations=[1, 1], max_number=10, split="calibration").problems()


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (MIA_RIGHT, None),
        (["With 30 more than 12 there are 42.", "Now, 42 minus 7 is 35.", MIA_LONG_ENDING], None),
        (["30 + 12 = 42.", *MIA_RIGHT[1:]], None),  # a sum may be turned round
        ([MIA_RIGHT[0], "7 - 42 = 35.", MIA_RIGHT[2]], 1),  # a difference may not
        (["12 + 30 = 43.", *MIA_RIGHT[1:]], 0),
        (["12 - 30 = 42.", *MIA_RIGHT[1:]], 0),
        (["12 * 30 = 42.", *MIA_RIGHT[1:]], 0),
        ([MIA_RIGHT[0], "So, Taking 7 from 42 leaves 35.", MIA_RIGHT[2]], 1),
        ([MIA_RIGHT[0], "", *MIA_RIGHT[1:]], 1),
        (MIA_RIGHT[:1], 1),  # the first missing line
        (MIA_RIGHT[:2], 2),
        ([*MIA_RIGHT[:2], "The answer is 36."], 2),
        ([*MIA_RIGHT[:2], "The answer is 35"], 2),
        ([*MIA_RIGHT[:2], "So Mia has 36 cards. The answer is 35."], 2),
        ([*MIA_RIGHT, "The answer is 35."], 3),  # superfluous
        (["12 + 30 = 42. So, taking 7 from 42 leaves 35.", MIA_RIGHT[2]], 0),
        ([*MIA_RIGHT, "", "  "], None),  # blanks at the end are a habit, not a mistake
        ([""], 0),
    ],
)
def test_checker_cases(lines: list[str], wrong: int | None) -> None:
    text = "\n".join(lines)
    assert first_wrong_line(MIA.meta, text) == wrong
    score = ZooArithmetic().score(MIA, text)
    assert score.correct == (wrong is None)
    assert score.first_wrong_line == wrong


def test_names_count_on_request_only() -> None:
    text = "\n".join([*MIA_RIGHT[:2], "Mia ends with 35 pens. The answer is 35."])
    assert first_wrong_line(MIA.meta, text) is None
    assert first_wrong_line(MIA.meta, text, names=True) == 2
    assert first_wrong_line(MIA.meta, "\n".join(MIA_RIGHT), names=True) is None


@pytest.mark.parametrize(
    ("lines", "detail"),
    [
        (MIA_RIGHT, "all lines are right; final number 35 is right"),
        (["12 + 30 = 43.", *MIA_RIGHT[1:]], "line 1 is wrong: '12 + 30 = 43.'; final number 35 is right"),
        (["The answer is 36."], "line 1 is wrong: 'The answer is 36.'; predicted 36, expected 35"),
        (MIA_RIGHT[:2], "line 3 is missing; no final answer, expected 35"),
    ],
)
def test_detail_tells_a_wrong_line_from_a_wrong_number(lines: list[str], detail: str) -> None:
    assert ZooArithmetic().score(MIA, "\n".join(lines)).detail == detail


def test_error_outside_the_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 to 2"):
        solution(MIA, random.Random(0), error_at=3)
    with pytest.raises(ValueError, match="Pass a Problem's meta"):
        first_wrong_line({"start": 3}, "")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"n": 0}, "n=0"),
        ({"n": True}, "n=True"),
        ({"n": 2.0}, "n=2.0"),
        ({"split": "dev"}, "train, calibration, test"),
        ({"seed": -1}, "seed=-1"),
        ({"operations": [2, 9]}, "from 2 to 8"),
        ({"operations": [4, 3]}, "from 4 to 8"),
        ({"operations": [3]}, "fewest, most"),
        ({"operations": "25"}, r"operations\[0\]='2'"),
        ({"max_number": 5}, "max_number=5"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        ZooArithmetic(**arguments)


# --- JSONL ---


def row(**changes: object) -> str:
    whole: dict[str, object] = {"id": "a", "prompt": "How many?", "reference": "18", "meta": {}, "more": 1}
    return json.dumps({key: value for key, value in {**whole, **changes}.items() if value is not None})


def filed(folder: Path, *lines: str) -> str:
    path = folder / "problems.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def chat(path: str, **settings: Any) -> OpenEnded:
    return OpenEnded(name="chat", path=path, **settings)


def test_jsonl_takes_the_rows_asked_for(tmp_path: Path) -> None:
    path = filed(tmp_path, row(id="a"), "", row(id="b", reference=7), row(id="c"))
    assert [p.id for p in chat(path).problems()] == ["a", "b", "c"]
    assert [p.id for p in chat(path, n=1, offset=1).problems()] == ["b"]
    assert [p.prompt for p in chat(path, n=1).problems()] == ["How many?"]


def test_shuffled_order_is_the_same_every_time_and_loses_nothing(tmp_path: Path) -> None:
    path = filed(tmp_path, *(row(id=str(i)) for i in range(30)))
    ids = [p.id for p in chat(path, shuffle=3).problems()]
    assert ids == [p.id for p in chat(path, shuffle=3).problems()]
    assert [p.id for p in chat(path, shuffle=3, n=10, offset=5).problems()] == ids[5:15]
    assert sorted(ids, key=int) == [str(i) for i in range(30)] != ids


def test_jsonl_missing_file_says_what_it_should_be() -> None:
    with pytest.raises(TaskDataError, match=r"nowhere\.jsonl' is not a file; expected JSONL.*\"reference\""):
        chat("nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"neither path nor hub.*task\.path=FILE"):
        OpenEnded(name="mine")


def test_jsonl_too_few_rows(tmp_path: Path) -> None:
    path = filed(tmp_path, row())
    with pytest.raises(TaskDataError, match=r"offset=0, n=2 asks for more than the 1 problems"):
        chat(path, n=2).problems()
    with pytest.raises(TaskDataError, match="Lower n or offset"):
        chat(path, offset=1).problems()
    with pytest.raises(TaskDataError, match="holds no problems for chat"):
        chat(filed(tmp_path, "", "  ")).problems()


def test_prompts_with_references_as_tables_write_them(tmp_path: Path) -> None:
    """A column of whole numbers of which one is missing is one of floats."""
    path = filed(tmp_path, row(reference=57.0), row(reference=None), row(reference="57"))
    task = Prompts(path=path)
    assert [task.score(p, "So there are 57 of them.").correct for p in task.problems()] == [True, None, True]
    for wrong in (True, ["57"], {"a": 57}, math.nan, math.inf):
        with pytest.raises(TaskDataError, match=r"line 2 has reference=.*text or number, or absent"):
            Prompts(path=filed(tmp_path, row(), row(reference=wrong))).problems()


def test_the_mark_before_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    """Some editors and tables write U+FEFF first, be the first line blank or not."""
    steps = row(steps=["one"], label=0)
    for lines in (("\ufeff", row(), steps), ("\ufeff" + row(), steps)):
        path = filed(tmp_path, *lines)
        assert [problem.prompt for problem in Prompts(path=path).problems()] == ["How many?", "How many?"]
    path = filed(tmp_path, "\ufeff", row())
    assert [problem.id for problem in chat(path).problems()] == ["a"]
    assert len(list(read_steps(filed(tmp_path, "\ufeff", steps)))) == 1
    with pytest.raises(TaskDataError, match="line 2 is not JSON"):  # elsewhere it is a mistake
        chat(filed(tmp_path, row(), "\ufeff")).problems()


@pytest.mark.parametrize("line", ['{"reference": ' + "9" * 5000 + "}", "[" * 100_000], ids=["long", "deep"])
def test_what_python_does_not_read_is_located(tmp_path: Path, line: str) -> None:
    path = filed(tmp_path, line)
    for read in (chat(path).problems, Prompts(path=path).problems, lambda: list(read_steps(path))):
        with pytest.raises(TaskDataError, match="line 1 is not JSON"):
            read()


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"id": ', "not JSON"),
        ("\x1b[2J\x00{", "not JSON in UTF-8 .*: \ufffd\\[2J\ufffd{;"),
        ("[1, 2]", r"\[1, 2\]; expected an object"),
        (row(id=None), "id missing"),
        (row(prompt=3), "prompt missing or of the wrong type"),
        (row(reference=[1]), "reference missing or of the wrong type"),
        (row(meta="x", prompt=None), "prompt, meta missing"),
        (row(id="first"), "repeats the id 'first' of line 1"),
    ],
)
def test_jsonl_malformed_line_is_located(tmp_path: Path, line: str, part: str) -> None:
    path = filed(tmp_path, row(id="first"), "", line)
    with pytest.raises(TaskDataError, match=f"line 3.*{part}"):
        Code(name="code", path=path, n=1).problems()


def test_jsonl_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    path = filed(tmp_path, row(reference="yes"))
    with pytest.raises(TaskDataError, match=r"expected a letter, and a line 'A\. …'"):
        Choice(name="mmlu", path=path).problems()
    with pytest.raises(TaskDataError, match=r"meta\.entry_point=None"):
        Code(name="humaneval", path=path, n=1).problems()
    with pytest.raises(TaskDataError, match=r"meta\.turns=\[3\]"):
        OpenEnded(name="chat", path=filed(tmp_path, row(meta={"turns": [3]}))).problems()


# --- the seam and the YAMLs ---


def test_every_class_is_a_task(tmp_path: Path) -> None:
    """The annotation is the test: the type checker holds each class against the protocol."""
    path = filed(tmp_path, row())
    tasks: list[Task] = [ZooArithmetic(), chat(path), Code(name="code", path=path), Choice(name="mmlu", path=path)]
    assert [task.name for task in tasks] == ["zoo_arithmetic", "chat", "code", "mmlu"]


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="first_wrong_line=None"):
        Score(True, "fine", first_wrong_line=2)
    with pytest.raises(ValueError, match="Give every problem an id"):
        Problem(id="", prompt="How many?", reference="3")


def test_yaml_of_the_zoo_lists_every_knob_with_its_default() -> None:
    config = DictConfig(OmegaConf.load(ROOT / "conf" / "task" / "zoo_arithmetic.yaml"))
    task, default = instantiate(config), ZooArithmetic()
    assert task.name == "zoo_arithmetic"
    # a list in a YAML and the tuple of the default are the same to us
    knobs = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    assert OmegaConf.create(knobs) == {key: value for key, value in config.items() if key != "_target_"}
