"""Documents whose figures come from records: Markdown templates for Jinja, and tables between two marks on a page.

`experiments/figures.py` uses it to write the project's own. Templates may call the methods of `Figures`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from parsedec.advice import report as advice
from parsedec.calibration import report as calibration
from parsedec.errors import ConfigError
from parsedec.experiment import table
from parsedec.experiment.intervals import with_interval
from parsedec.experiment.record import command_line, is_run, read_record
from parsedec.experiment.summary import again

BLOCK = re.compile(r"(<!-- table (?P<name>\w+): (?P<heads>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Figures:
    """The figures of the records in a folder, as text. Each record is read only once."""

    records: Path
    _read: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def record(self, name: str) -> dict[str, Any]:
        if name not in self._read:
            record = read_record(self.records / name / "record.json")
            self._read[name] = again(record) if is_run(record) else record
        return self._read[name]

    def table(self, name: str, heads: Sequence[str]) -> str:
        """The arms of a comparison as a Markdown table; `heads` chooses among the columns of its own table.

        Raises ConfigError for a column that it does not have.
        """
        record = self.record(name)
        known = ["arm", *(head for head, _ in table.columns(record))]
        unknown = [head for head in heads if head not in known]
        if unknown:
            raise ConfigError(f"a table of record {name} asks for columns {unknown}; it has {known}")
        chosen = [known.index(head) for head in heads]
        return table.grid(list(heads), [[row[i] for i in chosen] for row in table.rows(record)])

    def body(self, name: str, file: str = "table.md") -> str:
        """What the command wrote beside its record, without the heading and the command."""
        paragraphs = (self.records / name / file).read_text(encoding="utf-8").strip().split("\n\n")
        return "\n\n".join(paragraphs[2:])

    def command(self, name: str) -> str | None:
        """The command that made a record."""
        return command_line(self.record(name))

    def compared(self, name: str, arm: str) -> dict[str, Any]:
        """The row that compares an arm with its record's baseline: ratios with their intervals."""
        return next(row for row in self.record(name)["comparison"] if row["arm"] == arm)

    def speed(self, name: str, arm: str) -> str:
        row = self.compared(name, arm)
        return with_interval(row["speedup"], row["speedup_low"], row["speedup_high"])

    def change(self, name: str, arm: str) -> str:
        """How much more often an arm is right than the baseline, in percentage points."""
        row = self.compared(name, arm)
        middle, low, high = (100 * row[f"accuracy_change{end}"] for end in ("", "_low", "_high"))
        return f"{middle:+.1f} points [{low:+.1f}, {high:+.1f}]"

    def calibrated(self, name: str) -> str:
        """The goal of a calibration, its thresholds, and whether they kept the goal on the problems of the check."""
        record = self.record(name)
        return f"{calibration.sentence(record)}. {calibration.verdict(record['calibration'])}"

    def advised(self, names: Sequence[str]) -> str:
        """A table of what the advisor predicted and what was then measured, in these records."""
        rows = []
        for name in names:
            record = self.record(name)
            seed, problems = record["config"]["task"].get("seed", "-"), record["checked"]["problems"]
            rows += [[str(seed), *row, str(problems)] for row in advice.check_rows(record)]
        return table.grid(["task.seed", *advice.CHECK_HEADS, "n"], rows)

    def longer(self, name: str, arm: str) -> str:
        """How much more time an arm takes than the baseline, in per cent."""
        row = self.compared(name, arm)
        middle, low, high = (100 * (1 / row[key] - 1) for key in ("time_ratio", "time_ratio_high", "time_ratio_low"))
        return f"{middle:.0f} % [{low:.0f}, {high:.0f}]"

    def tau(self, name: str) -> str:
        """Tokens per target call, from a head's record."""
        found = self.record(name)["evaluation"]
        low, high = found["tau_interval"]
        return f"{found['tau']:.2f} [{low:.2f}, {high:.2f}]"

    def curve(self, name: str) -> str:
        """A table of what each threshold keeps and what that costs, from a target's record."""
        found = self.record(name)["evaluation"]
        rows = [
            [
                f"{at['threshold']:g}",
                percent(at["kept_tokens"] / at["drafted_tokens"]),
                share(at["accuracy"]),
                percent(where["exact"] / where["wrong_drafts"]),
                percent(where["never_later"] / where["wrong_drafts"]),
            ]
            for at, where in zip(found["thresholds"], found["localisation"], strict=True)
        ]
        return table.grid(
            ["threshold", "draft tokens kept", "accuracy of PARSE", "first wrong line found exactly", "never later"],
            rows,
        )

    def overhead(self) -> str:
        """A table of the engine's own work per step, as a share of a plain target step, for each inner speculator."""
        rows = []
        for inner in self.record("overhead")["inners"]:
            found = inner["summary"]
            low, high = found["overhead_share_low"], found["overhead_share_high"]
            rows.append([inner["name"], f"{percent(found['overhead_share'])} [{100 * low:.1f}, {100 * high:.1f}]"])
        return table.grid(["inner=", "engine's own work per step"], rows)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def share(counted: dict[str, Any]) -> str:
    """A share with its 95 % interval."""
    low, high = counted["interval"]
    return f"{percent(counted['share'])} [{100 * low:.1f}, {100 * high:.1f}]"


def rendered(template: Path, records: Path) -> str:
    """The document made from a template. Raises an error for a name or a column that does not exist."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=False,  # Markdown, from our own template and records
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"share": share, "percent": percent}
    return environment.get_template(template.name).render(figures=Figures(records))


def with_tables(page: str, records: Path) -> str:
    """The page, with all tables between `<!-- table RECORD: column, … -->` and `<!-- end -->` made anew."""
    figures = Figures(records)

    def made(found: re.Match[str]) -> str:
        heads = [head.strip() for head in found["heads"].split(",")]
        return f"{found[1]}{figures.table(found['name'], heads)}\n{found[4]}"

    return BLOCK.sub(made, page)
