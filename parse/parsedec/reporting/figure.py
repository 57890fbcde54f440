"""A picture of a report: its numbers, one sentence on how to read it, and how the numbers are drawn.

What is drawn is what is stored: `draw` sees only the rows, and the same rows are written as CSV and shown below the
picture. The colours are Okabe and Ito's, which the colour-blind can tell apart, and series never differ in colour
alone: markers or hatching differ, too.
"""

from __future__ import annotations

import csv
import io
import math
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from parsedec.experiment.record import write_text

INK, FAINT = "#1c2126", "#d6d9dc"  # the page replaces them with its own, which follow its light or dark theme
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8f94", "#b8a800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
HATCHES = ("", "//", "\\\\", "xx", "--")
HEAT = "cividis"  # its order is the same to the colour-blind and in grey
STYLE: Any = {  # Any, since matplotlib's types want the keys as literals
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "hatch.linewidth": 0.4,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
}

Cell = str | float | int | bool | None
Rows = Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture.

    name    of its files, and of its anchor in the page
    guide   one sentence on how to read it
    heads   names of the columns of `rows`; a row holds what one mark of the picture shows
    draw    draws rows on the axes
    height  in inches; the width is always `WIDTH`
    """

    name: str
    title: str
    guide: str
    heads: tuple[str, ...]
    rows: Rows
    draw: Callable[[Axes, Rows], None]
    height: float = 3.6

    def csv(self) -> str:
        """The numbers as CSV, in full precision, under a line of names."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.heads)
        writer.writerows(self.rows)
        return out.getvalue()


WIDTH = 8.4


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture as the page shows it: `svg` to put into HTML, `cells` of its table, and a data `link` to its CSV."""

    figure: Figure
    svg: Markup
    cells: list[list[str]]
    link: str


def drawn(figure: Figure, folder: Path | None) -> Drawn:
    """Draw a figure for the page; given a folder, also write NAME.svg, NAME.png and NAME.csv to it."""
    with rc_context(STYLE | {"svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=(WIDTH, figure.height), layout="constrained")
        figure.draw(canvas.subplots(), figure.rows)
        sink = io.StringIO()
        plain = {"Date": None, "Creator": None, "Format": None, "Type": None}
        canvas.savefig(sink, format="svg", facecolor="none", metadata=plain)
        svg = sink.getvalue()
        if folder is not None:
            write_text(figure.csv(), folder / f"{figure.name}.csv")
            write_text(svg, folder / f"{figure.name}.svg")
            canvas.savefig(folder / f"{figure.name}.png", dpi=150)
    data = b64encode(figure.csv().encode()).decode("ascii")
    return Drawn(
        figure=figure,
        svg=inline(svg, figure),
        cells=[[shown(cell) for cell in row] for row in figure.rows],
        link=f"data:text/csv;charset=utf-8;base64,{data}",
    )


def inline(svg: str, figure: Figure) -> Markup:
    """The picture as part of a page: with ids unique to it, the page's colours, and a size that follows the window."""
    svg = svg[svg.index("<svg") :]
    size = re.search(r'viewBox="([^"]+)"', svg)
    head = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="{size[1] if size else ""}" role="img" aria-label="{escape(figure.title)}">'
    )
    body = re.sub(r"^<svg[^>]*>", head, svg)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure.name}-", body)
    body = body.replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    return Markup(body)  # made by matplotlib, which escapes text


def shown(cell: Cell) -> str:
    """The text of a cell in the table below a picture; numbers are shortened, while the CSV has all digits."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def numbers(rows: Rows, column: int) -> np.ndarray:
    """One column as numbers; missing ones are NaN."""
    return np.array([np.nan if (cell := row[column]) is None else float(cell) for row in rows], dtype=float)


def names(rows: Rows, column: int = 0) -> list[str]:
    return [str(row[column]) for row in rows]


def bars_height(count: int) -> float:
    """The height in inches of a chart with `count` lines."""
    return 1.0 + 0.32 * max(count, 2)


def dots(axes: Axes, rows: Rows, value: int, low: int, high: int, label: str) -> None:
    """Draw a line for each row: value and interval, with the row's name at the axis."""
    places = np.arange(len(rows))
    centre = numbers(rows, value)
    whiskers(axes, centre, places, (numbers(rows, low), numbers(rows, high)), fmt="o", color=COLOURS[0])
    lines(axes, names(rows), label)


def whiskers(axes: Axes, x: np.ndarray, y: np.ndarray, ends: tuple[np.ndarray, np.ndarray], **how: Any) -> None:
    """Draw marks at (x, y) with horizontal intervals; an end that is NaN is not drawn."""
    length = np.nan_to_num(np.clip([x - ends[0], ends[1] - x], 0, None))  # [2, n]; an end may miss by a rounding error
    axes.errorbar(x, y, xerr=length, capsize=3, markersize=6, elinewidth=1.4, **how)


def lines(axes: Axes, labels: Sequence[str], label: str) -> None:
    """Lay out a chart with a line for each name, from top to bottom."""
    axes.set_yticks(np.arange(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)


def stacked(axes: Axes, rows: Rows, parts: Sequence[tuple[int, str]], label: str) -> None:
    """Draw a bar for each row, made of the parts in these columns."""
    left, places = np.zeros(len(rows)), np.arange(len(rows))
    for i, (column, name) in enumerate(parts):
        width = np.nan_to_num(numbers(rows, column))
        axes.barh(places, width, left=left, height=0.7, color=COLOURS[i], hatch=HATCHES[i % len(HATCHES)], label=name,
                  edgecolor=INK, linewidth=0.4)  # fmt: skip
        left += width
    lines(axes, names(rows), label)
    beside(axes)


def beside(axes: Axes) -> None:
    """Put the legend to the right of the picture."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0)


def series(axes: Axes, rows: Rows, x: int, y: int, *, low: int | None = None, high: int | None = None) -> None:
    """Draw a line with a marker of its own for each name in column 0, with intervals if there are columns of them."""
    for i, name in enumerate(dict.fromkeys(names(rows))):
        own = [row for row in rows if str(row[0]) == name]
        style: dict[str, Any] = {
            "marker": MARKERS[i % len(MARKERS)],
            "color": COLOURS[i % len(COLOURS)],
            "markersize": 5,
            "label": name,
        }
        here, there = numbers(own, x), numbers(own, y)
        if low is None or high is None:
            axes.plot(here, there, **style)
            continue
        length = np.nan_to_num(np.clip([there - numbers(own, low), numbers(own, high) - there], 0, None))
        axes.errorbar(here, there, yerr=length, capsize=3, **style)


def heat(axes: Axes, grid: np.ndarray, labels: np.ndarray, scale: str) -> None:
    """Draw shares [R, C] from 0 to 1 as colours, with a label [R, C] in each cell; NaN cells stay empty."""
    image = axes.pcolormesh(np.ma.masked_invalid(grid), cmap=HEAT, vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(grid):
        if np.isfinite(share):
            colour = "white" if share < 0.55 else "black"
            axes.text(
                column + 0.5, row + 0.5, str(labels[row, column]), ha="center", va="center", fontsize=8, color=colour
            )
    axes.invert_yaxis()
    axes.grid(visible=False)
    figure = axes.get_figure()
    if figure is not None:
        figure.colorbar(image, ax=axes, label=scale)
