"""A server for tests: a gateway in a thread of the test's process, or `parsedec serve` as a process of its own."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from parsedec.serve.app import Gateway
from parsedec.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def listening(engine, wrap=lambda app: app, **settings):
    """(address, gateway) of a gateway over `engine`; `wrap` may put something around its app."""
    limits = settings.pop("limits", None)
    gateway = Gateway(engine, ServeSettings(port=0, **settings), limits=limits)
    server = uvicorn.Server(uvicorn.Config(wrap(gateway.app), log_level="warning", lifespan="off"))
    server.install_signal_handlers = lambda: None
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", gateway
    finally:
        asyncio.run(gateway.desk.drain(0))
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()
        listener.close()


@contextmanager
def process(*overrides, **environment):
    """(address, process) of `parsedec serve`; it is ended if the test did not."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "parse"), str(ROOT / "adapters")]), **environment}
    command = [sys.executable, "-m", "parsedec", "serve", "serve.port=0", "runtime=cpu", *overrides]
    started = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield started.stdout.readline().strip(), started
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate(timeout=30)
