"""Pictures of what training, the engine and single passes cost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from parsedec.advice import report
from parsedec.reporting.curves import depth_figure
from parsedec.reporting.figure import (
    COLOURS,
    INK,
    Cell,
    Figure,
    Rows,
    bars_height,
    beside,
    dots,
    lines,
    names,
    numbers,
    series,
    stacked,
    whiskers,
)

Json = Mapping[str, Any]
STEP_PARTS = ("target", "drafter", "speculator", "engine")


def training_pictures(record: Json, prefix: str) -> list[Figure]:
    """The course of a training: losses and shares of right guesses by step, and how deep the trained head guesses."""
    figures = []
    for suffix, title, guide, scale, label in (
        ("loss", "What was learnt", "Lower is better: how surprised the model was by what it should have said.", 1,
         "loss"),
        ("accuracy", "Right guesses while learning", "Higher is better: the share of tokens that the model being "
         "trained got right at that step, per depth or kind of text.", 100, "right, %"),
    ):  # fmt: skip
        rows: list[list[Cell]] = [
            [key.removesuffix(f"_{suffix}").replace("_", " "), entry["step"], value]
            for key in dict.fromkeys(key for entry in record["history"] for key in entry)
            if key.endswith(f"_{suffix}")
            for entry in record["history"]
            if (value := entry.get(key)) is not None
        ]
        if rows:
            figures.append(
                Figure(
                    name=f"{prefix}-{suffix}",
                    title=title,
                    guide=guide,
                    heads=("of", "step", suffix),
                    rows=rows,
                    draw=partial(_course, scale=scale, label=label),
                )
            )
    found = record["evaluation"] or {}
    depths: list[list[Cell]] = [
        [record["title"], depth, found["target_calls"], reached, hits, hits / found["target_calls"]]
        for depth, (reached, hits) in enumerate(
            zip(found.get("offered_by_depth") or (), found.get("accepted_by_depth") or (), strict=True), 1)
    ]  # fmt: skip
    return [depth_figure(prefix, depths)] * bool(depths) + figures


def _course(axes: Axes, rows: Rows, scale: float, label: str) -> None:
    series(axes, [[row[0], row[1], scale * float(row[2] or 0)] for row in rows], 1, 2)
    for line in axes.get_lines():
        line.set_markevery(max(1, len(line.get_xdata()) // 8))  # type: ignore[arg-type]
    axes.set(xlabel="step", ylabel=label)
    axes.set_ylim(bottom=0)
    beside(axes)


def overhead_picture(record: Json, prefix: str) -> list[Figure]:
    """Where the time of a decode step goes, for each inner speculator; no picture if nothing was measured."""
    rows: list[list[Cell]] = [
        [inner["name"], one["problems"], one["steps"], *(1000 * one[f"{part}_s"] for part in STEP_PARTS),
         1000 * one["step_s"]]
        for inner in record["inners"] for one in (inner["summary"],)
    ]  # fmt: skip
    if not rows:
        return []
    return [
        Figure(
            name=f"{prefix}-steps",
            title="What a step consists of",
            guide="A step is one call of the large model (target) with the guesses for it (drafter); what our own code "
            "adds is speculator and engine, and should be hard to see.",
            heads=("inner", "n", "steps", *(f"{part}_ms" for part in STEP_PARTS), "step_ms"),
            rows=rows,
            draw=lambda axes, drawn: stacked(
                axes, drawn, [(i + 3, part) for i, part in enumerate(STEP_PARTS)], "milliseconds a step"
            ),
            height=bars_height(len(rows)),
        )
    ]


def floors_picture(record: Json, prefix: str) -> list[Figure]:
    """The milliseconds of every pass, beside the least that the device allows."""
    rows: list[list[Cell]] = []
    for row in record["rows"]:
        taken = [1000 * seconds for seconds in row["seconds"]]
        name = f"{row['shape'].removeprefix('replay:')}: {row['pass']}"
        rows.append([name, len(taken), median(taken), min(taken), max(taken), 1000 * row["floor_s"]])
    return [
        Figure(
            name=f"{prefix}-floors",
            title="How close each pass comes to what the machine allows",
            guide="The dot is the time of a pass, its bar the range of the repeats, and the diamond the least that "
            "memory and arithmetic of this machine permit.",
            heads=("pass", "n", "ms", "ms_least", "ms_most", "floor_ms"),
            rows=rows,
            draw=_floors,
            height=bars_height(len(rows)),
        )
    ]


def _floors(axes: Axes, rows: Rows) -> None:
    places = np.arange(len(rows))
    whiskers(axes, numbers(rows, 2), places, (numbers(rows, 3), numbers(rows, 4)), fmt="o", color=COLOURS[0],
             label="measured")  # fmt: skip
    axes.scatter(numbers(rows, 5), places, marker="D", color=COLOURS[3], edgecolor=INK, zorder=3, label="floor")
    lines(axes, names(rows), "milliseconds a pass")
    axes.set_xscale("log")
    beside(axes)


def advice_pictures(record: Json, prefix: str) -> list[Figure]:
    """What the advisor expects of its best arms and of the inner levels alone, and what was then measured."""
    n = record["costs"]["problems"]
    rows: list[list[Cell]] = [
        [f"{arm['label']}: expected", n, arm["speedup"], *arm["interval"]]
        for arm in (*record["looped"], *report.alone(record))
    ]
    checked = record.get("checked", {})
    rows += [
        [f"{row['arm']}: measured", checked["problems"], row["measured"], *row["measured_interval"]]
        for row in checked.get("rows", [])
    ]
    return [
        Figure(
            name=f"{prefix}-expected",
            title="How many times faster than the large model alone",
            guide="Further right is faster, and the bar is the range that chance in the choice of questions leaves; "
            "measured and expected values are for different questions.",
            heads=("arm", "n", "speedup", "low", "high"),
            rows=rows,
            draw=lambda axes, drawn: dots(axes, drawn, 2, 3, 4, "times faster, in seconds for the same questions"),
            height=bars_height(len(rows)),
        )
    ]


def load_pictures(found: Json, prefix: str) -> list[Figure]:
    """How long clients waited; no picture if none got an answer."""
    waited = {"first text": found.get("first_piece_s"), "whole answer": found.get("answer_s")}
    rows: list[list[Cell]] = [[name, found["requests"], at["p50"], at["p95"]] for name, at in waited.items() if at]
    if not rows:
        return []
    return [
        Figure(
            name=f"{prefix}-waits",
            title="How long clients waited",
            guide="Half of the clients waited no longer than the mark, 95 in 100 no longer than the end of the bar.",
            heads=("until", "n", "p50_s", "p95_s"),
            rows=rows,
            draw=lambda axes, drawn: dots(axes, drawn, 2, 2, 3, "seconds"),
            height=bars_height(len(rows)),
        )
    ]
