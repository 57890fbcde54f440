"""Labelled answers: solutions, solutions with an injected error, and real drafts.

The task's checker decides: the ends of lines before the first wrong one are Correct, those from it on Incorrect. Only
right text is learnt as text.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from parsedec.models.language_model import LanguageModel
from parsedec.segmenters import Lines, Segmenter
from parsedec.tasks.base import Problem, Score, Task, score_of_lines
from parsedec.text.spelling import Draft
from parsedec.training.packing import Answer


class Solution(Protocol):
    """Writes the lines of a solution; with `error_at`, that line is wrong (`zoo_arithmetic.solution`)."""

    def __call__(self, problem: Problem, rng: random.Random, error_at: int | None = None) -> list[str]: ...


SEGMENTER: Segmenter = Lines()


def mark(
    model: LanguageModel,
    task: Task,
    problem: Problem,
    tokens: Sequence[int],
    ended: bool,
    *,
    teach_until_error: bool = False,
) -> Answer:
    """The answer with a verdict at each of its line ends.

    teach_until_error  learn the lines before the first wrong one as text. Right for solutions with an injected error,
                       which begin like any other solution; wrong for drafts, whose habits are not to be learnt.
    Raises ConfigError for a task that does not say which line is wrong: all prefixes would pass for right.
    """
    draft = Draft.of(model, tokens, ended)
    cuts = SEGMENTER.cuts(draft)
    score = score_of_lines(task, problem, draft.text)
    wrong = score.first_wrong_line
    texts = [draft.text[: draft.ends[cut - 1]] for cut in cuts]
    right = [wrong is None or text.rstrip().count("\n") < wrong for text in texts]
    if score.correct:
        taught = len(draft.tokens) + ended
    else:
        kept = next((k for k, good in enumerate(right) if not good), len(right))
        # + 1: the line break after the last right line is still right
        taught = min(cuts[kept - 1] + 1, len(draft.tokens)) if teach_until_error and kept else 0
    return Answer(draft.tokens, tuple(cuts), tuple(right), taught, *_soundness(draft, score))


def _soundness(draft: Draft, score: Score) -> tuple[int, bool]:
    """How many leading tokens begin a right answer, and whether the token after them is known to break it."""
    if score.correct:
        return len(draft.tokens), False
    if score.error_at is None:  # the task does not say where the error is
        return 0, False
    at = bisect_right(draft.ends, score.error_at)  # the first token that reaches beyond the error
    return at, at < len(draft.tokens)


def clean(model: LanguageModel, task: Task, problem: Problem, solution: Solution, rng: random.Random) -> Answer:
    """A right solution, worded at random."""
    return mark(model, task, problem, model.encode("\n".join(solution(problem, rng))), True)


def injected(model: LanguageModel, task: Task, problem: Problem, solution: Solution, rng: random.Random) -> Answer:
    """A solution with an error in a random line."""
    lines = len(solution(problem, rng))
    text = "\n".join(solution(problem, rng, error_at=rng.randrange(lines)))
    return mark(model, task, problem, model.encode(text), True, teach_until_error=True)
