"""Compare arms over a task, alternating in one process: target alone, draft alone, inner alone, PARSE, PARSE + inner.

    python experiments/compare.py                                  the zoo pair
    python experiments/compare.py task.n=200 gate=adaptive
    python experiments/compare.py --help                           all groups and settings

Writes record.json, table.md and trace.html; the last line of stdout is the record's path.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="compare")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.job import refuse_nothing_answered, run_comparison
    from parsedec.experiment.record import write_text
    from parsedec.experiment.table import markdown, terminal
    from parsedec.models.ranks import leading

    folder = Path(HydraConfig.get().runtime.output_dir)
    with announced(folder / "record.json"):
        record = run_comparison(cfg, folder, "compare", list(HydraConfig.get().overrides.task))
        if leading():
            write_text(markdown(record), folder / "table.md")
        stderr.print(terminal(record))
        stderr.print(f"table: {folder / 'table.md'}\ntrace: {folder / 'trace.html'}", soft_wrap=True)
    refuse_nothing_answered(record)


if __name__ == "__main__":
    run_command(main, CONF)
