"""What a calibration writes for people and for runs: a table, a picture, and the YAML that applies the thresholds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from parsedec.experiment.calibrated import calibrated_conditions
from parsedec.experiment.record import write_text
from parsedec.experiment.table import document, grid, origin, tier

SHOWN = 12  # rows of the threshold sweep that are printed; the record holds all
FILE = "calibration.yaml"


def write_reports(record: dict[str, Any], folder: Path, boundary: str) -> list[Path]:
    """Write all files beside a finished record; returns their paths.

    boundary  the member of the group `boundary` that was calibrated
    """
    written = [write_text(markdown(record), folder / "table.md")]
    if record["calibration"]["used"]["fitted"]:
        written.append(write_text(settings(record, boundary), folder / FILE))
    if importlib.util.find_spec("matplotlib"):
        from parsedec.calibration.picture import draw

        written.append(draw(record, folder / "calibration.png"))
    return written


def settings(record: dict[str, Any], boundary: str) -> str:
    """The YAML: overrides that apply the thresholds, and the conditions under which these hold."""
    found, config = record["calibration"], record["config"]
    used = found["used"]
    draft = config["draft"]["model"]
    window = [f"boundary.window={config['boundary']['window']}"] if "window" in config["boundary"] else []
    data = {
        "overrides": [
            f"boundary={boundary}",
            f"boundary.threshold={used['threshold']!r}",
            f"boundary.full_threshold={used['full_threshold']!r}",
            *window,
        ],
        "holds_for": {
            "target": config["target"]["source"],
            "draft": draft["source"] if draft and config["labels"].get("task") else None,
            "judge": config["judge"],
            "segmenter": config["segmenter"],
            **calibrated_conditions(config),
        },
        "goal": found["goal"],
        "fitted": {key: value for key, value in found["fitted"].items() if "threshold" not in key},
        "check": {key: found["check"][key] for key in ("errors", "counted", "upper", "verdict")},
    }
    return (
        f"# Thresholds fitted by experiments/calibrate.py: {sentence(record)}\n"
        "# Apply them with calibration=THIS_FILE behind run.py or compare.py. They are about the first draft of a "
        "request, and hold under the settings below, for problems like those they were fitted on.\n"
        f"{OmegaConf.to_yaml(data)}"
    )


def sentence(record: dict[str, Any]) -> str:
    """The goal in words."""
    goal = record["calibration"]["goal"]
    of = "those of which something was kept" if goal["of"] == "kept" else "all requests"
    sure = f"with {goal['confidence']:.0%} confidence" if goal["method"] == "fixed_sequence" else "in expectation"
    return f"{record['controls']} are at most {100 * goal['risk']:g} % of {of}, {sure}"


def markdown(record: dict[str, Any]) -> str:
    """The report as Markdown."""
    found = record["calibration"]
    parts = [f"Goal: {sentence(record)}.", verdict(found), grid(["figure", "value"], rows(found))]
    if "sweep" in found:
        parts += ["## One threshold for prefixes and complete drafts, on the check", _sweep(found["sweep"]["check"])]
        parts += ["## By position: index of the prefix's last segment", _positions(found["by_position"])]
    counts = found["counts"]
    of = {part: counts.get(f"{part}_problems", counts[part]) for part in ("fit", "check")}  # older records: one each
    parts.append(
        f"Tier: {tier(record)}. To fit, {counts['fit']} samples of {of['fit']} problems: "
        f"{counts['explored']} problems explored, {counts['tested']} tested with one sample of each. To check, "
        f"{counts['check']} samples of {of['check']} problems, one of each for the goal. "
        f"{counts['left_out']} left out because they could not be judged; seed {record['config']['seed']}. "
        "Intervals are 95 %: Wilson for shares, Clopper and Pearson for the goal's, Tango for changes, bootstrap "
        f"over problems for areas. {origin(record)}"
    )
    return document(record, *parts)


def verdict(found: dict[str, Any]) -> str:
    """The thresholds found, and whether they keep the goal on problems that had no part in choosing them."""
    fitted, held = found["fitted"], found["check"]
    used = found["used"]
    numbers = f"threshold {used['threshold']:.6g}, full_threshold {used['full_threshold']:.6g}"
    if fitted["threshold"] is None:
        head = (
            f"**No pair of thresholds was shown to keep the goal**: {fitted['reason']} (at least "
            f"{fitted['least_samples']} samples without an error). No YAML was written. Figures below are at "
            f"{numbers}, in force without this run."
        )
    else:
        shown = f"{fitted['errors']} errors in {fitted['counted']} samples, bound {100 * fitted['upper']:.2f} %"
        head = f"Fitted: **{numbers}** ({shown})."
    risk = "-" if held["risk"] is None else f"{100 * held['risk']:.2f} %"
    low, high = held["interval"]
    return (
        f"{head}\n\nOn {held['drafts']} held-out samples: {held['errors']} errors in {held['counted']} = {risk} "
        f"[{100 * low:.2f}, {100 * high:.2f}]: goal **{held['verdict']}**."
    )


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures of the check, as rows of a name and a value."""
    held, complete = found["check"], found["complete"]
    cells = [
        ["kept share of drafted tokens", f"{held['kept_share']:.1%}"],
        ["drafts taken as complete", f"{held['accepted_whole']} of {held['drafts']}"],
        ["right drafts", f"{held['drafts_right']} of {held['drafts']}"],
    ]
    for name, one in (("prefixes", found.get("prefixes")), ("complete drafts", complete)):
        if one is not None:
            cells += [
                [f"AUC, {name}", _interval(one["separation"]["auc"], one["separation"]["interval"])],
                [f"expected calibration error, {name}", _number(one["reliability"]["ece"])],
                [f"false accepts, {name}", _share(one["mistakes"]["false_accepts"])],
                [f"false refusals, {name}", _share(one["mistakes"]["false_refusals"])],
            ]
    if "localisation" in found:
        for name, one in (("", found["localisation"]), (" at its best threshold", found["localisation_best"])):
            cells += [
                [f"first error found exactly{name}", _share(one["exact"])],
                [f"never later{name}", _share(one["never_later"])],
                [f"F1 of localisation{name}", f"{_number(one['f1'])} (threshold {one['threshold']:.4g})"],
            ]
    if "outcome" in found:
        one = found["outcome"]
        for name, key in (
            ("accuracy of the target alone", "target_accuracy"),
            ("accuracy with what is kept", "accuracy"),
            ("change", "change"),
        ):
            cells.append([name, _interval(one[key]["share"], one[key]["interval"])])
        cells.append(["spoilt, gained", f"{one['spoilt']}, {one['gained']}"])
    return cells


def _sweep(sweep: Sequence[dict[str, Any]]) -> str:
    step = max(1, -(-len(sweep) // SHOWN))
    heads = ["threshold", "kept share", "taken as complete", "of them wrong", "errors", "risk", "bound"]
    cells = [
        [f"{row['threshold']:.6g}", f"{row['kept_share']:.1%}", str(row["accepted_whole"]),
         str(row["accepted_whole_wrong"]), f"{row['errors']} of {row['counted']}", f"{row['risk']:.2%}",
         f"{row['upper']:.2%}"]
        for row in sweep[::-1][::step]
    ]  # fmt: skip
    return grid(heads, cells)


def _positions(found: dict[str, Any]) -> str:
    cells = [
        [f"{row['segment']}{' and later' if row['later_too'] else ''}", _share(row["false_accepts"]),
         _share(row["false_refusals"])]
        for row in found["positions"]
    ]  # fmt: skip
    return grid(["segment", "false accepts", "false refusals"], cells)


def _share(one: dict[str, Any]) -> str:
    if one["share"] is None:
        return "- of 0"
    low, high = one["interval"]
    return f"{one['count']} of {one['of']} = {one['share']:.1%} [{low:.1%}, {high:.1%}]"


def _interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None:
        return "not defined"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
