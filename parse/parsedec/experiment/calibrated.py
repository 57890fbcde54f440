"""Thresholds that `calibrate.py` fitted, applied to a run: the file it wrote, and whether it is about this run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from parsedec.errors import ConfigError
from parsedec.experiment.nodes import checkpoint_of, draft_node, target_node

log = logging.getLogger(__name__)


def read_calibration(path: Path) -> dict[str, Any]:
    """A calibration.yaml: the overrides that apply it, and what they hold for."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(path.expanduser()))
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(
            f"calibration={path} cannot be read: {error}. Expected the calibration.yaml of a run of calibrate.py."
        ) from error
    if not isinstance(found, dict):
        found = {}
    overrides = found.get("overrides")
    if not isinstance(overrides, list) or not all(str(o).startswith("boundary") for o in overrides):
        raise ConfigError(
            f"calibration={path} holds no overrides of the group boundary; expected the calibration.yaml of a run of "
            "calibrate.py."
        )
    return {str(key): value for key, value in found.items()}


def warn_of_other_calibration(cfg: DictConfig) -> None:
    """Say so if the run has another pair, judge or segmenter than the one the thresholds were fitted for."""
    holds = read_calibration(Path(str(cfg.calibration))).get("holds_for") or {}
    draft = draft_node(cfg)
    here = {
        "target": checkpoint_of(target_node(cfg)),
        "draft": None if draft is None else checkpoint_of(draft),
        "judge": OmegaConf.to_container(cfg.judge, resolve=True),
        "segmenter": OmegaConf.to_container(cfg.segmenter, resolve=True),
    }
    other = [key for key, value in holds.items() if value is not None and here.get(key) != value]
    if other:
        log.warning(
            "the thresholds of %s were fitted for another %s; they say nothing about this run. Fit them again: "
            "experiments/calibrate.py",
            cfg.calibration,
            " and ".join(other),
        )
