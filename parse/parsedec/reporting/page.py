"""Write a report: one self-contained HTML page, and every picture as SVG, PNG and CSV beside it.

The page needs no network and no other file; only its links to traces lead to other pages. This module says what is on
the page, and `report.html.j2`, which HTML-escapes all values, how it looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parsedec.experiment.html import rendered
from parsedec.experiment.record import write_text
from parsedec.reporting.figure import drawn
from parsedec.reporting.sections import Section, sections, sources

PAGE = "report.html"
TEMPLATE = Path(__file__).parent / "report.html.j2"
FILES = "report"  # folder for the pictures
GLOSSARY = {
    "target": ("Target, draft model", "The large model whose answers are wanted, and the small fast one that writes a "
               "first version of them."),
    "judge": ("Judge, score", "The large model reading a draft and saying how likely everything up to a point is "
              "right: a number between 0 and 1. Nothing new is written for that, so it costs little."),
    "kept": ("Kept", "Text of the small model that the large one let stand. The answer is what was kept and what the "
             "large model wrote after it."),
    "threshold": ("Threshold", "The score from which a piece of the draft is kept."),
    "arm": ("Arm", "One way of answering the same questions: the large model alone, the small one alone, PARSE, …"),
    "baseline": ("Baseline", "The arm that the others are measured against, as a rule the large model alone."),
    "tok/s": ("Token, tok/s", "Models write in tokens, pieces of about three quarters of a word; tok/s is how many per "
              "second."),
    "tau": ("tau", "How many tokens one call of the large model yields where a speculator guesses ahead; 1 without."),
    "auc": ("AUC", "Area under the ROC curve: the chance that something right is scored above something wrong."),
    "interval": ("[low, high]", "A 95 % interval: where the value could lie if other questions had been drawn. Two "
                 "values whose intervals overlap widely may not differ."),
    "n": ("n", "How many questions, or other things counted, a figure rests on."),
}  # fmt: skip


def write_report(found: Sequence[tuple[Path, Mapping[str, Any]]], folder: Path, title: str | None = None) -> Path:
    """Write `report.html` to `folder`, and its pictures to `folder`/report; returns the page's path.

    found  (path, contents) of every record
    Raises ParsedecError for a record that none of our commands writes.
    """
    made = sections(sources([(path, dict(record)) for path, record in found], folder))
    files = folder / FILES
    files.mkdir(parents=True, exist_ok=True)
    pictures = {one.anchor: [drawn(figure, files) for figure in one.figures] for one in made}
    return write_text(render(made, pictures, title or heading(made)), folder / PAGE)


def heading(made: Sequence[Section]) -> str:
    return made[0].title if len(made) == 1 else f"Report of {len(made)} parts"


def render(made: Sequence[Section], pictures: Mapping[str, Any], title: str) -> str:
    used = {word for one in made for word in one.words}
    values = {
        "title": title,
        "sections": made,
        "pictures": pictures,
        "files": FILES,
        "glossary": [entry for word, entry in GLOSSARY.items() if word in used],
    }
    return rendered(TEMPLATE, values)
