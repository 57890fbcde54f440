"""Files of checkpoints: what a source leads to, and the tensors in files that may be damaged.

A source is a directory, a `.gguf` file, a hub id (`ORG/NAME`, or `ORG/NAME/FILE.gguf` for a file there; either also at
a commit, tag or branch, `ORG/NAME@REVISION`), or `zoo:NAME` for what ships with parsedec.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from parsedec.errors import IncompatibleStack, ModelLoadError, first_line

DAMAGE = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


def zoo_names() -> list[str]:
    """What `zoo:NAME` can name: models, heads and probes."""
    return sorted(entry.name for entry in _zoo_folder().iterdir() if (entry / "config.json").is_file())


def in_zoo(source: str) -> Path:
    """The folder of `zoo:NAME`."""
    name = source.removeprefix("zoo:")
    if name not in zoo_names():
        raise ModelLoadError(f"'{source}' is not in the zoo; expected one of {[f'zoo:{n}' for n in zoo_names()]}.")
    return _zoo_folder() / name


@dataclass(frozen=True)
class Checkpoint:
    """What a source leads to.

    location  a directory, or the id of a repository on the hub
    gguf      the file there that is the model, if that is a GGUF file
    revision  commit, tag or branch of a repository; None: its main branch
    """

    location: str
    gguf: str | None = None
    revision: str | None = None

    @property
    def local(self) -> bool:
        return Path(self.location).is_dir()

    @property
    def id(self) -> str:
        """What a record calls it: ORG/NAME or ORG/NAME@REVISION."""
        return self.location if self.revision is None else f"{self.location}@{self.revision}"

    @property
    def commit(self) -> str | None:
        """The revision to read: the commit at which this process has read it before, else what was asked for."""
        return _commits.get(self.id, self.revision)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`, besides the location."""
        given = {"gguf_file": self.gguf, "revision": self.commit}
        return {name: value for name, value in given.items() if value is not None}

    def find(self, name: str) -> Path | None:
        """The path of one of its files, downloaded if need be; None if there is no such file, or no connection.

        Raises OSError for a repository or revision that does not exist on the hub, or that needs a login.
        """
        if self.local:
            path = Path(self.location) / name
            return path if path.is_file() else None
        found = cached_file(
            self.location, name, revision=self.commit, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        self.read_at(extract_commit_hash(found, None))
        return None if found is None else Path(found)

    def read_at(self, commit: str | None) -> None:
        """Remember the commit it was read at: its other files are read at the same one. None: it is a directory."""
        if commit is not None:
            _commits[self.id] = commit


# A branch moves: once read at some commit, a repository is read at that commit until the process ends. Records name it.
_commits: dict[str, str] = {}


def hub_commits() -> dict[str, str]:
    """The commit at which this process has read each repository of the hub."""
    return dict(sorted(_commits.items()))


def pin_commits(commits: Mapping[str, str]) -> None:
    """Read these repositories at these commits, which are those of a record that is resumed."""
    _commits.update(commits)


def find_checkpoint(source: str | Path) -> Checkpoint:
    """What a source leads to; nothing is downloaded. The output folder of a training recipe leads to the model in it.

    Raises ModelLoadError for a local path that does not exist, and for a name that is not in the zoo.
    """
    source = str(source)
    if source.startswith("zoo:"):
        return Checkpoint(str(in_zoo(source)))
    path = Path(source).expanduser()
    if not source or (path.is_file() and path.suffix != ".gguf"):
        raise ModelLoadError(
            f"'{source}' is {'a file of another kind' if source else 'no place of a model'}; expected a directory, a "
            "GGUF file, a hub id (ORG/NAME) or zoo:NAME."
        )
    if path.is_dir():
        trained = path / "model"  # in the output of a recipe, beside its record
        one = trained if (trained / "config.json").is_file() and not (path / "config.json").is_file() else path
        return Checkpoint(str(one))
    if path.is_file() and path.suffix == ".gguf":
        return Checkpoint(str(path.parent), path.name)
    name, _, revision = source.partition("@")
    parts = name.split("/")
    if source.startswith((".", "/", "~")) or (name.endswith(".gguf") and len(parts) < 3):
        what = "GGUF file" if name.endswith(".gguf") else "model directory"
        raise ModelLoadError(
            f"the {what} '{source}' does not exist. Check the path, or give a hub id (ORG/NAME, ORG/NAME@REVISION, "
            "ORG/NAME/FILE.gguf)."
        )
    if name.endswith(".gguf"):
        return Checkpoint("/".join(parts[:2]), "/".join(parts[2:]), revision or None)
    return Checkpoint(name, None, revision or None)


def find_file(source: str | Path, name: str) -> Path | None:
    """The path of a checkpoint's file; None if the source has no such file, or is a hub id that cannot be reached.

    Raises IncompatibleStack for a directory, repository or revision that does not exist, or that needs a login.
    """
    try:
        return find_checkpoint(source).find(name)
    except ModelLoadError as error:
        raise IncompatibleStack(str(error)) from error
    except OSError as error:
        raise IncompatibleStack(
            f"'{source}' cannot be had from the hub: {first_line(error)}. Check the id; a gated or private repository "
            "needs your login (hf auth login)."
        ) from error


PARTS = {  # parts that are not models, and how each is used: in a command, in Python
    "an EAGLE-3 head": ("inner=eagle3 inner.head={}", "parsedec_adapters.eagle3.Eagle3(head='{}')"),
    "a set of Medusa heads": ("inner=medusa inner.heads={}", "parsedec_adapters.medusa.Medusa(heads='{}')"),
    "a ParallelSpec head": (
        "inner=parallelspec inner.head={}",
        "parsedec_adapters.parallelspec.ParallelSpec(head='{}')",
    ),
    "a set of judge probes": ("judge=probe judge.weights={}", "parsedec.judge.ProbeJudge(weights='{}')"),
}
EAGLE_KEYS = {"draft_vocab_size", "eagle_config", "eagle_aux_hidden_state_layer_ids"}


def refuse_part(place: Checkpoint, source: str) -> None:
    """Raise ModelLoadError for a checkpoint that is only a part for a model, such as a head or probes.

    Some of their configurations would pass for a model's, and transformers would draw its missing weights at random.
    """
    config = place.find("config.json")
    try:
        raw = json.loads(config.read_bytes()) if config else {}
    except ValueError:
        return  # whoever loads it will report the damage
    heads = place.local and any(Path(place.location).glob("medusa_lm_head.*"))
    kind = _part(raw if isinstance(raw, dict) else {}, heads)
    if kind is not None:
        command, python = (how.format(source) for how in PARTS[kind])
        raise ModelLoadError(
            f"'{source}' is {kind}, which works beside the model it was trained for and is no model itself. Load that "
            f"model, and use this with it: {command}, in Python {python}."
        )


def _part(raw: Mapping[str, Any], medusa_file: bool) -> str | None:
    """Which of PARTS a config.json belongs to; None: a model, as far as it says."""
    named = " ".join(map(str, raw.get("architectures") or ()))
    if "ForCausalLMEagle" in named or raw.get("speculators_model_type") == "eagle3" or EAGLE_KEYS & set(raw):
        return "an EAGLE-3 head"
    if str(raw.get("format")).startswith("parsedec-parallel-head"):
        return "a ParallelSpec head"
    if raw.get("model_type") == "parsedec_probe":
        return "a set of judge probes"
    # Medusa-2 stores its heads inside a whole model, and its config.json then names a model_type
    return "a set of Medusa heads" if not raw.get("model_type") and (medusa_file or "medusa_num_heads" in raw) else None


Version = tuple[tuple[str, int, int], ...]


def version_of(source: str | Path) -> Version:
    """The state of a folder, as a key for caches of loaded weights: training may write the same folder again.

    Empty for a hub id or a single file.
    """
    folder = Path(source).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or pickled file whose names begin with `prefix`, on the CPU.

    Raises IncompatibleStack, which names the file, if it is damaged or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:  # reads no more of a whole model's file than is wanted
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


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Write a `.safetensors` file, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody but the owner read it
    return path


def _zoo_folder() -> Path:
    return Path(str(files("parsedec") / "zoo"))
