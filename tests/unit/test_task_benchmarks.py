"""Benchmarks: scoring of mathematics, choices and conversations; rows of the hub; the datasets' own answer keys.

The hub is not reached here: rows with the documented columns stand in for it. PARSEDEC_DATA=DIR names a folder of
benchmark files (gsm8k_test.jsonl, …) whose reference solutions must score right.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.utils import instantiate

import parsedec.tasks.base as base
import tiny
from configs import composed
from parsedec.engine import Parse
from parsedec.errors import ConfigError
from parsedec.experiment.runner import Arm, Settings, run_arms
from parsedec.experiment.summary import summarise
from parsedec.outer import TargetOnly
from parsedec.tasks import Choice, Hub, Maths, OpenEnded, Problem, TaskDataError
from parsedec.tasks.choice import chosen_letter
from parsedec.types import Limits, Sampling

CONF = Path(__file__).resolve().parents[2] / "conf"
DATA = os.environ.get("PARSEDEC_DATA")
needs_maths = pytest.mark.skipif(not base.find_spec("math_verify"), reason="math-verify is in the extra `eval`")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.jsonl"
    path.touch()
    return path


def problem(reference: str, **meta: Any) -> Problem:
    return Problem(id="a", prompt="How many?", reference=reference, meta=meta)


# --- mathematics ---


@needs_maths
@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("16 - 3 = 13\n#### 13", "13", True),
        ("#### 5\nWait, no.\n#### $1,234.50.", "1234.5", True),
        ("#### 18 dollars for 3 people", "18", True),
        ("####\n\n18", "18", True),
        ("#### **18**", "18", True),
        ("#### \u221218", "-18", True),
        ("#### unknown, but \\boxed{7}", "7", True),
        ("She has 3 apples and 4 pears, 7 in all.", "7", True),
        ("That is 40%.", "40", True),
        ("It fell by -$5", "-5", True),
        ("It earns \\$18 per day", "18", True),
        ("\\[ x = \\boxed{18} \\] dollars for 3", "18", True),
        ("1,000,000 people", "1000000", True),
        ("#### 1018.00", "1,018", True),
        ("#### 1. Cost\n3 * 4\n#### 2. Total\n30 + 12\n\\boxed{42}", "42", True),  # headings
        ("#### 1. Cost\n3 * 4\n#### 2. Total\n30 + 12\n\\boxed{42}", "2", False),
        ("#### 1) Cost\n#### **2 Total**\nso \\boxed{42}", "42", True),
        ("#### 42\n#### 2. Check\n42 - 30 = 12", "42", True),
        ("#### 1/2", "1", False),
        ("#### 1/2", "0.5", True),
        ("#### 2+2=4", "2", False),
        ("#### 2+2=4", "4", True),
        ("#### 20 - 25", "20", False),
        ("#### 20 to 25", "20", False),
        ("#### $18$\nThat is 3 more.", "18", True),
        ("#### \\(18\\)\nThat is 3 more.", "18", True),
        ("#### 18 km/h, not 3", "18", False),
        ("#### 18 km/h\nThat is 3 more.", "18", True),
        ("#### 18 cm^2 (the area)\nThat is 3 more.", "18", True),
        ("#### 18 \\text{ dollars}.\nThat is 3 more.", "18", True),
        ("#### 18 USD\nThat is 3 more.", "18", True),
        ("#### 18 (9 eggs, 2 each: 9 * 2 = 18)", "18", True),
        ("#### 18 dollars (9 * 2)\nThat is 3 more.", "18", True),
        ("#### 3 (4) = 12", "12", True),
        ("#### +18", "18", True),
        ("#### ~18", "18", True),
        ("\\boxed{50\\%}", "50", True),
        ("Step 1: \\boxed{3}. Step 2: \\boxed{4}", "4", True),
        ("\\boxed{4}\n\nWait, that is wrong: \\boxed{3}", "4", False),
        ("\\boxed{\\boxed{4}}", "4", True),
        ("\\boxed{50%}", "50", True),
        ("#### 50\\%", "50", True),
        ("so $50\\%$", "50%", True),
        ("\\boxed{50\\%}", "0.5", False),
        ("#### 12", "13", False),
        ("\\boxed{13} ... #### 12", "13", False),
        ("none", "13", False),
        ("", "13", False),
    ],
)
def test_numbers(empty: Path, text: str, reference: str, right: bool) -> None:
    task = Maths(name="gsm8k", path=empty, numbers=True)
    assert task.score(problem(reference), text).correct is right


@needs_maths
@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("so \\boxed{\\dfrac{2}{4}}", "\\frac12", True),
        ("so \\boxed{0.5}", "\\frac{1}{2}", True),
        ("so $\\boxed{(3, \\pi/2)}$", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("so $\\boxed{x^2 + 2x + 1}$", "(x+1)^2", True),
        ("so \\boxed{3} but #### 4", "3", True),  # the mark is GSM8K's own
        ("so \\boxed{(\\pi/2, 3)}", "\\left( 3, \\frac{\\pi}{2} \\right)", False),
        ("so \\boxed{\\frac{1}{3}}", "\\frac12", False),
        ("I cannot say.", "\\frac12", False),
    ],
)
def test_expressions(empty: Path, text: str, reference: str, right: bool) -> None:
    score = Maths(name="math500", path=empty).score(problem(reference), text)
    assert score.correct is right
    assert right or f"expected {reference}" in score.detail


@needs_maths
@pytest.mark.parametrize(
    "text", ["\\boxed{9^{9^{9^{9}}}}", "#### 9**9**9**9**9", "(" * 3000, "$" * 3001, "#### 1" + " " * 9000 + "="]
)
def test_hostile_answers_do_not_hang(empty: Path, text: str) -> None:
    started = time.monotonic()
    assert not Maths(name="math500", path=empty).score(problem("13"), text).correct
    assert time.monotonic() - started < 30


@needs_maths
def test_scoring_works_in_a_thread(empty: Path) -> None:
    """math-verify's own time limit is a signal, and only the main thread may set one."""
    scores: list[bool | None] = []
    task = Maths(name="math500", path=empty)
    thread = threading.Thread(target=lambda: scores.append(task.score(problem("18"), "so 18").correct))
    thread.start()
    thread.join()
    assert scores == [True]


@needs_maths
def test_reference_of_another_kind_is_refused(empty: Path) -> None:
    with pytest.raises(TaskDataError, match="reference='yes'; expected a number"):
        Maths(name="gsm8k", path=empty, numbers=True).prepare(problem("yes"))


def test_missing_library_is_named_with_its_remedy(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"scoring gsm8k needs the library math_verify.*pip install 'parsedec\[eval\]"
    ):
        Maths(name="gsm8k", path=empty)
    with pytest.raises(ConfigError, match=r"openai/gsm8k needs the library datasets.*or give a local file"):
        Hub(dataset="openai/gsm8k", rows="gsm8k").problems()


# --- choices ---


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("The answer is: **B**", "B"),
        ("**Answer: B**", "B"),
        ("Answer: B) Paris", "B"),
        ("The correct answer is option B.", "B"),
        ("B", "B"),
        ("(B)", "B"),
        ("**B. Paris**", "B"),
        ("so $\\boxed{B}$", "B"),
        ("so \\boxed{\\text{B}}", "B"),
        ("The answer is $\\boxed{B}$", "B"),
        ("I first thought the answer is (A). But no: the answer is (B).", "B"),
        ("The answer is (B), as C and D are wrong.", "B"),
        ("\\boxed{B}, not A", "B"),
        ("A is wrong, D is wrong. So B.", "B"),
        ("So B. I hope this helps.", "B"),  # the word
        ("B. A cat is no fish.", "B"),
        ("The answer is B because A and C are wrong.", "B"),
        ("B, as D is wrong.", "B"),
        ("The answer is A because B and C are wrong.", "A"),
        ("The correct answer is option A since it is the largest.", "A"),
        ("Answer: A cat", None),
        ("Therefore, option B is correct.", "B"),
        ("D is wrong. So **(B)** is the correct answer.", "B"),
        ("A is the only right one, as B is not correct.", "A"),
        ("B is not correct.", None),
        ("Answer: a", "A"),
        ("answer: a\nThat is all.", "A"),
        ("the answer is b.", "B"),
        ("The answer is (c), not B.", "C"),
        ("**Answer:** d) Paris", "D"),
        ("**Answer: b**", "B"),
        ("The answer is $\\boxed{b}$", "B"),
        ("so \\boxed{\\text{(b)}}", "B"),
        ("The answer is a. Paris", "A"),
        ("First the answer is A. No: the answer is c.", "C"),
        ("The answer is (A). To answer a, b and c at once is hard.", "A"),
        ("the answer is a cat", None),
        ("the answer is a 3-day week", None),
        ("Answer: a whole week", None),
        ("The answer is a.m., not p.m.", None),
        ("so \\boxed{a = 3}", None),
        ("The answer is d/dx, so a", None),
        ("the answer is e.", None),
        ("The answer is E.", None),  # no such option
        ("Vitamin D3 and plan-B4", None),
        ("the answer is unclear", None),
        ("", None),
    ],
)
def test_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text, 4) == letter


def test_ten_options_and_the_word_i(empty: Path) -> None:
    assert chosen_letter("The answer is (J).", 10) == "J"
    assert chosen_letter("It is G, I think.", 10) == "G"
    assert chosen_letter("The answer is I.", 10) == "I"


def test_choice_counts_options_and_leaves_broken_questions_out(tmp_path: Path) -> None:
    prompt = "Which?\nA. odd line in the question\n\nA. one\nB. two\nC. three"
    rows = [
        {"id": "1", "prompt": prompt, "reference": "C", "meta": {}},
        {"id": "2", "prompt": prompt, "reference": "A", "meta": {"scoreable": False}},
        {"id": "3", "prompt": prompt, "reference": "A", "meta": {"accept": ["A", "B"]}},
    ]
    path = tmp_path / "choice.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = Choice(name="mmlu", path=path)
    first, last = task.problems()
    assert (first.id, last.id) == ("1", "3")
    assert first.prompt.startswith(prompt + "\n\nReason step by step.")
    assert first.meta["options"] == 3
    assert task.score(first, "The answer is (C)").correct
    assert task.score(first, "The answer is (D)").detail == "no letter found, expected C"
    assert task.score(last, "The answer is (B)").correct
    assert task.score(last, "The answer is (C)").detail == "chose C, expected A or B"
    path.write_text(json.dumps(rows[0] | {"reference": "D"}))
    with pytest.raises(TaskDataError, match="reference='D' and options ABC"):
        task.problems()


# --- conversations ---


def test_conversation_goes_on_with_the_models_own_answers(empty: Path) -> None:
    task = OpenEnded(name="mt_bench", path=empty, turns=3)
    first = task.prepare(problem("", turns=["one?", "two?", "three?", "four?"]))
    assert first.asked == "one?"
    second = first.next_turn("1")
    assert second is not None
    third = second.next_turn("2")
    assert third is not None
    assert [p.id for p in (first, second, third)] == ["a", "a/turn2", "a/turn3"]
    assert third.asked == [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "three?"},
    ]
    assert third.next_turn("3") is None
    assert task.prepare(problem("")).follow_ups == ()
    assert task.score(first, "anything").correct is None


def test_every_turn_is_a_request_and_a_resumed_run_finishes_the_conversation(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [{"id": name, "prompt": "w1 w2", "meta": {"turns": ["w1 w2", "w3"]}} for name in ("a", "b")]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = OpenEnded(name="chat", path=path)
    engine = Parse(tiny.model("llama"), outer=TargetOnly())
    settings = Settings(limits=Limits(max_new_tokens=6), sampling=Sampling(), seed=0, warmup=0)

    def run(answered: list[dict[str, Any]]) -> list[dict[str, Any]]:
        arm = Arm("run", engine, requests=answered)
        run_arms([arm], task, task.problems(), settings, lambda name: None)
        return arm.requests

    whole = run([])
    assert [request["id"] for request in whole] == ["a", "a/turn2", "b", "b/turn2"]
    first = engine.generate("w1 w2", max_new_tokens=6).text
    turns = [("user", "w1 w2"), ("assistant", first), ("user", "w3")]
    dialogue = [{"role": role, "content": text} for role, text in turns]
    assert whole[1]["result"]["text"] == engine.generate(dialogue, max_new_tokens=6).text
    for interrupted in (1, 2, 3):
        resumed = run(whole[:interrupted])
        assert [(r["id"], r["result"]["text"]) for r in resumed] == [(r["id"], r["result"]["text"]) for r in whole]
    summary = summarise(whole)
    assert (summary["accuracy"], summary["requests"], summary["errors"]) == (None, 4, 0)


def test_failed_turn_of_an_unscored_task_is_no_wrong_answer(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "w1 " * 600, "meta": {"turns": ["w1 " * 600, "w3"]}}))
    arm = Arm("run", Parse(tiny.model("llama"), outer=TargetOnly()))
    settings = Settings(limits=Limits(max_new_tokens=6), sampling=Sampling(), seed=0, warmup=0)
    task = OpenEnded(name="chat", path=path)
    run_arms([arm], task, task.problems(), settings, lambda name: None)
    assert [(request["id"], request["correct"]) for request in arm.requests] == [("a", None)]
    assert (summarise(arm.requests)["accuracy"], summarise(arm.requests)["errors"]) == (None, 1)


# --- the hub: rows with the columns its datasets document ---

OPTIONS = "qrstuvwxyz"
ROWS: dict[str, tuple[dict[str, Any], Problem, str, str]] = {
    "gsm8k": (
        {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        Problem(id="gsm8k/0", prompt="How many?", reference="4", meta={"solution": "2 + 2 = <<2+2=4>>4\n#### 4"}),
        "#### 4",
        "#### 5",
    ),
    "math500": (
        {"problem": "Half?", "solution": "\\boxed{\\frac12}", "answer": "\\frac12", "subject": "Algebra", "level": 1,
         "unique_id": "test/algebra/1.json"},
        Problem(id="math500/test/algebra/1", prompt="Half?", reference="\\frac12",
                meta={"subject": "Algebra", "level": 1, "solution": "\\boxed{\\frac12}"}),
        "\\boxed{0.5}",
        "\\boxed{0.6}",
    ),
    "mmlu_redux": (
        {"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": 0,
         "error_type": "wrong_groundtruth", "source": None, "correct_answer": "2", "potential_reason": None},
        Problem(id="mmlu_redux/virology/0", prompt="Which?\n\nA. one\nB. two\nC. three\nD. four", reference="C",
                meta={"subject": "virology", "error_type": "wrong_groundtruth", "original_answer": "A", "options": 4,
                      "accept": ["C"], "scoreable": True}),
        "The answer is (C).",
        "The answer is (A).",
    ),
    "mmlu_pro": (
        {"question_id": 70, "question": "Which?", "options": list(OPTIONS), "answer": "J", "answer_index": 9,
         "cot_content": "", "category": "law", "src": "x"},
        Problem(id="mmlu_pro/70", prompt="Which?\n\n" + "\n".join(map("{}. {}".format, "ABCDEFGHIJ", OPTIONS)),
                reference="J", meta={"subject": "law", "options": 10}),
        "The answer is (J).",
        "The answer is (I).",
    ),
    "gpqa": (
        {"Question": "Which?", "Correct Answer": "right\n", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2",
         "Incorrect Answer 3": "w3", "Record ID": "rec06", "Subdomain": "Genetics"},
        Problem(id="gpqa/rec06", prompt="Which?\n\nA. w3\nB. right\nC. w1\nD. w2", reference="B",
                meta={"subject": "Genetics", "options": 4}),
        "The answer is (B).",
        "The answer is (A).",
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f",
         "test": "def check(f):\n    assert f() == 1"},
        Problem(id="HumanEval/0", prompt="def f():\n", reference="    return 1\n",
                meta={"entry_point": "f", "test": "def check(f):\n    assert f() == 1"}),
        "    return 1\n",
        "    return 2\n",
    ),
    "mbpp": (
        {"task_id": 11, "text": "Write f.", "code": "def f(): return 1", "test_list": ["assert f() == 1"],
         "test_setup_code": "", "challenge_test_list": []},
        Problem(id="mbpp/11", prompt="Write f. Your code should pass these tests:\n\nassert f() == 1",
                reference="def f(): return 1", meta={"test_list": ["assert f() == 1"], "test_setup_code": ""}),
        "def f(): return 1",
        "def f(): return 2",
    ),
    "mt_bench": (
        {"prompt": ["one?", "two?"], "prompt_id": 77, "category": "writing", "reference": []},
        Problem(id="mt_bench/77", prompt="one?", reference="", meta={"category": "writing", "turns": ["one?", "two?"]}),
        "",
        "",
    ),
    "spec_bench": (
        {"question_id": 81, "category": "rag", "turns": ["one?"]},
        Problem(id="spec_bench/81", prompt="one?", reference="", meta={"category": "rag", "turns": ["one?"]}),
        "",
        "",
    ),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`datasets` replaced by what it would return; the calls it got."""
    calls: list[dict[str, Any]] = []

    def load_dataset_builder(dataset: str, config: str | None, **settings: Any) -> SimpleNamespace:
        calls.append({"dataset": dataset, "config": config, **settings})
        name = next(name for name in ROWS if configured(name).hub.dataset == dataset)

        def as_dataset(split: str) -> list[dict[str, Any]]:
            calls[-1]["split"] = split
            return [ROWS[name][0]]

        return SimpleNamespace(base_path=None, download_and_prepare=lambda: None, as_dataset=as_dataset)

    fake = SimpleNamespace(
        load_dataset_builder=load_dataset_builder, get_dataset_config_names=lambda *_, **__: ["virology"]
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(base, "find_spec", lambda name: object())
    return calls


def configured(name: str, *overrides: str) -> Any:
    return composed("config", f"task={name}", "output=unused", *overrides).task


@needs_maths
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_hub_become_problems_that_are_scored(hub: list[dict[str, Any]], name: str) -> None:
    _, stored, right, wrong = ROWS[name]
    rows = configured(name).hub
    assert instantiate(rows).problems() == [stored]
    task = instantiate(configured(name, "task.n=1"))
    asked = task.problems()[0]
    assert asked.prompt.startswith(stored.prompt) or stored.prompt.strip() in asked.prompt
    unscored = name in ("mt_bench", "spec_bench")
    assert task.score(asked, right).correct is (None if unscored else True)
    assert task.score(asked, wrong).correct is (None if unscored else False)
    assert hub[0]["dataset"] == rows.dataset
    assert hub[0]["split"] == rows.split


@needs_maths
@pytest.mark.parametrize("name", ROWS)
def test_a_file_of_the_hubs_own_rows_is_the_same_task(tmp_path: Path, name: str) -> None:
    """As it is downloaded from the hub, or kept beside a benchmark's code."""
    row, stored, *_ = ROWS[name]
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (asked,) = instantiate(configured(name, f"task.path={path}", "task.n=1")).problems()
    assert asked.id.split("/")[-1] == stored.id.split("/")[-1]
    assert asked.reference == stored.reference
    path.write_text(json.dumps({"question": "How many?", "answer": "four"}))
    with pytest.raises(TaskDataError, match=r"line 1: id, .* missing.*or \w+'s columns on the hub \(\w+Error: "):
        instantiate(configured(name, f"task.path={path}", "task.n=1")).problems()


def test_other_columns_than_expected_are_located(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(TaskDataError, match=r"openai/gsm8k/main, row 0 .*KeyError: 'subject'.*it has .*question"):
        Hub(dataset="openai/gsm8k", rows="math500", config="main").problems()
    with pytest.raises(ConfigError, match=r"hub\.rows='x' is unknown; expected one of gsm8k"):
        Hub(dataset="openai/gsm8k", rows="x")


def test_unreachable_hub_is_explained(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset_builder", refuse)
    with pytest.raises(TaskDataError, match=r"openai/gsm8k .*ConnectionError: no route.*task\.path=FILE"):
        Hub(dataset="openai/gsm8k", rows="gsm8k").problems()


@pytest.mark.parametrize(
    ("corrected", "accept"),
    [("2", ["C"]), ("d", ["D"]), (" two ", ["B"]), ("one or two", ["A"]), (None, ["A"]), ("7", ["A"])],
)
def test_corrected_answers_of_mmlu_redux(corrected: str | None, accept: list[str]) -> None:
    from parsedec.tasks.hub import ROWS as CONVERT

    stored = CONVERT["mmlu_redux"](ROWS["mmlu_redux"][0] | {"correct_answer": corrected}, 0, "virology")
    assert stored.meta["accept"] == accept
    assert stored.meta["scoreable"] is (accept != ["A"])  # not one letter: the original stands, and is not counted


# --- the datasets' own answer keys ---

needs_data = pytest.mark.skipif(not DATA, reason="benchmark files are not part of the project; PARSEDEC_DATA=DIR")
FILED = {"gsm8k": "gsm8k_test", "math500": "math500", "mmlu_redux": "mmlu_redux", "humaneval": "humaneval",
         "mbpp": "mbpp_test", "mt_bench": "mt_bench"}  # fmt: skip


@needs_data
@needs_maths
@pytest.mark.parametrize("name", FILED)
def test_reference_answers_score_right_and_wrong_ones_wrong(name: str) -> None:
    path = Path(DATA or "") / f"{FILED[name]}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in PARSEDEC_DATA")
    n = 3 if name in ("humaneval", "mbpp") else 60  # each answer of those is a process
    task = instantiate(configured(name, f"task.path={path}", f"task.n={n}", "task.offset=20"))
    problems = task.problems()
    for stored in problems:
        key = {"humaneval": stored.reference, "mbpp": f"```python\n{stored.reference}\n```"}
        right = key.get(name) or stored.meta.get("solution") or f"The answer is ({stored.reference})."
        expected = None if name == "mt_bench" else True
        assert task.score(stored, right).correct is expected, stored.id
        assert not task.score(stored, "    return None\n").correct, stored.id
        assert not task.score(stored, "The answer is (7777777).").correct, stored.id
