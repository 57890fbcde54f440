"""The CUDA tests in a process of their own, while this one does work on the device that is not timed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LAST = 15  # lines that are kept in the record; all of them are in the log


class CudaTests:
    """`pytest -m gpu` on some paths of a checkout, started when this is made, if it can run at all."""

    def __init__(self, root: Path, paths: Sequence[str], seconds: float, output: Path) -> None:
        self.obstacle = _obstacle(root, paths)
        self._output, self._seconds, self._began = output, seconds, time.monotonic()
        self._process: subprocess.Popen[str] | None = None
        if self.obstacle is None:
            output.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *paths]
            with output.open("w") as sink:
                self._process = subprocess.Popen(
                    command, cwd=root, stdout=sink, stderr=subprocess.STDOUT, text=True, start_new_session=True
                )

    def result(self, most: float) -> dict[str, Any]:
        """Their outcome, after `most` seconds at the latest, or when their own time is up; they are ended then.

        passed  None if they did not run to their end
        """
        if self._process is None:
            return {"passed": None, "said": f"not run: {self.obstacle}", "last": []}
        left = min(most, self._seconds - (time.monotonic() - self._began))
        try:
            code = self._process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            self.end()
            code = None
        took, lines = time.monotonic() - self._began, self._output.read_text(errors="replace").splitlines()
        last = [line for line in lines if line.strip()][-LAST:]
        said = f"ended after {took:.0f} s" if code is None else (last[-1].strip("= ") if last else f"exit code {code}")
        passed = None if code is None else code == 0 and " passed" in said
        return {"passed": passed, "said": said, "last": last, "seconds": took}

    def end(self) -> None:
        """End the process and those it started, such as compilers."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _obstacle(root: Path, paths: Sequence[str]) -> str | None:
    if not paths:
        return "none were asked for"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    missing = [path for path in paths if not (root / path).exists()]
    return f"{root} has no {', '.join(missing)}" if missing else None
