"""Make a report that people look at of one or several records, e.g. those of a sweep's folder.

    python experiments/report.py outputs/…/record.json             of a run, comparison, calibration, training …
    python experiments/report.py outputs/…-sweep                   of all records below a folder
    python experiments/report.py A/record.json B/record.json --output outputs/report

Writes table.md and trace.html beside each record with answers, as the run itself did, report.html and, in the folder
report beside it, every picture as SVG, PNG and CSV; prints the paths. Without --output the report lies beside the
record, or in the folder that holds all of them.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from parsedec.errors import ParsedecError
from parsedec.experiment.record import read_record, write_text
from parsedec.experiment.table import markdown
from parsedec.experiment.trace import write_trace


def record_paths(given: list[Path]) -> list[Path]:
    """The records named, and those below the folders named."""
    found: list[Path] = []
    for path in given:
        below = sorted(path.rglob("record.json")) if path.is_dir() else [path]
        if not below:
            raise ParsedecError(f"there is no record.json below {path}. Expected the folder of a run or of a sweep.")
        found += below
    return list(dict.fromkeys(found))


def make(given: list[Path], output: Path | None) -> None:
    paths = record_paths(given)
    found = [(path, read_record(path)) for path in paths]
    for path, record in found:
        if "arms" in record:
            if record["arms"]:
                print(write_text(markdown(record), path.with_name("table.md")))
            print(write_trace(record, path.with_name("trace.html")))
    if importlib.util.find_spec("matplotlib") is None:
        raise ParsedecError("report.html needs matplotlib, which is not installed: pip install 'parsedec[report]'.")
    from parsedec.reporting.page import write_report

    folder = output or Path(os.path.commonpath([path.parent for path in paths]))
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
