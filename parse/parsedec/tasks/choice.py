"""Multiple choice: MMLU-Redux (arXiv 2406.04127), MMLU-Pro (arXiv 2406.01574), GPQA (arXiv 2311.12022).

The letter an answer chooses is the first of these that exists: the one after the last "answer is" or "answer:", the one
in the last `\\boxed{}`, the last capital letter on its own. Brackets and asterisks around it are ignored, and so are
letters that no option has. "A" and "I" before a lower-case word are words, except for the "A" of "answer is A since". A
letter on its own before a lower-case word is what the sentence is about, and chosen only if it "is correct". In the
first two places a lower-case letter counts if only the end of its sentence, a bracket or a comma follows: "answer: a"
chooses, "the answer is a cat" does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from parsedec.tasks.base import Problem, Score, TaskDataError
from parsedec.tasks.hub import LETTERS
from parsedec.tasks.jsonl import JsonlTask

_OPTION = re.compile(r"(?m)^([A-Z])\. ")
_ALONE = r"(?<![A-Za-z0-9'\u2019\\])({letters})(?![A-Za-z0-9'\u2019])"
_ANNOUNCED = r"(?i:answer(?:\s+is)?\s*:?)\s*(?:(?i:option)\s+)?[*({{\[$\\\s]*(?:boxed|text|mathrm)?[({{]*"
_SAID = r"(?i:answer(?:\s+is\s*:?|\s*:))[*\s]*(?:(?i:option)\s+)?[*({{\[$\\\s]*(?:boxed|text|mathrm)?[({{]*"
_BOXED = r"\\boxed\{{\s*(?:\\(?:text|mathrm)\{{)?[\s(]*"
_WORD = r"(?:(?<=is A|on A)|(?!(?<=[AI]) [a-z]))"  # "A cat", "I think": words; "is A since", "option A as": letters
_RIGHT = r"(?=\)?\*{{0,2}} is (?:the )?(?:only )?(?:correct|right)\b)"
_SUBJECT = r"(?! [a-z])"  # "B, as D is wrong"
_ENDS = r"(?=[*\s$]*(?:[)\]}},;:!]|\.(?!\w)|\Z|\n))"  # "a." and "a)" are letters, "a cat" and "a.m." are not


@dataclass(frozen=True, kw_only=True)
class Choice(JsonlTask):
    """Problems whose prompt lists options, one line `A. …` for each; the reference is a letter.

    `meta` may hold `accept`, the letters that are right, and `scoreable`: false if the benchmark's own annotators found
    the question broken. Such problems are left out.

    instruction  appended to each question after an empty line; "": nothing
    """

    instruction: str = "Reason step by step. Finish with the line 'The answer is (X)', where X is the letter."

    def counts(self, problem: Problem) -> bool:
        return bool(problem.meta.get("scoreable", True))

    def prepare(self, problem: Problem) -> Problem:
        letters = LETTERS[: _count(problem)]
        right = set(_accepted(problem))
        if not letters or not right <= set(letters):
            raise TaskDataError(
                f"{self.source}: problem {problem.id!r} has reference={problem.reference!r} and options "
                f"{letters or 'none'}; expected a letter, and a line 'A. …' per option at the end of the prompt. Is "
                "this file another benchmark's? Change path, or repair the line."
            )
        prompt = f"{problem.prompt}\n\n{self.instruction}" if self.instruction else problem.prompt
        return replace(problem, prompt=prompt, meta={**problem.meta, "options": len(letters)})

    def score(self, problem: Problem, text: str) -> Score:
        chosen = chosen_letter(text, int(problem.meta["options"]))
        right = _accepted(problem)
        expected = f"expected {' or '.join(right)}"
        if chosen is None:
            return Score(False, f"no letter found, {expected}")
        return Score(True, f"chose {chosen}") if chosen in right else Score(False, f"chose {chosen}, {expected}")


def chosen_letter(text: str, options: int) -> str | None:
    """The letter chosen in an answer to a question with this many options; None if none is."""
    capital, small = (_ALONE.format(letters=f"[{some}]") for some in (LETTERS[:options], LETTERS[:options].lower()))
    announced = f"(?:{_ANNOUNCED.format()}{capital}{_WORD}|{_SAID.format()}{small}{_ENDS.format()})"
    boxed = f"{_BOXED.format()}(?:{capital}|{small}" + r"(?=[\s)]*\}))"
    for pattern in (announced, boxed, f"{capital}(?:{_RIGHT.format()}|{_SUBJECT})"):
        if found := re.findall(pattern, text):
            return "".join(found[-1]).upper()
    return None


def _accepted(problem: Problem) -> list[str]:
    return [str(letter) for letter in problem.meta.get("accept") or [problem.reference]]


def _count(problem: Problem) -> int:
    """Number of options: as counted by the source, or the lines A., B., … without a gap that end the prompt."""
    stored = problem.meta.get("options") or len(problem.meta.get("option_starts") or ())
    if stored:
        return int(stored)
    listed = _OPTION.findall(problem.prompt)
    last = len(listed) - 1 - listed[::-1].index("A") if "A" in listed else len(listed)
    run = listed[last:]
    return len(run) if run == list(LETTERS[: len(run)]) else 0
