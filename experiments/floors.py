"""What a decode step, a tree of 64 and judge passes take, beside the floor that this device sets.

    python experiments/floors.py                                  a tiny shape, on whatever is there
    python experiments/floors.py "shapes=[replay:qwen3_8b]" target.dtype=bfloat16 runtime=graphed    on a GPU
    python experiments/floors.py "kernels=[cascade]" context=2048

Random weights; bandwidth and matrix rate are measured in the same run. experiments/gpu.py does it for several Qwen3
shapes, replays beside it. Writes record.json, table.md and plot.png; the last line of stdout is the record's path.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


def measure_all(cfg: DictConfig, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Rows of every shape, one model in memory at a time. What there is so far is saved after each."""
    from dataclasses import asdict

    import torch
    from hydra.utils import instantiate

    from parsedec.experiment.cli import progress, stderr
    from parsedec.experiment.nodes import check_local
    from parsedec.experiment.threads import settle_threads
    from parsedec.hardware.floors import JudgeSize, cells, measure

    check_local(cfg)
    sizes = [JudgeSize.of(f"judge_passes[{i}]", size) for i, size in enumerate(cfg.judge_passes)]
    rows: list[Any] = []
    devices: dict[str, Any] = {}
    measured = {"devices": devices, "rows": rows}
    with progress(len(cfg.shapes) * (2 + len(sizes) * len(cfg.kernels))) as step:
        for source in cfg.shapes:
            model = instantiate(cfg.target, source=source)
            settle_threads(cfg.runtime.threads, model)
            device, made = measure(
                model, context=cfg.context, nodes=cfg.nodes, sizes=sizes, kernels=cfg.kernels, repeats=cfg.repeats,
                after_each=step)  # fmt: skip
            rows += made
            devices[source] = asdict(device)
            save(measured)
            stderr.print(*(" | ".join(line) for line in cells({"rows": made})), sep="\n")
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return measured


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="floors")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.build import apply_runtime, plain
    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.plot import require_plots
    from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, write_record, write_text
    from parsedec.hardware.floors import draw, markdown, terminal

    if cfg.plot:
        require_plots()
    path = Path(HydraConfig.get().runtime.output_dir) / "record.json"
    config = plain(cfg)
    earlier_record(path, config, resume=None)
    apply_runtime(cfg)
    head = {"schema_version": SCHEMA_VERSION, "title": cfg.title, "config": config, "provenance": provenance()}
    with announced(path):
        record = head | measure_all(cfg, lambda measured: write_record(head | measured, path))
        write_record(record, path)
        write_text(markdown(record), path.with_name("table.md"))
        if cfg.plot:
            draw(record, path.with_name("plot.png"))
        stderr.print(terminal(record))
        stderr.print(f"table: {path.with_name('table.md')}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, CONF)
