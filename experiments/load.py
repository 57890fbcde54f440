"""Load on `parsedec serve`: many streaming clients, each answer compared with the one its prompt gets alone.

    python experiments/load.py                                   64 clients for two minutes, the zoo pair
    python experiments/load.py clients=8 seconds=5 inner=ngram   shorter, with an inner speculator
    python experiments/load.py url=http://HOST:PORT              a server that runs already

Writes record.json: answers lost, mixed up or different, seconds to the first text and to the end (p50, p95), memory of
the server, and what more requests than fit are told. The last line of stdout is the record's path.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
OWN = ("url", "clients", "seconds", "leave", "overflow", "output", "resume")


@contextmanager
def started(cfg: DictConfig, overrides: list[str]) -> Iterator[tuple[str, int | None]]:
    """(address, process id) of the server: the one that is named, or a new one, ended at the end by SIGTERM."""
    from parsedec.errors import ParsedecError

    if cfg.url is not None:
        yield cfg.url, None
        return
    theirs = [
        o for o in overrides if o.partition("=")[0] not in OWN and not o.startswith(("serve.port", "serve.queue"))
    ]
    command = [sys.executable, "-m", "parsedec", "serve", *theirs, "serve.port=0", f"serve.queue={cfg.serve.queue}"]
    sources = [str(ROOT / "parse"), str(ROOT / "adapters"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sources)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            if not address:
                raise ParsedecError("the server did not start; what it said is above.")
            yield address, server.pid
        finally:
            server.terminate()
            try:
                code = server.wait(cfg.serve.drain_s + 30)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
        if code:
            raise ParsedecError(f"the server ended with code {code} after SIGTERM; expected 0.")


def measure(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    import httpx
    from hydra.utils import instantiate

    from parsedec.serve.load import Load, apply_load

    prompts = [problem.prompt for problem in instantiate(cfg.task).problems()]
    with started(cfg, overrides) as (address, pid):
        model = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
        load = Load(
            address=address,
            model=model,
            clients=cfg.clients,
            seconds=cfg.seconds,
            leave=cfg.leave,
            overflow=cfg.overflow,
            room=cfg.serve.at_once + cfg.serve.queue,
            max_tokens=cfg.max_new_tokens,
            pid=pid,
            seed=cfg.seed,
        )
        return asyncio.run(apply_load(load, prompts))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="load")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.errors import ParsedecError
    from parsedec.experiment.build import plain
    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, write_record
    from parsedec.serve.load import sound

    path = Path(HydraConfig.get().runtime.output_dir) / "record.json"
    earlier_record(path, plain(cfg), resume=None)
    with announced(path):
        head = {
            "schema_version": SCHEMA_VERSION,
            "kind": "load",
            "title": f"{cfg.clients} clients at once on a server",
            "provenance": provenance(),
            "config": plain(cfg),
        }
        summary = measure(cfg, list(HydraConfig.get().overrides.task))
        write_record({**head, "summary": summary}, path)
        for name, value in summary.items():
            stderr.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    if wrong := sound(summary):
        raise ParsedecError(f"the load was not borne: {'; '.join(wrong)}. The record has the rest.")


if __name__ == "__main__":
    run_command(main, CONF)
