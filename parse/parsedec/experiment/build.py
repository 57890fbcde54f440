"""From a composed configuration to engines and tasks. `_target_` in a YAML names the class; there is no registry."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from parsedec.engine import Parse
from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.experiment.calibrated import warn_of_other_calibration
from parsedec.experiment.kinds import require_kinds
from parsedec.experiment.nodes import draft_node, name_of, target_node
from parsedec.experiment.threads import set_threads, settle_threads
from parsedec.models.language_model import LanguageModel
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


def build_target(cfg: DictConfig, node: DictConfig | None = None) -> LanguageModel:
    """The target of one configuration, or the model of another node in its place, and with it the number of threads,
    where that is to be tried."""
    target = build_model(node or target_node(cfg))
    settle_threads(cfg.runtime.threads, target)
    return target


def build_engine(cfg: DictConfig) -> Parse:
    """The engine of one configuration."""
    require_kinds(cfg)
    outer, inner, draft_inner = instantiate(cfg.outer), instantiate(cfg.inner), instantiate(cfg.draft.inner)
    if cfg.calibration is not None and outer.needs_draft:
        warn_of_other_calibration(cfg)
    wants_draft = outer.needs_draft or "model" in cfg.inner  # an inner speculator that drafts with a model
    draft = draft_node(cfg) if wants_draft else None
    if outer.needs_draft and draft is None:  # before the target is loaded, which may take long
        raise IncompatibleStack(
            f"{type(outer).__name__} needs a draft model, and draft is none. Set draft=WHERE, or use outer=none."
        )
    return Parse(
        build_target(cfg),
        build_model(draft) if draft is not None else None,
        inner=inner,
        draft_inner=draft_inner if draft is not None else None,
        acceptance=instantiate(cfg.acceptance),
        outer=outer,
    )


def build_draft_alone(cfg: DictConfig) -> Parse:
    """The draft model as if it were the target: the lower end of every comparison."""
    draft = draft_node(cfg)
    if draft is None:
        raise ConfigError("draft=none, but an arm runs the draft model alone. Choose a draft, or other arms (arms=…).")
    return Parse(
        build_target(cfg, draft),
        inner=instantiate(cfg.draft.inner),
        acceptance=instantiate(cfg.acceptance),
        outer=TargetOnly(),
    )


def build_sampling(cfg: DictConfig) -> Sampling:
    return Sampling(temperature=cfg.sampling.temperature, top_p=cfg.sampling.top_p, top_k=cfg.sampling.top_k)


def apply_runtime(cfg: DictConfig) -> None:
    """Thread settings, before the first tensor is made."""
    set_threads(cfg.runtime.threads)
    if not torch.cuda.is_available() and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        log.warning("OMP_WAIT_POLICY is not PASSIVE; on small machines torch can then be many times slower")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data, interpolations resolved."""
    data = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}
