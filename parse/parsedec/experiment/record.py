"""The record of a run: configuration, provenance, every request and a summary, as JSON that is written atomically.

`schema_version` changes when a key is removed or changes its meaning.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from parsedec.errors import FileNotWritten, OutputExistsError, ParsedecError, first_line
from parsedec.experiment.claim import claim, released_on_error
from parsedec.experiment.threads import recall_threads, settled_threads
from parsedec.models.checkpoints import hub_commits, pin_commits
from parsedec.models.ranks import leading

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SHOWN = 5  # differing settings that a message names
ABSENT = object()  # for a setting that is missing, which is not the same as null
PACKAGES = ("parsedec", "torch", "transformers", "tokenizers", "hydra-core", "numpy")


def to_json(value: Any) -> Any:
    """Dataclasses to dictionaries, tuples to lists, paths and enums to text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, (Path, str)) else value


def provenance() -> dict[str, Any]:
    """Where and with what this process runs: commit, packages, machine."""
    return {
        "git_sha": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
    }


def write_record(record: dict[str, Any], path: Path) -> Path:
    """Write to a temporary file and rename it, so that no reader and no kill finds half a record.

    To the provenance is added what was only known later: `hub`, the commit of each repository that was read, and the
    threads that were chosen. Raises FileNotWritten, which says what is kept and how to go on.
    """
    ended_by = sys.exception()  # a run is also saved when an error ends it
    if "provenance" in record:
        found = {"hub": hub_commits() or None, "threads": settled_threads()}
        known = {name: value for name, value in found.items() if value is not None}
        record = record | {"provenance": record["provenance"] | known}
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    try:
        return write_text(text, path)
    except FileNotWritten as error:
        raise FileNotWritten(f"{error} {_what_is_kept(record, path, ended_by)}") from error.__cause__


def _what_is_kept(record: Mapping[str, Any], path: Path, ended_by: BaseException | None) -> str:
    """What a message says about a record that could not be written. ended_by: the error that ended the run, if any"""
    before = ""
    if isinstance(ended_by, Exception) and not isinstance(ended_by, FileNotWritten):
        before = f" The run had failed before that: {type(ended_by).__name__}: {first_line(ended_by)}."
    if not path.exists():
        return f"Nothing of this run had been saved: run it again.{before}"
    resumed = f": resume=true output={path.parent} goes on from it" if "resume" in record.get("config", {}) else ""
    return f"The record as it was saved last is kept{resumed}.{before}"


def write_text(text: str, path: Path) -> Path:
    """Write to a temporary file and rename it. Raises FileNotWritten; the file then is as it was before."""
    try:
        return _write_text(text, path)
    except OSError as error:
        raise FileNotWritten(
            f"cannot write {path}: {error}. Expected room for {len(text.encode(errors='replace')):,} bytes in a folder "
            "that may be written. Make room, or see to its rights."
        ) from error


def _write_text(text: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        # "replace": a broken token can leave half of a surrogate pair, which UTF-8 cannot hold
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as sink:
            sink.write(text)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_record(path: Path) -> dict[str, Any]:
    """The record at `path`, or at `path`.gz. Raises ParsedecError if this version cannot read it."""
    packed = path if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
    try:
        plain_file = path != packed and (path.exists() or not packed.exists())
        record = json.loads(path.read_bytes() if plain_file else gzip.decompress(packed.read_bytes()))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ParsedecError(
            f"cannot read the record {path}: {error}. Expected a record.json written by a run."
        ) from error
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        found = record.get("schema_version") if isinstance(record, dict) else type(record).__name__
        raise ParsedecError(
            f"{path} has schema_version {found!r}; expected {SCHEMA_VERSION}. It was written by another "
            "version of parsedec, or is no record."
        )
    return record


def is_run(record: Mapping[str, Any]) -> bool:
    """Whether its `arms` are arms that answered requests. Records of other commands name their `kind`, and the arms of
    an advice are expectations."""
    return "arms" in record and "kind" not in record


def earlier_record(
    path: Path, config: dict[str, Any], resume: bool | None, free: Sequence[str] = ()
) -> dict[str, Any] | None:
    """The record to resume from, or None for a new run. Claims the folder: no other process may write there (`claim`).

    resume  None: this kind of run cannot be resumed
    free    dotted settings that may differ from the record's

    From now on, what the earlier run read from the hub is read at the same commits. Raises OutputExistsError rather
    than overwrite a record, or mix configurations in one.
    """
    if path.parent.is_file():
        raise OutputExistsError(f"output={path.parent} is a file; expected a folder, which need not exist yet.")
    if leading():  # the others do not write
        claim(path)  # before looking: a run that has begun may not have saved yet
    with released_on_error(path):
        return _to_go_on_from(path, config, resume, free)


def _to_go_on_from(
    path: Path, config: dict[str, Any], resume: bool | None, free: Sequence[str]
) -> dict[str, Any] | None:
    if not path.exists():
        if resume:
            log.info("nothing to resume in %s: this is a new run", path.parent)
        return None
    if resume is None:
        raise OutputExistsError(
            f"{path} exists already; a run never overwrites one, and this kind of run cannot be resumed. Choose "
            "another folder (output=DIR)."
        )
    if not resume:
        raise OutputExistsError(
            f"{path} exists already; a run never overwrites one. Choose another folder "
            "(output=DIR), or resume=true to finish that run."
        )
    record = read_record(path)
    ours, theirs = (_without(one, ("resume", "output", *free)) for one in (config, record["config"]))
    if changed := sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)):
        told = [said for key in changed for said in _changes(theirs.get(key), ours.get(key), key)]
        more = "; …" if len(told) > SHOWN else ""
        raise OutputExistsError(
            f"{path} was made with another configuration ({'; '.join(told[:SHOWN])}{more}), so it cannot be resumed "
            "with this one. Use the same overrides, add what differs, or choose another folder (output=DIR)."
        )
    provenance = record.get("provenance", {})
    pin_commits(provenance.get("hub", {}))
    recall_threads(provenance.get("threads"))
    return record


def _changes(before: Any, now: Any, name: str) -> Iterator[str]:
    """The settings in which two configurations differ, such as `runtime.threads: null, now "auto"`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _changes(before.get(key, ABSENT), now.get(key, ABSENT), f"{name}.{key}")
    elif before != now:
        was, became = ("absent" if value is ABSENT else json.dumps(value) for value in (before, now))
        yield f"{name}: {was}, now {became}"


def _without(config: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A configuration without some dotted settings."""
    left = copy.deepcopy(dict(config))
    for setting in settings:
        *path, name = setting.split(".")
        node: Any = left
        for key in path:
            node = node.get(key) or {}
        node.pop(name, None)
    return left


def _hydra() -> Any:
    """Hydra's settings of this job; None outside one. Does not import Hydra, which the library does without."""
    module = sys.modules.get("hydra.core.hydra_config")
    return module.HydraConfig.get() if module and module.HydraConfig.initialized() else None


def overrides_of_job() -> list[str]:
    """The overrides of this job as they were typed; in a sweep, with this job's values."""
    hydra = _hydra()
    return list(hydra.overrides.task) if hydra else []


def _of_sweep() -> bool:
    hydra = _hydra()
    return hydra is not None and hydra.mode.name == "MULTIRUN"


def _command() -> str:
    """The command as it was typed, without the path of the script; in a sweep, one that runs this job alone."""
    if _of_sweep():
        return shlex.join([f"{_hydra().job.name}.py", *overrides_of_job()])
    script = Path(sys.argv[0]).name
    at = next((i for i, word in enumerate(sys.orig_argv) if Path(word).name == script), len(sys.orig_argv))
    return shlex.join([script, *sys.orig_argv[at + 1 :]])


def command_line(record: Mapping[str, Any]) -> str | None:
    """The command that made a record, to be run in a checkout; None for a record without provenance."""
    typed = (record.get("provenance") or {}).get("command")
    return f"python experiments/{typed}" if typed and typed.split()[0].endswith(".py") else typed


def _git(*arguments: str) -> str | None:
    """Output of git in the folder of the running script, or None outside a checkout.

    For a job of a sweep, which a launcher's script may run, in the folder of its configuration.
    """
    folder = Path(sys.argv[0]).resolve().parent
    if _of_sweep():
        sources = _hydra().runtime.config_sources
        folder = next((Path(s.path) for s in sources if s.provider == "main" and s.schema == "file"), folder)
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return f"CPU {model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
