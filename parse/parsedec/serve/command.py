"""`parsedec serve`: an engine as `experiments/run.py` would build it, behind OpenAI's interface.

parsedec serve                                                    the embedded pair, on http://127.0.0.1:8000
parsedec serve target=HUB_ID draft=HUB_ID inner=ngram serve.port=9000 serve.api_key=env
parsedec serve --help                                             all groups and settings

SIGTERM and Ctrl-C let answers in progress finish, for `serve.drain_s` seconds at most; new requests get 503 meanwhile.
A second Ctrl-C ends at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

import hydra
import uvicorn
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from parsedec.experiment.cli import checked, run_command, stderr
from parsedec.experiment.nodes import conf_folder
from parsedec.serve.settings import KEY_VARIABLE, ServeSettings

if TYPE_CHECKING:
    from parsedec.serve.app import Gateway

AFTER_DRAIN = 5  # seconds for the last bytes to reach their readers
TURN_S = 0.001  # the thread that decodes lets the one that answers in so soon; Python's 5 ms double a refusal's wait


class Server(uvicorn.Server):
    """uvicorn, which on a signal first lets the gateway's answers finish, while new requests are told 503."""

    def __init__(self, gateway: Gateway) -> None:
        settings = gateway.settings
        super().__init__(
            uvicorn.Config(
                gateway.app,
                host=settings.host,
                port=settings.port,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,  # anyone on this machine could take a client's turn by another name
                ws="none",
                timeout_graceful_shutdown=AFTER_DRAIN,
                h11_max_incomplete_event_size=64 * 1024,
            )
        )
        self.gateway = gateway
        self._signals = 0
        self._draining: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                where = f"[{host}]" if ":" in host else host
                print(f"http://{where}:{port}", flush=True)  # stdout: what a script waits for
        stderr.print(f"{self.gateway.model} is served; stop with Ctrl-C.", highlight=False)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            super().handle_exit(sig, frame)  # before it listened
        elif self._signals:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)
        self._signals += 1

    def _begin_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        late = await self.gateway.desk.drain(self.gateway.settings.drain_s)
        if late:
            stderr.print(f"{late} answers were not finished in time; their readers were told.")
        self.should_exit = True


def serve(cfg: DictConfig) -> None:
    """Build the engine and serve it until a signal comes."""
    from parsedec.experiment.build import apply_runtime, build_engine, build_sampling
    from parsedec.serve.app import Gateway
    from parsedec.types import Limits

    settings: ServeSettings = instantiate(cfg.serve)
    _ = settings.keys  # a missing key is found before models are loaded
    if settings.unguarded:
        stderr.print(
            f"serve.host={settings.host} without a key: whoever reaches this machine can use the server. Set "
            f"serve.api_key=env and {KEY_VARIABLE}, or serve.host=127.0.0.1.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    apply_runtime(cfg)
    engine = build_engine(cfg)
    gateway = Gateway(
        engine,
        settings,
        limits=Limits(max_new_tokens=cfg.max_new_tokens, stop=cfg.stop),
        sampling=build_sampling(cfg),
        fingerprint=f"fp_{hashlib.sha256(OmegaConf.to_yaml(cfg, sort_keys=True).encode()).hexdigest()[:12]}",
    )
    sys.setswitchinterval(TURN_S)
    Server(gateway).run()


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="serve")
@checked
def composed(cfg: DictConfig) -> None:
    serve(cfg)


def run() -> None:
    """`parsedec serve …`, its arguments in sys.argv[1:]: exit code 0, 2 for what the user can mend."""
    run_command(composed, conf_folder())
