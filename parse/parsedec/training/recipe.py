"""A recipe from configuration to trained model: drafts to learn from, training, export, evaluation, record.

output/checkpoint.pt    the run so far
output/model/           the exported model or head
output/record.json      configuration, provenance, progress and evaluation

`models` and `heads` say what else the two kinds of recipe write.
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
        """Batches start..stop-1 of the whole training; each is a pure function of seed and number."""

    def finish(self) -> dict[str, Any]:
        """Export what was trained to output/model, and measure it as exported; returns entries of the record."""


JOBS: dict[str, Callable[[DictConfig, Path], Job]] = {"model": ModelJob, "head": HeadJob}


def run_recipe(cfg: DictConfig) -> dict[str, Any]:
    """Train (or go on training) one model; returns the record, which is written after every report and at the end.

    Raises OutputExistsError if the output folder holds a run that this one does not resume.
    """
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
        log.warning("interrupted at step %d; continue with resume=true output=%s", trainer.step, folder)
        raise
    finally:
        save(status=status)
    return record


def _earlier(path: Path, config: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The record to continue. The number of steps may have changed; the learning rate then follows the new one."""
    compared = copy.deepcopy(config)
    if resume and path.exists():
        before = read_record(path)["config"]["recipe"]["optimisation"]["steps"]
        if before != compared["recipe"]["optimisation"]["steps"]:
            log.warning("the run was begun for %d steps; it will not end as it would have with that number", before)
        compared["recipe"]["optimisation"]["steps"] = before
    return earlier_record(path, compared, resume)
