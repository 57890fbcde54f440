"""Drafts whose prefixes are known to be right or wrong: what trained judges learn from and all judges are measured on.

They come from a task that can check every line, or from a JSONL file with step labels in the form of ProcessBench
(arXiv 2412.06559), one object a line:

    {"problem": text, "steps": [text, …], "label": index of the first wrong step, or -1}

Shapes in this file:  N draft tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from parsedec.backends import open_session
from parsedec.chat import prompt_ids
from parsedec.model import LanguageModel
from parsedec.tasks.base import Problem, Task
from parsedec.tasks.jsonl import TaskDataError
from parsedec.text import Draft
from parsedec.training.answers import mark
from parsedec.training.generation import Written

log = logging.getLogger(__name__)

STEP_FORM = '{"problem": text, "steps": [text, …], "label": first wrong step or -1}'
BETWEEN = "\n\n"  # joins the steps of a file


@dataclass(frozen=True, slots=True)
class Marked:
    """A draft behind its prompt, with the cuts at which it is judged and the verdicts there.

    prompt   the target's tokens, up to the assistant opening
    own      the same prompt in the draft model's tokens; None where no draft model is known
    right    whether the prefix up to each cut is free of errors
    """

    problem: str
    prompt: tuple[int, ...]
    own: tuple[int, ...] | None
    draft: Draft
    cuts: tuple[int, ...]
    right: tuple[bool, ...]

    @property
    def first_wrong(self) -> int:
        """Index of the first wrong cut; the number of cuts if none is."""
        return next((k for k, right in enumerate(self.right) if not right), len(self.right))


def from_task(
    target: LanguageModel,
    draft: LanguageModel,
    task: Task,
    problems: Sequence[Problem],
    pool: Sequence[Sequence[Written]],
) -> list[Marked]:
    """The draft model's answers to every problem, their line ends judged by the task's checker. Raises ConfigError for
    a task that says an answer is wrong but not where."""
    shared, marked = target.same_vocabulary(draft), []
    for problem, answers in zip(problems, pool, strict=True):
        messages = [{"role": "user", "content": problem.prompt}]
        prompt, own = tuple(prompt_ids(target, messages)), tuple(prompt_ids(draft, messages))
        for tokens, ended in answers:
            mine = tokens if shared else tuple(target.encode(draft.decode(tokens), plain=True))
            answer = mark(target, task, problem, mine, ended)
            if answer.cuts:
                text = Draft.of(target, mine, ended)
                marked.append(Marked(problem.id, prompt, own if shared else None, text, answer.cuts, answer.right))
    return marked


def from_steps(
    target: LanguageModel, draft: LanguageModel | None, path: str | Path, n: int | None = None
) -> list[Marked]:
    """The first n solutions of a step-labelled file, cut where their steps end. Those too long for the target are
    left out."""
    marked, long = [], 0
    for number, row in enumerate(read_steps(path)):
        if n is not None and number >= n:
            break
        messages = [{"role": "user", "content": row["problem"]}]
        prompt = tuple(prompt_ids(target, messages))
        steps, label = row["steps"], row["label"]
        text = BETWEEN.join(steps)
        tokens = target.encode(text, plain=True)
        if len(prompt) + len(tokens) + target.context_limit // 8 > target.context_limit:  # room for a question
            long += 1
            continue
        spelt = Draft.of(target, tokens, ended=True)
        stops = accumulate(len(step) + len(BETWEEN) for step in steps)
        cuts = [spelt.position(max(1, min(stop - len(BETWEEN), len(spelt.text)))) for stop in stops]
        own = None
        if draft is not None and target.same_vocabulary(draft):
            own = tuple(prompt_ids(draft, messages)) if draft.has_template else prompt
        verdicts = dict(
            zip(cuts, (label < 0 or k < label for k in range(len(steps))), strict=True)
        )  # steps of no token
        marked.append(Marked(str(number), prompt, own, spelt, tuple(verdicts), tuple(verdicts.values())))
    if long:
        log.warning("%d of %d solutions are too long for %s and were left out", long, long + len(marked), target.name)
    return marked


def read_steps(path: str | Path) -> Iterable[dict[str, Any]]:
    """Rows with `problem`, `steps` and `label`, also of files in the form of our tasks (`prompt`, and the others in
    `meta` as `steps` and `first_wrong_step`). Raises TaskDataError that names the line."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise TaskDataError(f"steps={str(path)!r} is not a file; expected JSONL, each line {STEP_FORM}.")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                meta = row.get("meta") or {}
                problem = row.get("problem", row.get("prompt"))
                steps, label = row.get("steps", meta.get("steps")), row.get("label", meta.get("first_wrong_step"))
            except (ValueError, AttributeError) as bad:
                raise TaskDataError(f"{path}, line {number} is no JSON object: {bad}; expected {STEP_FORM}.") from bad
            good = isinstance(problem, str) and problem and isinstance(steps, list) and steps
            if not good or not all(isinstance(step, str) and step for step in steps):
                raise TaskDataError(f"{path}, line {number} has no problem with steps in it; expected {STEP_FORM}.")
            if not isinstance(label, int) or isinstance(label, bool) or not -1 <= label < len(steps):
                raise TaskDataError(f"{path}, line {number} has label={label!r} for {len(steps)} steps; {STEP_FORM}.")
            yield {"problem": problem, "steps": steps, "label": label}


def with_logprobs(
    marked: Sequence[Marked], draft: LanguageModel, after_each: Callable[[str], None] = lambda _: None
) -> list[Marked]:
    """The same drafts with the draft model's log-probabilities of their tokens, from one forward of it each: what it
    would have recorded while it wrote them. Left as they are where the vocabularies differ."""
    done = []
    for one in marked:
        if one.own is not None:
            session = open_session(draft)
            session.feed(one.own)
            rows = session.judge(one.draft.tokens, [len(one.draft.tokens)], ())
            one = replace(one, draft=replace(one.draft, logprobs=tuple(rows.draft_logprobs.tolist())))
        done.append(one)
        after_each("the draft model's probabilities")
    return done
