"""Drafts whose prefixes are known to be right or wrong: what trained judges learn from and all judges are measured on.

They come from a task that can check every line, or from a file of solutions with labelled steps (`tasks.steps`).

Shapes in this file:  N draft tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from parsedec.backends import open_session
from parsedec.chat import prompt_ids
from parsedec.model import LanguageModel
from parsedec.tasks.base import Problem, Task
from parsedec.tasks.steps import BETWEEN, StepFile, step_ends
from parsedec.text import Draft
from parsedec.training.answers import mark
from parsedec.training.generation import Written

log = logging.getLogger(__name__)


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
    target: LanguageModel,
    draft: LanguageModel | None,
    path: str | Path,
    n: int | None = None,
    shuffle: int | None = None,
) -> list[Marked]:
    """n solutions of a step-labelled file, cut where their steps end, in a random order (`shuffle` is its seed) or in
    the file's. Those too long for the target are left out."""
    marked, long = [], 0
    for problem in StepFile(path=path, n=n, shuffle=shuffle).problems():
        messages = [{"role": "user", "content": problem.prompt}]
        prompt = tuple(prompt_ids(target, messages))
        tokens = target.encode(BETWEEN.join(problem.meta["steps"]), plain=True)
        if len(prompt) + len(tokens) + target.context_limit // 8 > target.context_limit:  # room for a question
            long += 1
            continue
        spelt = Draft.of(target, tokens, ended=True)
        own = None
        if draft is not None and target.same_vocabulary(draft):
            own = tuple(prompt_ids(draft, messages)) if draft.has_template else prompt
        right = step_ends(spelt, problem)
        marked.append(Marked(problem.id, prompt, own, spelt, tuple(right), tuple(right.values())))
    if long:
        log.warning("%d of %d solutions are too long for %s and were left out", long, long + len(marked), target.name)
    return marked


def parted(marked: Sequence[Marked], share: float) -> tuple[list[Marked], list[Marked]]:
    """About the first share of the drafts, and the others; drafts behind the same prompt stay together."""
    by_prompt: dict[tuple[int, ...], list[Marked]] = {}
    for one in marked:
        by_prompt.setdefault(one.prompt, []).append(one)
    first: list[Marked] = []
    others: list[Marked] = []
    for group in by_prompt.values():
        (first if len(first) + len(group) <= round(share * len(marked)) else others).extend(group)
    return first, others


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
