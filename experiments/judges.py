"""Judges side by side on the same drafts: quality and cost. The last line of stdout is the record's path.

python experiments/judges.py                                     the judges that need no training, on the zoo pair
python experiments/judges.py probes=DIR/probe task.n=500         and those that experiments/train_probe.py trained
python experiments/judges.py target=HUB_ID draft=HUB_ID task=gsm8k labelled_by=answers     by final answers alone
python experiments/judges.py target=HUB_ID draft=none steps.path=FILE.jsonl '~judges.confidence' '~judges.escalating'
python experiments/judges.py --help                              all groups and settings

Writes record.json, with the curve of every judge, and table.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: spinning ones are erratic

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from parsedec.experiment.cli import checked, run_command

CONF = Path(__file__).resolve().parents[1] / "conf"


def measure(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """The record's summary, and the scores it was made of."""
    from hydra import compose
    from hydra.utils import instantiate

    from parsedec.boundary import DEFAULT_THRESHOLD
    from parsedec.calibration.sources import Answers, Checker, Question
    from parsedec.errors import ConfigError
    from parsedec.experiment import judging
    from parsedec.experiment.build import build_model, build_target
    from parsedec.experiment.cli import progress
    from parsedec.experiment.nodes import check_local
    from parsedec.training.generation import prompts, write_answers
    from parsedec.training.prefixes import from_steps, from_task, with_logprobs

    check_local(cfg)
    sources = {"checker": Checker, "answers": Answers}
    if cfg.labelled_by not in sources:
        raise ConfigError(f"labelled_by={cfg.labelled_by!r}; expected one of {', '.join(sources)}.")
    chosen = {**cfg.judges, **(cfg.trained if cfg.probes is not None else {})}
    unknown = {part for parts in cfg.combinations.values() for part in parts} - set(chosen)
    if unknown:
        raise ConfigError(f"combinations name judges {sorted(unknown)}; this run has {sorted(chosen)}.")
    target = build_target(cfg)
    draft = build_model(cfg.draft.model) if cfg.draft.model is not None else None
    judges = {
        str(name): instantiate(compose("judges", overrides=[*overrides, *own]).judge).bind(target)
        for name, own in chosen.items()
    }
    if cfg.steps.path is not None:
        marked = from_steps(target, draft, cfg.steps.path, cfg.steps.n, cfg.steps.shuffle)
    elif draft is None:
        raise ConfigError("draft=none, and no step-labelled file is given; set draft, or steps.path to a file.")
    else:
        task = instantiate(cfg.task)
        problems = task.problems()
        written = write_answers(draft, prompts(draft, problems), max_new_tokens=cfg.max_new_tokens, batch=cfg.batch)
        questions = [Question("check", problem, task) for problem in problems]
        source, pool = sources[cfg.labelled_by](task=task, fit={}), [[answer] for answer in written]
        marked = from_task(target, draft, source, questions, pool, instantiate(cfg.segmenter))
    if not judges or not marked:
        raise ConfigError(f"{len(judges)} judges and {len(marked)} drafts; expected some of both.")
    if draft is not None and any(judge.needs.draft_logprobs for judge in judges.values()):
        marked = with_logprobs(marked, draft)
    if cfg.combinations:
        judging.divided(marked)  # what would stop them is said before the long part
    with progress(len(marked)) as step:
        said, steps = judging.measure(target, judges, marked, step)
    for name, parts in cfg.combinations.items():
        said[str(name)] = judging.cross_fitted([said[part] for part in parts], marked)
    card = next(iter(judges.values())).card
    threshold = card.threshold if card else DEFAULT_THRESHOLD
    summary = judging.summarise(said, steps, marked, kept_share=cfg.kept_share, threshold=threshold, seed=cfg.seed)
    scores = {name: verdicts.scores for name, verdicts in said.items()}
    drafts = [
        {"problem": one.problem, "cuts": one.cuts, "right": one.right, "ended": one.draft.ended} for one in marked
    ]
    summary["labels"] = "steps" if cfg.steps.path is not None else cfg.labelled_by
    return {"summary": summary, "drafts": drafts, "scores": scores}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="judges")
@checked
def main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from parsedec.experiment.build import apply_runtime, plain
    from parsedec.experiment.cli import announced, stderr
    from parsedec.experiment.judging import cells, heads, markdown, note
    from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, provenance, to_json, write_record, write_text
    from parsedec.experiment.table import printed

    path = Path(HydraConfig.get().runtime.output_dir) / "record.json"
    config = plain(cfg)
    earlier_record(path, config, resume=None)
    apply_runtime(cfg)
    head = {
        "schema_version": SCHEMA_VERSION,
        "title": "Judges side by side",
        "config": config,
        "provenance": provenance(),
    }
    with announced(path):
        record = to_json(head | measure(cfg, list(HydraConfig.get().overrides.task)))
        write_record(record, path)
        write_text(markdown(record), path.with_name("table.md"))
        stderr.print(printed(record["title"], heads(record), cells(record), note(record)))
        stderr.print(f"table: {path.with_name('table.md')}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, CONF)
