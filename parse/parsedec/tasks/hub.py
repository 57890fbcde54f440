"""Benchmarks from the Hugging Face hub: where each is, and how its rows become problems.

`datasets` (the extra `eval`) downloads and caches them. A local file with the same columns works as well:
dataset=json and files=PATH.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from parsedec.errors import ConfigError
from parsedec.models.checkpoints import Checkpoint
from parsedec.tasks.base import Problem, TaskDataError, require_extra

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EVERY_CONFIG = "*"

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A split of a dataset on the hub.

    dataset   its id, or a builder of `datasets` such as json
    rows      the benchmark whose columns it has: a key of ROWS
    config    its configuration; "*": all of them, one after another; None: the only one
    split     the split to use
    revision  commit or tag of the dataset; None: the newest
    files     path or address of the data, for builders that read files
    """

    dataset: str
    rows: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    files: str | None = None

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise ConfigError(f"hub.rows={self.rows!r} is unknown; expected one of {', '.join(ROWS)}.")

    @property
    def _place(self) -> Checkpoint:
        return Checkpoint(f"datasets/{self.dataset}", revision=self.revision)

    def problems(self) -> list[Problem]:
        """All problems of the split, in its order. Raises TaskDataError if it cannot be loaded."""
        require_extra("datasets", f"the hub's dataset {self.dataset}", "or give a local file: task.path=FILE.jsonl")
        import datasets  # here, since it takes a second to import and local files do not need it

        problems = []
        for config in self._configs(datasets):
            try:
                builder = datasets.load_dataset_builder(
                    self.dataset, config, revision=self._place.commit, data_files=self.files
                )
                self._place.read_at(commit_in(builder.base_path))
                builder.download_and_prepare()
                split = builder.as_dataset(split=self.split)
            except Exception as error:  # network, access, a missing split and more: each chained and shown
                raise TaskDataError(
                    f"cannot load {self.dataset} (config {config}, split {self.split}) from the hub: "
                    f"{type(error).__name__}: {error}. Check the network and your access to it (hf auth login for "
                    "gated ones), or give a local file: task.path=FILE.jsonl."
                ) from error
            problems += to_problems(split, ROWS[self.rows], where=f"{self.dataset}/{config}", config=config or "")
        return problems

    def _configs(self, datasets: Any) -> list[str | None]:
        if self.config != EVERY_CONFIG:
            return [self.config]
        try:
            return sorted(datasets.get_dataset_config_names(self.dataset, revision=self._place.commit))
        except Exception as error:  # as above
            raise TaskDataError(
                f"cannot list the configurations of {self.dataset}: {type(error).__name__}: {error}. Check the "
                "network, or give a local file: task.path=FILE.jsonl."
            ) from error


def commit_in(address: str | None) -> str | None:
    """The commit in an address of files on the hub, hf://datasets/NAME@COMMIT; None if there is none."""
    found = re.search(r"@([0-9a-f]{40})\b", address or "")
    return found[1] if found else None


def to_problems(
    rows: Iterable[Row], convert: Callable[[Row, int, str], Problem], *, where: str, config: str = ""
) -> list[Problem]:
    """Every row as a problem. Raises TaskDataError that names a row without the benchmark's columns."""
    problems = []
    for number, row in enumerate(rows):
        try:
            problems.append(convert(row, number, config))
        except (KeyError, IndexError, TypeError, ValueError) as bad:
            raise TaskDataError(
                f"{where}, row {number} does not have the columns expected ({type(bad).__name__}: {bad}); it has "
                f"{sorted(row)}. Set hub.rows to its benchmark, or hub.revision to one with these columns."
            ) from bad
    return problems


def multiple_choice(question: str, options: Iterable[str]) -> str:
    """The prompt of a multiple-choice problem: the question, an empty line, and a line `A. …` per option."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\n\n{listed}"


def _gsm8k(row: Row, number: int, _: str) -> Problem:
    solution, marker, reference = str(row["answer"]).rpartition("####")
    if not marker:
        raise ValueError(f"answer {row['answer']!r} has no ####")
    meta = {"solution": solution.rstrip() + f"\n#### {reference.strip()}"}
    return Problem(id=f"gsm8k/{number}", prompt=row["question"], reference=reference.strip(), meta=meta)


def _math500(row: Row, _: int, __: str) -> Problem:
    meta = {key: row[key] for key in ("subject", "level", "solution")}
    identity = f"math500/{str(row['unique_id']).removesuffix('.json')}"
    return Problem(id=identity, prompt=row["problem"], reference=row["answer"], meta=meta)


def _mmlu_redux(row: Row, number: int, config: str) -> Problem:
    options = [str(option) for option in row["choices"]]
    original, accept = LETTERS[int(row["answer"])], []
    if row["error_type"] == "ok":
        accept = [original]
    elif row["error_type"] == "wrong_groundtruth":
        accept = _letters(row["correct_answer"], options)
    meta = {"subject": config, "error_type": row["error_type"], "original_answer": original, "options": len(options)}
    return Problem(
        id=f"mmlu_redux/{config}/{number}",
        prompt=multiple_choice(row["question"], options),
        reference=accept[0] if len(accept) == 1 else original,
        meta=meta | {"accept": accept or [original], "scoreable": len(accept) == 1},
    )


def _letters(corrected: object, options: list[str]) -> list[str]:
    """The letters of an annotator's corrected answer, written as an index, a letter or an option; empty if it is none
    of these."""
    text = str(corrected if corrected is not None else "").strip()
    if text.isdigit() and int(text) < len(options):
        return [LETTERS[int(text)]]
    if len(text) == 1 and text.upper() in LETTERS[: len(options)]:
        return [text.upper()]
    return [LETTERS[i] for i, option in enumerate(options) if option.strip() == text and text]


def _mmlu_pro(row: Row, _: int, __: str) -> Problem:
    options = [str(option) for option in row["options"]]
    if row["answer"] not in LETTERS[: len(options)]:
        raise ValueError(f"answer {row['answer']!r} is none of the {len(options)} options")
    return Problem(
        id=f"mmlu_pro/{row['question_id']}",
        prompt=multiple_choice(row["question"], options),
        reference=row["answer"],
        meta={"subject": row["category"], "options": len(options)},
    )


def _gpqa(row: Row, _: int, __: str) -> Problem:
    right = str(row["Correct Answer"]).strip()
    options = [right, *(str(row[f"Incorrect Answer {i}"]).strip() for i in (1, 2, 3))]
    # seeded by the record's own id, so that the right answer's place varies, but is the same in every run
    random.Random(str(row["Record ID"])).shuffle(options)
    return Problem(
        id=f"gpqa/{row['Record ID']}",
        prompt=multiple_choice(str(row["Question"]).strip(), options),
        reference=LETTERS[options.index(right)],
        meta={"subject": row["Subdomain"], "options": len(options)},
    )


def _humaneval(row: Row, _: int, __: str) -> Problem:
    meta = {"entry_point": row["entry_point"], "test": row["test"]}
    return Problem(id=row["task_id"], prompt=row["prompt"], reference=row["canonical_solution"], meta=meta)


def _mbpp(row: Row, _: int, __: str) -> Problem:
    """Both configurations: `full` (text, test_setup_code) and `sanitized` (prompt, test_imports)."""
    told = row["text"] if "text" in row else row["prompt"]
    tests = [str(test) for test in row["test_list"]]
    setup = row["test_setup_code"] if "test_setup_code" in row else "\n".join(row["test_imports"])
    return Problem(
        id=f"mbpp/{row['task_id']}",
        prompt=f"{str(told).strip()} Your code should pass these tests:\n\n" + "\n".join(tests),
        reference=row["code"],
        meta={"test_list": tests, "test_setup_code": setup},
    )


def _mt_bench(row: Row, _: int, __: str) -> Problem:
    turns = [str(turn) for turn in row["prompt"]]
    meta = {"category": row["category"], "turns": turns}
    return Problem(id=f"mt_bench/{row['prompt_id']}", prompt=turns[0], reference="", meta=meta)


def _spec_bench(row: Row, _: int, __: str) -> Problem:
    turns = [str(turn) for turn in row["turns"]]
    meta = {"category": row["category"], "turns": turns}
    return Problem(id=f"spec_bench/{row['question_id']}", prompt=turns[0], reference="", meta=meta)


ROWS: Mapping[str, Callable[[Row, int, str], Problem]] = {
    "gsm8k": _gsm8k,
    "math500": _math500,
    "mmlu_redux": _mmlu_redux,
    "mmlu_pro": _mmlu_pro,
    "gpqa": _gpqa,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "mt_bench": _mt_bench,
    "spec_bench": _spec_bench,
}
