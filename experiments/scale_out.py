"""What to expect of PARSE on GPUs that are not here, by the cost model of `parsedec.hardware.scale`: assumptions, no
measurement. The defaults are a 235B/8B pair on eight GPUs.

    python experiments/scale_out.py
    python experiments/scale_out.py draft_gpus.count=1 target.tokens_per_call=1 kept=[0.5,0.8]

Writes table.md; the last line of stdout is its path.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="scale_out")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.record import write_text
    from parsedec.hardware.scale import table, tabulate

    path = Path(HydraConfig.get().runtime.output_dir) / "table.md"
    with announced(path):
        gpus = (instantiate(cfg.target_gpus), instantiate(cfg.draft_gpus))
        rows = tabulate(instantiate(cfg.target), instantiate(cfg.draft), gpus, instantiate(cfg.request), list(cfg.kept))
        write_text(table(rows), path)
        stderr.print(path.read_text(), highlight=False)


if __name__ == "__main__":
    run_command(main, CONF)
