"""Write the pages of docs/ that have a template, and the tables of README.md, from the records.

python experiments/figures.py [--check]

With --check nothing is written, and the exit status is 1 if a document does not say what the records do.
"""

import sys
from pathlib import Path

from parsedec.experiment.record import write_text
from parsedec.reporting.documents import rendered, with_tables

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "experiments" / "records"


def documents() -> dict[Path, str]:
    """Every document that holds figures, as the records want it."""
    readme = ROOT / "README.md"
    pages = {template.with_suffix(""): rendered(template, RECORDS) for template in (ROOT / "docs").glob("*.md.j2")}
    return {**pages, readme: with_tables(readme.read_text(encoding="utf-8"), RECORDS)}


def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__.strip())
        return 2
    check = bool(sys.argv[1:])
    stale = {
        path: text
        for path, text in documents().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'not what the records say' if check else 'written'}")
        if not check:
            write_text(text, path)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
