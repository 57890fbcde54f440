"""Compare arms over a task, alternating in one process: target alone, draft alone, inner alone, PARSE, PARSE + inner.

    python experiments/compare.py                                  the zoo pair
    python experiments/compare.py task.n=200 gate=adaptive
    python experiments/compare.py --help                           all groups and settings

Writes record.json, table.md and trace.html; the last line of stdout is the record's path.
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
            own = compose("compare", overrides=[*overrides, *arm.overrides])
            build = build_draft_alone if arm.get("model") == "draft" else build_engine
            arms.append(Arm(str(name), build(own), " ".join(arm.overrides)))
        return arms

    return run_job(cfg, folder, make_arms, baseline=cfg.baseline)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="compare")
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.record import write_text
    from parsedec.experiment.table import markdown, terminal
    from parsedec.ranks import leading

    folder = Path(HydraConfig.get().runtime.output_dir)
    with announced(folder / "record.json"):
        record = run(cfg, folder, list(HydraConfig.get().overrides.task))
        if leading():
            write_text(markdown(record), folder / "table.md")
        stderr.print(terminal(record))
        stderr.print(f"table: {folder / 'table.md'}\ntrace: {folder / 'trace.html'}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, CONF)
