"""One run from configuration to record, shared by `run.py` (one arm), and `compare.py` and `replay.py` (several)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig

from parsedec.errors import ConfigError, ParsedecError, first_line, require_texts
from parsedec.experiment.analysis import engine_facts, measure_entropy
from parsedec.experiment.build import apply_runtime, build_draft_alone, build_engine, build_sampling, plain
from parsedec.experiment.claim import released_on_error
from parsedec.experiment.cli import progress
from parsedec.experiment.growing import GrowingRecord
from parsedec.experiment.nodes import draft_node, name_of, target_node
from parsedec.experiment.problems import digest, digests, read_now, refuse_other_problems
from parsedec.experiment.record import SCHEMA_VERSION, earlier_record, overrides_of_job, provenance
from parsedec.experiment.runner import Arm, Settings, run_arms
from parsedec.experiment.summary import comparison, summarise
from parsedec.experiment.trace import write_trace
from parsedec.models.ranks import leading
from parsedec.remote.model import RemoteModel
from parsedec.tasks.base import Problem, first_turn
from parsedec.types import Limits

log = logging.getLogger(__name__)


def run_job(
    cfg: DictConfig, folder: Path, make_arms: Callable[[], Sequence[Arm]], baseline: str | None = None
) -> dict[str, Any]:
    """Run (or finish) a configuration in `folder`. The record is saved every few seconds, and whatever ends the run.

    Of several processes that share a target (`ranks`), the first one writes; all resume from what it wrote. If a
    resumed run is finished, with the same configuration and problems, its record is returned and no model is loaded.

    Raises OutputExistsError, before a model is loaded, if the folder holds a record and this does not resume it, or if
    that has answers to problems that have changed or are no longer asked. KeyboardInterrupt passes through, after the
    record says `interrupted`.
    """
    with released_on_error(folder / "record.json"):
        return _run_job(cfg, folder, make_arms, baseline)


def _run_job(
    cfg: DictConfig, folder: Path, make_arms: Callable[[], Sequence[Arm]], baseline: str | None
) -> dict[str, Any]:
    earlier = earlier_record(folder / "record.json", plain(cfg), cfg.resume, free=["task.n", "baseline"])
    if earlier and _complete(earlier, plain(cfg)) and _as_asked(earlier, cfg, folder / "record.json"):
        log.info("%s is finished already, with the same configuration: skipped", folder / "record.json")
        return earlier
    settings = _settings(cfg)
    task = instantiate(cfg.task)
    problems = task.problems()
    if earlier:
        _check_asked(earlier, problems, folder / "record.json")
    arms = make_arms()
    if earlier:
        _take_over(arms, earlier)
    run = _Run(_head(cfg, arms, problems, earlier), folder / "record.json", arms, baseline, settings.batch)
    with run.saved_at_end():
        with progress(_left(arms, problems, settings)) as step:

            def after_each(name: str) -> None:
                step(name)
                run.tick()

            run_arms(arms, task, problems, settings, after_each)
        if first := next((arm for arm in arms if arm.name == baseline), None):
            run.head["entropy"] = _entropy(first, settings)
    return run.record


class _Run(GrowingRecord):
    """The requests that the arms have answered; at the end also a comparison of the arms, and the trace page."""

    def __init__(self, head: dict[str, Any], path: Path, arms: Sequence[Arm], baseline: str | None, batch: int) -> None:
        super().__init__(head, path)
        self._arms, self._baseline, self._batch = arms, baseline, batch
        self._models = {arm.name: engine_facts(arm.engine) for arm in arms}

    def done(self) -> str:
        return f"{sum(len(arm.requests) for arm in self._arms)} finished requests"

    def contents(self, status: str) -> dict[str, Any]:
        listed = [
            {
                "name": arm.name,
                "description": arm.description,
                "models": self._models[arm.name],
                "summary": summarise(arm.requests, batch=self._batch),
                "requests": arm.requests,
            }
            for arm in self._arms
        ]
        results: dict[str, Any] = {"arms": listed}
        if len(listed) == 1:
            results["summary"] = listed[0]["summary"]
        requests = {arm.name: arm.requests for arm in self._arms}
        if self._baseline in requests and status != "running":  # comparing takes time: not between timed requests
            results |= {"baseline": self._baseline, "comparison": comparison(requests, self._baseline)}
        return results

    def save(self, status: str) -> None:
        super().save(status)
        if status != "running" and leading():
            write_trace(self.record, self.path.with_name("trace.html"))


def run_comparison(cfg: DictConfig, folder: Path, config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run (or finish) the arms of `cfg.arms`. Each is the configuration `config` with the command's overrides, then its
    own; they are built when they are needed. Hydra must be initialised."""
    apply_runtime(cfg)
    for name, arm in cfg.arms.items():
        if not isinstance(arm, DictConfig) or "overrides" not in arm:
            raise ConfigError(
                f"arms.{name}={arm!r}; expected overrides=[…], and model=draft for the draft model alone."
            )
        require_texts(f"arms.{name}.overrides", arm.overrides)
    if cfg.baseline is not None and cfg.baseline not in cfg.arms and len(cfg.arms) > 1:
        raise ConfigError(
            f"baseline={cfg.baseline}; expected one of the arms, {', '.join(map(str, cfg.arms))}, or null to compare "
            "nothing."
        )

    def make_arms() -> list[Arm]:
        arms = []
        for name, arm in cfg.arms.items():
            own = compose(config, overrides=[*overrides, *arm.overrides])
            build = build_draft_alone if arm.get("model") == "draft" else build_engine
            arms.append(Arm(str(name), build(own), " ".join(arm.overrides)))
        return arms

    return run_job(cfg, folder, make_arms, baseline=cfg.baseline)


def refuse_nothing_answered(record: Mapping[str, Any]) -> None:
    """Raise ParsedecError if a run has answered nothing, so that a script does not go on."""
    if all(arm["summary"]["errors"] == arm["summary"]["requests"] for arm in record["arms"]):
        said = next(
            (str(request["error"]) for arm in record["arms"] for request in arm["requests"]), "that none was asked"
        )
        raise ParsedecError(
            f"no request could be answered; the first one's error is {first_line(said)}. The record has those of all."
        )


def _entropy(arm: Arm, settings: Settings) -> dict[str, Any] | None:
    """`measure_entropy`; None if it fails, which is no reason to fail a run that has answered all its requests."""
    try:
        return measure_entropy(arm.engine, arm.requests, settings.sampling)
    except (RuntimeError, ParsedecError) as error:  # RuntimeError: also what torch raises where memory is short
        log.warning(
            "the target's entropy was not measured, so the record has none: %s: %s", type(error).__name__, error
        )
        return None


def _complete(record: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a run has nothing left to do. Requests that failed are tried again."""
    before = record["config"]
    as_many = before["task"].get("n") == config["task"].get("n") and before.get("baseline") == config.get("baseline")
    failed = any(request["error"] for arm in record["arms"] for request in arm["requests"])
    return as_many and record["status"] == "finished" and not failed


def _as_asked(earlier: dict[str, Any], cfg: DictConfig, path: Path) -> bool:
    """Whether a finished run has answered all that is asked now: the file of a task may have grown."""
    problems = read_now(path, lambda: list[Problem](instantiate(cfg.task).problems()))
    if problems is None:
        return True
    _check_asked(earlier, problems, path)
    answered = {request["id"] for arm in earlier["arms"] for request in arm["requests"]}
    return {problem.id for problem in problems} <= answered


def _check_asked(earlier: dict[str, Any], problems: Sequence[Problem], path: Path) -> None:
    """Raise OutputExistsError unless all finished requests are answers to `problems`."""
    asked = {problem.id: problem for problem in problems}
    finished = [request for arm in earlier["arms"] for request in arm["requests"] if not request["error"]]
    # an id may look like that of a later turn, and yet be a problem's own
    answered = {one["id"] if one["id"] in asked else first_turn(one["id"]) for one in finished}
    known, now = earlier.get("problems"), digests(asked)
    if known is None:  # an earlier version's record: requests tell what was asked, but not all that a scorer read
        known = {one["id"]: digest(one["prompt"], one["reference"]) for one in finished}
        now = {name: digest(one.prompt, one.reference) for name, one in asked.items()}
    refuse_other_problems(path, known, now, answered)


def _head(
    cfg: DictConfig, arms: Sequence[Arm], problems: Sequence[Problem], earlier: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "title": cfg.title or _title(cfg),
        "config": plain(cfg),
        "overrides": overrides_of_job(),
        "provenance": provenance() | _servers(arms),
        "resumed_from": earlier["provenance"] if earlier else None,
        "problems": digests({problem.id: problem for problem in problems}),
    }


def _take_over(arms: Sequence[Arm], earlier: dict[str, Any]) -> None:
    """The finished requests of an earlier run, each to the arm that answered it."""
    answered = {arm["name"]: arm["requests"] for arm in earlier["arms"]}
    for arm in arms:
        arm.requests = [request for request in answered[arm.name] if not request["error"]]


def _left(arms: Sequence[Arm], problems: Sequence[Problem], settings: Settings) -> int:
    """How many requests are still to be answered; every turn of a conversation is one."""
    turns = len(settings.all_seeds) * sum(1 + len(problem.follow_ups) for problem in problems)
    return sum(turns - len(arm.requests) for arm in arms)


def _servers(arms: Sequence[Arm]) -> dict[str, Any]:
    """The servers of the arms' models, and what they can do."""
    models = [model for arm in arms for model in (arm.engine.target, arm.engine.draft)]
    found = {model.name: model.provenance for model in models if isinstance(model, RemoteModel)}
    return {"servers": found} if found else {}


def _settings(cfg: DictConfig) -> Settings:
    limits = Limits(max_new_tokens=cfg.max_new_tokens, stop=cfg.stop)
    if isinstance(cfg.seeds, (int, str)):
        raise ConfigError(f"seeds={cfg.seeds}; expected a list: seeds=[{cfg.seeds}].")
    seeds = tuple(cfg.seeds or ())
    return Settings(
        limits=limits,
        sampling=build_sampling(cfg),
        seed=cfg.seed,
        seeds=seeds,
        warmup=cfg.warmup,
        batch=cfg.batch,
    )


def _title(cfg: DictConfig) -> str:
    draft_model = draft_node(cfg)
    names = [name_of(target_node(cfg)), name_of(draft_model) if draft_model is not None else "no draft model"]
    target, draft = (name.rsplit("/", 1)[-1].removesuffix(".gguf") for name in names)
    task = cfg.task.get("name") or str(cfg.task._target_).rsplit(".", 1)[-1]
    return f"{target} with {draft} on {task}"
