"""All that one GPU has to show, within a given time: the CUDA tests, passes against their floors, replays.

    python experiments/gpu.py                          Qwen3 32B / 1.7B and 8B shapes: one GPU of 141 GB, nine minutes
    python experiments/gpu.py minutes=30 task.n=8      more requests of the replay
    python experiments/gpu.py '~stages.kernels'        without a stage

Random weights, scripted decisions: speed and nothing else. Writes record.json and table.md after every stage, the
replays' own records in folders beside them, and the tests' log; the last line of stdout is the record's path. What does
not fit into the time is left out, and the table says so.
"""

import os
import time

STARTED = time.monotonic()  # importing the libraries is part of the time
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="gpu")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.build import apply_runtime, plain
    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.nodes import check_local
    from parsedec.experiment.record import earlier_record
    from parsedec.hardware.claims import terminal
    from parsedec.hardware.gpu import Measurement
    from parsedec.hardware.stages import Clock

    check_local(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    earlier_record(folder / "record.json", plain(cfg), resume=None)
    apply_runtime(cfg)
    overrides, clock = list(HydraConfig.get().overrides.task), Clock.of(cfg.minutes, STARTED)
    with announced(folder / "record.json"):
        measurement = Measurement(cfg, folder, overrides, clock, ROOT)
        try:
            measurement.run()
        finally:
            stderr.print(terminal(measurement.record))
            stderr.print(f"table: {folder / 'table.md'}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, CONF)
