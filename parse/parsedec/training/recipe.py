"""A recipe from configuration to trained model: drafts to learn from, training, export, evaluation, record.

output/checkpoint.pt    the run so far
output/model/           the exported model or head
output/record.json      configuration, provenance, progress and evaluation

What the two kinds of recipe keep besides is said in `models` and `heads`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from parsedec.errors import ConfigError, OutputExistsError
from parsedec.experiment.build import apply_runtime, plain
from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, read_record, write_record
from parsedec.training.heads import HeadJob
from parsedec.training.loop import Objective, Schedule, Trainer
from parsedec.training.models import ModelJob

log = logging.getLogger(__name__)


class Job(Protocol):
    """One recipe at work."""

    @property
    def objective(self) -> Objective: ...

    @property
    def schedule(self) -> Schedule: ...

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """Batches number start..stop-1 of the whole training, a pure function of (seed, number)."""

    def finish(self) -> dict[str, Any]:
        """Export what was trained to output/model and measure the exported thing: entries of the record."""


JOBS: dict[str, Callable[[DictConfig, Path], Job]] = {"model": ModelJob, "head": HeadJob}


def run_recipe(cfg: DictConfig) -> dict[str, Any]:
    """Train (or go on training) one model; the record is on disk after every report and at the end."""
    apply_runtime(cfg)
    recipe, folder, config = cfg.recipe, Path(cfg.output), plain(cfg)
    checkpoint = folder / "checkpoint.pt"
    earlier = _earlier(folder / "record.json", config, cfg.resume)
    if earlier is None and checkpoint.exists():
        raise OutputExistsError(f"{checkpoint} exists without a record. Choose another folder (output=DIR).")
    if recipe.kind not in JOBS:
        raise ConfigError(f"recipe.kind={recipe.kind!r} does not exist; expected one of {', '.join(JOBS)}.")
    job: Job = JOBS[recipe.kind](cfg, folder)
    trainer = Trainer(job.objective, job.schedule)
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
            job.batches(trainer.step, trainer.schedule.steps),
            checkpoint=checkpoint,
            checkpoint_minutes=cfg.preset.checkpoint_minutes,
            report_steps=cfg.preset.report_steps,
            on_report=lambda _: save(),
        )
        save(**job.finish())
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
