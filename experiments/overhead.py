"""What the engine itself costs: `outer=none inner=none` against `model.generate`, and per step with every speculator.

    python experiments/overhead.py                                 the zoo target, 40 problems, 5 repeats
    python experiments/overhead.py "inners=[ngram,'eagle3 inner.tokens=8']" task.n=10
    python experiments/overhead.py target=DIR draft=DIR inners=[]  against model.generate only

Greedy, everything alternating in one process; whether all wrote the same tokens is checked. Writes record.json and
table.md; the last line of stdout is the record's path.
"""

import os
import shlex

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


def measure(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """What the record says of both measurements."""
    from hydra import compose
    from hydra.utils import instantiate

    from parsedec import Parse, TargetOnly
    from parsedec.experiment import overhead
    from parsedec.experiment.build import build_engine, build_target
    from parsedec.experiment.cli import progress
    from parsedec.experiment.nodes import check_local
    from parsedec.text.chat import prompt_ids

    check_local(cfg)
    model = build_target(cfg)
    engines = {}
    for entry in dict.fromkeys(["none", *cfg.inners] if cfg.inners else []):
        name, *own = shlex.split(entry)
        chosen = [f"inner={name}", "outer=none", *own]
        engines[entry] = build_engine(compose("overhead", overrides=[*overrides, *chosen]))
    problems = instantiate(cfg.task).problems()
    prompts = {p.id: prompt_ids(model, [{"role": "user", "content": p.prompt}]) for p in problems}
    with progress(len(prompts) * (1 + bool(engines))) as step:
        settings: dict[str, Any] = dict(max_new_tokens=cfg.max_new_tokens, repeats=cfg.repeats, after_each=step)
        rows = overhead.measure_generate(Parse(model, outer=TargetOnly()), prompts, **settings)
        by_inner = overhead.measure_steps(engines, prompts, **settings) if engines else {}
    summaries = overhead.summarise_steps(by_inner) if engines else {}
    inners = [{"name": name, "summary": summaries[name], "rows": by_inner[name]} for name in engines]
    return {"summary": overhead.summarise_generate(rows), "inners": inners, "rows": rows}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="overhead")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.build import apply_runtime, plain
    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.overhead import markdown, sentence, terminal
    from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, write_record, write_text

    path = Path(HydraConfig.get().runtime.output_dir) / "record.json"
    config = plain(cfg)
    earlier_record(path, config, resume=None)
    apply_runtime(cfg)
    head = {"schema_version": SCHEMA_VERSION, "title": "Engine overhead", "config": config, "provenance": provenance()}
    with announced(path):
        record = head | measure(cfg, list(HydraConfig.get().overrides.task))
        write_record(record, path)
        write_text(markdown(record), path.with_name("table.md"))
        if record["inners"]:
            stderr.print(terminal(record))
        stderr.print(
            sentence(record), f"table: {path.with_name('table.md')}", sep="\n", soft_wrap=True, highlight=False
        )


if __name__ == "__main__":
    run_command(main, CONF)
