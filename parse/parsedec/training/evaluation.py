"""How well a target solves and judges, measured on real answers of a draft model.

PARSE's answers are computed here from one packed judge pass per draft, batched greedy continuations and the engine's
own boundary rule: its decisions at every threshold, for the price of one. The figures are about text, not time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parsedec.boundary import FirstFailure
from parsedec.experiment.summary import auc, wilson
from parsedec.judge import how_to_ask
from parsedec.models.language_model import JudgeCard, LanguageModel
from parsedec.tasks.base import Problem, Task
from parsedec.text.spelling import common_prefix
from parsedec.training.answers import mark
from parsedec.training.generation import Written, prompts, write_answers
from parsedec.training.packing import Answer, Packer, Row

THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


@dataclass(frozen=True, slots=True)
class Judged:
    """A draft, its checked line ends, and the target's score of each."""

    answer: Answer
    ended: bool
    correct: bool
    scores: tuple[float, ...]

    @property
    def first_wrong(self) -> int:
        """Index of the first cut that is wrong; the number of cuts if none is."""
        return next((k for k, right in enumerate(self.answer.right) if not right), len(self.answer.right))


def evaluate(
    target: LanguageModel,
    draft: LanguageModel,
    task: Task,
    *,
    max_new_tokens: int = 160,
    batch: int = 128,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, Any]:
    """All figures of a target and its judge on one task."""
    started = time.monotonic()
    problems = task.problems()
    contexts = prompts(target, problems)
    own = write_answers(target, contexts, max_new_tokens=max_new_tokens, batch=batch)
    drafts = write_answers(draft, prompts(draft, problems), max_new_tokens=max_new_tokens, batch=batch)
    if not target.same_vocabulary(draft):
        drafts = [(tuple(target.encode(draft.decode(tokens))), ended) for tokens, ended in drafts]
    judged = judge_drafts(target, task, problems, contexts, drafts, batch=batch)
    shared = [common_prefix(a[0], b[0]) for a, b in zip(own, drafts, strict=True)]
    return {
        "problems": len(problems),
        "target_accuracy": accuracy(target, task, problems, own),
        "draft_accuracy": accuracy(target, task, problems, drafts),
        "target_tokens": sum(len(tokens) for tokens, _ in own),
        "draft_tokens": sum(len(tokens) for tokens, _ in drafts),
        "shared_prefix_tokens": sum(shared),  # what token-level acceptance would keep before its first rejection
        "probes": sum(len(one.scores) for one in judged),
        "auc": separation(judged),
        "localisation": [localisation(judged, threshold) for threshold in thresholds],
        "thresholds": sweep(target, task, problems, contexts, judged, thresholds, max_new_tokens, batch),
        "evaluation_s": time.monotonic() - started,
    }


def accuracy(model: LanguageModel, task: Task, problems: Sequence[Problem], answers: Sequence[Written]) -> Any:
    """{"right": count, "share": …, "interval": 95 %} of right answers. An answer that was cut off counts as wrong."""
    marks = [
        ended and bool(task.score(problem, model.decode(tokens)).correct)
        for problem, (tokens, ended) in zip(problems, answers, strict=True)
    ]
    return {"right": sum(marks), "share": sum(marks) / len(marks), "interval": wilson(sum(marks), len(marks))}


@torch.inference_mode()
def judge_drafts(
    target: LanguageModel,
    task: Task,
    problems: Sequence[Problem],
    contexts: Sequence[Sequence[int]],
    drafts: Sequence[Written],
    *,
    batch: int,
) -> list[Judged]:
    """The drafts with the target's score at each line end, from packed passes of `batch` drafts."""
    packer = Packer.of(target, dtype=target.dtype)
    answers = [mark(target, task, problem, *draft) for problem, draft in zip(problems, drafts, strict=True)]
    scores: list[tuple[float, ...]] = [()] * len(answers)
    usable = sorted((i for i, answer in enumerate(answers) if answer.cuts), key=lambda i: packer.width(answers[i]))
    right, wrong = packer.label_ids
    for start in range(0, len(usable), batch):
        chosen = usable[start : start + batch]
        rows = [Row(tuple(contexts[i]), (answers[i],)) for i in chosen]
        packed = packer.pack(rows).to(target.device)
        logits = target.hf(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=packed.attention_mask,
            use_cache=False,
        ).logits.float()  # [B, R, V]
        odds = (logits[..., right] - logits[..., wrong]).sigmoid()  # [B, R]
        for place, (i, row) in enumerate(zip(chosen, rows, strict=True)):
            scores[i] = tuple(odds[place, packer.verdict_positions(row)[0]].tolist())
    return [
        Judged(answer, ended, answer.taught == len(answer.tokens) + 1, score)
        for answer, (_, ended), score in zip(answers, drafts, scores, strict=True)
    ]


def separation(judged: Sequence[Judged]) -> float | None:
    """The area under the ROC curve of all scored prefixes; None unless there are both right and wrong ones."""
    scores = np.array([score for one in judged for score in one.scores], dtype=float)
    right = np.array([right for one in judged for right in one.answer.right], dtype=bool)
    return auc(scores, right) if right.any() and not right.all() else None


def localisation(judged: Sequence[Judged], threshold: float) -> dict[str, Any]:
    """Where the first failing prefix of a wrong draft is, compared with its first wrong line."""
    wrong = [one for one in judged if one.first_wrong < len(one.scores)]
    rule = FirstFailure(threshold=threshold, full_threshold=threshold)
    kept = [rule.keep(one.scores) for one in wrong]
    return {
        "threshold": threshold,
        "wrong_drafts": len(wrong),
        "exact": sum(k == one.first_wrong for k, one in zip(kept, wrong, strict=True)),
        "never_later": sum(k <= one.first_wrong for k, one in zip(kept, wrong, strict=True)),
    }


def sweep(
    target: LanguageModel,
    task: Task,
    problems: Sequence[Problem],
    contexts: Sequence[Sequence[int]],
    judged: Sequence[Judged],
    thresholds: Sequence[float],
    max_new_tokens: int,
    batch: int,
) -> list[dict[str, Any]]:
    """At every threshold, how much of the drafts is kept, and how many of PARSE's answers are right."""
    kept = [[_kept_tokens(one, threshold) for one in judged] for threshold in thresholds]
    needed = sorted(
        {(i, cut) for row in kept for i, (cut, whole) in enumerate(row) if not whole}
    )  # thresholds share most of their continuations
    starts = [[*contexts[i], *judged[i].answer.tokens[:cut]] for i, cut in needed]
    written = dict(
        zip(needed, write_answers(target, starts, max_new_tokens=max_new_tokens, batch=batch), strict=True)
        if needed
        else ()
    )
    table = []
    for threshold, row in zip(thresholds, kept, strict=True):
        answers: list[Written] = []
        for i, (cut, whole) in enumerate(row):
            rest, ended = ((), judged[i].ended) if whole else written[i, cut]
            answers.append(((*judged[i].answer.tokens[:cut], *rest), ended))
        table.append(
            {
                "threshold": threshold,
                "kept_tokens": sum(cut for cut, _ in row),
                "drafted_tokens": sum(len(one.answer.tokens) for one in judged),
                "accepted_whole": sum(whole for _, whole in row),
                "accepted_whole_wrong": sum(
                    whole and not one.correct for (_, whole), one in zip(row, judged, strict=True)
                ),
                "accuracy": accuracy(target, task, problems, answers),
            }
        )
    return table


def calibrate(model: LanguageModel, report: dict[str, Any], margin: float) -> JudgeCard:
    """The card with the lowest threshold at which PARSE is at most `margin` less accurate than the target alone.

    If there is none, it has the highest threshold tried, which keeps the least of the drafts.
    """
    wanted = report["target_accuracy"]["share"] - margin
    rows = report["thresholds"]
    good = (row["threshold"] for row in rows if row["accuracy"]["share"] >= wanted)
    threshold = min(good, default=max(row["threshold"] for row in rows))
    question, labels = how_to_ask(model)
    return JudgeCard(question=question, labels=labels, threshold=threshold, full_threshold=threshold)


def _kept_tokens(one: Judged, threshold: float) -> tuple[int, bool]:
    """(tokens kept of the draft, whether it is the whole answer), as `PrefixVerification` decides."""
    rule = FirstFailure(threshold=threshold, full_threshold=threshold)
    if not one.scores:
        return 0, False
    if rule.whole(one.scores[-1]):
        return len(one.answer.tokens), one.ended
    count = rule.keep(one.scores)
    return (one.answer.cuts[count - 1] if count else 0), False
