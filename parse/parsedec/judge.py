"""The packed label judge of PARSE: one masked target pass scores every prefix of a draft.

After each cut stands the verification suffix (the target's own chat turns with a question); the score of a prefix is

    s = p(Correct) / (p(Correct) + p(Incorrect))      at the probe's last row.

Where a mask cannot work the same probes run as a batch of forked caches, with the same scores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch

from parsedec.chat import label_tokens, suffix_text
from parsedec.errors import ConfigError, IncompatibleStack, JudgeError
from parsedec.model import JudgeCard, LanguageModel
from parsedec.remote.model import RemoteModel
from parsedec.selftest import probe_error
from parsedec.session import Session
from parsedec.text import Draft
from parsedec.types import JudgePath

log = logging.getLogger(__name__)

QUESTION = (
    "Is every statement of your answer so far correct? It may be unfinished. Reply with one word, Correct or Incorrect."
)
LABELS = ("Correct", "Incorrect")


def how_to_ask(target: LanguageModel) -> tuple[str, tuple[str, str]]:
    """The question and the labels a target is judged with where nobody says otherwise: its card's, else English."""
    card = target.judge_card
    return (card.question, card.labels) if card else (QUESTION, LABELS)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of the probed cuts, in order, and what came out of the same pass.

    values          one score in [0, 1] per probe
    draft_logprobs  the target's log-probability of every draft token, nats
    """

    values: tuple[float, ...]
    draft_logprobs: tuple[float, ...]
    rows: int
    path: JudgePath
    note: str | None = None  # e.g. why the packed path was not taken


class Judge(Protocol):
    """How likely is the answer up to each cut free of errors? The draft is left staged in `session`."""

    def bind(self, target: LanguageModel) -> Self:
        """A copy for `target`; whatever is wrong with the pair is found here."""

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        """Scores of `probes`, a subset of `cuts`."""

    @property
    def suffix_rows(self) -> int:
        """Rows a probe costs."""

    @property
    def card(self) -> JudgeCard | None:
        """The target's judge card, if this judge asks as the card says, so that its thresholds hold."""


@dataclass(frozen=True, kw_only=True)
class LabelJudge:
    """The target says Correct or Incorrect after every prefix.

    question  the user turn of the suffix; None: the one the target's checkpoint was trained with (its judge card),
              else a plain English one
    labels    (right, wrong); told apart by their first tokens. None: the judge card's, else Correct and Incorrect
    path      "auto": packed where a mask works on the target and passes a self-test, else forked
    """

    question: str | None = None
    labels: Sequence[str] | None = None
    path: str = "auto"
    # Filled in by bind:
    suffix: tuple[int, ...] = ()
    label_ids: tuple[int, int] | None = None
    chosen: JudgePath | None = None
    reason: str | None = None
    card: JudgeCard | None = None

    def __post_init__(self) -> None:
        if self.path not in ("auto", "packed", "forked"):
            raise ConfigError(f"judge.path='{self.path}'; expected auto, packed or forked.")
        if self.labels is not None and len(self.labels) != 2:
            raise ConfigError(f"judge.labels={list(self.labels)}; expected two words, right and wrong.")

    @property
    def suffix_rows(self) -> int:
        return len(self.suffix)

    def bind(self, target: LanguageModel) -> LabelJudge:
        card = target.judge_card
        own_question, own_labels = how_to_ask(target)
        question = self.question or own_question
        labels = tuple(self.labels or (LABELS if self.question else own_labels))
        suffix = suffix_text(target, question)
        first = label_tokens(target, suffix, labels)
        ids = tuple(target.encode(suffix))
        chosen, reason = self._choose(target, ids)
        if reason:
            log.warning("judge runs as a forked batch on %s: %s", target.name, reason)
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

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        if self.label_ids is None or self.chosen is None:
            raise JudgeError("the judge was not bound to a target; call bind(target) first.")
        rows = session.judge(draft.tokens, cuts, self.suffix, probes=probes, path=self.chosen, wanted=self.label_ids)
        right, wrong = self.label_ids
        # p(right) / (p(right) + p(wrong)) is the logistic function of the difference of their logits
        values = torch.sigmoid(rows.probe_logits[:, right] - rows.probe_logits[:, wrong])  # [K]
        if not bool(values.isfinite().all()):
            raise JudgeError(
                f"the scores of a draft of {len(draft.tokens)} tokens are not all numbers, so the target's logits "
                "overflow in their dtype. Use dtype=bfloat16 or float32 for the target."
            )
        logprobs = tuple(rows.draft_logprobs.tolist())
        return Scores(tuple(values.tolist()), logprobs, rows.rows, rows.path, self.reason)

    def _choose(self, target: LanguageModel, suffix: tuple[int, ...]) -> tuple[JudgePath, str | None]:
        """The path, and why it is not the packed one."""
        if isinstance(target, RemoteModel):
            if target.judge_obstacle:
                raise IncompatibleStack(f"the judge cannot run on {target.judge_obstacle}. Use outer=none.")
            return JudgePath.REMOTE, None
        problem = target.mask_obstacle or probe_error(target, suffix, JudgePath.PACKED)
        if self.path == "packed" and problem:
            raise IncompatibleStack(f"judge.path=packed, but {target.name} has {problem}. Use judge.path=auto.")
        if self.path != "forked" and not problem:
            return JudgePath.PACKED, None
        if failure := probe_error(target, suffix, JudgePath.FORKED):
            raise IncompatibleStack(
                f"the judge cannot run on {target.name}: packed, {problem}; forked, {failure}. Use outer=none."
            )
        return JudgePath.FORKED, problem
