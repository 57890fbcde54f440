"""Thresholds that `calibrate.py` fitted, applied to a run: the file it wrote, and whether it is about this run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from parsedec.errors import ConfigError
from parsedec.experiment.nodes import checkpoint_of, conf_folder, draft_node, target_node

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
    """Say so if the run has another pair, judge or segmenter than the one the thresholds were fitted for, or other
    thresholds."""
    calibration = read_calibration(Path(str(cfg.calibration)))
    holds = calibration.get("holds_for") or {}
    pairs = [str(override).split("=", 1) for override in calibration["overrides"]]
    fitted = OmegaConf.from_dotlist([f"{key}={value}" for key, value in pairs if key.startswith("boundary.")])
    changed = [
        f"boundary.{key} is {cfg.boundary.get(key)}, not {value}"
        for key, value in (fitted.get("boundary") or {}).items()
        if cfg.boundary.get(key) != value
    ]
    rule = dict(pairs).get("boundary")
    if rule is not None and cfg.boundary._target_ != _target_of(rule):
        changed.insert(0, f"the rule is {cfg.boundary._target_.rsplit('.', 1)[-1]}, not boundary={rule}")
    if changed:
        log.warning(
            "calibration=%s is overridden: %s. What it promises does not hold for this run", cfg.calibration,
            "; ".join(changed),
        )  # fmt: skip
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


def _target_of(rule: str) -> str | None:
    """The class that a file of the group boundary names."""
    path = conf_folder() / "boundary" / f"{rule}.yaml"
    return str(OmegaConf.select(OmegaConf.load(path), "_target_")) if path.is_file() else None
