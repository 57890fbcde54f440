"""Run one configuration over a task and write its record; the last line of stdout is the record's path.

python experiments/run.py                                      the zoo pair with PARSE
python experiments/run.py inner=draft_model task.n=20          another inner speculator, fewer problems
python experiments/run.py target=HUB_ID draft=HUB_ID task=gsm8k task.path=FILE
python experiments/run.py --multirun inner=none,draft_model    one run for each
python experiments/run.py --help                               all groups and settings
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    from parsedec.experiment.build import apply_runtime, build_engine
    from parsedec.experiment.job import run_job
    from parsedec.experiment.runner import Arm

    apply_runtime(cfg)
    return run_job(cfg, folder, lambda: [Arm("run", build_engine(cfg))])


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.job import refuse_nothing_answered
    from parsedec.experiment.table import terminal
    from parsedec.models.ranks import leading

    folder = Path(HydraConfig.get().runtime.output_dir)
    with announced(folder / "record.json"):
        record = run(cfg, folder)
        if leading():
            stderr.print(terminal(record))
            stderr.print(f"trace: {folder / 'trace.html'}", soft_wrap=True)
    refuse_nothing_answered(record)


if __name__ == "__main__":
    run_command(main, CONF)
