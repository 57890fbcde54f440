"""What a run of the advisor shows and writes: a table for the terminal, advice.md, and a configuration to run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import OmegaConf
from rich.console import Group, RenderableType
from rich.text import Text

from parsedec.experiment.intervals import with_interval
from parsedec.experiment.nodes import conf_folder
from parsedec.experiment.record import write_text
from parsedec.experiment.summary import wilson
from parsedec.experiment.table import document, grid, origin, printed, tier

Json = dict[str, Any]
SHOWN = 8  # arms of PARSE in the table
CLOSE = 0.15  # the largest error with which a prediction still counts as close
NAME = "advised"
NOT_OURS = ("output", "resume", "title", "calibration")  # settings of a run on which there is no advice
HEADS = ("arm", "speed-up", "kept", "spoilt", "draft ms", "judge ms", "decode ms")
CHECK_HEADS = ("arm", "predicted", "measured", "error", "in tok/s", "accuracy change", "kept")


def write_reports(record: Json, folder: Path, overrides: Sequence[str]) -> list[Path]:
    """Write advice.md and the configuration; returns their paths."""
    advised = folder / "experiment" / f"{NAME}.yaml"
    written = write_text(configuration(record, overrides), advised)
    return [write_text(markdown(record, command(folder)), folder / "advice.md"), written]


def command(folder: Path) -> str:
    """The command that runs the advised configuration, from the directory in which the advisor ran."""
    near = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    return f"python experiments/run.py --config-dir {near} experiment={NAME}"


def configuration(record: Json, overrides: Sequence[str]) -> str:
    """The advised arm as YAML for the group `experiment`: members of groups, and settings that differ from theirs.

    overrides  those of the advisor's own command, including models and task; what only the advisor knows is left out
    """
    known = compose("config")
    user = [one for one in overrides if _root(one) in {*known, "experiment"} and _root(one) not in NOT_OURS]
    wanted = [*user, *record["verdict"]["overrides"]]
    base = [one for one in user if _key(one) == "experiment"]
    members = dict(_pair(one) for one in wanted if _is_member(one) and _key(one) != "experiment")
    groups = [f"{key}={value}" for key, value in members.items()]
    rest = [one for one in wanted if not _is_member(one)]
    different = _differences(_settings([*base, *groups, *rest]), _settings([*base, *groups]))
    defaults = [_pair(one)[1] for one in base] + [{f"override /{key}": value} for key, value in members.items()]
    body = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, **different}))
    verdict = record["verdict"]
    return (
        f"# @package _global_\n# {verdict['text']}\n# Advised for PARSE (arXiv 2605.04263) by experiments/advise.py, "
        f"on {record['costs']['problems']} problems.\n{body}"
    )


def _differences(full: Json, base: Json) -> Json:
    """The settings of `full` that `base` lacks or sets to another value."""
    found: Json = {}
    for key, value in full.items():
        other = base.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _differences(value, other):
                found[key] = inner
        elif value != other:
            found[key] = value
    return found


def _settings(overrides: Sequence[str]) -> Json:
    """A run's configuration as written, with its interpolations unresolved."""
    data = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=False)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items() if key not in NOT_OURS}


def _pair(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value


def _key(override: str) -> str:
    return _pair(override)[0]


def _root(override: str) -> str:
    return re.split("[.@]", _key(override).lstrip("+~"))[0]


def _is_member(override: str) -> bool:
    """Whether an override chooses a member of a group."""
    key = _key(override).partition("@")[0]
    return "." not in key and (conf_folder() / key).is_dir()


def arm_rows(record: Json) -> list[list[str]]:
    """Table rows of the best arm and its loops, the fastest other arms of PARSE, and the inner levels alone."""
    parse = sorted((arm for arm in record["arms"] if arm["arm"]["segmenter"]), key=lambda a: -a["speedup"])
    demand = record["config"]["spoilt"]
    first = record["looped"][0]["label"]
    rest = [arm for arm in parse if arm["label"] != first]
    shown = [arm for arm in rest if arm["spoilt"] <= demand][:SHOWN] or rest[:SHOWN]
    marked = [{**arm, "label": f"{arm['label']} (best)" if arm["label"] == first else arm["label"]}
              for arm in record["looped"]]  # fmt: skip
    return [_arm_row(arm, record["costs"]["problems"]) for arm in (*marked, *shown, *alone(record))]


def alone(record: Mapping[str, Any]) -> list[Json]:
    """The inner levels without PARSE, the fastest first."""
    return sorted((arm for arm in record["arms"] if arm["arm"]["segmenter"] is None), key=lambda arm: -arm["speedup"])


def _arm_row(arm: Json, n: int) -> list[str]:
    parts = [f"{1000 * arm['parts'][name]:.1f}" for name in ("draft", "judge", "decode")]
    kept = "-" if arm["kept_share"] is None else f"{100 * arm['kept_share']:.0f} %"
    return [arm["label"], with_interval(arm["speedup"], *arm["interval"]), kept, _spoilt(arm["spoilt"], n), *parts]


def _spoilt(share: float | None, n: int) -> str:
    if share is None:
        return "-"
    low, high = wilson(share * n, n)
    return f"{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def cost_rows(record: Json) -> list[list[str]]:
    """Table rows of the measured costs, and of how well each judge separates right from wrong."""
    costs = record["costs"]
    rows = [
        ["target, ms a token", f"{1000 * costs['target_token_s']:.2f}"],
        ["draft model, ms a token", f"{1000 * costs['draft_token_s']:.2f}"],
        ["ceiling: the target's pace over the draft model's", f"{costs['ceiling']:.2f}"],
        ["tokens of an answer / of a draft", f"{costs['answer_tokens']:.0f} / {costs['draft_tokens']:.0f}"],
        [_meaning(record), f"{100 * costs['accuracy']:.0f} % / {100 * costs['draft_accuracy']:.0f} %"],
    ]
    for name, judge in costs["judges"].items():
        area = "not known" if judge["auc"] is None else _area(judge)
        rows.append([
            f"judge, {name}", f"{judge['cuts']:.1f} cuts, {judge['rows']:.0f} rows, {1000 * judge['pass_s']:.1f} ms a "
            f"pass ({1e6 * judge['row_s']:.0f} µs a row), AUC {area}"])  # fmt: skip
    for name, pace in costs["inners"].items():
        rows.append([f"inner={name}", f"{pace['pace']:.2f} of the target's time a token, {pace['start']:.1f} tokens' "
                     f"worth to start, tau {pace['tau']:.2f}"])  # fmt: skip
    if (most := record["verdict"].get("spoilt_at_most")) is not None:  # records before it was bounded have none
        rows.append([f"best of {record['verdict']['settings']} settings: spoilt, counted / on others at most (95 %)",
                     f"{100 * record['verdict']['parse']['spoilt']:.0f} % / {100 * most:.0f} %"])  # fmt: skip
    if seen := record["rehearsed"]:
        rows.append([f"best arm on {seen['problems']} of the problems, predicted / run",
                     f"{seen['predicted']:.2f} / {seen['measured']:.2f}"])  # fmt: skip
        if "luck" in seen:  # records before it was estimated have none
            rows.append(["of which the choice of the best accounts for", f"{100 * (seen['luck'] - 1):.1f} %"])
        rows += [[f"accuracy against the target alone, best arm {name if name != 'once' else ''}".rstrip(), text]
                 for name, text in rehearsed_accuracy(record).items()]  # fmt: skip
    rows += [[f"inner={name}", f"left out: {reason}"] for name, reason in costs["left_out_inners"].items()]
    return rows


def rehearsed_accuracy(record: Json) -> dict[str, str]:
    """By loop, how the share of right answers changed when the best arm was run, or "not scored" if no program can
    tell. Empty for records from before this was stored."""
    said = {}
    for name, seen in ((record["rehearsed"] or {}).get("accuracy") or {}).items():
        said[name] = "not scored"
        if seen is not None:
            low, high = (100 * end for end in seen["interval"])
            change = f"{100 * seen['change']:+.1f} points [{low:+.1f}, {high:+.1f}]"
            said[name] = f"{change} on {seen['requests']} of the problems"
    return said


def _area(judge: Json) -> str:
    low, high = judge["interval"]
    return f"{judge['auc']:.2f} [{low:.2f}, {high:.2f}] ({judge['right']} right, {judge['wrong']} wrong)"


def _meaning(record: Json) -> str:
    if record["verdict"]["agreement"]:
        return "right, target / drafts (no references: agreement with the target's own answer)"
    return "right, target / drafts" + ("" if record["verdict"]["prefixes"] else " (final answers)")


def check_rows(record: Json) -> list[list[str]]:
    """Predicted and measured figures side by side, one row of cells per arm."""
    rows = []
    for row in record.get("checked", {}).get("rows", []):
        said, seen = ([row[key], *row[f"{key}_interval"]] for key in ("predicted", "measured"))
        close = "" if abs(row["error"]) <= CLOSE else f" (more than {100 * CLOSE:.0f} %)"
        kept = "-" if row["kept_share"] is None else f"{100 * row['kept_share']:.0f} %"
        change = row["accuracy_change"]
        rows.append([
            row["arm"], with_interval(*said), with_interval(*seen),
            f"{100 * row['error']:+.0f} %{close}", f"{row['tokens_speedup']:.2f}",
            "-" if change is None else f"{100 * change:+.1f} points", kept])  # fmt: skip
    return rows


def note(record: Json) -> str:
    """How to read the table of arms."""
    config = record["config"]
    shown = "prefixes" if record["verdict"]["prefixes"] else "complete drafts; wrong prefixes cannot be told here"
    return (
        f"Tier: {tier(record)}. n = {record['costs']['problems']}, seed {config['seed']}, at most "
        f"{config['max_new_tokens']} new tokens; speed-ups in time, 95 % intervals (jackknife over problems; Wilson). "
        "An arm: segmenter, threshold, inner level, loop. Spoilt: requests the target alone gets right and of which "
        f"something wrong is kept ({shown}). Milliseconds a request. The best, its loops and the best inner level "
        f"alone are as they ran{_where(record)}, the others as costs predict; what the best owes to having been "
        "chosen on these same problems is estimated (bootstrap) and taken off the speed-up. What arms spoil is as "
        "counted, each interval that of one arm by itself; the table of costs bounds what the best spoils on other "
        "problems, and check.n=… measures on them. A "
        f"threshold with a promise is for experiments/calibrate.py to find. {origin(record)}"
    )


def _where(record: Json) -> str:
    seen = record["rehearsed"]
    return f" on {seen['problems']} of the problems" if seen else ""


def terminal(record: Json) -> RenderableType:
    """What is printed in the terminal: the tables, the verdict and its findings."""
    verdict = record["verdict"]
    said = [verdict["text"], *(f"- {finding['text']}" for finding in verdict["findings"])]
    tables: list[RenderableType] = [
        printed("Costs", ["", "measured"], cost_rows(record), ""),
        printed("What to expect", HEADS, arm_rows(record), note(record)),
    ]
    if rows := check_rows(record):
        n = record["checked"]["problems"]
        tables.append(printed(f"Predicted and measured, {n} further problems", CHECK_HEADS, rows, ""))
    return Group(*tables, Text("\n".join(said), style="bold"))


def markdown(record: Json, run: str) -> str:
    """The text of advice.md; `run` is the command that runs the advised configuration."""
    verdict = record["verdict"]
    parts = [f"**{verdict['text']}**"]
    if verdict["findings"]:
        parts += ["What limits it:", "\n".join(f"* {finding['text']}" for finding in verdict["findings"])]
    parts += [f"To run what is advised ({verdict['recommended']['label']}):", f"    {run}"]
    parts.append("which is the same as the models and the task of the command above with")
    parts.append(f"    {' '.join(verdict['overrides'])}")
    if rows := check_rows(record):
        parts.append(f"## Predicted and measured, {record['checked']['problems']} further problems")
        parts.append(grid(CHECK_HEADS, rows))
    parts += ["## What to expect", grid(HEADS, arm_rows(record)), note(record)]
    return document(record, *parts, "## Costs", grid(("", "measured"), cost_rows(record)))
