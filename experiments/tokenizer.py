"""Learn the zoo's tokenizer from the text of its tasks; the last line of stdout is the record's path.

python experiments/tokenizer.py                          both tasks, 448 tokens
python experiments/tokenizer.py ~corpus.lists            word problems only
python experiments/tokenizer.py vocabulary=512 output=DIR
python experiments/tokenizer.py --help                   all settings
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="tokenizer")
@checked
def main(cfg: DictConfig) -> None:
    from parsedec.experiment.cli import announced
    from parsedec.training.tokenizer import train_tokenizer

    with announced(Path(cfg.output) / "record.json"):
        train_tokenizer(cfg)


if __name__ == "__main__":
    run_command(main, CONF)
