"""Pictures that several kinds of records share: shares by threshold, and acceptance by depth."""

from __future__ import annotations

from matplotlib.axes import Axes

from parsedec.reporting.figure import Figure, Rows, beside, series


def threshold_figure(prefix: str, rows: Rows) -> Figure:
    """Shares by threshold. Rows are (name, threshold, share, low, high, arm, n)."""
    return Figure(
        name=f"{prefix}-thresholds",
        title="How strict the judge should be",
        guide="To the right the judge asks for more certainty before it keeps a piece of the draft: less is kept, and "
        "fewer mistakes slip through.",
        heads=("line", "threshold", "share", "share_low", "share_high", "arm", "n"),
        rows=rows,
        draw=_thresholds,
    )


def _thresholds(axes: Axes, rows: Rows) -> None:
    shares = [[row[0], row[1], *(None if cell is None else 100 * float(cell) for cell in row[2:5])] for row in rows]
    series(axes, shares, 1, 2, low=3, high=4)
    axes.set(xlabel="threshold: the score from which a piece is kept", ylabel="%")
    beside(axes)


def depth_figure(prefix: str, rows: Rows) -> Figure:
    """Acceptance by depth. Rows are (name, depth, trees, reached, accepted, share)."""
    return Figure(
        name=f"{prefix}-depth",
        title="How many guessed tokens in a row were right",
        guide="Speculators guess the next few tokens before the large model has spoken; the line is the share of "
        "guesses in which the first 1, 2, 3 … tokens were right, so a line that stays high saves more.",
        heads=("name", "depth", "trees", "reached", "accepted", "share"),
        rows=rows,
        draw=_depths,
        height=max(3.4, 1 + 0.22 * len({row[0] for row in rows})),
    )


def _depths(axes: Axes, rows: Rows) -> None:
    series(axes, [[row[0], row[1], 100 * float(row[5] or 0)] for row in rows], 1, 2)
    axes.set(xlabel="tokens guessed in a row", ylabel="guesses right so far, %", ylim=(0, 102))
    axes.set_xticks(sorted({int(row[1] or 0) for row in rows}))
    beside(axes)
