"""Where labels come from: a task's checker, labelled steps, or - for any pair and task - final answers alone.

Every source gives two disjoint sets of questions: `fit`, on which thresholds are found, and `check`, on which the goal
is checked. If no second set is named, a share of the first is held out, drawn by problem, so that all solutions to one
problem stay in the same set.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from parsedec.calibration.risk import drawn
from parsedec.calibration.samples import right_prefixes
from parsedec.errors import ConfigError
from parsedec.experiment.problems import digest, digests
from parsedec.judge.probe import read_card, weights_of
from parsedec.models.language_model import LanguageModel
from parsedec.tasks.base import Problem, Task, score_of_lines
from parsedec.tasks.steps import BETWEEN, StepFile, step_ends
from parsedec.text.spelling import Draft

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """A problem, the part it belongs to, and the task that scores answers to it."""

    part: str
    problem: Problem
    task: Task


Labels = tuple[tuple[bool, ...] | None, bool]  # (per cut whether the prefix is right, whether the draft is)


class Source(ABC):
    """Base of all sources.

    prefixes  whether it knows which prefixes are right, not only which answers
    drafts    whether the stack's draft model writes what is judged
    controls  what a fitted threshold keeps in bounds, in words
    """

    prefixes: ClassVar[bool]
    drafts: ClassVar[bool]
    controls: ClassVar[str]

    @abstractmethod
    def questions(self, seed: int) -> list[Question]:
        """The questions of `fit`, then those of `check`; ids are unique within a part."""


@dataclass(frozen=True, kw_only=True)
class Answers(Source):
    """Labels of the final answers to any task; nothing is known about prefixes.

    What is kept in bounds is the outcome: the share of spoilt requests, which the target alone answers rightly and the
    two levels together do not. The accuracy lost is that share minus the requests gained, so never more than the share.
    Whether a kept prefix was right is not known; a target may recover from a wrong one.

    task      any task
    fit       settings of the task for the problems on which thresholds are fitted
    check     settings for the problems on which the goal is checked; null: `held_out` of the former
    held_out  share of the problems held out where `check` is null
    """

    prefixes: ClassVar[bool] = False
    drafts: ClassVar[bool] = True
    controls: ClassVar[str] = "requests the target alone answers rightly and PARSE does not"

    task: Any  # a Task; Hydra builds it
    fit: Mapping[str, Any]
    check: Mapping[str, Any] | None = None
    held_out: float = 0.5

    def __post_init__(self) -> None:
        require_share(self.held_out)

    def questions(self, seed: int) -> list[Question]:
        fit = self._with(self.fit, "fit")
        check = None if self.check is None else self._with(self.check, "check")
        return divided(fit, check, self.held_out, seed)

    def label(self, question: Question, draft: Draft, cuts: Sequence[int]) -> Labels:
        """(by cut whether the prefix is right, or None where that is not known; whether the draft is)."""
        return None, right(question.task, question.problem, draft.text)

    def _with(self, settings: Mapping[str, Any], name: str) -> Task:
        try:
            changed: Task = replace(self.task, **settings)
        except TypeError as error:
            raise ConfigError(
                f"labels.{name}={dict(settings)} does not fit {type(self.task).__name__}: {error}. Expected settings "
                f"of that task ({', '.join(field.name for field in fields(self.task))}), e.g. labels.{name}={{n: 100}}."
            ) from error
        return changed


@dataclass(frozen=True, kw_only=True)
class Checker(Answers):
    """Labels by a task that can check every line of an answer, as the zoo's tasks can."""

    prefixes: ClassVar[bool] = True
    controls: ClassVar[str] = "drafts of which the kept prefix is wrong"

    def label(self, question: Question, draft: Draft, cuts: Sequence[int]) -> Labels:
        score = score_of_lines(question.task, question.problem, draft.text)
        return right_prefixes(draft, cuts, score), bool(score.correct)


def right(task: Task, problem: Problem, text: str) -> bool:
    """Whether an answer is right; raises ConfigError for an open-ended question, which no program can score."""
    correct = task.score(problem, text).correct
    if correct is None:
        raise ConfigError(f"{problem.id} is open-ended: no program scores its answers. Calibrate on another task.")
    return correct


@dataclass(frozen=True, kw_only=True)
class Steps(Source):
    """Labels from a file of solutions whose first wrong step is marked. Their texts are judged as if they were drafts.

    path        JSONL file for the fit, in a format of `tasks.steps`
    check_path  the same for the check; null: `held_out` of `path`
    n, check_n  how many problems to take of each; null: all
    shuffle     seed of the random order in which they are taken; null: the order of the file
    held_out    share of the problems held out where `check_path` is null
    separator   text between two steps of what is judged
    """

    prefixes: ClassVar[bool] = True
    drafts: ClassVar[bool] = False
    controls: ClassVar[str] = "solutions of which the kept prefix is wrong"

    path: str | Path
    check_path: str | Path | None = None
    n: int | None = None
    check_n: int | None = None
    shuffle: int | None = 0
    held_out: float = 0.5
    separator: str = BETWEEN

    def __post_init__(self) -> None:
        require_share(self.held_out)

    def questions(self, seed: int) -> list[Question]:
        fit = StepFile(path=self.path, n=self.n, shuffle=self.shuffle)
        check = None
        if self.check_path is not None:
            check = StepFile(path=self.check_path, n=self.check_n, shuffle=self.shuffle)
        return divided(fit, check, self.held_out, seed)

    def draft(self, target: LanguageModel, problem: Problem) -> tuple[Draft, list[int], list[bool]]:
        """The solution as a draft, a cut at the end of each step, and which prefixes are right.

        Two steps that end in one token share a cut, which is right if both are.
        """
        steps = problem.meta["steps"]
        draft = Draft.of(target, target.encode(self.separator.join(steps), plain=True), ended=True)
        right = step_ends(draft, problem, self.separator)
        return draft, list(right), list(right.values())


def divided(fit: Task, check: Task | None, held_out: float, seed: int) -> list[Question]:
    """The questions of two tasks, or of one task of which a share is held out.

    Raises ConfigError if fit and check share a problem, or if one of them is empty.
    """
    problems = fit.problems()
    if check is None:
        held = drawn(groups(problems), held_out, seed, "held out")  # all solutions to a problem stay together
        parts = ["check" if out else "fit" for out in held]
        asked = [Question(part, problem, fit) for part, problem in zip(parts, problems, strict=True)]
        asked.sort(key=lambda question: question.part != "fit")  # stable: keeps the order within a part
    else:
        others = check.problems()
        shared = {problem.id for problem in problems} & {problem.id for problem in others}
        texts = {problem.prompt for problem in problems}
        if shared := shared | {problem.id for problem in others if problem.prompt in texts}:
            raise ConfigError(
                f"{len(shared)} problems are in both the fit and the check, e.g. {min(shared)}; expected none, or the "
                "check says nothing. Choose other problems for one of them."
            )
        asked = [Question("fit", p, fit) for p in problems] + [Question("check", p, check) for p in others]
    if {question.part for question in asked} != {"fit", "check"}:
        raise ConfigError(f"{len(asked)} problems leave a part without any; expected some to fit and some to check.")
    return asked


def groups(problems: Sequence[Problem]) -> list[str]:
    """For each solution, what identifies its problem: the id of the first one with the same prompt."""
    first: dict[str, str] = {}
    return [first.setdefault(problem.prompt, problem.id) for problem in problems]


def prompt_digests(problems: Iterable[Problem]) -> list[str]:
    """Sorted digests of prompts, by which a card of trained probes records the problems they know."""
    return sorted({_of_prompt(problem) for problem in problems})


def refuse_known(judge: object, questions: Sequence[Question]) -> None:
    """Raise ConfigError if the weights of `judge` were trained, or chosen, on problems among the questions."""
    for source in sorted(weights_of(judge)):
        problems = read_card(source)[0].problems
        if problems is None:
            log.warning(
                "the card of %s does not say which problems its weights were trained on; if they are among those asked "
                "here, thresholds look safer than they are", source,
            )  # fmt: skip
            continue
        known = set(problems)
        if shared := [one for one in questions if _of_prompt(one.problem) in known]:
            raise ConfigError(
                f"{len(shared)} of {len(questions)} problems, e.g. {shared[0].problem.id}, are among those that the "
                f"weights of '{source}' were trained or chosen on; expected none, or the judge looks better than it "
                "is. Choose other problems, e.g. another split or offset: labels.fit={n: 100, offset: 1000}."
            )


def _of_prompt(problem: Problem) -> str:
    return digest(" ".join(problem.prompt.split()))


def asked_of(questions: Sequence[Question]) -> dict[str, str]:
    """Digests of questions, by the ids of their problems. The part a question belongs to is in its digest."""
    of = digests({question.problem.id: question.problem for question in questions})
    return {question.problem.id: digest(question.part, of[question.problem.id]) for question in questions}


def require_share(held_out: float) -> None:
    if not 0 < held_out < 1:
        raise ConfigError(f"labels.held_out={held_out}; expected a share between 0 and 1.")
