"""Run generated Python in a subprocess that cannot hang or exhaust the scorer. POSIX only.

What it does: it starts a fresh interpreter in isolated mode, with an empty environment and an empty folder that is
deleted afterwards; limits CPU time, address space and file size, and allows no core dumps; discards output; and kills
the whole process group at the wall-clock limit or when the code ends. Success is reported by a word that only the
runner knows, after the last part has run, so that ending early with exit code 0 does not count.

What it does not do: it is not a security boundary. The code runs as the current user: it can read and write whatever
that user can, and use the network. A child that leaves the process group survives the kill (its CPU time stays
limited). Many processes at once are not prevented, and each has a memory limit of its own. Code that looks for the
runner's variables can forge a success. Some systems (macOS) do not enforce the address-space limit, and root can lift
every limit. For code you have reason to fear, run the whole scorer in a container or a virtual machine without network.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from parsedec.errors import ConfigError

_FILE_MB = 16  # largest file the code may write, its error output included
_SMALLEST_MEMORY_MB = 64  # with less, the interpreter itself does not start
_TAIL_BYTES = 4096  # read from the end of the error output, of which only the last line is reported

# Runs in the child. It reads the job and moves its own output channel out of the way before any foreign code
# runs. The parts are compiled one by one, so that an unclosed quote or block in one cannot swallow the next.
_RUNNER = """
import json, os, resource, sys, traceback, types
job = json.load(sys.stdin)
verdict = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for name, value in job["limits"].items():
    which = getattr(resource, name)
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (ValueError, OSError):
        if sys.platform != "darwin":
            raise
candidate = types.ModuleType("candidate")
sys.modules["candidate"] = candidate
try:
    for part in job["parts"]:
        exec(compile(part, "<candidate>", "exec"), candidate.__dict__)
except BaseException:
    traceback.print_exc(limit=-3)
    os._exit(1)
os.write(verdict, job["word"].encode())
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """Whether all parts ran to their end, and if not, why: the traceback's last line, or what stopped them."""

    passed: bool
    detail: str


def require_limits(timeout_s: float, memory_mb: int) -> None:
    """Raise ConfigError for limits under which nothing could run."""
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 < timeout_s < math.inf:
        raise ConfigError(f"timeout_s={timeout_s!r} is not usable; expected seconds above 0. Raise it.")
    if not isinstance(memory_mb, int) or isinstance(memory_mb, bool) or memory_mb < _SMALLEST_MEMORY_MB:
        raise ConfigError(
            f"memory_mb={memory_mb!r} is not usable; expected a whole number of at least "
            f"{_SMALLEST_MEMORY_MB}, which Python itself needs. Raise memory_mb."
        )


def run_sandboxed(parts: Sequence[str], *, timeout_s: float, memory_mb: int) -> SandboxResult:
    """Run `parts` one after another in one namespace; passed if the last one ends without an exception."""
    require_limits(timeout_s, memory_mb)
    if os.name != "posix":
        raise ConfigError(
            f"the sandbox cannot run on os.name={os.name!r}; expected a POSIX system, whose "
            "resource limits it uses. Score on Linux, macOS or WSL."
        )
    word = secrets.token_hex(16)
    job = json.dumps({"parts": list(parts), "word": word, "limits": _limits(timeout_s, memory_mb)})
    # Files instead of pipes, so that nothing can block on a full pipe or on a grandchild that keeps one open.
    with (
        tempfile.TemporaryDirectory(prefix="parsedec-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as verdict,
        tempfile.TemporaryFile() as errors,
    ):
        stdin.write(job.encode())
        stdin.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER],
            cwd=folder,
            env={},
            start_new_session=True,
            stdin=stdin,
            stdout=verdict,
            stderr=errors,
        )
        code = _wait_and_kill(child, timeout_s)
        if code is None:
            return SandboxResult(False, f"timed out after {timeout_s:g} s")
        verdict.seek(0)
        if verdict.read(len(word) + 1) == word.encode():
            return SandboxResult(True, "passed")
        return SandboxResult(False, _reason(code, errors))


def _limits(timeout_s: float, memory_mb: int) -> dict[str, int]:
    return {
        # + 1, since the wall clock should strike first; this limit is for what escapes the process group
        "RLIMIT_CPU": math.ceil(timeout_s) + 1,
        "RLIMIT_AS": memory_mb << 20,
        "RLIMIT_FSIZE": _FILE_MB << 20,
        "RLIMIT_CORE": 0,
    }


def _wait_and_kill(child: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """The exit code, or None after the time limit. Either way the child's whole process group has been killed."""
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # the group has the child's id, since the child opened its session; it may be empty by now
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _reason(code: int, errors: IO[bytes]) -> str:
    if code < 0:
        return f"killed by signal {-code}"
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _TAIL_BYTES))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    if code and lines:
        return lines[-1].strip()[:200]
    return f"ended with exit code {code} before its checks were done"
