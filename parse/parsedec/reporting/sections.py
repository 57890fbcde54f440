"""Turn a record into a section of a report: what it says in words, its tables, its pictures, its links.

Records of all commands have a section. What a record lacks, because an older version made it or another kind of run, is
left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parsedec.errors import ParsedecError
from parsedec.experiment import judging, overhead, table
from parsedec.experiment.record import command_line, is_run
from parsedec.experiment.trace import by_id
from parsedec.hardware import claims, floors
from parsedec.reporting import costs, judged, speed
from parsedec.reporting.figure import Figure

Json = dict[str, Any]
LINKS = 12  # requests that a section links to
LABEL = 70  # most characters of a name that pictures have room for
NOT_SETTINGS = ("title", "resume", "output")


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table with cells of text; its first column holds names."""

    title: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Link:
    href: str
    text: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """One record, or several side by side.

    anchor  its id in the page;  kind  the command that made it, in words;  words  the glossary entries it needs
    """

    anchor: str
    kind: str
    title: str
    status: str = "finished"
    command: str | None = None
    said: Sequence[str] = ()
    tables: Sequence[TextTable] = ()
    figures: Sequence[Figure] = ()
    links: Sequence[Link] = ()
    words: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A record, its path, its anchor in the page, and the path of its trace relative to the report."""

    path: Path
    record: Json
    anchor: str
    trace: str


def sources(found: Sequence[tuple[Path, Json]], folder: Path) -> list[Source]:
    """The records as sources, with anchors made from the names of their folders; the report will be in `folder`."""
    made: list[Source] = []
    for path, record in found:
        name = re.sub(r"[^a-z0-9]+", "-", path.resolve().parent.name.lower()).strip("-")
        name = name if name[:1].isalpha() else f"record-{name}".rstrip("-")
        taken = {source.anchor for source in made}
        choices = (f"{name}-{i}" if i > 1 else name for i in range(1, len(found) + 1))
        anchor = next(choice for choice in choices if choice not in taken)
        trace = os.path.relpath(path.resolve().with_name("trace.html"), folder.resolve())
        made.append(Source(path=path, record=record, anchor=anchor, trace=Path(trace).as_posix()))
    return made


def sections(found: Sequence[Source]) -> list[Section]:
    """The sections of all records, after those of records that can be shown side by side."""
    return [*side_by_side(found), *(section(source) for source in found)]


def section(source: Source) -> Section:
    record = source.record
    make = maker(record)
    if make is None:
        raise ParsedecError(
            f"{source.path} holds none of what a report is made of (arms, advice, calibration, judges, probes, a "
            f"training, overhead, floors, load); it has {sorted(record)}."
        )
    return replace(make(source), status=record.get("status", "finished"), command=command_line(record))


def maker(record: Json) -> Callable[[Source], Section] | None:
    """The function that makes the section of such a record; None if it has no section."""
    return next((make for fits, make in MAKERS if fits(record)), None)


def _arms(source: Source) -> Section:
    record, points = source.record, speed.points(source.record)
    compared = bool(record.get("comparison"))
    tables = [arms_table(record)] if record["arms"] and points else []
    if tables:
        tables += [TextTable(title=title, heads=heads, cells=cells, note=note)
                   for title, heads, cells, note in table.sections(record)]  # fmt: skip
    figures = speed.pictures(points, record.get("baseline"), source.anchor) if points else []
    words = {"target", "kept", "judge", "tok/s", "interval", "n"} | ({"arm", "baseline"} if compared else {"arm"})
    if any(point.summary.get("tau") for point in points):
        words.add("tau")
    return Section(
        anchor=source.anchor,
        kind="Comparison" if compared else "Run",
        title=record["title"],
        said=in_short(record, points),
        tables=tables,
        figures=figures,
        links=trace_links(source) if points else [],
        words=frozenset(words),
    )


def arms_table(record: Json) -> TextTable:
    """The table of arms with n, and with an interval for every share and ratio."""
    heads = ["arm", "n", *(name for name, _ in table.columns(record))]
    counts = {arm["name"]: str(arm["summary"]["requests"]) for arm in record["arms"]}
    cells = [[row[0], counts[row[0]], *row[1:]] for row in table.rows(record)]
    return TextTable(title="All arms", heads=heads, cells=cells, note=table.caption(record))


def in_short(record: Json, points: Sequence[speed.Point]) -> list[str]:
    """What a hurried reader should know: how the fastest arms, with a judge and without, compare with the baseline."""
    if not points:
        return ["No request was answered."]
    rated = [point for point in points if point.gain]
    if not rated:
        one = points[0].summary
        right = "" if one["accuracy"] is None else f", {one['accuracy']:.1%} of them right"
        pace = "" if one["tokens_per_s"] is None else f", {one['tokens_per_s']:.1f} tokens per second"
        return [f"{one['requests'] - one['errors']} of {one['requests']} questions answered{right}{pace}."]
    said = []
    for what, judges in (("With the judge", True), ("Without a judge", False)):
        own = [p for p in rated if bool(p.summary.get("judge_passes")) == judges and not p.name.startswith("draft")]
        if own:
            said.append(_against(max(own, key=lambda p: float((p.gain or {})["time_ratio"])), what, record["baseline"]))
    return said


def _against(point: speed.Point, what: str, baseline: str) -> str:
    gain: Mapping[str, Any] = point.gain or {}
    quick = f"{gain['time_ratio']:.2f} times as fast"
    if gain["time_ratio_low"] is not None:
        quick = f"{gain['time_ratio']:.2f} times [{gain['time_ratio_low']:.2f}, {gain['time_ratio_high']:.2f}] as fast"
    text = f"{what}, {point.name} was fastest: it answered the same {gain['requests']} questions {quick} as {baseline}"
    if gain["accuracy_change"] is not None and point.summary["accuracy"] is not None:
        change, low, high = (100 * gain[f"accuracy_change{end}"] for end in ("", "_low", "_high"))
        text += f", and its share of right answers differed by {change:+.1f} points [{low:+.1f}, {high:+.1f}]"
    return text + "."


def trace_links(source: Source) -> list[Link]:
    """Links to the requests that tell most, those that some arms got wrong and others not; then to the first ones."""
    arms = source.record["arms"]
    keyed = [(arm["name"], by_id(arm["requests"])) for arm in arms]
    wrong: list[Link] = []
    others: list[Link] = []
    for number, key in enumerate(dict.fromkeys(key for _, requests in keyed for key in requests), 1):
        bad = [name for name, requests in keyed if key in requests and requests[key].get("correct") is False]
        link = Link(
            href=f"{source.trace}#request-{number}", text=key[0], why=f"wrong: {', '.join(bad)}" if bad else "all right"
        )
        (wrong if bad and len(bad) < len(keyed) else others).append(link)
    chosen = [*wrong, *others][:LINKS]
    return [Link(href=source.trace, text="all requests", why="every answer, piece by piece"), *chosen]


def _calibration(source: Source) -> Section:
    from parsedec.calibration.report import rows, sentence, verdict

    record = source.record
    found = record.get("calibration")
    if found is None:
        return Section(anchor=source.anchor, kind="Calibration", title=record["title"],
                       said=[f"Not finished: {len(record['samples'])} drafts are judged."])  # fmt: skip
    said = [f"The promise asked for: {sentence(record)}.", *verdict(found).replace("**", "").split("\n\n")]
    return Section(
        anchor=source.anchor,
        kind="Calibration",
        title=record["title"],
        said=said,
        tables=[TextTable(title="On problems that chose nothing", heads=["figure", "value"], cells=rows(found),
                          note=f"n = {found['counts']['check']}. Tier: {table.tier(record)}. {table.origin(record)}")],
        figures=judged.calibration_pictures(found, source.anchor),
        words=frozenset({"target", "kept", "judge", "threshold", "interval", "n", "auc"}),
    )  # fmt: skip


def _judges(source: Source) -> Section:
    record = source.record
    return Section(
        anchor=source.anchor,
        kind="Judges",
        title=record["title"],
        tables=[TextTable(title="All judges", heads=judging.heads(record), cells=judging.cells(record),
                          note=judging.note(record))],
        figures=judged.judge_pictures(record["summary"], source.anchor),
        words=frozenset({"target", "kept", "judge", "threshold", "interval", "n", "auc"}),
    )  # fmt: skip


def _probes(source: Source) -> Section:
    record = source.record
    unseen, origin = record["data"]["calibration"], f"Tier: {table.tier(record)}. {table.origin(record)}"
    note = f"n = {unseen['prefixes']} prefixes, {unseen['wrong_prefixes']} of them wrong, on which these were chosen; "
    note += f"elsewhere: each half of their problems, with what the other half chose. {origin}"
    used = TextTable(title="What is used", heads=judged.PROBE_HEADS, cells=judged.probe_rows(record), note=note)
    return Section(anchor=source.anchor, kind="Probes", title=record["title"], tables=[used],
                   figures=[judged.probe_picture(record, source.anchor)],
                   words=frozenset({"target", "judge", "threshold", "n", "auc"}))  # fmt: skip


def _training(source: Source) -> Section:
    record, found = source.record, source.record["evaluation"] or {}
    figures = judged.evaluation_pictures(found, source.anchor) + costs.training_pictures(record, source.anchor)
    cells = [[key.replace("_", " "), _plain(value)] for key, value in found.items() if not _is_table(value)]
    n = f"n = {found['problems']} unseen problems. " if "problems" in found else ""
    return Section(
        anchor=source.anchor,
        kind="Training",
        title=record["title"],
        tables=[TextTable(title="On unseen problems", heads=["figure", "value"], cells=cells,
                          note=f"{n}{table.origin(record)}")] * bool(cells),
        figures=figures,
        words=frozenset({"target", "interval", "n", *(("judge", "kept", "threshold") if "probes" in found else ()),
                         *(("tau",) if "tau" in found else ())}),
    )  # fmt: skip


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _plain(value: Any) -> str:
    """A value of an evaluation as text."""
    if isinstance(value, dict) and "share" in value:
        low, high = value["interval"]
        return f"{value['share']:.1%} [{low:.1%}, {high:.1%}]"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _overhead(source: Source) -> Section:
    record, anchor = source.record, source.anchor
    note = overhead.caption(record)
    steps = TextTable(title="Per step", heads=overhead.HEADS, cells=overhead.rows_of(record), note=note)
    return Section(anchor=anchor, kind="Overhead", title=record["title"], said=[overhead.sentence(record)],
                   tables=[steps], figures=costs.overhead_picture(record, anchor),
                   words=frozenset({"target", "interval", "n"}))  # fmt: skip


def _floors(source: Source) -> Section:
    record, anchor = source.record, source.anchor
    passes = TextTable(title="All passes", heads=floors.HEADS, cells=floors.cells(record), note=floors.caption(record))
    return Section(anchor=anchor, kind="Floors", title=record["title"], tables=[passes],
                   figures=costs.floors_picture(record, anchor), words=frozenset({"target"}))  # fmt: skip


def _gpu(source: Source) -> Section:
    record = source.record
    tables = [TextTable(title=title, heads=heads, cells=cells, note=note)
              for title, heads, cells, note in claims.parts(record)]  # fmt: skip
    return Section(anchor=source.anchor, kind="GPU", title=record["title"], status=record["status"], tables=tables,
                   words=frozenset({"target", "kept", "tau", "arm", "interval", "n"}))  # fmt: skip


def _advice(source: Source) -> Section:
    from parsedec.advice import report

    record = source.record
    empty = Section(anchor=source.anchor, kind="Advice", title=record["title"])
    if "verdict" not in record:
        return replace(empty, said=[f"Not finished: {len(record['trials'])} problems are measured."])
    verdict, n = record["verdict"], record["costs"]["problems"]
    tables = [
        TextTable(title="What to expect", heads=report.HEADS, cells=report.arm_rows(record), note=report.note(record)),
        TextTable(title="Costs", heads=("", "measured"), cells=report.cost_rows(record), note=f"n = {n}."),
    ]
    if rows := report.check_rows(record):
        further = record["checked"]["problems"]
        tables.insert(0, TextTable(title="Predicted and measured", heads=report.CHECK_HEADS, cells=rows,
                                   note=f"n = {further} further problems."))  # fmt: skip
    said = [verdict["text"], *(finding["text"] for finding in verdict["findings"])]
    words = frozenset({"target", "kept", "judge", "threshold", "arm", "interval", "n", "auc"})
    return replace(empty, said=said, tables=tables, words=words, figures=costs.advice_pictures(record, source.anchor))


def _load(source: Source) -> Section:
    found = source.record["summary"]
    cells = [[key.replace(".", ", ").replace("_", " "), _plain(value)] for key, value in _flat(found)]
    return Section(
        anchor=source.anchor,
        kind="Load",
        title=source.record.get("title") or f"{found['clients']} clients at once on a server",
        figures=costs.load_pictures(found, source.anchor),
        tables=[TextTable(title="What the clients saw", heads=["figure", "value"], cells=cells,
                          note=f"n = {found['requests']} requests. Names say the units.")],
        words=frozenset({"tok/s", "n"}),
    )  # fmt: skip


MAKERS: tuple[tuple[Callable[[Json], bool], Callable[[Source], Section]], ...] = (
    (is_run, _arms),
    (lambda record: record.get("kind") == "advice", _advice),
    (lambda record: record.get("kind") == "load", _load),
    (lambda record: record.get("kind") == "gpu", _gpu),
    (lambda record: record.get("kind") == "calibration", _calibration),
    (lambda record: "judges" in (record.get("summary") or {}), _judges),
    (lambda record: "card" in record and "probes" in record, _probes),
    (lambda record: "history" in record and "evaluation" in record, _training),
    (lambda record: "inners" in record, _overhead),
    (lambda record: "devices" in record and "rows" in record, _floors),
)


def side_by_side(found: Sequence[Source]) -> list[Section]:
    """A section for each group of one-arm runs of the same pair, task and machine, such as a sweep leaves behind."""
    groups: dict[str, list[Source]] = {}
    for source in found:
        record = source.record
        if is_run(record) and len(record["arms"]) == 1 and speed.points(record):
            config = record["config"]
            draft = ((config.get("draft") or {}).get("model") or {}).get("source")
            alike = [config["target"]["source"], draft, config.get("task"), record["provenance"]["device"]]
            groups.setdefault(json.dumps(alike, sort_keys=True), []).append(source)
    return [_sweep(group, i) for i, group in enumerate(groups.values(), 1) if len(group) > 1]


def _sweep(group: Sequence[Source], number: int) -> Section:
    labels = differences([source.record["config"] for source in group])
    told = len(set(labels)) == len(labels) and max(map(len, labels)) <= LABEL  # else they are known by their folders
    names = labels if told else [source.anchor for source in group]
    points = [replace(speed.points(source.record)[0], name=name) for source, name in zip(group, names, strict=True)]
    differ = TextTable(
        title="What they differ in", heads=["arm", "settings"], cells=list(map(list, zip(names, labels, strict=True)))
    )
    merged = {
        "title": group[0].record["title"],
        "config": group[0].record["config"],
        "provenance": group[0].record["provenance"],
        "arms": [{**point.arm, "name": point.name} for point in points],
    }
    anchor = f"sweep-{number}"
    return Section(
        anchor=anchor,
        kind="Sweep",
        title=f"{len(group)} runs side by side: {group[0].record['title']}",
        said=["Each run was a process of its own, so differences in speed include what else the machine was doing; "
              "compare.py lets the arms take turns, and pairs them."],
        tables=[arms_table(merged), *([] if told else [differ])],
        figures=speed.pictures(points, None, anchor),
        words=frozenset({"target", "kept", "judge", "tok/s", "interval", "n"}),
    )  # fmt: skip


def differences(configs: Sequence[Json]) -> list[str]:
    """For each configuration, the settings in which it differs from the others, as `key=value` words."""
    flat = [dict(_flat(config)) for config in configs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key.split(".")[0] not in NOT_SETTINGS]
    varied = [key for key in keys if len({json.dumps(one.get(key)) for one in flat}) > 1]
    # the outer level holds copies of settings at the top
    varied = [key for key in varied if not (key.startswith("outer.") and key.removeprefix("outer.") in varied)]
    classes = {key.removesuffix("._target_") for key in varied if key.endswith("._target_")}
    varied = [key for key in varied if key.endswith("._target_") or key.rpartition(".")[0] not in classes]
    return [", ".join(f"{key.removesuffix('._target_')}={_setting(one.get(key))}" for key in varied) for one in flat]


def _flat(config: Json, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def _setting(value: Any) -> str:
    return value.rpartition(".")[2] if isinstance(value, str) and value.startswith("parsedec") else str(value)
