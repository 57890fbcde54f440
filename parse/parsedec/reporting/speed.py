"""Pictures of records with arms: accuracy against speed, what was kept, where the time went, how long answers took.

An *arm* is one way of answering; a `Point` is what pictures know of it. The records of a sweep, one arm each, give the
same pictures as one record with several arms, except for the paired speed-ups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from parsedec.experiment.analysis import predict
from parsedec.experiment.intervals import ratio_interval, share_interval
from parsedec.experiment.summary import batch_of, latencies
from parsedec.reporting.curves import depth_figure, threshold_figure
from parsedec.reporting.figure import (
    COLOURS,
    INK,
    MARKERS,
    Cell,
    Figure,
    Rows,
    bars_height,
    beside,
    dots,
    heat,
    lines,
    names,
    numbers,
    stacked,
    whiskers,
)

Json = Mapping[str, Any]
PHASES = ("prefill", "draft", "judge", "decode")
QUANTILES = (5, 25, 50, 75, 95, 99)
DEEPEST = 10  # segments in the map; all later ones share the last


@dataclass(frozen=True, kw_only=True)
class Point:
    """What pictures know of an arm.

    arm        the record's entry
    gain       its row of the comparison with the baseline
    expected   what the cost model predicts for it
    threshold  the judge's threshold, if it was set by hand
    batch      how many requests were answered at a time
    """

    name: str
    arm: Json
    gain: Json | None = None
    expected: Json | None = None
    threshold: float | None = None
    batch: int = 1

    @property
    def summary(self) -> Json:
        found: Json = self.arm["summary"]
        return found

    @property
    def results(self) -> list[tuple[str, Json]]:
        """(problem, result) of the requests that have a result."""
        return [(request["id"], request["result"]) for request in self.arm["requests"] if request.get("result")]


def points(record: Json) -> list[Point]:
    """The arms of a record that answered something."""
    gains = {row["arm"]: row for row in record.get("comparison") or () if row["speedup"] is not None}
    sized = all("models" in arm for arm in record["arms"])  # the cost model needs the models' sizes
    return [
        Point(
            name=arm["name"],
            arm=arm,
            gain=gains.get(arm["name"]),
            expected=predict(dict(record), arm) if sized and gains else None,
            threshold=threshold_of(record, arm),
            batch=batch_of(record),
        )
        for arm in record["arms"]
        if any(request.get("result") for request in arm["requests"])
    ]


def threshold_of(record: Json, arm: Json) -> float | None:
    """The judge's threshold, if it was set by hand and something was judged."""
    if not arm["summary"].get("judge_passes"):
        return None
    settings = dict(word.split("=", 1) for word in arm.get("description", "").split() if "=" in word)
    boundary = (record.get("config") or {}).get("boundary") or {}
    found = settings.get("boundary.threshold", boundary.get("threshold"))
    return None if found in (None, "null") else float(found)


def pictures(found: Sequence[Point], baseline: str | None, prefix: str) -> list[Figure]:
    """All pictures for which the arms have numbers, in the order of a reader's questions."""
    compared = baseline is not None and any(point.gain for point in found)
    makers: tuple[Callable[[], Figure | None], ...] = (
        lambda: front(found, baseline if compared else None, prefix),
        lambda: gains(found, str(baseline), prefix) if compared else None,
        lambda: thresholds(found, prefix),
        lambda: kept(found, prefix),
        lambda: positions(found, prefix),
        lambda: times(found, prefix),
        lambda: waits(found, prefix, "latency", "How long an answer took", _until_complete,
                      "until the answer was complete"),
        lambda: waits(found, prefix, "first", "How long until the first words", _until_first,
                      "until the first token that could no longer change"),
        lambda: depths(found, prefix),
    )  # fmt: skip
    return [figure for make in makers if (figure := make()) is not None]


def front(found: Sequence[Point], baseline: str | None, prefix: str) -> Figure | None:
    """Accuracy against speed, as a multiple of the baseline's where arms are paired, else in tokens per second."""
    rows: list[list[Cell]] = []
    for point in found:
        if point.summary["accuracy"] is None:
            continue
        speed: tuple[float | None, ...]
        if baseline is None:
            taken = [(key, float(len(r["tokens"])), r["times"]["wall_s"]) for key, r in point.results]
            speed = ratio_interval(taken)
        elif point.gain is None:
            speed = (1.0, None, None)
        else:
            speed = tuple(point.gain[f"speedup{end}"] for end in ("", "_low", "_high"))
        n = point.summary.get("problems", point.summary["requests"])
        rows.append([point.name, n,
                     point.summary["accuracy"], *point.summary["accuracy_interval"], *speed])  # fmt: skip
    if not rows:
        return None
    best = on_front([(float(row[5] or 0), float(row[2] or 0)) for row in rows])
    rows = [[*row, mark] for row, mark in zip(rows, best, strict=True)]
    label = "tokens per second" if baseline is None else f"tokens per second, as a multiple of {baseline}"
    return Figure(
        name=f"{prefix}-front",
        title="Accuracy against speed",
        guide="Up is more right answers, right is faster: an arm on the dashed line is beaten by no other arm in both "
        "at once, and where bars overlap widely the difference may be chance.",
        heads=("arm", "n", "accuracy", "accuracy_low", "accuracy_high", "speed", "speed_low", "speed_high", "on_front"),
        rows=rows,
        draw=lambda axes, drawn: _front(axes, drawn, label),
        height=max(3.8, 1.2 + 0.22 * len(rows)),
    )


def on_front(at: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the (speed, accuracy) pairs are on the Pareto front: no other is as good in both and better in one."""
    return [not any(s >= speed and a >= right and (s, a) != (speed, right) for s, a in at) for speed, right in at]


def _front(axes: Axes, rows: Rows, label: str) -> None:
    x, y = numbers(rows, 5), 100 * numbers(rows, 2)
    below, above = 100 * numbers(rows, 3), 100 * numbers(rows, 4)
    best = sorted((x[i], y[i]) for i in range(len(rows)) if rows[i][8])
    # steps: the accuracy that some arm reaches at this speed or more
    axes.plot(*zip(*best, strict=True), color=INK, linewidth=1, linestyle=(0, (4, 3)), drawstyle="steps-pre", zorder=1)
    for i, name in enumerate(names(rows)):
        place = (x[i : i + 1], y[i : i + 1])
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "fmt": MARKERS[i % len(MARKERS)]}
        whiskers(axes, *place, (numbers(rows, 6)[i : i + 1], numbers(rows, 7)[i : i + 1]), **style, label=name)
        length = [[max(0.0, y[i] - below[i])], [max(0.0, above[i] - y[i])]]
        axes.errorbar(*place, yerr=length, capsize=3, elinewidth=1, **style, markersize=0.1)
    axes.set(xlabel=label, ylabel="answers that are right, %")
    axes.set_xlim(left=0)
    beside(axes)


def gains(found: Sequence[Point], baseline: str, prefix: str) -> Figure:
    rows: list[list[Cell]] = []
    for point in found:
        if point.gain is None:
            continue
        expected = point.expected or {}
        rows.append(
            [point.name, point.gain["requests"]]
            + [point.gain[f"{kind}{end}"] for kind in ("time_ratio", "speedup") for end in ("", "_low", "_high")]
            + [expected.get("speedup"), expected.get("ceiling")]
        )
    said = " A diamond is what the cost model expected, a bar what could be reached at best." if any(
        row[8] is not None for row in rows) else ""  # fmt: skip
    return Figure(
        name=f"{prefix}-speedup",
        title=f"How many times faster than {baseline}",
        guide=f"Right of the line at 1, the same questions were answered in less time than by {baseline}; the bar is "
        f"the range that chance in the choice of questions leaves.{said}",
        heads=("arm", "n", "time_ratio", "time_ratio_low", "time_ratio_high", "speedup_tok_s", "speedup_tok_s_low",
               "speedup_tok_s_high", "cost_model", "ceiling"),
        rows=rows,
        draw=_gains,
        height=bars_height(len(rows)),
    )  # fmt: skip


def _gains(axes: Axes, rows: Rows) -> None:
    axes.axvline(1, color=INK, linewidth=1)
    places = np.arange(len(rows))
    for column, marker, label in ((8, "D", "cost model"), (9, "|", "ceiling")):
        if np.isfinite(value := numbers(rows, column)).any():
            axes.scatter(value, places, marker=marker, s=60, color=COLOURS[3], label=label, zorder=3)
    if axes.get_legend_handles_labels()[0]:
        beside(axes)
    dots(axes, rows, 2, 3, 4, "times faster, in seconds for the same questions")


def kept(found: Sequence[Point], prefix: str) -> Figure | None:
    rows: list[list[Cell]] = []
    for point in found:
        drafted = [(key, r["counters"]["kept_draft_tokens"], r["counters"]["draft_tokens"]) for key, r in point.results]
        share = share_interval(drafted)
        if share[0] is not None:
            rows.append([point.name, len(drafted), point.summary["draft_tokens"], point.summary["kept_draft_tokens"],
                         *share])  # fmt: skip
    if not rows:
        return None
    return Figure(
        name=f"{prefix}-kept",
        title="How much of the draft was kept",
        guide="Of all tokens that the small model wrote, the share that the large model let stand: what is kept need "
        "not be written again, which is where the time is saved.",
        heads=("arm", "n", "draft_tokens", "kept_draft_tokens", "kept_share", "kept_share_low", "kept_share_high"),
        rows=rows,
        draw=_kept,
        height=bars_height(len(rows)),
    )


def _kept(axes: Axes, rows: Rows) -> None:
    share, places = 100 * numbers(rows, 4), np.arange(len(rows))
    axes.barh(places, share, height=0.6, color=COLOURS[0], alpha=0.55)
    whiskers(axes, share, places, (100 * numbers(rows, 5), 100 * numbers(rows, 6)), fmt="none", ecolor=INK)
    lines(axes, names(rows), "drafted tokens kept, %")
    axes.set_xlim(0, 100)


def times(found: Sequence[Point], prefix: str) -> Figure:
    rows: list[list[Cell]] = []
    for point in found:
        answered, summary = len(point.results), point.summary
        spent = [summary[f"{phase}_s"] / answered for phase in PHASES]
        wall = summary["wall_s"] / answered
        rows.append([point.name, answered, *spent, max(0.0, wall - sum(spent)), wall])
    return Figure(
        name=f"{prefix}-time",
        title="Where the time goes",
        guide="The length of a bar is the mean time of one answer: reading the question (prefill), the small model "
        "writing (draft), the large model checking (judge), the large model writing (decode), and all else.",
        heads=("arm", "n", *(f"{phase}_s" for phase in PHASES), "other_s", "wall_s"),
        rows=rows,
        draw=lambda axes, drawn: stacked(
            axes, drawn, [(i + 2, name) for i, name in enumerate((*PHASES, "other"))], "seconds per answer, mean"
        ),
        height=bars_height(len(rows)),
    )


def _until_complete(point: Point) -> list[float]:
    return latencies([result for _, result in point.results], point.batch)


def _until_first(point: Point) -> list[float]:
    return [result["times"]["first_token_s"] for _, result in point.results]


def waits(
    found: Sequence[Point], prefix: str, name: str, title: str, taken_of: Callable[[Point], list[float]], until: str
) -> Figure | None:
    """Quantiles of the seconds that `taken_of` gives; None if no arm has any."""
    rows: list[list[Cell]] = []
    for point in found:
        if taken := taken_of(point):
            rows.append([point.name, len(taken), *(float(q) for q in np.percentile(taken, QUANTILES))])
    if not rows:
        return None
    return Figure(
        name=f"{prefix}-{name}",
        title=title,
        guide=f"Seconds {until}: half of the answers lie in the box, its line is the middle one, the whiskers span "
        "from the fastest to the slowest 5 %, and the cross is what 99 in 100 stay below.",
        heads=("arm", "n", *(f"p{q}" for q in QUANTILES)),
        rows=rows,
        draw=_waits,
        height=bars_height(len(rows)),
    )


def _waits(axes: Axes, rows: Rows) -> None:
    at = {q: numbers(rows, i + 2) for i, q in enumerate(QUANTILES)}
    boxes = [
        {"whislo": at[5][i], "q1": at[25][i], "med": at[50][i], "q3": at[75][i], "whishi": at[95][i], "fliers": []}
        for i in range(len(rows))
    ]
    places = np.arange(len(rows))
    axes.bxp(boxes, positions=places, orientation="horizontal", widths=0.55, showfliers=False, patch_artist=True,
             boxprops={"facecolor": COLOURS[5], "edgecolor": INK}, medianprops={"color": INK, "linewidth": 2},
             whiskerprops={"color": INK}, capprops={"color": INK})  # fmt: skip
    axes.plot(at[99], places, "x", color=COLOURS[3])
    if np.nanmax(at[99]) > 30 * max(1e-9, np.nanmin(at[5])):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    lines(axes, names(rows), "seconds")


def positions(found: Sequence[Point], prefix: str) -> Figure | None:
    """Among the drafts long enough to have a segment at a place, the share in which that segment was kept."""
    rows: list[list[Cell]] = []
    for point in found:
        stands, reached = [0] * DEEPEST, [0] * DEEPEST
        rounds = [entry for _, result in point.results for entry in result["rounds"] if entry.get("drafted")]
        for entry in rounds:
            for place, segment in enumerate(entry.get("segments") or ()):
                reached[min(place, DEEPEST - 1)] += 1
                stands[min(place, DEEPEST - 1)] += bool(segment["kept"])
        rows += [
            [point.name, place + 1, reached[place], stands[place], stands[place] / reached[place]]
            for place in range(DEEPEST) if reached[place]
        ]  # fmt: skip
    if not rows:
        return None
    return Figure(
        name=f"{prefix}-positions",
        title="Where drafts are cut",
        guide="Each cell is a segment (as a rule one line) by its place in the draft: the number is the share, in per "
        f"cent, of drafts with such a segment in which it was kept; place {DEEPEST} holds all later ones, too.",
        heads=("arm", "segment", "drafts", "kept", "share_kept"),
        rows=rows,
        draw=_positions,
        height=bars_height(len({row[0] for row in rows})) + 0.4,
    )


def _positions(axes: Axes, rows: Rows) -> None:
    arms = list(dict.fromkeys(names(rows)))
    grid = np.full((len(arms), int(numbers(rows, 1).max())), np.nan)
    for row in rows:
        grid[arms.index(str(row[0])), int(row[1] or 0) - 1] = float(row[4] or 0)
    labels = np.array([["" if np.isnan(share) else f"{100 * share:.0f}" for share in line] for line in grid])
    heat(axes, grid, labels, "share kept")
    axes.set_yticks(np.arange(len(arms)) + 0.5, arms)
    axes.set_xticks(np.arange(grid.shape[1]) + 0.5, [str(i + 1) for i in range(grid.shape[1])])
    axes.set_xlabel("place of the segment in the draft")


def thresholds(found: Sequence[Point], prefix: str) -> Figure | None:
    """Accuracy and kept share by threshold; None unless arms ran with different ones."""
    swept = sorted((point for point in found if point.threshold is not None), key=lambda p: p.threshold or 0)
    if len({point.threshold for point in swept}) < 2:
        return None
    rows: list[list[Cell]] = []
    for point in swept:
        counts = [(key, r["counters"]["kept_draft_tokens"], r["counters"]["draft_tokens"]) for key, r in point.results]
        for name, value in (
            ("accuracy", [point.summary["accuracy"], *(point.summary["accuracy_interval"] or (None, None))]),
            ("kept share", list(share_interval(counts))),
        ):
            if value[0] is not None:
                rows.append([name, point.threshold, *value, point.name, len(counts)])
    return threshold_figure(prefix, rows)


def depths(found: Sequence[Point], prefix: str) -> Figure | None:
    """How deep the inner level's guesses were accepted."""
    rows: list[list[Cell]] = []
    for point in found:
        summary = point.summary
        for depth, hits in enumerate(summary.get("accepted_by_depth") or (), 1):
            trees, reached = summary["inner_steps"], summary["offered_by_depth"][depth - 1]
            rows.append([point.name, depth, trees, reached, hits, hits / trees])
    return depth_figure(prefix, rows) if rows else None
