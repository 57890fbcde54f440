"""Train the probes of judge=probe and the weights of judge=combined; the last line of stdout is the record's path.

python experiments/train_probe.py                                 the zoo pair, a few minutes of one core
python experiments/train_probe.py target=HUB_ID draft=HUB_ID labels=answers task=gsm8k     from final answers alone
python experiments/train_probe.py target=HUB_ID draft=none labels=steps labels.path=FILE.jsonl     from labelled steps
python experiments/run.py judge=probe judge.weights=DIR/probe     use what DIR, the output, holds
python experiments/train_probe.py --help                          all groups and settings
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train_probe")
@checked
def main(cfg: DictConfig) -> None:
    from parsedec.experiment.cli import announced
    from parsedec.training.probe_job import train_probes

    with announced(Path(cfg.output) / "record.json"):
        train_probes(cfg)


if __name__ == "__main__":
    run_command(main, CONF)
