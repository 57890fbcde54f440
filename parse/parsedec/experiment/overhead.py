"""What the engine costs: against `model.generate` without speculation, and per verified tree with every speculator.

A clock is switched whenever a request enters or leaves code that belongs to somebody else. What networks do counts as
theirs, whatever they call in turn; the rest is overhead:

    prefill      the target reads the prompt
    target       every other forward of the target
    drafter      networks of the speculator: a draft model, a head, the parts of the target it borrows
    speculator   start, propose, commit ... without those networks      | overhead
    engine       everything else                                        |

On CUDA the clock waits for the device at every switch, so work that would go on side by side is counted in turn.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from parsedec.engine import Parse
from parsedec.errors import ConfigError
from parsedec.experiment.summary import resampled
from parsedec.experiment.table import document, grid, origin, printed, tier
from parsedec.models.language_model import LanguageModel

PARTS = ("prefill", "target", "drafter", "speculator", "engine")
NETWORKS = PARTS[:3]
PROTOCOL = ("start", "propose", "commit", "rewind", "note_refused")
HEADS = (
    "inner",
    "steps",
    "ms a step",
    "target",
    "drafter",
    "speculator",
    "engine",
    "overhead",
    "of a plain step",
    "of its own",
)

Row = dict[str, Any]  # of one request, as it is stored


class Stopwatch:
    """Seconds by part of a request, from `start` to `stop`; together they are its wall-clock time."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._now = _finished if device.type == "cuda" else perf_counter
        self._part, self._since = "engine", 0.0

    def start(self) -> None:
        self._since = self._now()

    def stop(self) -> None:
        self._switch("engine")

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`call`, its time counted for `part` - unless a network is at work already."""

        @wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            outside = self._part
            if outside in NETWORKS:
                return call(*args, **kwargs)
            self._switch(part if part != "target" else self._claim())
            try:
                return call(*args, **kwargs)
            finally:
                self._switch(outside)

        return counted

    def _claim(self) -> str:
        """Whose a forward of the target is."""
        if self._part == "speculator":  # one that drafts with the target itself
            return "drafter"
        return "target" if self.seconds["prefill"] else "prefill"

    def _switch(self, part: str) -> None:
        now = self._now()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now


def _finished() -> float:
    """The time once the device has done what it was given."""
    torch.cuda.synchronize()
    return perf_counter()


@contextmanager
def watching(engine: Parse) -> Iterator[Stopwatch]:
    """A running stopwatch around the engine's networks and speculator; both are as before afterwards."""
    watch = Stopwatch(engine.target.device)
    with ExitStack() as stack:
        for owner, name, part in _calls(engine):
            before = vars(owner).get(name)  # hooks of other packages stand there, too
            object.__setattr__(owner, name, watch.timed(getattr(owner, name), part))  # frozen dataclasses among them
            undo = partial(object.__delattr__, owner, name)
            stack.callback(undo if before is None else partial(object.__setattr__, owner, name, before))
        watch.start()
        try:
            yield watch
        finally:
            watch.stop()


def _calls(engine: Parse) -> list[tuple[Any, str, str]]:
    """(owner, method, part) of every call to be timed, once each."""
    hf = engine.target.hf
    borrowed = [module for module in (hf.get_input_embeddings(), hf.get_output_embeddings()) if module is not None]
    calls = [(hf, "forward", "target"), *((module, "forward", "drafter") for module in borrowed)]
    calls += [(engine.inner, name, "speculator") for name in PROTOCOL if hasattr(engine.inner, name)]
    calls += [(owner, name, "drafter") for owner, name in _networks(engine.inner)]
    return list({(id(owner), name): (owner, name, part) for owner, name, part in reversed(calls)}.values())


def _networks(held: object) -> Iterator[tuple[nn.Module, str]]:
    """Networks a speculator holds, in its fields or theirs: the forward of a model, all methods of a smaller module."""
    if isinstance(held, PreTrainedModel):
        yield held, "forward"
    elif isinstance(held, nn.Module):
        for kind in type(held).__mro__[: type(held).__mro__.index(nn.Module)]:
            for name, value in vars(kind).items():
                if inspect.isfunction(value) and not name.startswith("_"):
                    yield held, name
    elif isinstance(held, LanguageModel):
        yield from _networks(held.hf)
    elif dataclasses.is_dataclass(held) and not isinstance(held, type):
        for field in dataclasses.fields(held):
            yield from _networks(getattr(held, field.name))


def measure_steps(
    engines: Mapping[str, Parse],
    prompts: Mapping[str, Sequence[int]],
    *,
    max_new_tokens: int,
    repeats: int,
    after_each: Callable[[str], None],
) -> dict[str, list[Row]]:
    """A row for every engine and prompt: the fastest of `repeats` runs, so that other load matters less.

    The engines alternate, their order rotating. Each answers the first prompt once before that, uncounted. `equal`:
    the first engine wrote the same tokens.
    """
    names = list(engines)
    for name in names:
        time_request(engines[name], next(iter(prompts.values())), max_new_tokens)
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for at, (problem, ids) in enumerate(prompts.items()):
        runs: dict[str, list[Row]] = {name: [] for name in names}
        for turn in range(repeats * len(names)):
            name = names[(turn + at + turn // len(names)) % len(names)]
            runs[name].append(time_request(engines[name], ids, max_new_tokens))
        reference = runs[names[0]][0]["tokens"]
        for name in names:
            best = min(runs[name], key=lambda row: float(row["wall_s"]))
            equal = all(row["tokens"] == reference for row in runs[name])
            rows[name].append({"id": problem, **best, "tokens": len(best["tokens"]), "equal": equal})
        after_each(problem)
    return rows


def time_request(engine: Parse, ids: Sequence[int], max_new_tokens: int) -> Row:
    """Tokens, verified trees and seconds of one greedy answer."""
    with watching(engine) as watch:
        result = engine.generate(list(ids), max_new_tokens=max_new_tokens)
    seconds = {f"{part}_s": watch.seconds[part] for part in PARTS}
    return {"tokens": result.tokens, "steps": result.counters.inner_steps, "wall_s": sum(seconds.values()), **seconds}


def summarise_steps(rows: Mapping[str, Sequence[Row]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Seconds per verified tree of every engine, and its overhead as a share of a target step, with 95 % bootstrap
    intervals over problems. A plain step is the target's forward in the first engine, which guesses nothing; its own
    step, the forward that verified the tree."""
    columns = ("steps", "target_s", "drafter_s", "speculator_s", "engine_s")
    facts = {name: np.array([[row[key] for key in columns] for row in of]) for name, of in rows.items()}  # [n, 5]
    first = next(iter(facts.values()))
    if any(fact[:, 0].sum() == 0 for fact in facts.values()):
        raise ConfigError("no tree was verified; overhead per step needs longer answers. Raise max_new_tokens.")
    draws = resampled(len(first), seed)
    unit, units = _per_step(first.sum(0))[0], _per_step(first[draws].sum(1))[..., 0]
    summary = {}
    for name, fact in facts.items():
        a_step, sampled = _per_step(fact.sum(0)), _per_step(fact[draws].sum(1))  # [4], [resamples, 4]
        overhead, overheads = a_step[2:].sum(), sampled[:, 2:].sum(-1)
        summary[name] = {
            "problems": len(fact),
            "steps": int(fact[:, 0].sum()),
            "equal": all(row["equal"] for row in rows[name]),
            "step_s": float(a_step.sum()),
            **{key: float(value) for key, value in zip(columns[1:], a_step, strict=True)},
            **_with_interval("overhead_s", overhead, overheads),
            **_with_interval("overhead_share", overhead / unit, overheads / units),
            **_with_interval("own_share", overhead / a_step[0], overheads / sampled[:, 0]),
        }
    return summary


def _per_step(sums: np.ndarray) -> np.ndarray:
    """[..., 5] -> [..., 4]: seconds of the parts per step."""
    return np.asarray(sums[..., 1:] / np.maximum(sums[..., :1], 1))


def _with_interval(name: str, value: float, samples: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


def measure_generate(
    engine: Parse,
    prompts: Mapping[str, Sequence[int]],
    *,
    max_new_tokens: int,
    repeats: int,
    after_each: Callable[[str], None],
) -> list[Row]:
    """Seconds of `model.generate` and of an engine without speculation for every prompt: the least of `repeats`
    alternating runs each."""
    hf, rows = engine.target.hf, []
    for problem, ids in prompts.items():
        inputs = torch.tensor([ids], device=engine.target.device)
        mask = torch.ones_like(inputs)
        theirs, ours = [], []
        for _ in range(repeats):
            start = perf_counter()
            with torch.inference_mode():
                written = hf.generate(inputs, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
            reference = written[0, len(ids) :].tolist()
            theirs.append(perf_counter() - start)
            start = perf_counter()
            tokens = list(engine.generate(list(ids), max_new_tokens=max_new_tokens).tokens)
            ours.append(perf_counter() - start)
        seconds = {"generate_s": min(theirs), "engine_s": min(ours)}
        rows.append({"id": problem, "tokens": len(tokens), "equal": tokens == reference, **seconds})
        after_each(problem)
    return rows


def summarise_generate(rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Ratio of seconds, engine over generate (both wrote the same tokens), with a 95 % bootstrap interval."""
    seconds = np.array([[row["engine_s"], row["generate_s"]] for row in rows])  # [n, 2]
    draws = resampled(len(rows), seed)
    sums, total = seconds[draws].sum(1), seconds.sum(0)  # [resamples, 2], [2]
    return {
        "problems": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "equal": all(row["equal"] for row in rows),
        **_with_interval("ratio", total[0] / total[1], sums[:, 0] / sums[:, 1]),
    }


def sentence(record: dict[str, Any]) -> str:
    """Engine against generate."""
    made = record["summary"]
    return (
        f"Engine over generate, seconds per token, no speculation: {made['ratio']:.3f} [{made['ratio_low']:.3f}, "
        f"{made['ratio_high']:.3f}], {made['tokens']} tokens, same tokens: {'yes' if made['equal'] else 'no'}."
    )


def caption(record: dict[str, Any]) -> str:
    config = record["config"]
    return (
        f"Milliseconds per verified tree without prefill, the fastest of {config['repeats']} alternating runs of each "
        "problem. Overhead: speculator and engine outside networks, absolute, as a share of the target's forward in a "
        f"step without speculation, and of the one in the same step. Tier: {tier(record)}. "
        f"n = {record['summary']['problems']}, at most {config['max_new_tokens']} new tokens; 95 % bootstrap "
        f"intervals over problems. {origin(record)}"
    )


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    """Cells of the table, a list per inner speculator; marked where it wrote other tokens."""
    return [
        [
            inner["name"] + ("" if inner["summary"]["equal"] else " (other tokens)"),
            str(inner["summary"]["steps"]),
            *(f"{1000 * inner['summary'][f'{part}_s']:.2f}" for part in ("step", *PARTS[1:])),
            _cell(inner["summary"], "overhead_s", 1000, 2, ""),
            _cell(inner["summary"], "overhead_share", 100, 1, " %"),
            _cell(inner["summary"], "own_share", 100, 1, " %"),
        ]
        for inner in record["inners"]
    ]


def _cell(summary: dict[str, Any], name: str, scale: float, digits: int, unit: str) -> str:
    value, low, high = (scale * summary[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def terminal(record: dict[str, Any]) -> Table:
    return printed(record["title"], HEADS, rows_of(record), caption(record))


def markdown(record: dict[str, Any]) -> str:
    """The same with the command that made it, to be committed beside the record."""
    table = [grid(HEADS, rows_of(record))] if record["inners"] else []
    return document(record, sentence(record), *table, caption(record))
