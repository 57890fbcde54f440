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

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="replay")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.job import run_comparison
    from parsedec.experiment.plot import require_plots
    from parsedec.experiment.record import write_text
    from parsedec.hardware.replay import draw, markdown, terminal

    if cfg.plot:
        require_plots()
    folder = Path(HydraConfig.get().runtime.output_dir)
    with announced(folder / "record.json"):
        record = run_comparison(cfg, folder, "replay", list(HydraConfig.get().overrides.task))
        write_text(markdown(record), folder / "table.md")
        if cfg.plot:
            draw(record, folder / "plot.png")
        stderr.print(terminal(record))
        stderr.print(f"table: {folder / 'table.md'}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, CONF)
