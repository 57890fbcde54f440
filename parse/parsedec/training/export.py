"""A trained model as a folder that `parsedec.load` reads: bf16 weights, tokenizer with chat template, judge card."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

from parsedec.experiment.record import to_json, write_text
from parsedec.models.language_model import JudgeCard, LanguageModel


def export(model: LanguageModel, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write `model` to `folder` in `dtype`, and return `folder`; the model itself keeps its precision."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model.hf).to(dtype).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # they were written as a temporary file, which is private
    # the template goes into tokenizer_config.json: one file fewer, and every version of transformers finds it there
    model.tokenizer.save_pretrained(folder, save_jinja_files=False)
    if model.judge_card is not None:
        export_card(model.judge_card, folder)
    return folder


def export_card(card: JudgeCard, folder: Path) -> Path:
    """Write judge.json: how to ask the model, and the thresholds calibrated for it. Returns its path."""
    return write_text(json.dumps(to_json(card)), folder / "judge.json")
