"""From the harness's `--model_args` to a configuration: they are overrides as for `experiments/run.py`, and three keys:

config   a YAML file of such overrides, as `inner: draft_model` and `inner.length: 4`, or nested; other arguments win
record   file for what the engine did, request by request
model    what the harness calls the model in its results
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from parsedec.errors import ConfigError
from parsedec.experiment.build import build_sampling
from parsedec.experiment.cli import expand_shorthand
from parsedec.experiment.nodes import conf_folder
from parsedec.types import Sampling

log = logging.getLogger(__name__)
OWN_KEYS = ("config", "record", "model")


def composed(arguments: Mapping[str, Any]) -> DictConfig:
    """The configuration that model arguments stand for.

    Raises Hydra's errors for a name that does not exist, and ConfigError for a setting that the harness decides.
    """
    conf = conf_folder()
    listed: dict[str, Any] = {}
    if arguments.get("config") is not None:
        listed |= _read(Path(str(arguments["config"])).expanduser())
    listed |= {key: value for key, value in arguments.items() if key not in OWN_KEYS}
    written = [f"{key}={_written(value)}" for key, value in listed.items()]
    overrides = [expanded for override in written for expanded in expand_shorthand(override, conf)]
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("config", overrides)
    _check_used(cfg)
    return cfg


def of_the_harness(additional: Mapping[str, Any] | None) -> dict[str, Any]:
    """Overrides from the harness's own options: `--device` is used, batch sizes are not."""
    given = additional or {}
    if str(given.get("batch_size") or 1) != "1":
        log.warning("batch_size=%s is not used: requests run one at a time", given["batch_size"])
    device = given.get("device")
    if device is None or (str(device).startswith("cuda") and not torch.cuda.is_available()):
        return {}  # the harness's default is cuda:0 on every machine
    return {"runtime.device": device}


def _check_used(cfg: DictConfig) -> None:
    """Raise ConfigError for settings that are not used here: people would believe the results to depend on them."""
    if (sampling := build_sampling(cfg)) != Sampling():
        raise ConfigError(
            f"the model arguments ask for {sampling}, but here the task says how tokens are chosen; expected none of "
            "sampling.*. Use --gen_kwargs do_sample=true,temperature=…,top_p=…,top_k=…"
        )
    if cfg.batch != 1:
        raise ConfigError(
            f"batch={cfg.batch}, but requests of the harness run one at a time; expected 1. Leave it out."
        )
    if cfg.seeds is not None:
        raise ConfigError(
            f"seeds={list(cfg.seeds)}, but the task says how often a problem is answered; expected null. Use seed=N."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"config={str(path)!r} cannot be read: {error}. Expected a YAML file of settings, such as 'inner: pard'."
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"config={str(path)!r} holds {type(loaded).__name__}; expected settings, such as 'inner: pard'."
        )
    return dict(_flat(loaded))


def _flat(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _written(value: object) -> str:
    """A value in Hydra's notation. A plain word or a path stays unquoted, since it may name a member of a group."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = value and all(c.isalnum() or c in "_-./:@" for c in value)
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Sequence):
        return f"[{','.join(_written(item) for item in value)}]"
    return str(value)
