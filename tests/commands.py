"""Commands as users type them, each in a process of its own that need not import torch first.

A process that has imported what commands import, one per test worker, is forked for each. So a command has its own
interpreter, arguments, folder, output and exit code, and starts at once instead of after several seconds. (What starts
as users start it: tests/cli/test_bad_input.py's Ctrl-C, and the servers of tests/serving.py.)
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PARSEDEC_")} | {
    "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("parse", "adapters")),
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}
STUCK_S = 600  # nothing here takes that long


def run(script, *arguments, cwd, timeout=300, **environment):
    """`python experiments/SCRIPT ARGUMENTS` as subprocess.run returns it; `script` may also be "-m parsedec", or a path
    elsewhere."""
    words = script.split() if script.startswith("-m ") else [str(ROOT / "experiments" / script)]
    forkable = _forkable(tuple(sorted(environment.items())))
    try:
        return forkable.run([*words, *map(str, arguments)], str(cwd), timeout)
    except BaseException:
        _forkable.cache_clear()  # an answer that nobody waited for would be taken for the next one's
        raise


@cache
def _forkable(environment):
    return Forkable(ENVIRONMENT | dict(environment))


class Forkable:
    """The other end of `serve`."""

    def __init__(self, environment):
        ours, theirs = socket.socketpair()
        ours.settimeout(STUCK_S)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL)  # fmt: skip
        theirs.close()  # it ends when our end is closed, at the latest with this process
        self._lines = ours.makefile("rw")

    def run(self, words, cwd, timeout):
        with TemporaryDirectory() as folder:
            outputs = [Path(folder, name) for name in ("stdout", "stderr")]
            self._lines.write(json.dumps([words, cwd, timeout, *map(str, outputs)]) + "\n")
            self._lines.flush()
            code = json.loads(self._lines.readline() or '"ended"')
            if code == "ended":
                raise ChildProcessError(f"the process that is forked for commands has ended: {self._process.wait()}")
            if code is None:
                raise subprocess.TimeoutExpired(words, timeout)
            return subprocess.CompletedProcess(words, code, *(path.read_text() for path in outputs))


def serve(lines):
    """Fork for every line, and say the child's exit code, or null if it took too long. Returns in the child, with what
    it is to run."""
    for line in lines:
        words, cwd, timeout, *outputs = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(cwd)
            for stream, path in zip((1, 2), outputs, strict=True):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT)
                os.dup2(fd, stream)
                os.close(fd)
            return words
        lines.write(json.dumps(exit_code(child, timeout)) + "\n")
        lines.flush()
    return None


def exit_code(child, timeout):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def become(words):
    """Run a command in this process, and leave it. The interpreter is not taken down: what was imported before the fork
    is of no use to anybody, and touching all of it once more would take longer than most commands."""
    code = 0
    try:
        if words[0] == "-m":
            sys.argv[:] = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = words
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter would, which this stands for
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    import hydra  # noqa: F401

    import parsedec.experiment.job  # noqa: F401 - and with it torch and transformers

    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, all of it
    with socket.socket(fileno=int(sys.argv[1])) as end, end.makefile("rw") as requests:
        asked = serve(requests)
    if asked is not None:
        become(asked)
