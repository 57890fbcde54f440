"""Where configurations are, and which part of one says where a model is: the groups target and draft, or the engine
with its servers."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from parsedec.errors import ConfigError


def name_of(cfg: DictConfig) -> str:
    """What a node of a model is about: a checkpoint, or a server."""
    return str(cfg.source if "source" in cfg else cfg.model or cfg.url)


def target_node(cfg: DictConfig) -> DictConfig:
    """Where the target is: on a server, if there is an engine and it says so."""
    node: DictConfig = ("engine" in cfg and cfg.engine.target) or cfg.target
    return node


def draft_node(cfg: DictConfig) -> DictConfig | None:
    """Where the draft model is; None without one."""
    remote = cfg.engine.draft
    if remote is None or remote.url is None:
        local: DictConfig | None = cfg.draft.model
        return local
    shared = OmegaConf.merge(remote, {"tokenizer": remote.tokenizer or cfg.engine.target.tokenizer})
    assert isinstance(shared, DictConfig)
    return shared


def checkpoint_of(cfg: DictConfig) -> str:
    """The checkpoint of a node of a model; of one on a server, the one its tokenizer is from."""
    return str(cfg.source if "source" in cfg else cfg.tokenizer)


def check_local(cfg: DictConfig) -> None:
    """Raise ConfigError where the models are on servers: for commands that read logits, states or times of passes."""
    if cfg.engine.target is not None:
        raise ConfigError(
            f"engine has target.url={cfg.engine.target.url}, but this command needs the model itself. Use engine=local "
            "with the same checkpoint; what it finds holds for a server that serves it."
        )


def conf_folder() -> Path:
    """The folder of the configuration groups: beside the package where it is installed, else in the checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "conf", package.parents[1] / "conf")
    found = next((place for place in places if (place / "config.yaml").is_file()), None)
    if found is None:
        raise ConfigError(f"no configuration groups in {places[0]} or {places[1]}; install parsedec again.")
    return found
