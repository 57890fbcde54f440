"""Make a report that people look at of one or several records, e.g. those of a sweep's folder.

    python experiments/report.py outputs/…/record.json             of a run, comparison, calibration, training …
    python experiments/report.py outputs/…-sweep                   of all records below a folder
    python experiments/report.py A/record.json B/record.json --output outputs/report

Writes table.md and trace.html beside each record with answers, as the run itself did, report.html and, in the folder
report beside it, every picture as SVG, PNG and CSV; prints the paths. Records below a folder that it cannot read or has
nothing to say of are named and left out. Without --output the report lies beside the
record, or in the folder that holds all of them.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from parsedec.errors import ParsedecError
from parsedec.experiment import table
from parsedec.experiment.record import is_run, read_record, write_text
from parsedec.experiment.summary import again
from parsedec.experiment.trace import write_trace
from parsedec.hardware import claims, replay

Json = dict[str, Any]
Found = tuple[Path, Json]


def read_all(given: list[Path]) -> list[Found]:
    """The records named, and those below the folders named. Raises for one named that cannot be read; below a folder
    such a one is said and left out."""
    found: dict[Path, Json] = {}
    for path in given:
        below = sorted([*path.rglob("record.json"), *path.rglob("record.json.gz")]) if path.is_dir() else [path]
        if not below:
            raise ParsedecError(f"there is no record.json below {path}. Expected the folder of a run or of a sweep.")
        for one in below:
            try:
                record = whole(read_record(one), one)
                found[one] = again(record) if is_run(record) else record
            except ParsedecError as error:
                if one in given:
                    raise
                print(f"left out: {error}", file=sys.stderr)
    return list(found.items())


def whole(record: Json, path: Path) -> Json:
    """The record, if it has what every command writes first."""
    if missing := {"config", "provenance"} - set(record):
        raise ParsedecError(f"{path} is no whole record: it has no {' and no '.join(sorted(missing))}.")
    return record


def with_sections(found: list[Found], named: list[Path]) -> list[Found]:
    """Those a report has a section for, and those named outright; the others are said and left out."""
    from parsedec.reporting.sections import maker

    kept = []
    for path, record in found:
        if path in named or maker(record):
            kept.append((path, record))
        else:
            print(f"left out: a report has no section for {path}, which holds {sorted(record)}.", file=sys.stderr)
    return kept


def is_gpu(record: Json) -> bool:
    return record.get("kind") == "gpu"


def make(given: list[Path], output: Path | None) -> None:
    found = [(path, claims.with_runs(record, path.parent) if is_gpu(record) else record)
             for path, record in read_all(given)]  # fmt: skip
    for path, record in found:
        if is_gpu(record):
            print(write_text(claims.markdown(record), path.with_name("table.md")))
        elif is_run(record):
            if record["arms"]:
                markdown = replay.markdown if replay.is_replay(record) else table.markdown
                print(write_text(markdown(record), path.with_name("table.md")))
            print(write_trace(record, path.with_name("trace.html")))
    if importlib.util.find_spec("matplotlib") is None:
        raise ParsedecError("report.html needs matplotlib, which is not installed: pip install 'parsedec[report]'.")
    from parsedec.reporting.page import write_report

    found = with_sections(found, given)
    if not found:
        raise ParsedecError(f"nothing below {', '.join(map(str, given))} has a section in a report; see above.")
    folder = output or Path(os.path.commonpath([path.parent for path, _ in found]))
    print(write_report(found, folder))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="record.json files, or folders that hold some")
    parser.add_argument("--output", type=Path, help="folder of the report")
    options = parser.parse_args(arguments)
    try:
        make(options.records, options.output)
    except ParsedecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
