"""Open-ended questions that no program scores: MT-Bench (arXiv 2306.05685), Spec-Bench (arXiv 2401.07851).

They measure speed and how much of the drafts is kept. Quality would need a judge of its own; the answers of a lossless
run can be compared text by text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from parsedec.errors import require_number, require_texts
from parsedec.tasks.base import Problem, Score, TaskDataError
from parsedec.tasks.jsonl import JsonlTask


@dataclass(frozen=True, kw_only=True)
class OpenEnded(JsonlTask):
    """Conversations: `meta.turns` holds the user's messages; without it, the prompt is the only one.

    turns       most turns to ask of a conversation, each with the model's own earlier answers before it
    categories  only problems whose `meta.category` is one of these; (): all
    """

    references: ClassVar[bool] = False
    turns: int = 2
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("turns", self.turns, whole=True, low=1)
        require_texts("categories", self.categories)

    def counts(self, problem: Problem) -> bool:
        return not self.categories or problem.meta.get("category") in self.categories

    def prepare(self, problem: Problem) -> Problem:
        said = problem.meta.get("turns") or [problem.prompt]
        if not isinstance(said, list) or not all(isinstance(turn, str) and turn.strip() for turn in said):
            raise TaskDataError(
                f"{self.source}: problem {problem.id!r} has meta.turns={said!r}; expected a list of texts. "
                "Is this another benchmark's file? Change path, or repair the line."
            )
        return replace(problem, prompt=said[0], follow_ups=tuple(said[1 : self.turns]))

    def score(self, problem: Problem, text: str) -> Score:
        return Score(None, "not scored")
