"""What was to be shown on a GPU beside what was measured: a line for each claim, made from the record of `gpu`.

Wanted numbers are settings (`wanted` in conf/gpu.yaml); a line without one only reports a measurement. The spread of a
ratio is its 95 % paired interval over requests, or their range if they are fewer than `FEWEST`; that of repeated passes
is their range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group

from parsedec.experiment import table
from parsedec.experiment.analysis import token_seconds
from parsedec.experiment.intervals import FEWEST
from parsedec.experiment.record import read_record
from parsedec.experiment.summary import compare
from parsedec.hardware import floors, replay
from parsedec.hardware.floors import GIB, JudgeSize

HEADS = ("what", "wanted", "measured", "n", "spread", "ceiling", "holds")
STAGE_HEADS = ("stage", "status", "expected s", "seconds", "note")
RUNS = ("replay", "hf")  # comparisons with records of their own, in folders of these names
KEPT_OF_RESULT = ("tokens", "times")  # what ratios are computed from; the run's own record has everything

Json = dict[str, Any]
Part = tuple[str, Sequence[str], list[list[str]], str]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A line of the table.

    wanted    None if the line only reports a measurement
    measured  None if it was not measured
    n         how many repeats, or requests
    """

    what: str
    wanted: str | None = None
    measured: str | None = None
    n: int | None = None
    spread: str = "-"
    ceiling: str = "-"
    holds: bool | None = None

    def cells(self) -> list[str]:
        verdict = "-" if self.holds is None else "yes" if self.holds else "no"
        if self.measured is None:
            verdict = "not measured"
        n = "-" if self.n is None else str(self.n)
        return [self.what, self.wanted or "-", self.measured or "-", n, self.spread, self.ceiling, verdict]


def claims(record: Json) -> list[Claim]:
    """All lines, including those that were not measured."""
    return [
        *_tests(record),
        *_token_times(record),
        _tree(record),
        *_judge(record),
        _long(record),
        *_speedups(record),
        *_added(record),
        *_streamed(record),
        _hugging_face(record),
    ]


def cells(record: Json) -> list[list[str]]:
    return [claim.cells() for claim in claims(record)]


def short(source: str) -> str:
    return source.rsplit(":", 1)[-1].rsplit("_", 1)[-1].upper() if "qwen3" in source else source.rsplit(":", 1)[-1]


def _tests(record: Json) -> Iterator[Claim]:
    tests = record.get("tests") or {"passed": None, "said": "not run"}
    ran, said = tests["passed"] is not None, tests["said"]
    what = "CUDA tests" if ran else f"CUDA tests ({said})"
    yield Claim(what=what, wanted="pass", measured=said if ran else None, holds=tests["passed"])


def sources(record: Json) -> dict[str, str]:
    config = record["config"]
    return {
        "target": config["target"]["source"],
        "also": config["also"],
        "draft": config["draft"]["model"]["source"],
    }


def row_of(record: Json, source: str, name: str) -> Json | None:
    """The row of one pass of one shape; None if there is none."""
    rows = record.get("floors", {}).get("rows", ())
    return next((row for row in rows if (row["shape"], row["pass"]) == (source, name)), None)


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _range(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _token_times(record: Json) -> Iterator[Claim]:
    for model, most in record["config"]["wanted"]["token_ms"].items():
        source = sources(record)[model]
        row = row_of(record, source, "decode")
        what, wanted = f"one token, {short(source)}", f"<= {most:g} ms"
        if row is None or not row["seconds"]:
            yield Claim(what=what, wanted=wanted)
            continue
        taken = median(row["seconds"])
        yield Claim(
            what=what,
            wanted=wanted,
            measured=ms(taken),
            n=len(row["seconds"]),
            spread=_range([1000 * second for second in row["seconds"]]),
            ceiling=f"floor {ms(row['floor_s'])}",
            holds=1000 * taken <= most,
        )


def _tree(record: Json) -> Claim:
    config, source = record["config"], sources(record)["target"]
    most, name = config["wanted"]["tree_steps"], floors.tree_name(config["nodes"])
    what, wanted = f"{name} nodes, {short(source)}", f"<= {most} decode steps"
    step, tree = row_of(record, source, "decode"), row_of(record, source, name)
    if step is None or tree is None or not step["seconds"] or not tree["seconds"]:
        return Claim(what=what, wanted=wanted)
    each = [seconds / median(step["seconds"]) for seconds in tree["seconds"]]
    return Claim(
        what=what,
        wanted=wanted,
        measured=f"{median(each):.2f} steps, {ms(median(tree['seconds']))}",
        n=len(each),
        spread=_range(each),
        holds=median(each) <= most,
    )


def _judge(record: Json) -> Iterator[Claim]:
    """Judge passes, with the kernel chosen by default and with the others that were measured."""
    config, source = record["config"], sources(record)["target"]
    wanted, size = config["wanted"], JudgeSize(**config["judge_pass"])
    said = f"<= {wanted['judge_floors']} x floor or <= {wanted['judge_ms']:g} ms"
    for kernel in ("auto", *config["kernels"]):
        what, row = f"{size.name}, {short(source)}, {kernel}", row_of(record, source, f"{size.name}, {kernel}")
        if row is not None and row["seconds"]:
            taken, floor = median(row["seconds"]), row["floor_s"]
            yield Claim(
                what=what,
                wanted=said,
                measured=f"{ms(taken)}, {taken / floor:.2f} x floor",
                n=len(row["seconds"]),
                spread=_range([1000 * second for second in row["seconds"]]),
                ceiling=f"floor {ms(floor)}",
                holds=taken <= wanted["judge_floors"] * floor or 1000 * taken <= wanted["judge_ms"],
            )
        elif kernel == "auto":
            yield Claim(what=what, wanted=said)


def _long(record: Json) -> Claim:
    source, size = sources(record)["target"], JudgeSize(**record["config"]["long_pass"])
    row = row_of(record, source, f"{size.name}, auto")
    what = f"{size.draft} draft rows and {size.probes} probes beside {short(source)}"
    if row is None:
        return Claim(what=what, wanted="fit")
    if not row["seconds"]:
        return Claim(what=what, wanted="fit", measured=row["error"][:80], n=1, holds=False)
    peak = "" if row["peak_bytes"] is None else f"peak {row['peak_bytes'] / GIB:.1f} GiB, "
    return Claim(
        what=what,
        wanted="fit",
        measured=f"{peak}{row['seconds'][0]:.2f} s",
        n=len(row["seconds"]),
        ceiling=f"floor {row['floor_s']:.2f} s",
        holds=True,
    )


def _run(record: Json) -> Json:
    return record.get("replay") or {"arms": []}


def _arm(run: Json, name: str) -> Json | None:
    return next((arm for arm in run["arms"] if arm["name"] == name and arm["requests"]), None)


def _speedups(record: Json) -> Iterator[Claim]:
    """Speed-ups over the target alone, those with a goal first."""
    run, wanted = _run(record), record["config"]["wanted"]
    costs = replay.paces(run)
    goals = {**wanted["speedups"], **dict.fromkeys(wanted["told"])}
    for name, least in goals.items():
        what, said = f"{name} over {record['config']['baseline']}", None if least is None else f">= {least}"
        row, arm = against(run, name, record["config"]["baseline"]), _arm(run, name)
        if row is None or arm is None:
            yield Claim(what=what, wanted=said)
            continue
        best = replay.ceiling(arm, costs)
        share, tau = arm["summary"]["kept_share"], arm["summary"].get("tau")
        told = ("" if share is None else f", {100 * share:.0f} % kept") + ("" if tau is None else f", tau {tau:.1f}")
        yield Claim(
            what=what + told,
            wanted=said,
            measured=f"{row['speedup']:.2f}",
            n=row["requests"],
            spread=f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
            ceiling="-" if best is None else f"{best:.2f}",
            holds=None if least is None else row["speedup"] >= least,
        )


def against(run: Json, arm: str, than: str) -> dict[str, Any] | None:
    """The comparison of one arm of a run with another, on the requests that both answered; None if there are none.

    If these are too few for an interval, its ends are the smallest and the largest ratio of a single request.
    """
    first, second = _arm(run, than), _arm(run, arm)
    row = None if first is None or second is None else compare(first["requests"], second["requests"])
    if first is None or second is None or row is None or row["speedup"] is None:
        return None
    alone = [one for request in second["requests"] if (one := compare(first["requests"], [request]))]
    for name in ("speedup", "time_ratio"):
        if row[f"{name}_low"] is None:
            ratios = [one[name] for one in alone if one[name] is not None]
            row |= {f"{name}_low": min(ratios), f"{name}_high": max(ratios)}
    return row


def _added(record: Json) -> Iterator[Claim]:
    """What a speculator for the draft model adds."""
    for pair in record["config"]["wanted"]["added"]:
        what, row = f"{pair['arm']} over {pair['than']}", against(_run(record), pair["arm"], pair["than"])
        if row is None:
            yield Claim(what=what)
            continue
        yield Claim(
            what=what,
            measured=f"{row['speedup']:.2f}",
            n=row["requests"],
            spread=f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}",
        )


def _streamed(record: Json) -> Iterator[Claim]:
    """Streamed arms against others. "No slower" holds if the interval reaches 1, "faster" if all of it is above 1."""
    for pair in record["config"]["wanted"]["streamed"]:
        row = against(_run(record), pair["arm"], pair["than"])
        wanted = "faster: > 1" if pair["faster"] else "no slower: >= 1 within the interval"
        what = f"{pair['arm']} over {pair['than']}, in time"
        if row is None:
            yield Claim(what=what, wanted=wanted)
            continue
        low, high = row["time_ratio_low"], row["time_ratio_high"]
        yield Claim(
            what=what,
            wanted=wanted,
            measured=f"{row['time_ratio']:.2f}",
            n=row["requests"],
            spread=f"{low:.3f} to {high:.3f}",
            holds=low > 1 if pair["faster"] else high >= 1,
        )


def _hugging_face(record: Json) -> Claim:
    """Milliseconds a token of Hugging Face's own loop, without prompts, and as a multiple of the baseline's."""
    config = record["config"]
    what = f"Hugging Face generate, eager, {config['hf']['max_new_tokens']} tokens"
    run = record.get("hf") or {"arms": []}
    arms = [_arm(run, name) for name in (config["baseline"], config["hf"]["arm"])]
    paces = [None if arm is None else token_seconds(arm["summary"]) for arm in arms]
    if None in paces or arms[1] is None:
        return Claim(what=what)
    ours, theirs = (pace or 0.0 for pace in paces)
    times = f", {theirs / ours:.2f} x {config['baseline']}" if ours else ""
    return Claim(what=what, measured=f"{ms(theirs)} a token{times}", n=arms[1]["summary"]["requests"])


def with_runs(record: Json, folder: Path) -> Json:
    """The record, completed with runs that it lacks because it was interrupted in the middle of one."""
    paths = {name: folder / name / "record.json" for name in RUNS if name not in record}
    return record | {name: slim(read_record(path)) for name, path in paths.items() if path.exists()}


def slim(run: Json) -> Json:
    """A comparison's record without what would be stored twice: prompts, texts, rounds, and overrides of the arms."""
    arms = [arm | {"requests": [_slim_request(request) for request in arm["requests"]]} for arm in run["arms"]]
    return {key: value for key, value in run.items() if key not in ("provenance", "overrides")} | {"arms": arms}


def _slim_request(request: Json) -> Json:
    result = request["result"]
    kept = None if result is None else {name: result[name] for name in KEPT_OF_RESULT}
    return {name: request.get(name) for name in ("id", "seed", "correct", "error")} | {"result": kept}


def caption(record: Json) -> str:
    config = record["config"]
    dtype, hf = config["target"]["dtype"], config["hf"]
    without = f"Without torch.compile: {record['uncompiled']}. " if "uncompiled" in record else ""
    if record.get("left_out"):
        without += (
            f"Arms that failed, and those made of the same parts, are left out: {', '.join(record['left_out'])}. "
        )
    if late := sum(record.get("captured_late", {}).values()):
        without += f"CUDA graphs captured while requests were timed: {late}. "
    return (
        f"Tier: {table.tier(record)}. {dtype}, batch 1, {config['context']} tokens of context, answers of "
        f"{config['max_new_tokens']}, of {hf['max_new_tokens']} for {hf['arm']}; n: repeats of a pass, or requests. "
        f"Spread: range of the repeats, or 95 % paired interval, of fewer than {FEWEST} requests their range. "
        "Ceiling: of the device for a pass, the "
        f"analytic one for an arm. {without}{table.origin(record)}"
    )


def parts(record: Json) -> list[Part]:
    """(title, heads, cells, note) of every table that has something to show, the claims first."""
    same = {key: record[key] for key in ("config", "provenance")}
    made: list[Part] = [(record["title"], HEADS, cells(record), caption(record))]
    for name in RUNS:
        run = record.get(name) or {"arms": []}
        if arms := [arm for arm in run["arms"] if arm["requests"]]:
            run = same | run | {"arms": arms}
            made.append((f"{run['title']} ({name})", replay.HEADS, replay.rows(run), replay.caption(run)))
    if record["floors"]["rows"]:
        measured = same | dict(record["floors"])
        made.append(("Passes and their floors", floors.HEADS, floors.cells(measured), floors.caption(measured)))
    stages = [
        [one["name"], one["status"], f"{one['expected_s']:.0f}", f"{one['seconds']:.0f}", one["note"]]
        for one in record["stages"]
    ]
    made.append(("Stages", STAGE_HEADS, stages, "; ".join(record["warnings"][:5])))
    return made


def terminal(record: Json) -> Group:
    """All tables for the terminal, the claims last, where they stay on the screen."""
    return Group(*(table.printed(*part) for part in reversed(parts(record))))


def markdown(record: Json) -> str:
    """The same tables as Markdown, the claims first, with the command that made the record."""
    (_, heads, lines, note), *others = parts(record)
    said = [table.grid(heads, lines), note]
    for title, heads, lines, note in others:
        said += [f"## {title}", table.grid(heads, lines), *([note] if note else [])]
    return table.document(record, *said)
