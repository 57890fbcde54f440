"""Train a model by a recipe and write its record; the last line of stdout is the record's path.

python experiments/train.py recipe=zoo_target                   the zoo's target, from the shipped weights, on a CPU
python experiments/train.py recipe=zoo_draft preset=cuda        the draft model on a GPU
python experiments/train.py resume=true output=DIR              go on after a kill, with the settings of that run
python experiments/train.py --help                              all recipes, presets and settings
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
@checked
def main(cfg: DictConfig) -> None:
    from parsedec.experiment.cli import announced
    from parsedec.training import run_recipe

    with announced(Path(cfg.output) / "record.json"):  # after Ctrl-C: what was learnt is in the checkpoint beside it
        run_recipe(cfg)


if __name__ == "__main__":
    run_command(main, CONF)
