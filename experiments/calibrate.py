"""Fit thresholds to a stated goal and check it on held-out problems; the last line of stdout is the record's path.

python experiments/calibrate.py                                the zoo pair: of drafts kept in part, at most 1 % wrong
python experiments/calibrate.py goal.risk=0.02 judge=label     another goal, another judge
python experiments/calibrate.py labels=steps labels.path=FILE target=DIR draft=none
python experiments/calibrate.py labels=answers task=gsm8k target=DIR draft=DIR goal.of=requests goal.risk=0.05
python experiments/calibrate.py resume=true output=DIR         go on after a kill, with the settings of that run
python experiments/run.py calibration=DIR/calibration.yaml     apply what was fitted
python experiments/calibrate.py --help                         all groups and settings
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="calibrate")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.calibration.job import run_calibration
    from parsedec.calibration.report import rows, verdict, write_reports
    from parsedec.experiment.build import apply_runtime
    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.table import printed

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    with announced(folder / "record.json"):
        apply_runtime(cfg)
        record = run_calibration(cfg, folder)
        written = write_reports(record, folder, hydra_config.runtime.choices["boundary"])
        found = record["calibration"]
        stderr.print(printed(record["title"], ["figure", "value"], rows(found), verdict(found)))
        stderr.print("\n".join(map(str, written)), soft_wrap=True)


if __name__ == "__main__":
    run_command(main, CONF)
