"""Replay: models of real shapes with random weights; everything is computed, only what stands is scripted.

    python experiments/replay.py                                  tiny shapes, on whatever is there
    python experiments/replay.py experiment=replay_qwen3_32b      Qwen3 32B / 1.7B on one GPU
    python experiments/replay.py judge.kept=0.85 judge.whole=0    another trace of kept shares
    python experiments/replay.py acceptance.tau=3 acceptance.depth=6 inner.depth=5

It measures the engine's speed and nothing else: the answers mean nothing. Writes record.json, table.md, plot.png and
trace.html; the last line of stdout is the record's path.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


def run(cfg: DictConfig, folder: Path, overrides: list[str]) -> dict[str, Any]:
    from hydra import compose

    from parsedec.experiment.build import apply_runtime, build_draft_alone, build_engine
    from parsedec.experiment.job import run_job
    from parsedec.experiment.runner import Arm

    apply_runtime(cfg)

    def make_arms() -> list[Arm]:
        arms = []
        for name, arm in cfg.arms.items():
            own = compose("replay", overrides=[*overrides, *arm.overrides])
            build = build_draft_alone if arm.get("model") == "draft" else build_engine
            arms.append(Arm(str(name), build(own), " ".join(arm.overrides)))
        return arms

    return run_job(cfg, folder, make_arms, baseline=cfg.baseline)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="replay")
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.plot import require_plots
    from parsedec.experiment.record import write_text
    from parsedec.experiment.replay import draw, markdown, terminal

    if cfg.plot:
        require_plots()
    folder = Path(HydraConfig.get().runtime.output_dir)
    with announced(folder / "record.json"):
        record = run(cfg, folder, list(HydraConfig.get().overrides.task))
        write_text(markdown(record), folder / "table.md")
        if cfg.plot:
            draw(record, folder / "plot.png")
        stderr.print(terminal(record))
        stderr.print(f"table: {folder / 'table.md'}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, CONF)
