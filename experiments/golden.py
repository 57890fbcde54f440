"""Replay golden vectors: every step the reference implementations of EAGLE-3 and Medusa recorded, through ours.

    python experiments/golden.py root=DIR                    DIR holds eagle3/cases and medusa/cases
    python experiments/golden.py root=DIR attention=[eager]

Prints a line for every case and, at the end, how many recorded items are equal. Exit code 1 if any is not, 2 if there
is nothing to replay.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"
SHOWN = 8  # unequal items named per case


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="golden")
@checked
def main(cfg: DictConfig) -> None:
    import torch

    from parsedec_adapters.golden import CaseResult, run_cases

    def report(case: CaseResult) -> None:
        print(f"{case.name}: {case.items - len(case.unequal)}/{case.items} items equal", flush=True)
        for item in case.unequal[:SHOWN]:
            print(f"    differs: {item}")
        if case.fault:
            print(f"    {case.fault}")

    torch.set_num_threads(1)  # the models are tiny
    results = run_cases(Path(cfg.root).expanduser(), list(cfg.attention), report)
    items, unequal = sum(case.items for case in results), sum(len(case.unequal) for case in results)
    print(f"golden: {items - unequal}/{items} items equal in {len(results)} cases")
    if unequal:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, CONF)
