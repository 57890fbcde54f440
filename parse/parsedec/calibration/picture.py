"""The picture of a calibration: reliability, ROC, the threshold sweep and the heat map, drawn with matplotlib."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(record: dict[str, Any], path: Path) -> Path:
    """A PNG of the record's figures; panels for which the labels say nothing are left out."""
    found = record["calibration"]
    shown = found.get("prefixes") or found["complete"]
    what = "prefixes" if "prefixes" in found else "complete drafts"
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _reliability(axes, shown, what),
        lambda axes: _roc(axes, shown, what),
    ]
    if "sweep" in found:
        panels += [lambda axes: _sweep(axes, found), lambda axes: _heat(axes, found["by_position"])]
    figure = Figure(figsize=(10, 4 * (len(panels) // 2)), dpi=110, layout="constrained")
    for panel, axes in zip(panels, np.ravel(figure.subplots(len(panels) // 2, 2)), strict=True):
        panel(axes)
    figure.suptitle(record["title"])
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".png")
    os.close(handle)
    figure.savefig(temporary)
    Path(temporary).chmod(0o644)
    os.replace(temporary, path)
    return path


def _reliability(axes: Axes, shown: dict[str, Any], what: str) -> None:
    bins = shown["reliability"]["bins"]
    scores, right = [row["score"] for row in bins], [row["right"] for row in bins]
    # the ends of an interval may lie a rounding error inside the share
    below = [max(0.0, row["right"] - row["interval"][0]) for row in bins]
    above = [max(0.0, row["interval"][1] - row["right"]) for row in bins]
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.errorbar(scores, right, yerr=[below, above], marker="o", linewidth=1)
    axes.set(xlabel="score", ylabel="share right", title=f"Reliability of {what}, n = {shown['reliability']['count']}")


def _roc(axes: Axes, shown: dict[str, Any], what: str) -> None:
    found = shown["separation"]
    area = "not defined" if found["auc"] is None else f"{found['auc']:.3f}"
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot(*zip(*found["curve"], strict=True) if found["curve"] else ([], []))
    axes.set(xlabel="wrong ones passed", ylabel="right ones passed", title=f"ROC of {what}, area {area}")


def _sweep(axes: Axes, found: dict[str, Any]) -> None:
    rows = found["sweep"]["check"]
    kept = [row["kept_share"] for row in rows]
    axes.plot(kept, [row["risk"] for row in rows], marker=".", label="share of errors")
    axes.plot(kept, [row["upper"] for row in rows], linestyle="--", label="its upper bound")
    axes.axhline(found["goal"]["risk"], color="0.5", linewidth=1, label="goal")
    axes.set(xlabel="kept share of drafted tokens", ylabel="risk", title="Every threshold, on the check")
    axes.legend()


def _heat(axes: Axes, found: dict[str, Any]) -> None:
    right, wrong = (np.array(found[name], dtype=float) for name in ("right", "wrong"))  # [positions, bins]
    total = right + wrong
    share = np.divide(wrong, total, out=np.full_like(total, np.nan), where=total > 0)
    image = axes.imshow(share, aspect="auto", vmin=0, vmax=1, cmap="RdYlGn_r", extent=(0, 1, len(share) - 0.5, -0.5))
    for (row, column), count in np.ndenumerate(total):
        if count:
            axes.text((column + 0.5) / total.shape[1], row, f"{count:.0f}", ha="center", va="center", fontsize=7)
    axes.set(xlabel="score", ylabel="segment", title="Share wrong by position and score, with counts")
    axes.figure.colorbar(image, ax=axes)
