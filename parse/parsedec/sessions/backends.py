"""Which backend a session runs on: Hugging Face's own forward, or the static one for models that qualify."""

from __future__ import annotations

import logging
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from parsedec.errors import IncompatibleStack
from parsedec.models.language_model import LanguageModel
from parsedec.sessions.reference import excess, plain_logits, random_tokens
from parsedec.sessions.session import Session
from parsedec.static.session import StaticSession, forget_machine
from parsedec.static.weights import foreign_hooks, static_obstacle

log = logging.getLogger(__name__)

Structure = tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]

_obstacles: WeakKeyDictionary[PreTrainedModel, tuple[Structure, str | None]] = WeakKeyDictionary()


def open_session(model: LanguageModel, taps: tuple[int, ...] = (), *, ids: int = 0) -> Session:
    """A new session of `model` on the backend that serves it; arguments as for `DecodingSession`."""
    return (StaticSession if runs_static(model) else Session)(model, taps, ids=ids)


def runs_static(model: LanguageModel) -> bool:
    """Whether the sessions of `model` run on the static backend.

    Raises IncompatibleStack for backend=static on a model that does not qualify; backend=auto falls back to eager.
    """
    if model.backend == "eager":
        return False
    structure = _structure(model.hf)
    before, obstacle = _obstacles.get(model.hf, (((), ()), None))
    if structure[0] != before[0]:
        forget_machine(model)
    if structure != before:  # a new model, or one that has gained, changed or lost weights, adapters or hooks
        obstacle = static_obstacle(model) or _disagreement(model)
        _obstacles[model.hf] = structure, obstacle
        if obstacle and model.backend == "auto":
            log.warning("%s runs on the eager backend: it has %s", model.name, obstacle)
    if obstacle and model.backend == "static":
        raise IncompatibleStack(
            f"backend=static cannot run {model.name}: it has {obstacle}. Use backend=auto or runtime=eager."
        )
    return obstacle is None


def _structure(hf: PreTrainedModel) -> Structure:
    """What users may change in a model between requests: modules and parameters, then replaced forwards and hooks."""
    modules = list(hf.modules())
    return (
        tuple((id(m), id(type(m)), *map(id, m._parameters.values())) for m in modules),
        tuple(("forward" in vars(m), *foreign_hooks(m)) for m in modules),
    )


def _disagreement(model: LanguageModel) -> str | None:
    """What is wrong where the static forward differs from the model's own, as with a hook that changes a result."""
    ids = random_tokens(model, 9, 0)
    session = StaticSession(replace(model, compiled=False))  # not worth compiling for a few tokens
    session.feed(ids[:6])
    ours = torch.stack([session.feed(ids[6:8]), session.feed(ids[8:])])
    error = excess(model, ours, plain_logits(model, ids, last=2))
    return None if error is None else f"a forward of its own (logits differ by {error:.2g})"
