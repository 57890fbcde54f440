"""Recipes for whole models: a target that solves and judges, or a draft model that only solves.

output/drafts.json   what the draft model wrote for the judge to learn from (kept for resuming)
output/model/        the exported model
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import LlamaConfig, LlamaForCausalLM

from parsedec.errors import ConfigError
from parsedec.experiment.record import to_json
from parsedec.models.language_model import LanguageModel, load
from parsedec.tasks.base import Task
from parsedec.training.answers import clean
from parsedec.training.drafts import Pool, load_or_sample, share_wrong
from parsedec.training.evaluation import accuracy, calibrate, evaluate
from parsedec.training.export import export, export_card
from parsedec.training.generation import prompts, write_answers
from parsedec.training.growth import freeze, grown, renew
from parsedec.training.packing import Batch, Packer
from parsedec.training.rows import Batches, Rows, stream
from parsedec.training.solve_judge import SolveAndJudge
from parsedec.training.tokenizer import tokenizer_of

log = logging.getLogger(__name__)


class ModelJob:
    """kind=model: weights of a causal language model."""

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self.cfg = cfg
        self.folder = folder
        self.model = new_model(cfg)
        if cfg.recipe.new_tokens:
            renew(self.model, cfg.recipe.new_tokens, cfg.seed)
        freeze(self.model, cfg.recipe.freeze)
        self.schedule = instantiate(cfg.recipe.optimisation)
        self.objective = SolveAndJudge(
            self.model, self.schedule, autocast=cfg.preset.autocast, compiled=cfg.preset.compile
        )

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        if start >= stop:  # nothing is left to train, so no drafts need be sampled
            return iter(())
        rows = make_batches(self.cfg, self.model, instantiate(self.cfg.recipe.task), self.folder)
        return stream(rows, start, stop, self.cfg.preset.workers)

    def finish(self) -> dict[str, Any]:
        export(self.model, self.folder / "model")
        return measure(self.cfg, self.folder / "model")


def new_model(cfg: DictConfig) -> LanguageModel:
    """The model to train, in float32: with given weights (`init`), or with new ones of a given `shape`."""
    recipe, preset = cfg.recipe, cfg.preset
    if recipe.init is not None:
        model = load(recipe.init, dtype="float32", device=preset.device, attention=preset.attention)
        return grown(model, recipe.grow, cfg.seed, some_texts(cfg, model)) if recipe.grow else model
    shape = recipe.shape
    tokenizer, card = tokenizer_of(shape.tokenizer)
    if shape.hidden_size % shape.heads:
        raise ConfigError(
            f"shape.hidden_size={shape.hidden_size} is not a multiple of shape.heads={shape.heads}. Change one."
        )
    torch.manual_seed(cfg.seed)  # transformers draws initial weights from the global generator
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa" if preset.attention == "auto" else preset.attention,
    )
    device = "cuda" if preset.device == "auto" and torch.cuda.is_available() else preset.device
    hf = LlamaForCausalLM(config).to("cpu" if device == "auto" else device)
    return LanguageModel.wrap(hf, tokenizer, name=recipe.title, judge_card=card)


def some_texts(cfg: DictConfig, model: LanguageModel, count: int = 64) -> list[list[int]]:
    """Problems, each with a right solution, as token ids."""
    task, solution, rng = instantiate(cfg.recipe.task), instantiate(cfg.recipe.solution), random.Random(cfg.seed)
    problems = task.problems()[:count]
    answers = [clean(model, task, problem, solution, rng).tokens for problem in problems]
    return [[*context, *answer] for context, answer in zip(prompts(model, problems), answers, strict=True)]


def make_batches(cfg: DictConfig, model: LanguageModel, task: Task, folder: Path) -> Batches:
    """The training data of a recipe; samples drafts if it learns from any."""
    recipe, preset = cfg.recipe, cfg.preset
    problems = task.problems()
    mix = instantiate(recipe.mix)
    pool: Pool = []
    if mix.drafts:
        draft = load(recipe.drafts.model, dtype="float32", device=preset.device)
        asked = problems[: recipe.drafts.problems]
        pool = load_or_sample(
            folder / "drafts.json",
            draft,
            asked,
            [instantiate(one) for one in recipe.drafts.passes],
            max_new_tokens=recipe.max_new_tokens,
            batch=preset.generation_batch,
            seed=cfg.seed,
        )
        some = random.Random(cfg.seed).sample(range(len(asked)), min(200, len(asked)))
        wrong = share_wrong([pool[i] for i in some], [asked[i] for i in some], task, draft)
        log.info(
            "%d different drafts of %d problems, about %.0f %% wrong", sum(map(len, pool)), len(asked), 100 * wrong
        )
        pool += [[] for _ in problems[len(asked) :]]
    rows = Rows(
        model=model,
        task=task,
        problems=problems,
        solution=instantiate(recipe.solution),
        pool=pool,
        mix=mix,
        judged=recipe.judged,
        seed=cfg.seed,
    )
    packer = Packer.of(model, dtype=torch.bfloat16 if preset.autocast else torch.float32)
    return Batches(rows=rows, packer=packer, lengths=list(recipe.lengths), positions=preset.positions)


def measure(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Figures of the exported model: solving and judging, or only solving for a model that does not judge.

    A judge's thresholds are chosen on the calibration problems, and written to its card, before the test begins.
    """
    recipe, device, batch = cfg.recipe, cfg.preset.device, cfg.preset.generation_batch
    model, task = load(folder, dtype="float32", device=device), instantiate(recipe.evaluation.task)
    if not recipe.judged:
        problems = task.problems()
        answers = write_answers(model, prompts(model, problems), max_new_tokens=recipe.max_new_tokens, batch=batch)
        return {"evaluation": {"problems": len(problems), "accuracy": accuracy(model, task, problems, answers)}}
    draft = load(recipe.evaluation.draft, dtype="float32", device=device)

    def report(of: Task) -> dict[str, Any]:
        return evaluate(
            model,
            draft,
            of,
            max_new_tokens=recipe.max_new_tokens,
            batch=batch,
            thresholds=list(recipe.evaluation.thresholds),
        )

    calibration = report(instantiate(recipe.evaluation.calibration))
    card = calibrate(model, calibration, recipe.evaluation.margin)
    export_card(card, folder)
    return {"judge_card": to_json(card), "calibration": calibration, "evaluation": report(task)}
