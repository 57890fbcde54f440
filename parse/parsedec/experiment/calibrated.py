"""Thresholds that `calibrate.py` fitted, applied to a run: the file it wrote, and whether it is about this run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from parsedec.errors import ConfigError
from parsedec.experiment.nodes import checkpoint_of, conf_folder, draft_node, target_node

log = logging.getLogger(__name__)

WHICH_PROBLEMS = {"n", "offset", "shuffle", "split", "seed", "path", "hub"}  # settings of tasks, not their kind
WHOLE, ONCE, ALWAYS = "parsedec.outer.PrefixVerification", "parsedec.loop.Once", "parsedec.gate.Always"


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


def conditions(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides, besides the pair, the judge and the segmenter, which drafts are judged and what is kept of them.

    config  as `build.plain` gives it; what a configuration does not have is None
    """
    outer, task = config.get("outer") or {}, config.get("task")
    models = {"target": config.get("target"), "draft": (config.get("draft") or {}).get("model")}
    return {
        "outer": {key: outer.get(key) for key in ("_target_", "max_draft_tokens")},
        "loop": config.get("loop"),
        "gate": config.get("gate"),
        "sampling": config.get("sampling"),
        "max_new_tokens": config.get("max_new_tokens"),
        "stop": config.get("stop"),
        "task": {key: value for key, value in task.items() if key not in WHICH_PROBLEMS} if task else None,
        "prompts": {name: {key: (node or {}).get(key) for key in ("chat_template", "template_args")}
                    for name, node in models.items()},
    }  # fmt: skip


def calibrated_conditions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those a calibration of this configuration is about: first drafts of every problem, decided upon when they are
    complete, whatever the configuration says of later rounds, gates and reading along."""
    labels = config["labels"]
    if not (task := labels.get("task")):  # solutions of a file: no model drafted, and no task was asked
        return {"drafts": f"solutions of {labels['path']}"}
    found = conditions({**config, "task": {**task, **(labels.get("fit") or {})}})
    return found | {"outer": found["outer"] | {"_target_": WHOLE}, "loop": {"_target_": ONCE},
                    "gate": {"_target_": ALWAYS}}  # fmt: skip


def differences(here: Any, fitted: Any, name: str) -> list[str]:
    """What of a run's settings is not as it was when thresholds were fitted, as "name is 1, not 0"."""
    if here == fitted:
        return []
    if isinstance(here, Mapping) and isinstance(fitted, Mapping):
        if here.get("_target_") != fitted.get("_target_"):
            return [f"{name} is {_class_of(here)}, not {_class_of(fitted)}"]
        return [said for key in dict.fromkeys([*fitted, *here])
                for said in differences(here.get(key), fitted.get(key), f"{name}.{key}")]  # fmt: skip
    return [f"{name} is {here}, not {fitted}"]


def _class_of(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_")).rsplit(".", 1)[-1]


def warn_of_other_calibration(cfg: DictConfig) -> None:
    """Say so if the run is not what the thresholds were fitted for (another pair, judge, loop, sampling, …), or has
    other thresholds."""
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
        "drafts": "what a draft model writes",
        **conditions(dict(OmegaConf.to_container(cfg, resolve=True))),  # type: ignore[arg-type]
    }
    unknown = {"task"} if "serve" in cfg else set()  # a server is asked what its clients ask
    other = [
        said
        for key, value in holds.items()
        if value is not None and key not in unknown
        for said in differences(here.get(key), value, key)
    ]
    if other:
        log.warning(
            "the thresholds of %s were fitted for something else: %s. What it promises does not hold for this run. Fit "
            "them again: experiments/calibrate.py",
            cfg.calibration,
            "; ".join(other),
        )


def _target_of(rule: str) -> str | None:
    """The class that a file of the group boundary names."""
    path = conf_folder() / "boundary" / f"{rule}.yaml"
    return str(OmegaConf.select(OmegaConf.load(path), "_target_")) if path.is_file() else None
