"""Make the table and the trace page of a record again, e.g. after the page's design has changed.

python experiments/report.py outputs/…/record.json [more records]

Writes table.md and trace.html beside each record and prints their paths.
"""

import sys
from pathlib import Path

from parsedec.errors import ParsedecError
from parsedec.experiment.record import read_record, write_text
from parsedec.experiment.table import markdown
from parsedec.experiment.trace import write_trace


def main(paths: list[str]) -> int:
    if not paths or paths[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if paths else 2
    for path in map(Path, paths):
        try:
            record = read_record(path)
            if "arms" not in record:
                raise ParsedecError(f"{path} is no record of run.py or compare.py; there is no table to make of it.")
        except ParsedecError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(write_text(markdown(record), path.with_name("table.md")))
        print(write_trace(record, path.with_name("trace.html")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
