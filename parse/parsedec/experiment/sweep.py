"""A sweep as a table: what each of its jobs was told, and what came of it.

Every job of `--multirun` writes its record into its own folder, `hydra.sweep.dir`/0, /1, …; after each one the table of
all that are there is written beside them, as sweep.md and, with plain numbers, sweep.csv. It is made from the records
alone, so it is right after a kill, and for jobs of other machines that share the folder.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from parsedec.errors import ParsedecError
from parsedec.experiment.record import is_run, read_record, write_text
from parsedec.experiment.table import columns, grid, origin

SETTINGS_OF_THE_SWEEP = ("resume", "output")  # they say how it was run, not what


class SweepTable(Callback):
    """Hydra callback: writes the table of a sweep whenever one of its jobs has ended, failed ones included."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            write_sweep(Path(config.hydra.runtime.output_dir).parents[_depth(config) - 1])


def write_sweep(folder: Path) -> tuple[Path, Path] | None:
    """sweep.md and sweep.csv of the records under `folder`; None where there is no record yet."""
    records = read_sweep(folder)
    if not records:
        return None
    return (
        write_text(markdown(folder.name, records), folder / "sweep.md"),
        write_text(comma_separated(records), folder / "sweep.csv"),
    )


def read_sweep(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(job, record) of every job under `folder` that has one this version can read, in the order of the jobs."""
    found = []
    for path in folder.rglob("record.json"):
        try:
            record = read_record(path)
        except ParsedecError:  # another command's record, or another version's: not of this table
            continue
        if is_run(record):
            found.append((path.parent.relative_to(folder).as_posix(), record))
    return sorted(found, key=lambda job: (not job[0].isdigit(), int(job[0]) if job[0].isdigit() else 0, job[0]))


def varied(records: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The overrides in which the jobs differ, in the order in which they were given."""
    told = [_overrides(record) for _, record in records]
    names = dict.fromkeys(name for overrides in told for name in overrides)
    return [
        name
        for name in names
        if name not in SETTINGS_OF_THE_SWEEP and len({overrides.get(name) for overrides in told}) > 1
    ]


def markdown(title: str, records: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A row per job and arm: the settings in which jobs differ, then the columns of a record's own table."""
    names = varied(records)
    shown = list(dict.fromkeys(head for _, record in records for head, _ in columns(record)))
    rows = []
    for job, record in records:
        against = {row["arm"]: row for row in record.get("comparison", [])}
        told = _overrides(record)
        for arm in record["arms"]:
            render = dict(columns(record))
            cells = [
                render[head](arm["summary"], against.get(arm["name"])) if head in render else "-" for head in shown
            ]
            rows.append([job, *(told.get(name, "") for name in names), arm["name"], record["status"], *cells])
    common = sorted({origin(record) for _, record in records})
    return f"# {title}\n\n{grid(['job', *names, 'arm', 'status', *shown], rows)}\n\n{' '.join(common)}\n"


def comma_separated(records: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The same for programs: every number of the summaries, undecorated."""
    names, numbers = varied(records), list[str]()
    for _, record in records:
        for arm in record["arms"]:
            numbers += [key for key, value in arm["summary"].items() if _plain(value) and key not in numbers]
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["job", *names, "arm", "status", *numbers])
    for job, record in records:
        told = _overrides(record)
        for arm in record["arms"]:
            values = [arm["summary"].get(key) for key in numbers]
            writer.writerow([job, *(told.get(name, "") for name in names), arm["name"], record["status"], *values])
    return sink.getvalue()


def _overrides(record: dict[str, Any]) -> dict[str, str]:
    """What the job was told: setting -> value, as typed. Records made before it was stored have none."""
    pairs = (override.partition("=") for override in record.get("overrides", []))
    return {name: value for name, _, value in pairs}


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str))


def _depth(config: DictConfig) -> int:
    """How many folders a job's own one is below the sweep's."""
    return len(Path(str(config.hydra.sweep.subdir)).parts)
