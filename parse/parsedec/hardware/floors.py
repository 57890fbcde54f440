"""Decode step, tree of guesses and judge pass of one model, against the least time they can take on this device.

    bytes    every weight is read once per pass:     weight bytes / copy bandwidth
    matrix   every weight is used once per row:      2 x weights x rows / rate of a matrix product

A pass takes at least the larger of the two. Bandwidth and rate are measured in the same run. The embedding table does
not count, as a pass reads only its rows' entries, unless it is also the output matrix; nor does attention.

Shapes: R rows of a pass, N draft rows, K probes, S rows a probe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, Self

import torch
from rich.table import Table

from parsedec.errors import ConfigError
from parsedec.experiment import table
from parsedec.experiment.plot import Bar, draw_bars
from parsedec.inner import Decoder, NoSpeculation
from parsedec.meter import Tally
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.sessions.backends import open_session
from parsedec.sessions.reference import random_tokens
from parsedec.sessions.session import Session
from parsedec.types import Sampling, Tree

log = logging.getLogger(__name__)

WARM_UPS = 2  # passes before those that count, in which graphs are captured and buckets compiled
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes: more than any cache holds
SIDE = {"cpu": 1024, "cuda": 8192}  # size of the square matrices whose product is timed
GIB = 1 << 30
HEADS = ("shape", "pass", "rows", "ms", "of its decode step", "floor ms", "bound by", "share of floor", "peak GiB")

TOKENS = 16  # written one after another to time a decode step: what the host does between two is a part of it

Row = dict[str, Any]  # of one pass, as it is stored


class Pass(NamedTuple):
    """A pass to be timed. `rows`: its rows; `run`: makes `times` passes, one after another (`passes`)."""

    name: str
    rows: int
    run: Callable[[], Session]
    times: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSize:
    """N draft rows and K probes of S rows."""

    draft: int
    probes: int
    suffix: int

    @classmethod
    def of(cls, name: str, sizes: Mapping[Any, Any]) -> Self:
        """Those of the setting `name`."""
        names = [field.name for field in fields(cls)]
        if set(sizes) != set(names):
            raise ConfigError(f"{name} has {', '.join(map(str, sizes)) or 'nothing'}; expected {', '.join(names)}.")
        return cls(**sizes)

    def __post_init__(self) -> None:
        if not 1 <= self.probes <= self.draft or self.suffix < 1:
            raise ConfigError(
                f"a judge pass of draft={self.draft}, probes={self.probes}, suffix={self.suffix}; expected 1 <= probes "
                "<= draft and suffix >= 1."
            )

    @property
    def rows(self) -> int:
        return self.draft + self.probes * self.suffix

    @property
    def name(self) -> str:
        return f"judge {self.draft} + {self.probes} x {self.suffix}"


@dataclass(frozen=True, slots=True)
class Device:
    """What the device can do: bytes per second of a copy, counting those read and those written, and FLOP/s."""

    bandwidth: float
    rate: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, repeats: int) -> Device:
        count, side = COPIED[device.type], SIDE[device.type]
        source = torch.zeros(count, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        a = torch.randn(side, side, device=device).to(dtype)
        copying = least_seconds(lambda: target.copy_(source), device, repeats)
        return cls(2 * count / copying, 2 * side**3 / least_seconds(lambda: a @ a, device, repeats))

    def floor(self, weights: int, width: int, rows: int) -> tuple[float, str]:
        """The least seconds that a pass takes, and what bounds it. weights: how many; width: bytes of each."""
        by_bytes, by_matrix = weights * width / self.bandwidth, 2 * weights * rows / self.rate
        return (by_matrix, "matrix") if by_matrix > by_bytes else (by_bytes, "bytes")


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def least_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(WARM_UPS):
        call()
    return min(seconds_of(call, device) for _ in range(repeats))


def weights_of(model: LanguageModel) -> int:
    """How many weights a pass reads: all but the embedding table, unless that is also the output matrix."""
    hf = model.hf
    table_ = hf.get_input_embeddings().weight
    tied = table_.data_ptr() == hf.get_output_embeddings().weight.data_ptr()
    return sum(int(p.numel()) for p in hf.parameters()) - (0 if tied else int(table_.numel()))


def wide_tree(root: int, guesses: Sequence[int]) -> Tree:
    """A tree as EAGLE grows it: half the guesses in a chain, the others as siblings along it."""
    tokens, parents, spine = [root], [-1], 0
    for i, token in enumerate(guesses):
        tokens.append(token)
        parents.append(spine)
        if i % 2 == 0:
            spine = len(tokens) - 1
    return Tree(tuple(tokens), tuple(parents))


def passes(
    model: LanguageModel, context: int, nodes: int, sizes: Sequence[JudgeSize], kernels: Sequence[str]
) -> Iterator[Pass]:
    """Every pass behind `context` tokens. A run works on a fork and returns it, so that all have the same cache."""
    yield from step_passes(model, context, nodes)
    yield from judge_passes(model, context, sizes, kernels)


def step_passes(model: LanguageModel, context: int, nodes: int | None) -> Iterator[Pass]:
    """A decode step, and a tree of so many nodes unless there are none."""
    prompt, token = random_tokens(model, context, 0), random_tokens(model, 1, 1)[0]
    base = open_session(model)
    base.feed(prompt)

    def write() -> Session:
        session = base.fork()
        session.append(token)
        decoder = Decoder(model, NoSpeculation(), Sampler(Sampling()), Tally(), session=session)
        for left in range(TOKENS, 0, -1):
            decoder.step(left)
        return session

    yield Pass("decode", 1, write, TOKENS)
    if nodes is None:
        return
    tree = wide_tree(token, random_tokens(model, nodes - 1, 2))

    def verify() -> Session:
        session = base.fork()
        session.append(token)
        session.tree(tree)
        session.keep([0])
        return session

    yield Pass(tree_name(nodes), nodes, verify)


def tree_name(nodes: int) -> str:
    return f"tree of {nodes}"


def judge_passes(
    model: LanguageModel, context: int, sizes: Sequence[JudgeSize], kernels: Sequence[str]
) -> Iterator[Pass]:
    """A judge pass of every size with every kernel."""
    prompt = random_tokens(model, context, 0)
    for size in sizes:
        for kernel in kernels:
            own = open_session(replace(model, judge_kernel=kernel))
            own.feed(prompt)
            yield Pass(f"{size.name}, {kernel}", size.rows, judging(own, size))


def judging(base: Session, size: JudgeSize) -> Callable[[], Session]:
    """A judge pass of which nothing is kept."""
    draft, suffix = random_tokens(base.model, size.draft, 3), random_tokens(base.model, size.suffix, 4)
    cuts = [size.draft * (i + 1) // size.probes for i in range(size.probes)]

    def call() -> Session:
        session = base.fork()
        session.judge(draft, cuts, suffix)
        session.keep_draft(0)
        return session

    return call


def measure(
    model: LanguageModel,
    *,
    context: int,
    nodes: int,
    sizes: Sequence[JudgeSize],
    kernels: Sequence[str],
    repeats: int,
    after_each: Callable[[str], None],
) -> tuple[Device, list[Row]]:
    """The device, and a row for every pass of the model: seconds of each repeat, and the floor.

    A pass that cannot be run - too little memory, a kernel that cannot be compiled - has a row that says so.
    """
    device, rows = Device.measured(model.device, model.dtype, repeats), []
    for row in timed(model, device, passes(model, context, nodes, sizes, kernels), repeats):
        rows.append(row)
        after_each(f"{model.name} {row['pass']}")
    return device, rows


def timed(
    model: LanguageModel, device: Device, found: Iterable[Pass], repeats: int, warm_ups: int = WARM_UPS
) -> Iterator[Row]:
    """A row for every pass of the model: seconds of each repeat, and the floor on this device."""
    weights, width = weights_of(model), model.dtype.itemsize
    for one in found:
        floor, bound = device.floor(weights, width, one.rows)
        row = {"shape": model.name, "pass": one.name, "rows": one.rows, "floor_s": floor, "bound": bound}
        try:
            row |= _timed(one, model.device, repeats, warm_ups)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, the other passes are worth having
            log.warning("%s, %s was not measured: %s: %s", model.name, one.name, type(error).__name__, error)
            row |= {"seconds": [], "peak_bytes": None, "error": f"{type(error).__name__}: {error}"}
        yield row


def _timed(one: Pass, device: torch.device, repeats: int, warm_ups: int) -> Row:
    """Seconds a pass of each repeat, and the most memory they took."""
    began = perf_counter()
    for _ in range(warm_ups):
        one.run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [seconds_of(one.run, device) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    prepared = perf_counter() - began - sum(seconds)
    return {"seconds": [taken / one.times for taken in seconds], "peak_bytes": peak, "prepared_s": prepared}


def cells(record: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table, a list per pass; seconds are medians."""
    steps = {
        row["shape"]: median(row["seconds"]) for row in record["rows"] if row["pass"] == "decode" and row["seconds"]
    }
    return [_cells(row, steps.get(row["shape"])) for row in record["rows"]]


def _cells(row: Row, step: float | None) -> list[str]:
    middle = median(row["seconds"]) if row["seconds"] else None
    return [
        row["shape"].removeprefix("replay:"),
        row["pass"],
        str(row["rows"]),
        "failed" if middle is None else f"{1000 * middle:.2f}",
        "-" if middle is None or step is None else f"{middle / step:.2f}",
        f"{1000 * row['floor_s']:.2f}",
        row["bound"],
        "-" if middle is None else f"{100 * row['floor_s'] / middle:.0f} %",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.1f}",
    ]


def caption(record: Mapping[str, Any]) -> str:
    config, devices = record["config"], record["devices"]
    measured = "; ".join(
        f"{name.removeprefix('replay:')}: copies {d['bandwidth'] / 1e9:.0f} GB/s, matrix products "
        f"{d['rate'] / 1e12:.2f} TFLOP/s"
        for name, d in devices.items()
    )
    return (
        f"Random weights of real shapes, {config['target']['dtype']}, batch 1, {config['context']} tokens of context, "
        f"medians of {config['repeats']}; a decode step is one of {TOKENS} in a row. "
        f"Floor: weights read once at the bandwidth of a copy, or 2 x weights x rows "
        f"at the rate of a matrix product, whichever is longer; attention is left out of it. {measured}. "
        f"{table.origin(dict(record))}"
    )


def terminal(record: dict[str, Any]) -> Table:
    return table.printed(record["title"], HEADS, cells(record), caption(record))


def markdown(record: dict[str, Any]) -> str:
    """The same with the command that made it, to be committed beside the record."""
    return table.document(record, table.grid(HEADS, cells(record)), caption(record))


def draw(record: dict[str, Any], path: Path) -> None:
    """Milliseconds of every pass, with the range of its repeats, and its floor."""
    bars = []
    for row in record["rows"]:
        if not row["seconds"]:
            continue
        middle, low, high = (1000 * of(row["seconds"]) for of in (median, min, max))
        name = f"{row['shape'].removeprefix('replay:')}: {row['pass']}"
        bars.append(Bar(name, middle, low, high, 1000 * row["floor_s"]))
    draw_bars(bars, record["title"], "milliseconds a pass", "floor", path)
