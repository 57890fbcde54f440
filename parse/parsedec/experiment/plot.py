"""Plots of records: horizontal bars with an interval, and a mark for what could be reached at best."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parsedec.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Bar:
    """A named value, its interval, and the best it could be; None where there is none."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    best: float | None = None


def require_plots() -> None:
    """Raise ConfigError if plots cannot be drawn; to be asked before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "plot=true needs matplotlib, which is not installed. Use plot=false, or pip install 'parsedec[report]'."
        )


def draw_bars(bars: Sequence[Bar], title: str, unit: str, best: str, path: Path) -> None:
    """Write a PNG: a bar each, from top to bottom.

    unit  what the axis says;  best  what the marks are called
    """
    from matplotlib.figure import Figure  # an optional package, and slow to import

    figure = Figure(figsize=(8, 0.8 + 0.34 * len(bars)), layout="constrained")
    axes = figure.subplots()
    places = range(len(bars))
    axes.barh(places, [bar.value for bar in bars], color="#5b8db8")
    for place, bar in zip(places, bars, strict=True):
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color="black", linewidth=1.2)
    marked = [(bar.best, place) for place, bar in zip(places, bars, strict=True) if bar.best is not None]
    if marked:
        axes.plot(*zip(*marked, strict=True), "D", color="#c0504d", markersize=5, label=best)
        figure.legend(loc="outside lower right", frameon=False)
    axes.set_yticks(places, [bar.name for bar in bars])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
