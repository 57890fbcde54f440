"""Do two texts mean the same? The judges of outer=lookahead (Lookahead Reasoning, arXiv 2506.19830).

The published judge is a separate model, asked for one word. Here any model can be asked, by default the target. Two
simple rules serve targets that cannot be asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Protocol, Self

import torch

from parsedec.errors import ConfigError, IncompatibleStack, JudgeError, require_texts
from parsedec.models.language_model import LanguageModel
from parsedec.remote.model import RemoteModel
from parsedec.sessions.backends import open_session
from parsedec.text.chat import label_tokens, prompt_ids, suffix_text

OWN, PROPOSED = "{own}", "{proposed}"
QUESTION = (
    "Here are two versions of the next step of a solution. Do they state the same thing and come to the same result, "
    "whatever their wording? Reply with one word, Same or Different.\n\nVersion A:\n{own}\n\nVersion B:\n{proposed}"
)
LABELS = ("Same", "Different")
TOO_LONG = "steps that are longer than the context of {1}, {0} tokens, could not be compared: the target's own stand"
NUMBER = r"(?:(?<!\w)-)?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"  # the hyphen of "3-5" is not a sign


@dataclass(frozen=True, slots=True)
class Sameness:
    """The result of a comparison: the score that the texts mean the same, and what asking cost.

    calls, rows  of the model that was asked; 0 if none was
    note         why none could be asked, for the trace
    """

    score: float
    calls: int = 0
    rows: int = 0
    note: str | None = None


class Equivalence(Protocol):
    """Scores how likely two versions of a step mean the same."""

    def bind(self, target: LanguageModel) -> Self:
        """A copy for `target`; raises if the two do not fit."""

    def compare(self, own: str, proposed: str) -> Sameness:
        """Compare the target's own version with the draft model's."""

    @property
    def asks(self) -> LanguageModel | None:
        """The model that is asked, if any."""


@dataclass(frozen=True)
class EqualText:
    """The same text, apart from white space and case. Every rule below tries this first, as published."""

    asks = None

    def bind(self, target: LanguageModel) -> EqualText:
        return self

    def compare(self, own: str, proposed: str) -> Sameness:
        return Sameness(float(bare(own) == bare(proposed)))


@dataclass(frozen=True, kw_only=True)
class SameNumber:
    """The same result, for arithmetic: equal text, or the same last number, however it is written. Not from the paper.

    pattern  regular expression for numbers, after commas between digits are removed and minus signs (U+2212) replaced
             by hyphens
    """

    asks = None
    pattern: str = NUMBER

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"equivalence.pattern={self.pattern!r} is not a regular expression: {error}.") from error

    def bind(self, target: LanguageModel) -> SameNumber:
        return self

    def compare(self, own: str, proposed: str) -> Sameness:
        last = [self._last_number(text) for text in (own, proposed)]
        same_number = last[0] is not None and last[0] == last[1]
        return Sameness(float(same_number or bare(own) == bare(proposed)))

    def _last_number(self, text: str) -> object:
        """The value of the last number; the text itself if a user's pattern matches something that is not a number."""
        found = re.findall(self.pattern, re.sub(r"(?<=\d),(?=\d)", "", text.replace("\u2212", "-")))
        if not found:
            return None
        try:
            return Decimal(found[-1])
        except (InvalidOperation, ValueError):
            return found[-1]


@dataclass(frozen=True, kw_only=True)
class LabelEquivalence:
    """A model says Same or Different: s = p(same) / (p(same) + p(different)); equal texts need no question.

    model     the model to ask; None: the target. Published: a third model, Qwen2.5-7B-Instruct
    question  the user turn, with {own} and {proposed} in place of the texts
    labels    (same, different), which must differ in their first tokens

    As published, the question does not contain the problem, so the answer's cache cannot be used for it.
    """

    model: LanguageModel | None = None
    question: str = QUESTION
    labels: Sequence[str] = LABELS
    label_ids: tuple[int, int] | None = None  # set by `bind`

    def __post_init__(self) -> None:
        require_texts("equivalence.labels", self.labels, count=2, wanted="a list of two words, same and different")
        if any(self.question.count(slot) != 1 for slot in (OWN, PROPOSED)):
            raise ConfigError(
                f"equivalence.question={self.question!r}; expected a question with {OWN} and {PROPOSED} in it, once "
                "each."
            )

    @property
    def asks(self) -> LanguageModel | None:
        return self.model

    def bind(self, target: LanguageModel) -> LabelEquivalence:
        model = self.model or target
        if isinstance(model, RemoteModel):
            raise IncompatibleStack(
                f"equivalence=label reads the logits of {model.name}, which are at {model.server.url}. Use "
                "equivalence=equal or number, or set equivalence.model to a local model."
            )
        same, different = label_tokens(model, suffix_text(model, "?"), self.labels)
        return replace(self, model=model, label_ids=(same, different))

    def compare(self, own: str, proposed: str) -> Sameness:
        if bare(own) == bare(proposed):
            return Sameness(1.0)
        if self.model is None or self.label_ids is None:
            raise JudgeError("the equivalence judge was not bound to a target; call bind(target) first.")
        ids = prompt_ids(self.model, [{"role": "user", "content": self._ask(own, proposed)}])
        if len(ids) > self.model.context_limit:
            return Sameness(0.0, note=TOO_LONG.format(self.model.context_limit, self.model.name))
        session = open_session(self.model)
        logits = session.feed(ids)
        same, different = self.label_ids
        score = float(torch.sigmoid(logits[same].float() - logits[different].float()))
        if not 0 <= score <= 1:
            raise JudgeError(
                f"the logits of {self.model.name} are not all numbers; they overflow in their dtype. Use "
                "dtype=bfloat16 or float32 for it."
            )
        return Sameness(score, session.calls, session.rows)

    def _ask(self, own: str, proposed: str) -> str:
        """The question with both texts inserted, even if a text contains what looks like a slot."""
        slots = {OWN: own.strip(), PROPOSED: proposed.strip()}
        return re.sub(r"\{own\}|\{proposed\}", lambda slot: slots[slot[0]], self.question)


def bare(text: str) -> str:
    """The text in lower case and without white space."""
    return "".join(text.split()).lower()
