"""What kind of value a setting is: a number, a switch, a list. What is of another kind is found before a model is read.

The class says so that a setting is for, and of a command's own settings their defaults do. Of what is within a kind,
such as the range of a number, whoever uses it says so.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

from parsedec.errors import ConfigError, require_number, require_texts

NUMBERS = {"int", "float"}
EITHER = {"layers"}  # how many, or a list of which


def require_kinds(cfg: DictConfig) -> None:
    """Raise ConfigError for text where a number belongs, a number where a switch belongs, and the like.

    Looked at are settings that `_target_` annotates as int, float, bool, or one of these or None.
    """
    for key, node in _targets(cfg, ""):
        settings, written = dict(_settled(node)), OmegaConf.to_container(node, resolve=False)
        assert isinstance(written, dict)
        for name, kinds in _kinds(str(settings["_target_"])).items():
            if name in settings:
                there = re.fullmatch(r"\$\{([\w.]+)\}", str(written[name]))  # it was set where that points to
                _require(there[1] if there else f"{key}.{name}", settings[name], kinds)


def _targets(node: object, key: str) -> Iterator[tuple[str, DictConfig]]:
    """(where it is, node) of every node that names what it is for."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        for name, part in _settled(node):
            yield from _targets(part, f"{key}.{name}" if key else name)
    elif isinstance(node, ListConfig):
        for i in range(len(node)):
            with suppress(MissingMandatoryValue, InterpolationToMissingValueError):
                yield from _targets(node[i], f"{key}[{i}]")


def _settled(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """Settings that have a value; the others are asked for later, or filled in by the command."""
    for name in node:
        with suppress(MissingMandatoryValue, InterpolationToMissingValueError):
            yield str(name), node[name]


def _kinds(target: str) -> dict[str, set[str]]:
    """Parameters of a class or function that are annotated as numbers or switches."""
    try:
        signature = inspect.signature(get_object(target))
    except (ImportError, ValueError, TypeError):  # not there, which its maker will say; or it does not tell
        return {}
    found = {name: _parts(parameter.annotation) for name, parameter in signature.parameters.items()}
    return {name: kinds for name, kinds in found.items() if kinds - {"None"} and kinds <= {*NUMBERS, "bool", "None"}}


def _parts(annotation: object) -> set[str]:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return {part.strip() for part in text.split("|")}


def _require(name: str, value: object, kinds: set[str]) -> None:
    made = isinstance(value, DictConfig) and "_target_" in value  # of whatever kind
    if made or (value is None and "None" in kinds):
        return
    if kinds & NUMBERS:
        require_number(name, value, whole="float" not in kinds)
    elif not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}; expected true or false.")


def require_kinds_of_defaults(cfg: DictConfig, config: str, folders: Sequence[Path]) -> None:
    """Raise ConfigError for a setting of the configuration `config`, a file in one of the folders, that is of another
    kind than its default.

    null stands for no value where a default is a number or a list; whether there can be none is for the command to say.
    """
    for default in _defaults(config, folders):
        _require_like(default, cfg, "")


def _defaults(config: str, folders: Sequence[Path]) -> Iterator[Any]:
    """What a command's YAML holds, and those that it is made of."""
    places = [folder / f"{config.removesuffix('.yaml')}.yaml" for folder in folders]
    file = next((place for place in places if place.is_file()), None)
    held = None if file is None else OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    if not isinstance(held, dict):
        return
    for parent in held.pop("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            yield from _defaults(parent, folders)
    held.pop("hydra", None)
    yield held


def _require_like(default: Any, value: Any, name: str) -> None:
    absent = value is None and not isinstance(default, dict)
    if isinstance(default, str) or default is None or absent or name in EITHER:
        return
    if isinstance(default, bool):
        _require(name, value, {"bool"})
    elif isinstance(default, int | float):
        _require(name, value, {type(default).__name__})
    elif isinstance(default, list):
        if not isinstance(value, ListConfig):
            raise ConfigError(f"{name}={value!r}; expected a list: {name}=[…].")
        like = next((one for one in default if one is not None), None)
        if isinstance(like, str):
            require_texts(name, value)
        for i, one in enumerate(value):
            _require_like(like, one, f"{name}[{i}]")
    elif not isinstance(value, DictConfig):
        raise ConfigError(f"{name}={value!r}; expected settings by name, such as {', '.join(map(str, default))}.")
    elif "_target_" not in default:
        for key, one in _settled(value):
            if key in default:
                _require_like(default[key], one, f"{name}.{key}" if name else key)
