"""The command line around Hydra: shorthand for models, errors with a suggestion, logs and progress on stderr.

stdout carries results only; its last line is the path of the record.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from parsedec.errors import ConfigError, ParsedecError
from parsedec.experiment.calibrated import read_calibration
from parsedec.experiment.claim import release
from parsedec.experiment.kinds import require_kinds, require_kinds_of_defaults

log = logging.getLogger(__name__)
USAGE, INTERRUPTED = 2, 130
TOLD_EVERY_S = 60.0
_begun: list[str] = []  # jobs of this process; before the first one Hydra makes its folder
# tables need room; a pipe has no width of its own
stderr = Console(stderr=True, width=None if sys.stderr.isatty() else 200)


def run_command(main: Callable[[], Any], conf: Path) -> None:
    """Run a `@hydra.main` function as a command: exit code 0, 2 for errors the user can mend, 130 when interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit by itself, without our suggestion
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        force=True,
        handlers=[RichHandler(console=stderr, show_time=False, show_path=False)],
    )
    for noisy in ("httpx", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(_usage(main))
        sys.argv[1:] = [expanded for argument in sys.argv[1:] for expanded in expand_shorthand(argument, conf)]
        with interrupted_by_sigterm():
            main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (HydraException, OmegaConfBaseException, ParsedecError) as error:
        _refuse(explain(error, conf))
    except OSError as error:
        if _begun:
            raise
        if isinstance(error, BrokenPipeError):  # --help | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
            sys.exit(1)
        _refuse(f"the output folder cannot be made: {error}. Set another one: output=DIR.")


def _usage(main: Callable[[], Any]) -> str:
    """What the command's module says of it; Hydra's own help, which comes behind, lists groups and settings alone."""
    return (
        f"{(sys.modules[main.__module__].__doc__ or '').strip()}\n\n"
        "Listed below are the settings of the members chosen; choose others to see theirs: GROUP=MEMBER --help. The "
        "files\nof conf/, by group and member, say what each setting is for.\n"
    )


def _refuse(message: str) -> NoReturn:
    stderr.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(USAGE)


def checked(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """A decorator for below `@hydra.main`: first refuses settings of the wrong kind."""

    @wraps(task)
    def run(cfg: DictConfig) -> None:
        _begun.append(task.__module__)
        _quiet_transformers()
        hydra = HydraConfig.get()
        folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
        require_kinds_of_defaults(cfg, str(hydra.job.config_name), folders)
        require_kinds(cfg)
        if cfg.get("output") == "":  # as of a shell's variable that was not set: it would be the current folder
            raise ConfigError("output is empty; expected a folder: output=DIR.")
        task(cfg)

    return run


def expand_shorthand(argument: str, conf: Path) -> list[str]:
    """What a shorthand argument stands for: `target=WHERE` and `draft=WHERE` for any model, `draft.inner=NAME` for the
    draft model's speculator, `calibration=FILE` for thresholds of calibrate.py, `labels.fit` and `labels.check` with
    any setting of the task, even one that the file in conf/ does not name.

    Raises ConfigError for a member of a group that is not text (inner=null), which Hydra does not expect."""
    key, _, value = argument.partition("=")
    _require_member(key, argument, conf)
    if key in ("target", "draft") and not (conf / key / f"{value}.yaml").is_file():
        several = [value] if Path(value).exists() else value.split(",")  # of a sweep
        if all(map(_is_location, several)):
            sources = ",".join(map(_quoted, several))
            return [f"{key}=any", f"{'draft.model' if key == 'draft' else key}.source={sources}"]
    if key == "calibration" and value not in ("", "null"):
        return [f"calibration={_quoted(value)}", *read_calibration(Path(value))["overrides"]]
    if re.fullmatch(r"labels\.(fit|check)(\.\w+)?", key):
        return [f"++{argument}"]  # only the task knows its settings, and it will refuse others
    if key == "draft.inner":
        return [f"inner@draft.inner={value}"]
    return [argument]


def explain(error: Exception, conf: Path) -> str:
    """The message of an error that the user can mend, with the closest names that do exist."""
    cause = error.__cause__
    if isinstance(error, InstantiationException) and cause is not None:
        return str(cause) if isinstance(cause, ParsedecError) else f"{str(error).splitlines()[0]} {cause}"
    message = str(error).strip()
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the argument {error.override}; expected NAME=VALUE. Text with quotes, brackets or commas in "
            """it is quoted, too: 'NAME="[a], b"'."""
        )
    if found := re.match(r"Ambiguous value for argument '(.+?)=(.+)'\n", message):
        return (
            f"{found[1]} has several values, {found[2]}; expected one. A list is {found[1]}=[{found[2]}], and "
            "-m makes a run for each."
        )
    first = message.splitlines()[0] if message else type(error).__name__
    if found := re.search(r"Could not find '([\w@/.]+)/([^']*)'", message):
        return _no_member(found[1], found[2], conf)
    if found := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", message):
        key, names = found[1] or found[2], known_settings(conf)
        if key in names:
            alike = difflib.get_close_matches(key, [name for name in names if name != key], n=1, cutoff=0.9)
            group, _, setting = key.partition(".")
            of = [name for name in _members(group, conf) if setting in OmegaConf.load(conf / group / f"{name}.yaml")]
            where = f": of {', '.join(f'{group}={name}' for name in of)}" if of else ""
            return (
                f"{key} is a setting of another member of {group} than the one chosen{where}."
                f"{f' Did you mean {alike[0]}?' if alike else ''} --help and the files of conf/ show what each has."
            )
        return f"no setting is called '{key}'.{_close(key, names)} --help shows all of them."
    if found := re.search(r"Missing mandatory value: ([\w.]+)", message):
        path = found[1].split(".")  # perhaps of a node that stands for a setting nearer to the root: outer.judge
        known = set(known_settings(conf))
        key = next((k for i in range(len(path)) if (k := ".".join(path[i:])) in known), found[1])
        return f"{key} has no default; set it: {key}=…"
    return message if isinstance(error, ParsedecError) else first


def _require_member(key: str, argument: str, conf: Path) -> None:
    if not key:
        raise ConfigError(f"the argument {argument} has no name; expected NAME=VALUE.")
    group = key.partition("@")[0]
    if not (conf / group).is_dir():
        return
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return  # for Hydra to say where it cannot be read
    if value is None or isinstance(value, bool | int | float):
        raise ConfigError(_no_member(group, argument.partition("=")[2], conf))


def _no_member(group: str, name: str, conf: Path) -> str:
    members = _members(group, conf)
    key = {"target": "target.source", "draft": "draft.model.source"}.get(group)
    other = f" A hub id without a slash is given as {group}=any {key}={name}." if key else ""
    return f"{group}={name} does not exist; {group} is one of {members}.{_close(name, members)}{other}"


def _members(group: str, conf: Path) -> list[str]:
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def known_settings(conf: Path) -> list[str]:
    """The dotted names of all settings of all group members, and of the groups themselves."""
    names: set[str] = set()
    for path in conf.rglob("*.yaml"):
        parent = path.parent.relative_to(conf)
        prefix = "" if parent == Path(".") or parent.name == "experiment" else f"{parent}."
        names |= {prefix.rstrip(".")} if prefix else set()
        loaded = OmegaConf.load(path)
        if isinstance(loaded, DictConfig):
            names |= {prefix + name for name in _dotted(loaded)}
    return sorted(names - {"defaults"})


def _dotted(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        yield f"{prefix}{key}"
        known = not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key)
        if known and isinstance(node[key], DictConfig):
            yield from _dotted(node[key], f"{prefix}{key}.")


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM, as a scheduler sends it, like Ctrl-C in the body: what is finished is written first."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def announced(record_path: Path) -> Iterator[None]:
    """End a command's stdout with the path of its record, when it is done, or after Ctrl-C if there is one; and give up
    the claim on its folder, so that other processes may go on with it."""
    try:
        yield
    except KeyboardInterrupt:
        if record_path.exists():
            print(record_path)  # what was finished is there
        raise
    finally:
        release(record_path)
    print(record_path)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Progress as a bar on a terminal, else as a line a minute. Call what it yields with a label after each step."""
    if not stderr.is_terminal:
        yield _told(total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda label: bar.update(task, advance=1, description=label)


def _told(total: int) -> Callable[[str], None]:
    """Progress in the log, where nobody can see a bar: a line every minute."""
    began = told = time.monotonic()
    done = 0

    def step(label: str) -> None:
        nonlocal told, done
        done += 1
        now = time.monotonic()
        if now - told >= TOLD_EVERY_S:
            told = now
            left = (total - done) * (now - began) / done
            log.info("%d of %d, %s; about %.0f min left", done, total, label, left / 60)

    return step


def _quoted(value: str) -> str:
    """A value as Hydra reads it: \' is a quote; backslashes before a quote, the closing one included, are doubled."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", r"\'"), value) + "'"


def _is_location(value: str) -> bool:
    return value.startswith("zoo:") or value.endswith(".gguf") or "/" in value or Path(value).is_dir()


def _close(name: str, known: list[str]) -> str:
    inside = [k for k in known if k.endswith(f".{name}")]  # the right name without its group
    near = inside[:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not near and "." in name:  # right group, wrong setting
        group = name.rsplit(".", 1)[0]
        near = [k for k in known if k.startswith(f"{group}.")]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _quiet_transformers() -> None:
    import transformers  # here: this takes seconds, and neither --help nor a misspelt setting should wait for it
    from huggingface_hub.utils.tqdm import enable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # its own, and those of downloads with it
    if stderr.is_terminal:
        enable_progress_bars()
