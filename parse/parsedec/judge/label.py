"""The packed label judge of PARSE (arXiv 2605.04263): one masked target pass scores every prefix of a draft.

Each cut is followed by the verification suffix (a question in the target's own chat turns); the score of a prefix is

    s = p(Correct) / (p(Correct) + p(Incorrect))      at the probe's last row.

Where a mask cannot work, the same probes run as a batch of forked caches, with the same scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from parsedec.errors import JudgeError, require_texts
from parsedec.judge.seam import PassJudge, Reading, check_path, choose_path
from parsedec.models.language_model import LanguageModel
from parsedec.text.chat import label_tokens, suffix_text

QUESTION = (
    "Is every statement of your answer so far correct? It may be unfinished. Reply with one word, Correct or Incorrect."
)
LABELS = ("Correct", "Incorrect")


def how_to_ask(target: LanguageModel) -> tuple[str, tuple[str, str]]:
    """The default question and labels for a target: those of its judge card, else English ones."""
    card = target.judge_card
    return (card.question, card.labels) if card else (QUESTION, LABELS)


@dataclass(frozen=True, kw_only=True)
class LabelJudge(PassJudge):
    """The target says Correct or Incorrect after every prefix.

    question  the user turn of the suffix; None: the one the target's checkpoint was trained with (its judge card),
              else a default in English
    labels    (right, wrong), which must differ in their first tokens. None: the judge card's, else Correct, Incorrect
    path      "packed", "forked", or "auto": packed where a mask works on the target and passes a self-test, else forked
    """

    question: str | None = None
    labels: Sequence[str] | None = None
    path: str = "auto"
    label_ids: tuple[int, int] | None = None  # set by `bind`

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.labels is not None:
            require_texts("judge.labels", self.labels, count=2, wanted="a list of two words, right and wrong")

    def bind(self, target: LanguageModel) -> Self:
        card = target.judge_card
        own_question, own_labels = how_to_ask(target)
        question = self.question or own_question
        labels = tuple(self.labels or (LABELS if self.question else own_labels))
        suffix = suffix_text(target, question)
        first = label_tokens(target, suffix, labels)
        ids = tuple(target.encode(suffix))
        chosen, reason = choose_path(target, ids, self.path)
        return replace(
            self,
            question=question,
            labels=labels,
            suffix=ids,
            label_ids=(first[0], first[1]),
            chosen=chosen,
            reason=reason,
            card=card if card and (question, labels) == (card.question, tuple(card.labels)) else None,
        )

    @property
    def wanted(self) -> tuple[int, ...] | None:
        return self.label_ids

    def read(self, reading: Reading) -> Tensor:
        if self.label_ids is None:
            raise JudgeError("the judge was not bound to a target; call bind(target) first.")
        right, wrong = self.label_ids
        logits = reading.rows.probe_logits
        # p(right) / (p(right) + p(wrong)) is the logistic function of the difference of their logits
        return torch.sigmoid(logits[:, right] - logits[:, wrong])
