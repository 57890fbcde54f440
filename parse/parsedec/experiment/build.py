"""From a composed configuration to engines and tasks. `_target_` in a YAML names the class; there is no registry."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from parsedec.engine import Parse
from parsedec.errors import ConfigError
from parsedec.model import LanguageModel
from parsedec.outer import TargetOnly
from parsedec.types import Sampling

log = logging.getLogger(__name__)

_models: dict[str, LanguageModel] = {}


def build_model(cfg: DictConfig) -> LanguageModel:
    """A model from its node; equal nodes share one copy, so the arms of a comparison do not load it again."""
    key = OmegaConf.to_yaml(cfg, resolve=True, sort_keys=True)
    if key not in _models:
        log.info("loading %s", name_of(cfg))
        _models[key] = instantiate(cfg)
    return _models[key]


def name_of(cfg: DictConfig) -> str:
    """What a node of a model is about: a checkpoint, or a server."""
    return str(cfg.source if "source" in cfg else cfg.model or cfg.url)


def target_node(cfg: DictConfig) -> DictConfig:
    """Where the target is: on a server, if the engine says so."""
    node: DictConfig = cfg.engine.target or cfg.target
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


def build_engine(cfg: DictConfig) -> Parse:
    """The engine of one configuration."""
    outer = instantiate(cfg.outer)
    wants_draft = outer.needs_draft or "model" in cfg.inner  # an inner speculator that drafts with a model
    draft = draft_node(cfg) if wants_draft else None
    return Parse(
        build_model(target_node(cfg)),
        build_model(draft) if draft is not None else None,
        inner=instantiate(cfg.inner),
        draft_inner=instantiate(cfg.draft.inner) if draft is not None else None,
        acceptance=instantiate(cfg.acceptance),
        outer=outer,
    )


def build_draft_alone(cfg: DictConfig) -> Parse:
    """The draft model as if it were the target: the lower end of every comparison."""
    draft = draft_node(cfg)
    if draft is None:
        raise ConfigError("draft=none, but an arm runs the draft model alone. Choose a draft, or other arms (arms=…).")
    return Parse(
        build_model(draft),
        inner=instantiate(cfg.draft.inner),
        acceptance=instantiate(cfg.acceptance),
        outer=TargetOnly(),
    )


def build_sampling(cfg: DictConfig) -> Sampling:
    return Sampling(temperature=cfg.sampling.temperature, top_p=cfg.sampling.top_p, top_k=cfg.sampling.top_k)


def apply_runtime(cfg: DictConfig) -> None:
    """Thread settings, before the first tensor is made."""
    threads = cfg.runtime.threads
    if threads is not None:
        torch.set_num_threads(threads)
    if not torch.cuda.is_available() and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        log.warning("OMP_WAIT_POLICY is not PASSIVE; on small machines torch can then be many times slower")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data, interpolations resolved."""
    data = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}
