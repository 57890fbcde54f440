"""Drafts with a verdict on every prefix: what trained judges learn from, and what all judges are measured on.

They come from a task that can check every line, from final answers alone, or from a file of solutions with labelled
steps (`calibration.sources`).

Shapes in this file:  N draft tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from parsedec.calibration.sources import Answers, Question
from parsedec.models.language_model import LanguageModel
from parsedec.segmenters import Lines, Segmenter
from parsedec.sessions.backends import open_session
from parsedec.tasks.base import Problem
from parsedec.tasks.steps import BETWEEN, StepFile, step_ends
from parsedec.text.chat import prompt_ids
from parsedec.text.spelling import Draft
from parsedec.training.generation import Written

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Marked:
    """A prompt and a draft, with the cuts at which it is judged and the verdicts there.

    problem  the problem's id
    prompt   the prompt in the target's tokens, up to the assistant opening
    own      the same prompt in the draft model's tokens; None without a draft model of the same vocabulary
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
        """Index of the first wrong cut; the number of cuts if none is wrong."""
        return next((k for k, right in enumerate(self.right) if not right), len(self.right))


def from_task(
    target: LanguageModel,
    draft: LanguageModel,
    source: Answers,
    questions: Sequence[Question],
    pool: Sequence[Sequence[Written]],
    segmenter: Segmenter | None = None,
) -> list[Marked]:
    """The draft model's answers to every question, cut by `segmenter` (None: at line ends) and labelled by `source`.

    A source that knows only final answers gives every prefix the verdict on the whole draft, as verifiers are trained
    on outcomes (arXiv 2110.14168, section 4): a score then says how likely a draft that begins like this ends right.

    Raises ConfigError for a task that cannot give the labels.
    """
    segmenter = segmenter or Lines()
    shared, marked = target.same_vocabulary(draft), []
    for question, answers in zip(questions, pool, strict=True):
        messages = [{"role": "user", "content": question.problem.prompt}]
        prompt, own = tuple(prompt_ids(target, messages)), tuple(prompt_ids(draft, messages))
        for tokens, ended in answers:
            mine = tokens if shared else tuple(target.encode(draft.decode(tokens), plain=True))
            text = Draft.of(target, mine, ended)
            cuts = tuple(segmenter.cuts(text))
            prefixes, whole = source.label(question, text, cuts)
            right = (whole,) * len(cuts) if prefixes is None else prefixes
            if cuts:
                marked.append(Marked(question.problem.id, prompt, own if shared else None, text, cuts, right))
    return marked


def from_steps(
    target: LanguageModel,
    draft: LanguageModel | None,
    path: str | Path,
    n: int | None = None,
    shuffle: int | None = None,
) -> list[Marked]:
    """n solutions from a step-labelled file (None: all), in random order (`shuffle`: its seed) or in the file's."""
    return from_solutions(target, draft, StepFile(path=path, n=n, shuffle=shuffle).problems())


def from_solutions(
    target: LanguageModel, draft: LanguageModel | None, solutions: Sequence[Problem], separator: str = BETWEEN
) -> list[Marked]:
    """Step-labelled solutions (`tasks.steps`), cut where their steps end. Leaves out those too long for the target."""
    marked, long = [], 0
    for problem in solutions:
        messages = [{"role": "user", "content": problem.prompt}]
        prompt = tuple(prompt_ids(target, messages))
        tokens = target.encode(separator.join(problem.meta["steps"]), plain=True)
        if len(prompt) + len(tokens) + target.context_limit // 8 > target.context_limit:  # room for a question
            long += 1
            continue
        spelt = Draft.of(target, tokens, ended=True)
        own = None
        if draft is not None and target.same_vocabulary(draft):
            own = tuple(prompt_ids(draft, messages)) if draft.has_template else prompt
        right = step_ends(spelt, problem, separator)
        marked.append(Marked(problem.id, prompt, own, spelt, tuple(right), tuple(right.values())))
    if long:
        log.warning("%d of %d solutions are too long for %s and were left out", long, long + len(marked), target.name)
    return marked


def with_logprobs(
    marked: Sequence[Marked], draft: LanguageModel, after_each: Callable[[str], None] = lambda _: None
) -> list[Marked]:
    """The same drafts with the draft model's log-probabilities of their tokens, as it would have recorded them while it
    wrote. Takes one forward for each draft. Drafts without the prompt in its tokens are returned as they are."""
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
