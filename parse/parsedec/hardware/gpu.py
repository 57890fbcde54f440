"""All measurements on one GPU, in one process and a given time: passes against their floors, and the replay.

Each model is made once and serves all stages. Everything is compiled and captured in `prepare`, while the CUDA tests
run, and nothing is timed before both are done. Whatever a stage measures goes into the record at once.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from torch._dynamo.exc import TorchDynamoException

from parsedec.errors import ConfigError, ParsedecError, first_line
from parsedec.experiment.build import build_model, build_target, plain
from parsedec.experiment.job import run_comparison
from parsedec.experiment.nodes import draft_node
from parsedec.experiment.record import SCHEMA_VERSION, provenance, read_record, write_record, write_text
from parsedec.hardware import claims, floors
from parsedec.hardware.cuda_tests import CudaTests
from parsedec.hardware.floors import Device, JudgeSize, Pass, judge_passes, step_passes
from parsedec.hardware.stages import Clock, Stage, run_stages
from parsedec.models.language_model import LanguageModel
from parsedec.sessions.backends import runs_static
from parsedec.static.graphs import Graphs
from parsedec.static.session import machine_of

log = logging.getLogger(__name__)

Json = dict[str, Any]
CONFIG = "gpu"
LEVELS = ("outer", "inner", "inner@draft.inner")


class Measurement:
    """The stages of one command, and what they have found so far.

    overrides  the command's, with which the arms' configurations are composed
    root       the folder of the checkout, where the tests are
    """

    def __init__(self, cfg: DictConfig, folder: Path, overrides: Sequence[str], clock: Clock, root: Path) -> None:
        self.cfg, self.folder, self.overrides, self.clock = cfg, folder, list(overrides), clock
        self.record: Json = {
            "schema_version": SCHEMA_VERSION,
            "kind": "gpu",
            "title": cfg.title,
            "config": plain(cfg),
            "provenance": provenance(),
            "status": "running",
            "stages": [],
            "warnings": [],
            "left_out": {},
            "captured_late": {},  # graphs that `prepare` missed, by run: their requests took longer
            "floors": {"devices": {}, "rows": []},
        }
        self.stages = self._stages()  # bad ones are refused before anything is started
        paths = list(cfg.tests.paths) if "tests" in cfg.stages else []
        self.tests = CudaTests(root, paths, cfg.tests.seconds, folder / "tests.txt")

    def run(self) -> Json:
        """Run all stages. Whatever ends the run, the record is complete and the table is written."""
        try:
            with _warnings_in(self.record["warnings"]):
                run_stages(self.stages, self.clock, self._save)
            self.record["status"] = "finished"
        except KeyboardInterrupt:
            self.record["status"] = "interrupted"
            raise
        finally:
            self.tests.end()
            self._save(self.record["stages"])
        return self.record

    def _stages(self) -> list[Stage]:
        """The stages that the configuration has, in its order."""
        calls: dict[str, Callable[[], None]] = {
            "prepare": self._prepare,
            "tests": self._tests,
            "target": self._target,
            "draft": self._draft,
            "hf": self._hugging_face,
            "also": self._also,
            "replay": self._replay,
            "long": self._long,
            "kernels": self._kernels,
        }
        made = []
        for name, stage in self.cfg.stages.items():
            yields_to = list(stage.get("yields_to") or ())
            unknown = {str(name), *yields_to} - set(calls)
            if unknown:
                raise ConfigError(f"stages has {sorted(unknown)}; expected some of {list(calls)}.")
            there = tuple(later for later in yields_to if later in self.cfg.stages)
            made.append(Stage(name=str(name), seconds=stage.seconds, call=calls[str(name)], yields_to=there))
        return made

    def _save(self, stages: list[Json]) -> None:
        self.record["stages"] = stages
        write_record(self.record, self.folder / "record.json")
        write_text(claims.markdown(self.record), self.folder / "table.md")

    # The stages

    def _prepare(self) -> None:
        """Make both models, and run everything once that compiles or captures a step that is timed later.

        If a compiler fails, that costs speed, not the measurement: all goes on without it, and the record says so. Any
        other failure of an arm leaves out the arms of the replay that are made of the same parts.
        """
        for name in self.cfg.prepare:
            try:
                self._rehearse(name)
            except Exception as error:
                if name == self.cfg.baseline:
                    raise  # nothing can be compared without it
                log.exception("the arm %s is left out of the replay, with those made of the same parts", name)
                self.record["left_out"][name] = f"{type(error).__name__}: {first_line(error)}"
        self._note_graphs()

    def _rehearse(self, name: str) -> None:
        """One request of an arm, again without torch.compile if that may be what fails."""
        changes = ("task.n=1", "warmup=0")
        try:
            self._compare(f"prepare/{name}", [name], *changes)
        except ParsedecError:
            raise
        except Exception as error:
            first = name == self.cfg.baseline and self.cfg.runtime.compiled
            if "uncompiled" in self.record or not (first or isinstance(error, TorchDynamoException)):
                raise
            log.warning("goes on without torch.compile: %s: %s", type(error).__name__, error)
            torch.compiler.set_stance("force_eager")
            self.record["uncompiled"] = f"{type(error).__name__}: {first_line(error)}"
            self._compare(f"prepare/{name}_uncompiled", [name], *changes)

    def _tests(self) -> None:
        self.record["tests"] = self.tests.result(self.clock.left())

    def _target(self) -> None:
        """The judge pass, also by the kernel for longer texts, unless a test has failed: a kernel that reads memory it
        must not read ends the process."""
        model, size = build_target(self.cfg), JudgeSize.of("judge_pass", self.cfg.judge_pass)
        kernels = ["auto", "cascade"] if (self.record.get("tests") or {}).get("passed") else ["auto"]
        self._time(model, step_passes(model, self.cfg.context, self.cfg.nodes))
        self._time(model, judge_passes(model, self.cfg.context, [size], kernels))

    def _draft(self) -> None:
        model = self._draft_model()
        self._time(model, step_passes(model, self.cfg.context, self.cfg.nodes))

    def _also(self) -> None:
        """A decode step of one more shape, whose model is made for this alone."""
        model = instantiate(self.cfg.target, source=self.cfg.also)
        self._time(model, step_passes(model, self.cfg.context, None))
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _hugging_face(self) -> None:
        """Hugging Face's own loop. It takes several times as long per token as all others: a few tokens are enough."""
        hf = self.cfg.hf
        changes = (f"max_new_tokens={hf.max_new_tokens}", "task.n=1", "warmup=0")
        self._compare("hf", [self.cfg.baseline, hf.arm], *changes)

    def _replay(self) -> None:
        failed = [self._parts_of(name) for name in self.record["left_out"]]
        arms = [
            str(name) for name in self.cfg.arms
            if name != self.cfg.hf.arm and not any(parts <= self._parts_of(str(name)) for parts in failed)
        ]  # fmt: skip
        self._compare("replay", arms, "warmup=0")  # `prepare` was that

    def _parts_of(self, name: str) -> set[str]:
        """The levels that an arm is made of; a level that is `none` is not a part."""
        arm = self.cfg.arms[name]
        made = {setting for setting in arm.overrides if setting.split("=")[0] in LEVELS} - {"outer=none"}
        return made or {f"model={arm.get('model', 'target')}"}

    def _long(self) -> None:
        """A long judge pass, once, to see whether it fits while the draft model is in memory, too."""
        self._draft_model()
        model, size = build_target(self.cfg), JudgeSize.of("long_pass", self.cfg.long_pass)
        self._time(model, judge_passes(model, self.cfg.context, [size], ["auto"]), repeats=1, warm_ups=0)

    def _kernels(self) -> None:
        """For comparison: the judge pass by every other kernel."""
        model, size = build_target(self.cfg), JudgeSize.of("judge_pass", self.cfg.judge_pass)
        self._time(model, judge_passes(model, self.cfg.context, [size], list(self.cfg.kernels)))

    # What they have in common

    def _draft_model(self) -> LanguageModel:
        node = draft_node(self.cfg)
        if node is None:
            raise ConfigError("draft=none, but a replay needs a draft model. Choose one, e.g. draft=replay.")
        return build_model(node)

    def _time(
        self, model: LanguageModel, found: Iterable[Pass], repeats: int | None = None, warm_ups: int = floors.WARM_UPS
    ) -> None:
        """Time passes. Each row goes into the record at once."""
        self.tests.end()  # whatever became of their stage, nothing is timed while they run
        devices, n = self.record["floors"]["devices"], repeats or self.cfg.repeats
        device = Device.measured(model.device, model.dtype, max(2, n))
        devices[model.name] = asdict(device)
        for row in floors.timed(model, device, found, n, warm_ups):
            self.record["floors"]["rows"].append(row)
            self._save(self.record["stages"])

    def _compare(self, name: str, arms: Sequence[str], *changes: str) -> None:
        """Run some of the arms, alternating, with a record of their own in the folder `name`. What runs in RUNS have
        answered is also put into this record, however they end."""
        if name in claims.RUNS:
            self.tests.end()
        overrides, folder = [*self.overrides, *changes], self.folder / name
        own = compose(CONFIG, overrides=overrides)
        with open_dict(own):
            own.arms = {arm: own.arms[arm] for arm in arms}
        captures = Graphs.total
        try:
            run_comparison(own, folder, CONFIG, overrides)
        finally:
            if name in claims.RUNS and (folder / "record.json").exists():
                self.record[name] = claims.slim(read_record(folder / "record.json"))
                self.record["captured_late"][name] = Graphs.total - captures

    def _note_graphs(self) -> None:
        """Note how many steps were captured: few or none, if captures failed, of which the log warns."""
        for model in (build_target(self.cfg), self._draft_model()):
            steps = machine_of(model).steps[model.compiled] if runs_static(model) else None
            self.record.setdefault("captured", {})[model.name] = None if steps is None else steps.captures


@contextmanager
def _warnings_in(found: list[str]) -> Iterator[None]:
    """Keep all warnings of the log in `found`, too: with a fallback that nobody notices, figures are not understood."""

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.name}: {record.getMessage()}")

    handler = Keeping(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
