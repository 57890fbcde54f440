"""Does PARSE help this pair of models on these prompts? Measures, predicts, says what limits it, writes what to run.

python experiments/advise.py                                   the zoo pair
python experiments/advise.py target=HUB_ID draft=HUB_ID task=prompts task.path=FILE.jsonl
python experiments/advise.py task=gsm8k task.path=FILE task.n=60 check.n=30   and compare with a measurement
python experiments/advise.py resume=true output=DIR            go on after a kill, with the settings of that run
python experiments/run.py --config-dir DIR experiment=advised  run what was advised
python experiments/advise.py --help                            all groups and settings

Writes record.json, advice.md and experiment/advised.yaml; the last line of stdout is the record's path.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="advise")
@checked
def main(cfg: DictConfig) -> None:
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    from parsedec.advice.job import run_advice
    from parsedec.advice.report import terminal, write_reports
    from parsedec.experiment.build import apply_runtime
    from parsedec.experiment.cli import announced, stderr

    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)

    def composed(own: Sequence[str], config: str = "advise") -> DictConfig:
        return compose(config, overrides=[*overrides, *own])

    with announced(folder / "record.json"):
        apply_runtime(cfg)
        record = run_advice(cfg, folder, composed)
        written = write_reports(record, folder, overrides)
        stderr.print(terminal(record))
        stderr.print("\n".join(map(str, written)), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run_command(main, CONF)
