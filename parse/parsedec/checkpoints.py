"""Files of checkpoints: where a name leads to, and tensors out of files that may be damaged.

A source is a directory, a hub id, or `zoo:NAME` for what ships with parsedec.
"""

from __future__ import annotations

import pickle
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from parsedec.errors import IncompatibleStack, ModelLoadError

DAMAGE = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


def zoo_names() -> list[str]:
    """What `zoo:NAME` can name: models and heads."""
    return sorted(entry.name for entry in _zoo_folder().iterdir() if (entry / "config.json").is_file())


def in_zoo(source: str) -> Path:
    """The folder of `zoo:NAME`."""
    name = source.removeprefix("zoo:")
    if name not in zoo_names():
        raise ModelLoadError(f"'{source}' is not in the zoo; expected one of {[f'zoo:{n}' for n in zoo_names()]}.")
    return _zoo_folder() / name


def find_file(source: str | Path, name: str) -> Path | None:
    """A file of a checkpoint; None if the source has no such file, or is a hub id that cannot be reached.

    Raises IncompatibleStack for a directory that does not exist.
    """
    source = str(source)
    folder = in_zoo(source) if source.startswith("zoo:") else Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if source.startswith((".", "/", "~")):
        raise IncompatibleStack(f"the directory '{source}' does not exist. Check the path, or give a hub id.")
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False)  # fmt: skip
    return None if found is None else Path(found)


Version = tuple[tuple[str, int, int], ...]


def version_of(source: str | Path) -> Version:
    """Which version of a folder this is, for caches of loaded weights: training writes one more than once.

    Empty for a hub id and for a single file.
    """
    folder = Path(source).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or pickled file whose names begin with `prefix`, on the CPU.

    Raises IncompatibleStack that names the file if it is damaged or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:  # of a whole model's file only what is wanted is read
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
                return {name: file.get_tensor(name) for name in names}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        why = next(iter(str(error).splitlines()), "it ends too early")
        raise IncompatibleStack(
            f"{path} cannot be read: {type(error).__name__}: {why}. Is the file truncated? Copy or download it again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise IncompatibleStack(
            f"{path} holds {type(tensors).__name__}, no table of tensors by name. Is it a file of weights?"
        )
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _zoo_folder() -> Path:
    return Path(str(files("parsedec") / "zoo"))
