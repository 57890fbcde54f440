"""A recipe from configuration to trained model: drafts to learn from, training, export, evaluation, record.

output/drafts.json      what the draft model wrote (kept for a resumption)
output/checkpoint.pt    the run so far
output/model/           the exported model
output/record.json      configuration, provenance, progress and evaluation
"""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import LlamaConfig, LlamaForCausalLM

from parsedec.errors import ConfigError, OutputExistsError
from parsedec.experiment.build import apply_runtime, plain
from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, read_record, to_json, write_record
from parsedec.model import LanguageModel, load
from parsedec.tasks.base import Task
from parsedec.training.drafts import Pool, load_or_sample, share_wrong
from parsedec.training.evaluation import accuracy, calibrate, evaluate
from parsedec.training.export import export, export_card
from parsedec.training.generation import prompts, write_answers
from parsedec.training.loop import Trainer
from parsedec.training.packing import Packer
from parsedec.training.rows import Batches, Rows, stream

log = logging.getLogger(__name__)


def run_recipe(cfg: DictConfig) -> dict[str, Any]:
    """Train (or go on training) one model; the record is on disk after every report and at the end."""
    apply_runtime(cfg)
    recipe, folder, config = cfg.recipe, Path(cfg.output), plain(cfg)
    checkpoint = folder / "checkpoint.pt"
    earlier = _earlier(folder / "record.json", config, cfg.resume)
    if earlier is None and checkpoint.exists():
        raise OutputExistsError(f"{checkpoint} exists without a record. Choose another folder (output=DIR).")
    model, task = new_model(cfg), instantiate(recipe.task)
    batches = make_batches(cfg, model, task, folder)
    trainer = Trainer(
        model, instantiate(recipe.optimisation), autocast=cfg.preset.autocast, compiled=cfg.preset.compile
    )
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "title": recipe.title,
        "config": config,
        "provenance": provenance(),
        "resumed_from": earlier["provenance"] if earlier else None,
        "status": "running",
    }

    def save(**more: Any) -> None:
        record.update(history=trainer.history, **more)
        write_record(record, folder / "record.json")

    save()
    if checkpoint.exists():
        trainer.restore(checkpoint)
    status = "failed"
    try:
        trainer.train(
            stream(batches, trainer.step, trainer.optimisation.steps, cfg.preset.workers),
            checkpoint=checkpoint,
            checkpoint_minutes=cfg.preset.checkpoint_minutes,
            report_steps=cfg.preset.report_steps,
            on_report=lambda _: save(),
        )
        export(model, folder / "model")
        save(**measure(cfg, folder / "model"))
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        log.warning("interrupted at step %d; resume=true output=%s goes on from there", trainer.step, folder)
        raise
    finally:
        save(status=status)
    return record


def _earlier(path: Path, config: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The record to go on from. The number of steps may have changed: the rate then follows the new one."""
    compared = copy.deepcopy(config)
    if resume and path.exists():
        before = read_record(path)["config"]["recipe"]["optimisation"]["steps"]
        if before != compared["recipe"]["optimisation"]["steps"]:
            log.warning("the run was begun for %d steps; what follows is not what it would have been", before)
        compared["recipe"]["optimisation"]["steps"] = before
    return earlier_record(path, compared, resume)


def new_model(cfg: DictConfig) -> LanguageModel:
    """The model to train, in float32: given weights (`init`), or new ones of `shape`."""
    recipe, preset = cfg.recipe, cfg.preset
    if recipe.init is not None:
        return load(recipe.init, dtype="float32", device=preset.device, attention=preset.attention)
    shape = recipe.shape
    tokenizer_of = load(shape.tokenizer, device="cpu")  # tokenizer, template and judge card come with a model
    tokenizer = tokenizer_of.tokenizer
    if shape.hidden_size % shape.heads:
        raise ConfigError(
            f"shape.hidden_size={shape.hidden_size} is no multiple of shape.heads={shape.heads}. Change one."
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
    return LanguageModel.wrap(hf, tokenizer, name=recipe.title, judge_card=tokenizer_of.judge_card)


def make_batches(cfg: DictConfig, model: LanguageModel, task: Task, folder: Path) -> Batches:
    """The training data of a recipe, drafts sampled if it learns from any."""
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
    """Figures of the exported model: solving and judging, or solving alone where nothing was judged.

    A judge's thresholds are chosen on the calibration problems and written to its card before the test is looked at.
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
