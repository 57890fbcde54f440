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
from weakref import WeakKeyDictionary

import torch

from parsedec.chat import label_tokens, suffix_text
from parsedec.errors import ConfigError, IncompatibleStack, JudgeError
from parsedec.model import LanguageModel
from parsedec.session import Session
from parsedec.text import Draft
from parsedec.types import JudgePath

log = logging.getLogger(__name__)

QUESTION = (
    "Is every statement of your answer so far correct? It may be unfinished. Reply with one word, Correct or Incorrect."
)
LABELS = ("Correct", "Incorrect")

# Results of the self-test, so that the engines of one model make it once: model -> suffix -> what was wrong
_tested: WeakKeyDictionary[LanguageModel, dict[tuple[int, ...], str | None]] = WeakKeyDictionary()


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


class Judge(Protocol):
    """How likely is the answer up to each cut free of errors? The draft is left staged in `session`."""

    def bind(self, target: LanguageModel) -> Self:
        """A copy for `target`; whatever is wrong with the pair is found here."""

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        """Scores of `probes`, a subset of `cuts`."""

    @property
    def suffix_rows(self) -> int:
        """Rows a probe costs."""


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
        question = self.question or (card.question if card else QUESTION)
        labels = tuple(self.labels or (card.labels if card and not self.question else LABELS))
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
        )

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        if self.label_ids is None or self.chosen is None:
            raise JudgeError("the judge was not bound to a target; call bind(target) first.")
        rows = session.judge(draft.tokens, cuts, self.suffix, probes=probes, path=self.chosen)
        right, wrong = self.label_ids
        # p(right) / (p(right) + p(wrong)) is the logistic function of the difference of their logits
        values = torch.sigmoid(rows.probe_logits[:, right] - rows.probe_logits[:, wrong])  # [K]
        return Scores(tuple(values.tolist()), tuple(rows.draft_logprobs.tolist()), rows.rows, rows.path)

    def _choose(self, target: LanguageModel, suffix: tuple[int, ...]) -> tuple[JudgePath, str | None]:
        """The path, and why it is not the packed one."""
        obstacle = target.mask_obstacle
        if self.path == "packed" and obstacle:
            raise IncompatibleStack(f"judge.path=packed, but {target.name} has {obstacle}. Use judge.path=auto.")
        if self.path == "forked" or obstacle:
            return JudgePath.FORKED, obstacle
        known = _tested.setdefault(target, {})
        if suffix not in known:
            known[suffix] = packed_error(target, suffix)
        error = known[suffix]
        if error is None:
            return JudgePath.PACKED, None
        if self.path == "packed":
            raise IncompatibleStack(f"judge.path=packed, but on {target.name} {error}. Use judge.path=auto.")
        return JudgePath.FORKED, error


def packed_error(target: LanguageModel, suffix: Sequence[int]) -> str | None:
    """Self-test: do packed probes equal plain forwards of the same sequences on this model? None if they do.

    A model may accept a mask and quietly not honour it. The test compares the packed pass with plain forwards, and
    allows a few times the difference that two equally plain ways of computing them have in this dtype.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size, (36,), generator=generator).tolist()
    prompt, draft, cuts = ids[:12], ids[12:], [7, 16, 24]
    # a context limit set lower than the test's few tokens says nothing about the model
    target = replace(target, context_limit=max(target.context_limit, len(ids) + len(suffix)))
    plain, stepped = [], []
    for cut in cuts:
        whole, steps = Session(target), Session(target)
        plain.append(whole.feed([*prompt, *draft[:cut], *suffix]))
        steps.feed(prompt)
        steps.feed(draft[:cut])
        stepped.append(steps.feed(suffix))
    packed = Session(target)
    packed.feed(prompt)
    rows = packed.judge(draft, cuts, suffix).probe_logits
    reference = torch.stack(plain).float()
    noise = float((torch.stack(stepped).float() - reference).abs().max())
    error = float((rows - reference).abs().max())
    allowed = 4 * noise + 1e-4 * float(reference.std())
    if error <= allowed:
        return None
    return f"the packed pass differs from plain forwards by {error:.2g} in the logits, where {allowed:.2g} is rounding"
