"""The table of a record, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.table import Table

Column = tuple[str, Callable[[dict[str, Any], dict[str, Any] | None], str]]


def _accuracy(summary: dict[str, Any], _: dict[str, Any] | None) -> str:
    if summary["accuracy"] is None:
        return "-"
    low, high = summary["accuracy_interval"]
    return f"{100 * summary['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _share(summary: dict[str, Any], _: dict[str, Any] | None) -> str:
    return "-" if summary["kept_share"] is None else f"{100 * summary['kept_share']:.1f} %"


def _ratio(name: str) -> Callable[[dict[str, Any], dict[str, Any] | None], str]:
    def cell(_: dict[str, Any], row: dict[str, Any] | None) -> str:
        return "-" if row is None else f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"

    return cell


COLUMNS: tuple[Column, ...] = (
    ("accuracy", _accuracy),
    ("new tokens", lambda s, _: str(s["new_tokens"])),
    ("target calls", lambda s, _: str(s["target_calls"])),
    ("kept share", _share),
    ("drafts kept whole", lambda s, _: str(s["accepted_whole"])),
    ("rounds", lambda s, _: str(s["rounds"])),
    ("errors", lambda s, _: str(s["errors"])),
    ("tok/s", lambda s, _: "-" if s["tokens_per_s"] is None else f"{s['tokens_per_s']:.1f}"),
    ("speed-up in tok/s", _ratio("speedup")),
    ("in time", _ratio("time_ratio")),
)


def columns(record: dict[str, Any]) -> tuple[Column, ...]:
    """A run by itself is compared with nothing."""
    return COLUMNS if record.get("comparison") else COLUMNS[:-2]


def rows(record: dict[str, Any]) -> list[list[str]]:
    """One list of cells per arm, its name first."""
    against = {row["arm"]: row for row in record.get("comparison", [])}
    return [
        [arm["name"], *(render(arm["summary"], against.get(arm["name"])) for _, render in columns(record))]
        for arm in record["arms"]
    ]


def caption(record: dict[str, Any]) -> str:
    """Tier, commit, machine, versions, seed and counts: what a reader needs to weigh the figures."""
    made, config = record["provenance"], record["config"]
    sha = (made["git_sha"] or "no commit")[:10] + (" with uncommitted changes" if made["git_dirty"] else "")
    versions = ", ".join(f"{name} {made['packages'][name]}" for name in ("torch", "transformers"))
    n = record["arms"][0]["summary"]["requests"]
    return (
        f"Tier: {tier(record)}. n = {n}, seed {config['seed']}, at most {config['max_new_tokens']} new tokens; "
        "95 % intervals (Wilson; paired bootstrap for speed-ups). In time: the baseline's seconds over the arm's for "
        f"the same requests. {made['device']}, {versions}, commit {sha}."
    )


def tier(record: dict[str, Any]) -> str:
    """Which kind of evidence this is; the kinds are never mixed in one table."""
    return "zoo" if str(record["config"]["target"]["source"]).startswith("zoo:") else "real checkpoints"


def terminal(record: dict[str, Any]) -> Table:
    table = Table(title=record["title"], caption=caption(record), box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("arm", no_wrap=True)
    for name, _ in columns(record):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(record):
        table.add_row(*row)
    return table


def markdown(record: dict[str, Any]) -> str:
    """The same with the command that made it, to be committed beside the record."""
    head = ["arm", *(name for name, _ in columns(record))]
    lines = [" | ".join(cells) for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows(record))]
    body = "\n".join(f"| {line} |" for line in lines)
    return (
        f"# {record['title']}\n\n    python experiments/{record['provenance']['command']}\n\n{body}\n\n"
        f"{caption(record)}\n"
    )
