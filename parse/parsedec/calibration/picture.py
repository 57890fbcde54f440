"""The picture of a calibration: the report's panels on one sheet, drawn with matplotlib."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from parsedec.reporting.figure import STYLE
from parsedec.reporting.judged import calibration_pictures


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the record's figures as a PNG to `path`, and return it. Leaves out panels for which there are no labels."""
    panels = calibration_pictures(record["calibration"], "calibration")
    lines = -(-len(panels) // 2)
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 4.6 * lines), dpi=110, layout="constrained")
        places = np.ravel(figure.subplots(lines, 2, squeeze=False))
        for panel, axes in zip(panels, places, strict=False):
            panel.draw(axes, panel.rows)
            axes.set_title(panel.title)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        figure.suptitle(record["title"])
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".png")
        os.close(handle)
        figure.savefig(temporary)
    Path(temporary).chmod(0o644)
    os.replace(temporary, path)
    return path
