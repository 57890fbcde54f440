"""Pictures of judges: how far a score can be trusted, what every threshold costs, where mistakes are made."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from parsedec.experiment.judging import outcomes
from parsedec.experiment.summary import wilson
from parsedec.reporting.curves import threshold_figure
from parsedec.reporting.figure import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    Cell,
    Figure,
    Rows,
    bars_height,
    beside,
    dots,
    heat,
    names,
    numbers,
    series,
)

Json = Mapping[str, Any]
WIDE = 8  # costs that differ by more than this factor are drawn on a logarithmic scale


def calibration_pictures(found: Json, prefix: str) -> list[Figure]:
    """The pictures of a record's `calibration`; those for which its labels say nothing are left out."""
    kinds = {"prefixes": found.get("prefixes"), "complete drafts": found["complete"]}
    judged = {name: one for name, one in kinds.items() if one is not None}
    figures = [reliability(judged, prefix)]
    if any(one["separation"]["curve"] for one in judged.values()):
        figures.append(roc(judged, prefix))
    if "sweep" in found:
        figures += [
            sweep(found, prefix),
            positions(found["by_position"], prefix),
            mistakes(found["by_position"], prefix),
        ]
    return figures


def reliability(judged: Mapping[str, Json], prefix: str) -> Figure:
    rows: list[list[Cell]] = [
        [name, bin_["low"], bin_["high"], bin_["count"], bin_["score"], bin_["right"], *bin_["interval"]]
        for name, one in judged.items()
        for bin_ in one["reliability"]["bins"]
    ]
    return Figure(
        name=f"{prefix}-reliability",
        title="Can the judge's scores be taken at their word?",
        guide="On the diagonal, things scored 0.8 are right 8 times in 10; below it the judge is too sure of itself, "
        "above it too careful.",
        heads=("of", "bin_low", "bin_high", "n", "mean_score", "share_right", "share_right_low", "share_right_high"),
        rows=rows,
        draw=_reliability,
        height=4.4,
    )


def _reliability(axes: Axes, rows: Rows) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    series(axes, rows, 4, 5, low=6, high=7)
    axes.set(xlabel="the judge's score", ylabel="share that is right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    beside(axes)


def roc(judged: Mapping[str, Json], prefix: str) -> Figure:
    areas = {name: one["separation"]["auc"] for name, one in judged.items()}
    rows: list[list[Cell]] = [
        [name if areas[name] is None else f"{name}, area {areas[name]:.3f}", *pair]
        for name, one in judged.items()
        for pair in one["separation"]["curve"]
    ]
    return Figure(
        name=f"{prefix}-roc",
        title="How well right and wrong are told apart",
        guide="Each point is one threshold: a good judge passes nearly all that is right (high) before it passes what "
        "is wrong (right); the diagonal is guessing, and the area below the line is 1 for a perfect judge.",
        heads=("of", "wrong_passed", "right_passed"),
        rows=rows,
        draw=_roc,
        height=4.2,
    )


def _roc(axes: Axes, rows: Rows) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    series(axes, rows, 1, 2)
    axes.set(xlabel="of the wrong ones, passed", ylabel="of the right ones, passed", xlim=(-0.02, 1.02))
    axes.set(ylim=(-0.02, 1.02), aspect="equal")
    beside(axes)


def sweep(found: Json, prefix: str) -> Figure:
    """One threshold for prefixes and complete drafts alike, on the problems of the check."""
    goal, in_force = found["goal"]["risk"], found["check"]["kept_share"]
    keys = ("threshold", "kept_share", "risk", "upper", "errors", "counted", "accepted_whole", "accepted_whole_wrong")
    return Figure(
        name=f"{prefix}-sweep",
        title="What every threshold would keep, and get wrong",
        guide="Every marker is a threshold, strict ones on the left: the solid line is the share of mistakes found, "
        "the dashed one what it may be at worst; the promise is kept where the dashed line is below the level one, and "
        "the dotted line is what the thresholds in force keep.",
        heads=(*keys, "goal", "kept_share_in_force"),
        rows=[[*(row[key] for key in keys), goal, in_force] for row in found["sweep"]["check"]],
        draw=_sweep,
    )


def _sweep(axes: Axes, rows: Rows) -> None:
    kept = 100 * numbers(rows, 1)
    axes.plot(kept, 100 * numbers(rows, 2), marker="o", markersize=4, label="mistakes found")
    axes.plot(kept, 100 * numbers(rows, 3), linestyle="--", marker="^", markersize=4, label="at worst")
    axes.axhline(100 * numbers(rows, 8)[0], color=INK, linewidth=1, label="the goal")
    axes.axvline(100 * numbers(rows, 9)[0], color=INK, linestyle=":", label="thresholds in force")
    axes.set(xlabel="drafted tokens kept, %", ylabel="mistakes, %")
    beside(axes)


def positions(found: Json, prefix: str) -> Figure:
    """The heat map: the share of wrong prefixes by the place of their last segment and by score."""
    edges = found["edges"]
    rows: list[list[Cell]] = []
    for i, (right, wrong) in enumerate(zip(found["right"], found["wrong"], strict=True)):
        for j, (good, bad) in enumerate(zip(right, wrong, strict=True)):
            share = bad / (good + bad) if good + bad else None
            rows.append([i + 1, edges[j], edges[j + 1], good, bad, share])
    return Figure(
        name=f"{prefix}-heat",
        title="Where mistakes sit, and how they are scored",
        guide="Rows are places in the draft, columns the judge's score, the number says how many prefixes fell there, "
        "and the colour which share of them was wrong: a good judge has the wrong ones on the left only.",
        heads=("segment", "score_low", "score_high", "right", "wrong", "share_wrong"),
        rows=rows,
        draw=_positions,
        height=1.4 + 0.3 * len(found["right"]),
    )


def _positions(axes: Axes, rows: Rows) -> None:
    places, bins = sorted({int(row[0] or 0) for row in rows}), len({row[1] for row in rows})
    grid = numbers(rows, 5).reshape(len(places), bins)
    counts = (numbers(rows, 3) + numbers(rows, 4)).astype(int).reshape(grid.shape)
    heat(axes, grid, counts, "share wrong")
    axes.set_yticks(np.arange(len(places)) + 0.5, [str(place) for place in places])
    axes.set_xticks(np.arange(bins + 1), [f"{edge:.1f}" for edge in [*numbers(rows, 1)[:bins], 1.0]])
    axes.set(xlabel="the judge's score", ylabel="place in the draft")


def mistakes(found: Json, prefix: str) -> Figure:
    rows: list[list[Cell]] = []
    for name, key in (("wrong, but passed", "false_accepts"), ("right, but refused", "false_refusals")):
        for row in found["positions"]:
            one = row[key]
            if one["share"] is not None:
                rows.append([name, row["segment"] + 1, one["count"], one["of"], one["share"], *one["interval"]])
    return Figure(
        name=f"{prefix}-mistakes",
        title="The judge's mistakes by place",
        guide="Passing what is wrong costs right answers, refusing what is right costs time; the bars show what so few "
        "examples leave open.",
        heads=("mistake", "segment", "count", "n", "share", "share_low", "share_high"),
        rows=rows,
        draw=_mistakes,
    )


def _mistakes(axes: Axes, rows: Rows) -> None:
    moved = [  # the two kinds side by side, not on top of each other
        [
            row[0],
            float(row[1] or 0) + (-0.08 if row[0] == rows[0][0] else 0.08),
            *(100 * float(x or 0) for x in row[4:7]),
        ]
        for row in rows
    ]
    series(axes, moved, 1, 2, low=3, high=4)
    axes.set(xlabel="place in the draft", ylabel="%", ylim=(-2, 102))
    axes.set_xticks(sorted({int(row[1] or 0) for row in rows}))
    beside(axes)


def judge_pictures(summary: Json, prefix: str) -> list[Figure]:
    """The pictures of judges side by side on the same drafts."""
    judges = summary["judges"]
    quality: list[list[Cell]] = [
        [name, summary["drafts"], one["auc"], *one["auc_interval"], one["decode_steps"], one["pass_s"], one["rows"]]
        for name, one in judges.items()
        if one["auc"] is not None and isfinite(one["auc"])  # undefined where nothing was wrong, or nothing right
    ]
    curve: list[list[Cell]] = [
        [name, at["threshold"], at["kept_share"], at["never_later"], at["wrong_drafts"],
         at["never_later"] / at["wrong_drafts"], *wilson(at["never_later"], at["wrong_drafts"])]
        for name, one in judges.items() for at in one["curve"] if at["wrong_drafts"]
    ]  # fmt: skip
    figures = []
    if quality:
        figures.append(
            Figure(
                name=f"{prefix}-judges",
                title="Which judge is best, and which is cheapest",
                guide="Up is better at telling right from wrong (0.5 is guessing, 1 perfect), left is cheaper: the "
                "cost of one judgement is given in steps of ordinary writing by the large model.",
                heads=("judge", "n", "auc", "auc_low", "auc_high", "decode_steps", "pass_s", "rows"),
                rows=quality,
                draw=_quality,
                height=4,
            )
        )
    if curve and not outcomes(summary):  # a final answer does not say where the mistake is
        figures.append(
            Figure(
                name=f"{prefix}-tradeoff",
                title="Keeping much, and nothing wrong",
                guide="Each line is a judge, each marker a threshold: further right more of the drafts is kept, higher "
                "up fewer drafts with a mistake are kept beyond that mistake.",
                heads=("judge", "threshold", "kept_share", "never_later", "n", "share", "share_low", "share_high"),
                rows=curve,
                draw=_tradeoff,
                height=4.2,
            )
        )
    return figures


def _quality(axes: Axes, rows: Rows) -> None:
    for i, name in enumerate(names(rows)):
        x, y = numbers(rows, 5)[i], numbers(rows, 2)[i]
        low, high = numbers(rows, 3)[i], numbers(rows, 4)[i]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "fmt": MARKERS[i % len(MARKERS)], "label": name}
        axes.errorbar([x], [y], yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], capsize=3, **style)
    axes.axhline(0.5, color=FAINT, linewidth=1.5)
    axes.set(xlabel="cost of judging one draft, in decode steps", ylabel="area under the ROC curve")
    if (cost := numbers(rows, 5)).max() > WIDE * cost.min():
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    beside(axes)


def _tradeoff(axes: Axes, rows: Rows) -> None:
    shares = [[row[0], *(100 * float(row[i] or 0) for i in (2, 5))] for row in rows]
    series(axes, shares, 1, 2)
    axes.set(xlabel="drafted tokens kept, %", ylabel="mistakes not kept, %", xlim=(-2, 102), ylim=(-2, 102))
    beside(axes)


PROBE_HEADS = ("judge", "layer or weights", "AUC where chosen", "AUC elsewhere", "threshold", "full threshold")


def probe_rows(record: Json) -> list[list[str]]:
    """Table rows of what training probes recommends: the best layer of each position, the combined judge's weights."""
    card, areas = record["card"], {(row["position"], row["layer"]): row["auc"] for row in record["probes"]}
    others = record.get("elsewhere") or {}  # earlier records have none
    rows = [
        [
            f"probe, position={at}",
            str(fit["layer"]),
            f"{areas[at, fit['layer']]:.4f}",
            "-" if others.get(at) is None else f"{others[at]:.4f}",
            *_bounds(fit),
        ]
        for at, fit in card["probes"].items()
    ]
    if mixture := card.get("combined"):
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in mixture["weights"].items())
        rows.append(["combined", f"{weights}, bias {mixture['bias']:.3g}", "-", "-", *_bounds(mixture)])
    return rows


def _bounds(fit: Json) -> list[str]:
    return [f"{fit[name]:.4g}" for name in ("threshold", "full_threshold")]


def probe_picture(record: Json, prefix: str) -> Figure:
    """How well every trained probe tells right from wrong."""
    n = record["data"]["calibration"]["prefixes"]
    rows: list[list[Cell]] = [
        [row["position"], row["layer"], n, row["auc"], row["strength"]]
        for row in sorted(record["probes"], key=lambda row: (row["position"], row["layer"]))
    ]
    return Figure(
        name=f"{prefix}-layers",
        title="Where in the large model right and wrong can be told apart",
        guide="Higher is better at telling right from wrong (0.5 is guessing, 1 perfect); layers further right are "
        "later ones. Measured on the problems that chose how strongly each probe is regularised, so a little too high.",
        heads=("position", "layer", "n", "auc", "strength"),
        rows=rows,
        draw=_layers,
    )


def _layers(axes: Axes, rows: Rows) -> None:
    series(axes, rows, 1, 3)
    axes.axhline(0.5, color=FAINT, linewidth=1.5)
    axes.set(xlabel="layer of the target", ylabel="area under the ROC curve")
    beside(axes)


def evaluation_pictures(found: Json, prefix: str) -> list[Figure]:
    """The pictures of a trained model's evaluation on unseen problems: thresholds, localisation and accuracies."""
    rows: list[list[Cell]] = []
    located: list[list[Cell]] = []
    for row in found.get("thresholds") or ():
        accuracy, share = row["accuracy"], row["kept_tokens"] / row["drafted_tokens"]
        rows.append(["accuracy", row["threshold"], accuracy["share"], *accuracy["interval"], None, found["problems"]])
        rows.append(["kept share", row["threshold"], share, None, None, None, found["problems"]])
    for row in found.get("localisation") or ():
        for name, key in (("found exactly", "exact"), ("never later", "never_later")):
            hits, n = row[key], row["wrong_drafts"]
            located.append([name, row["threshold"], hits, n, hits / n, *wilson(hits, n)])
    figures = [threshold_figure(prefix, rows)] if rows else []
    if located:
        figures.append(
            Figure(
                name=f"{prefix}-localisation",
                title="Is the first mistake found?",
                guide="Of the drafts with a mistake: how often the judge stopped right before the first wrong line, "
                "and how often there or earlier, so that no mistake was kept.",
                heads=("line", "threshold", "count", "n", "share", "share_low", "share_high"),
                rows=located,
                draw=_localisation,
            )
        )
    accuracies: list[list[Cell]] = [
        [name, found["problems"], found[key]["share"], *found[key]["interval"]]
        for name, key in (("target", "target_accuracy"), ("draft model", "draft_accuracy"), ("model", "accuracy"))
        if key in found
    ]
    if accuracies:
        figures.append(
            Figure(
                name=f"{prefix}-accuracy",
                title="Right answers on unseen problems",
                guide="The share of problems answered rightly; the bar is the range that chance in the choice of "
                "problems leaves.",
                heads=("model", "n", "accuracy", "accuracy_low", "accuracy_high"),
                rows=accuracies,
                draw=_accuracies,
                height=bars_height(len(accuracies)),
            )
        )
    return figures


def _accuracies(axes: Axes, rows: Rows) -> None:
    dots(axes, [[row[0], *(100 * float(x or 0) for x in row[2:])] for row in rows], 1, 2, 3, "right answers, %")
    axes.set_xlim(0, 102)


def _localisation(axes: Axes, rows: Rows) -> None:
    shares = [[row[0], row[1], *(100 * float(x or 0) for x in row[4:])] for row in rows]
    series(axes, shares, 1, 2, low=3, high=4)
    axes.set(xlabel="threshold", ylabel="drafts with a mistake, %")
    beside(axes)
