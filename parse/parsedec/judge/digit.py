"""The digit judge: the target gives every prefix a mark from 0 to 9 (SpecReason, arXiv 2504.07891).

SpecReason asks about one step after another, in a short pass each; here all prefixes of a draft are marked in one
packed pass, as by the label judge. The mark is read at the probe's last row, from the ten digits alone:

    s = sum over d of  d * p(d) / 9,      p a distribution over the digits 0 .. 9
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from parsedec.errors import ConfigError, JudgeError
from parsedec.judge.seam import PassJudge, Reading, check_labels, check_path, choose_path
from parsedec.models.language_model import LanguageModel
from parsedec.text.chat import label_tokens, suffix_text

QUESTION = (
    "Rate your answer so far, which may be unfinished: is every statement correct, and does each follow from what "
    "stands before it? Reply with one digit, from 0 (certainly wrong) to 9 (certainly right)."
)
DIGITS = tuple("0123456789")


@dataclass(frozen=True, kw_only=True)
class DigitJudge(PassJudge):
    """The target marks every prefix with a digit.

    question  the user turn of the suffix; None: a default in English
    opening   start of the assistant's turn that leads up to the digit, e.g. "Score: "
    mark      "expected": the mean digit under the target's probabilities; "likeliest": the most probable one
    path      as for the label judge
    """

    question: str | None = None
    opening: str = ""
    mark: str = "expected"
    path: str = "auto"
    digit_ids: tuple[int, ...] = ()  # set by `bind`

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.mark not in ("expected", "likeliest"):
            raise ConfigError(f"judge.mark='{self.mark}'; expected expected or likeliest.")

    def bind(self, target: LanguageModel) -> Self:
        suffix = suffix_text(target, self.question or QUESTION) + self.opening
        digits = tuple(label_tokens(target, suffix, DIGITS))
        check_labels(target, "digit", digits)
        ids = tuple(target.encode(suffix))
        chosen, reason = choose_path(target, ids, self.path)
        return replace(self, suffix=ids, digit_ids=digits, chosen=chosen, reason=reason)

    @property
    def wanted(self) -> tuple[int, ...]:
        return self.digit_ids[::-1]

    def read(self, reading: Reading) -> Tensor:
        if not self.digit_ids:
            raise JudgeError("the judge was not bound to a target; call bind(target) first.")
        logits = reading.rows.probe_logits[:, list(self.digit_ids)]  # [K, 10]
        if self.mark == "likeliest":
            return logits.argmax(-1) / 9
        return logits.softmax(-1) @ torch.arange(10.0, device=logits.device) / 9
