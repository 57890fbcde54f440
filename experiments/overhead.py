"""What the engine itself costs: `outer=none inner=none` against `model.generate`, alternating in one process.

    python experiments/overhead.py                                 the zoo target, 40 problems, 5 repeats
    python experiments/overhead.py target=DIR task.n=10

Greedy; both write the same tokens, which is checked. Prints the ratio of seconds per token with a bootstrap interval;
the last line of stdout is the record's path.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


def measure(cfg: DictConfig, repeats: int) -> list[dict[str, Any]]:
    """Seconds of both for every problem: the least of `repeats` alternating runs, so that other load matters less."""
    import torch
    from hydra.utils import instantiate

    from parsedec import Parse, TargetOnly
    from parsedec.chat import prompt_ids
    from parsedec.experiment.build import build_model
    from parsedec.experiment.cli import progress

    model = build_model(cfg.target)
    engine = Parse(model, outer=TargetOnly())
    rows = []
    problems = instantiate(cfg.task).problems()
    with progress(len(problems)) as step:
        for problem in problems:
            ids = prompt_ids(model, [{"role": "user", "content": problem.prompt}])
            inputs = torch.tensor([ids], device=model.device)
            mask = torch.ones_like(inputs)
            theirs, ours = [], []
            for _ in range(repeats):
                start = perf_counter()
                with torch.inference_mode():
                    reference = model.hf.generate(
                        inputs, attention_mask=mask, max_new_tokens=cfg.max_new_tokens, do_sample=False
                    )[0, len(ids) :].tolist()
                theirs.append(perf_counter() - start)
                start = perf_counter()
                tokens = list(engine.generate(ids, max_new_tokens=cfg.max_new_tokens).tokens)
                ours.append(perf_counter() - start)
            rows.append(
                {"id": problem.id, "tokens": len(tokens), "equal": tokens == reference, "generate_s": min(theirs),
                 "engine_s": min(ours)})  # fmt: skip
            step(problem.id)
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratio of seconds, engine over generate (both wrote the same tokens), with a 95 % bootstrap interval."""
    import numpy as np

    seconds = np.array([[row["engine_s"], row["generate_s"]] for row in rows])  # [n, 2]
    draws = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))
    sums = seconds[draws].sum(1)  # [2000, 2]
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    total = seconds.sum(0)
    return {
        "problems": len(rows), "tokens": sum(row["tokens"] for row in rows), "equal": all(row["equal"] for row in rows),
        "ratio": float(total[0] / total[1]), "ratio_low": float(low), "ratio_high": float(high),
    }  # fmt: skip


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="overhead")
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.build import apply_runtime, plain
    from parsedec.experiment.cli import stderr
    from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, write_record

    path = Path(HydraConfig.get().runtime.output_dir) / "record.json"
    earlier_record(path, plain(cfg), resume=False)
    apply_runtime(cfg)
    rows = measure(cfg, cfg.repeats)
    summary = summarise(rows)
    record = {"schema_version": SCHEMA_VERSION, "title": "Engine overhead", "config": plain(cfg)}
    write_record(record | {"provenance": provenance(), "rows": rows, "summary": summary}, path)
    stderr.print(
        f"engine / generate, seconds per token: {summary['ratio']:.3f} "
        f"({summary['ratio_low']:.3f} to {summary['ratio_high']:.3f}), n = {summary['problems']} problems, "
        f"{summary['tokens']} tokens, same tokens: {summary['equal']}", highlight=False)  # fmt: skip
    print(path)


if __name__ == "__main__":
    run_command(main, CONF)
