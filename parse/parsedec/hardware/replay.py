"""The table and plot of a replay: measured speed beside an analytic ceiling, computed from costs of the same run.

With t seconds a token, N drafted tokens, R tokens that the target wrote itself, and rho the gain of EAGLE-3 alone:

    ceiling of PARSE = T t_target / (N t_draft / rho_draft + judge + R t_target / rho)

for T tokens of answers. It leaves out prompts and all work between forwards, so it cannot be reached. A rho is 1 if
that model decodes plainly. The ceiling of EAGLE-3 alone is tau, as if a tree cost as much as a token and the head
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from parsedec.experiment import table
from parsedec.experiment.analysis import token_seconds
from parsedec.experiment.intervals import FEWEST
from parsedec.experiment.plot import Bar, draw_bars

INNER = "inner=eagle3_random"
DRAFT_INNER = "inner@draft.inner=eagle3_random"
KEPT = "judge.kept="
SHOWN = ("new tokens", "target calls", "tau", "kept share", "errors", "tok/s", "speed-up in tok/s", "in time")
HEADS = ("arm", *SHOWN, "ms a token", "ceiling", "share of it")


def paces(record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per token, without prompts, of the arms in which one model writes alone."""
    alone = ("target", "draft", "eagle3", "draft_eagle3")
    seconds = {arm["name"]: token_seconds(arm["summary"]) for arm in record["arms"] if arm["name"] in alone}
    return {name: each for name, each in seconds.items() if each is not None}


def ceiling(arm: Mapping[str, Any], costs: Mapping[str, float]) -> float | None:
    """The ceiling of an arm, by the formula above; None for arms to which it does not apply."""
    summary, settings = arm["summary"], arm["description"].split()
    if not summary["draft_tokens"]:
        return summary["tau"] if INNER in settings else None
    draft, rest = costs.get("draft_eagle3" if DRAFT_INNER in settings else "draft"), costs.get("target")
    own = costs.get("eagle3" if INNER in settings else "target")
    if draft is None or own is None or rest is None:
        return None
    written = summary["new_tokens"] - summary["kept_draft_tokens"]
    least = summary["draft_tokens"] * draft + summary["judge_s"] + written * own
    return float(summary["new_tokens"] * rest / least)


def rows(record: dict[str, Any]) -> list[list[str]]:
    """The cells of the table, a row for each arm."""
    against = {row["arm"]: row for row in record.get("comparison", [])}
    render, costs, made = dict(table.COLUMNS), paces(record), []
    for arm in record["arms"]:
        summary, row, best = arm["summary"], against.get(arm["name"]), ceiling(arm, costs)
        each = summary["wall_s"] / summary["new_tokens"] if summary["new_tokens"] else None
        share = row["speedup"] / best if row and row["speedup"] is not None and best else None
        made.append(
            [
                arm["name"],
                *(render[name](summary, row) for name in SHOWN),
                "-" if each is None else f"{1000 * each:.2f}",
                "-" if best is None else f"{best:.2f}",
                "-" if share is None else f"{100 * share:.0f} %",
            ]
        )
    return made


def caption(record: dict[str, Any]) -> str:
    config, costs = record["config"], paces(record)
    seconds = ", ".join(f"{name} {1000 * value:.2f}" for name, value in costs.items())
    return (
        f"Tier: {table.tier(record)}. Shapes: {config['target']['source']}, {config['draft']['model']['source']}, "
        f"{config['target']['dtype']}. Trace: {trace(record)}; what came of it is in the table. "
        f"Milliseconds a token without the prompt: {seconds}. Ceiling: tokens x target / (drafted x draft + judge + "
        "rewritten x target, each at its speed with its speculator). Arms hf_*: Hugging Face's own loops, eager. "
        f"n = {record['arms'][0]['summary']['requests']}, at most {config['max_new_tokens']} new tokens; 95 % paired "
        f"intervals, from {FEWEST} on. {table.origin(record)}"
    )


def trace(record: Mapping[str, Any]) -> str:
    """The scripted decisions, in words; arms may have kept shares of their own."""
    judge, tau = record["config"]["judge"], record["config"]["acceptance"]["tau"]
    settings = [setting for arm in record["arms"] for setting in arm["description"].split()]
    own = dict.fromkeys(setting.removeprefix(KEPT) for setting in settings if setting.startswith(KEPT))
    kept = f"each arm's own, of {', '.join(own)}" if own else judge["kept"]
    return (
        f"kept share {kept} ± {judge['spread']}, full accepts {100 * judge['whole']:.0f} %, tau {tau}, "
        f"seed {judge['seed']}"
    )


def is_replay(record: Mapping[str, Any]) -> bool:
    """Whether a record's decisions were scripted: it then has all the settings that the table shows of them."""
    config = record["config"]
    return {"kept", "spread", "whole", "seed"} <= set(config.get("judge") or ()) and "tau" in (
        config.get("acceptance") or ()
    )


def terminal(record: dict[str, Any]) -> Table:
    return table.printed(record["title"], HEADS, rows(record), caption(record))


def markdown(record: dict[str, Any]) -> str:
    """The same as Markdown, with the command that made it, to be committed beside the record."""
    return table.document(record, table.grid(HEADS, rows(record)), caption(record))


def draw(record: dict[str, Any], path: Path) -> None:
    """Plot speed-ups over the baseline, in tokens per second, and the ceilings."""
    costs, arms = paces(record), {arm["name"]: arm for arm in record["arms"]}
    bars = [
        Bar(row["arm"], row["speedup"], row["speedup_low"], row["speedup_high"], ceiling(arms[row["arm"]], costs))
        for row in record.get("comparison", [])
        if row["speedup"] is not None
    ]
    draw_bars(bars, record["title"], f"tokens per second over the arm '{record['baseline']}'", "ceiling", path)
