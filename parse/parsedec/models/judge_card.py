"""The judge card, `judge.json` beside a checkpoint's weights: how to use a checkpoint that was trained to judge."""

from __future__ import annotations

import json
from dataclasses import dataclass

from parsedec.errors import ModelLoadError
from parsedec.models.checkpoints import Checkpoint


@dataclass(frozen=True, kw_only=True)
class JudgeCard:
    """How to ask a checkpoint that was trained to judge. A judge's settings that are null are taken from here.

    question                   the user turn of the verification suffix
    labels                     the words for (right, wrong)
    threshold, full_threshold  calibrated for prefixes, and for complete drafts
    """

    question: str
    labels: tuple[str, str]
    threshold: float
    full_threshold: float

    def __post_init__(self) -> None:
        texts = [self.question, *self.labels]
        scores = [self.threshold, self.full_threshold]
        if len(self.labels) != 2 or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"question={self.question!r}, labels={self.labels!r} are not a text and two words")
        if not all(isinstance(score, (int, float)) and 0 <= score <= 1 for score in scores):
            raise ValueError(f"thresholds {scores} are not numbers from 0 to 1")


def read_judge_card(checkpoint: Checkpoint) -> JudgeCard | None:
    """The `judge.json` beside a checkpoint, in a directory or on the hub, if there is one. Raises ModelLoadError."""
    path = checkpoint.find("judge.json")
    if path is None:
        return None
    try:
        return JudgeCard(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ModelLoadError(
            f"{path} is not a judge card: {error}. Expected JSON with question, labels, threshold and full_threshold."
        ) from error
