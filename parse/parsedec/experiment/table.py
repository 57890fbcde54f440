"""The tables of a record, for the terminal and as Markdown: its arms, and how deep their guesses were accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

DEEPEST = 8  # levels shown; a record holds all of them
OFFERED = 0.95  # the share of trees that reached a level is shown where it is below this

Column = tuple[str, Callable[[dict[str, Any], dict[str, Any] | None], str]]


def _accuracy(summary: dict[str, Any], _: dict[str, Any] | None) -> str:
    if summary["accuracy"] is None:
        return "-"
    low, high = summary["accuracy_interval"]
    return f"{100 * summary['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _share(summary: dict[str, Any], _: dict[str, Any] | None) -> str:
    return "-" if summary["kept_share"] is None else f"{100 * summary['kept_share']:.1f} %"


def _tau(summary: dict[str, Any], _: dict[str, Any] | None) -> str:
    tau = summary.get("tau")  # records made before it was counted have none
    return "-" if tau is None else f"{tau:.2f}"


def _ratio(name: str) -> Callable[[dict[str, Any], dict[str, Any] | None], str]:
    def cell(_: dict[str, Any], row: dict[str, Any] | None) -> str:
        return "-" if row is None else f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"

    return cell


COLUMNS: tuple[Column, ...] = (
    ("accuracy", _accuracy),
    ("new tokens", lambda s, _: str(s["new_tokens"])),
    ("target calls", lambda s, _: str(s["target_calls"])),
    ("tau", _tau),
    ("kept share", _share),
    ("drafts kept whole", lambda s, _: str(s["accepted_whole"])),
    ("rounds", lambda s, _: str(s["rounds"])),
    ("errors", lambda s, _: str(s["errors"])),
    ("tok/s", lambda s, _: "-" if s["tokens_per_s"] is None else f"{s['tokens_per_s']:.1f}"),
    ("speed-up in tok/s", _ratio("speedup")),
    ("in time", _ratio("time_ratio")),
)


def columns(record: dict[str, Any]) -> tuple[Column, ...]:
    """A run by itself is compared with nothing; tau is shown if some arm guesses tokens."""
    shown = COLUMNS if record.get("comparison") else COLUMNS[:-2]
    guesses = any(arm["summary"].get("tau") is not None for arm in record["arms"])
    return tuple(column for column in shown if guesses or column[1] is not _tau)


def rows(record: dict[str, Any]) -> list[list[str]]:
    """One list of cells per arm, its name first."""
    against = {row["arm"]: row for row in record.get("comparison", [])}
    return [
        [arm["name"], *(render(arm["summary"], against.get(arm["name"])) for _, render in columns(record))]
        for arm in record["arms"]
    ]


def depth_rows(record: dict[str, Any]) -> list[list[str]]:
    """One list of cells per arm that guesses tokens: its name, and for every depth the share of its verified trees
    accepted that far - of the share that reached it, where that is noticeably less than all."""
    guessing = [arm for arm in record["arms"] if arm["summary"].get("tau") is not None]
    deepest = min(DEEPEST, max((len(arm["summary"]["offered_by_depth"]) for arm in guessing), default=0))
    return [[arm["name"], *(_accepted(arm["summary"], depth) for depth in range(deepest))] for arm in guessing]


def _accepted(summary: dict[str, Any], depth: int) -> str:
    trees, reached = summary["inner_steps"], summary["offered_by_depth"]
    if depth >= len(reached):
        return "-"
    accepted, offered = summary["accepted_by_depth"][depth] / trees, reached[depth] / trees
    return f"{accepted:.2f}" + (f" of {offered:.2f}" if offered < OFFERED else "")


DEPTH_CAPTION = (
    "Share of the verified trees that were accepted to this depth or deeper; of: the share that reached it, where "
    f"below {OFFERED}. tau: tokens per verified tree, the target's own included."
)


def caption(record: dict[str, Any]) -> str:
    """Tier, machine, versions, commit, seed and counts: what a reader needs to weigh the figures."""
    n = record["arms"][0]["summary"]["requests"]
    return (
        f"Tier: {tier(record)}. n = {n}, seed {record['config']['seed']}, at most {record['config']['max_new_tokens']} "
        "new tokens; 95 % intervals (Wilson; paired bootstrap for speed-ups). In time: the baseline's seconds over the "
        f"arm's for the same requests. {origin(record)}"
    )


def origin(record: dict[str, Any]) -> str:
    """Machine, versions and commit of a record."""
    made = record["provenance"]
    sha = (made["git_sha"] or "no commit")[:10] + (" with uncommitted changes" if made["git_dirty"] else "")
    versions = ", ".join(f"{name} {made['packages'][name]}" for name in ("torch", "transformers"))
    return f"{made['device']}, {versions}, commit {sha}."


def tier(record: dict[str, Any]) -> str:
    """Which kind of evidence this is; the kinds are never mixed in one table."""
    source = str(record["config"]["target"]["source"])
    kinds = {"zoo:": "zoo", "replay:": "replay (random weights, scripted decisions: speed and nothing else)"}
    return next((kind for prefix, kind in kinds.items() if source.startswith(prefix)), "real checkpoints")


def terminal(record: dict[str, Any]) -> Group:
    """What is printed: the arms, and below them how deep guesses were accepted, if there were any."""
    heads, depths = ["arm", *(name for name, _ in columns(record))], depth_rows(record)
    tables = [printed(record["title"], heads, rows(record), caption(record))]
    if depths:
        tables.append(printed("Accepted by depth", _depth_heads(depths), depths, DEPTH_CAPTION))
    return Group(*tables)


def markdown(record: dict[str, Any]) -> str:
    """The same with the command that made it, to be committed beside the record."""
    heads, depths = ["arm", *(name for name, _ in columns(record))], depth_rows(record)
    text = (
        f"# {record['title']}\n\n    python experiments/{record['provenance']['command']}\n\n"
        f"{grid(heads, rows(record))}\n\n{caption(record)}\n"
    )
    if depths:
        text += f"\n## Accepted by depth\n\n{grid(_depth_heads(depths), depths)}\n\n{DEPTH_CAPTION}\n"
    return text


def printed(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], note: str) -> Table:
    """A table for the terminal; the first column holds names."""
    table = Table(title=title, caption=note, box=box.SIMPLE_HEAD, caption_justify="left")
    for i, name in enumerate(heads):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    return table


def grid(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column holds names."""
    lines = [" | ".join(row) for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *cells)]
    return "\n".join(f"| {line} |" for line in lines)


def _depth_heads(depths: Sequence[Sequence[str]]) -> list[str]:
    return ["arm", *map(str, range(1, len(depths[0])))]
