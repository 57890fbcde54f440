"""A report shows the record's own numbers: the CSV behind every picture is recomputed here from the stored requests."""

from __future__ import annotations

import base64
import csv
import html
import json
import re
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parsedec.errors import ParsedecError
from parsedec.experiment.record import read_record

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from parsedec.reporting import judged, page, sections, speed
from parsedec.reporting.figure import drawn

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "experiments" / "records"
SMALL = "qwen_coder_humaneval"  # a comparison of five arms and few requests
PHASES = ("prefill_s", "draft_s", "judge_s", "decode_s")


class Well(HTMLParser):
    """Every element is closed, names are unique, links within the page lead somewhere, nothing is fetched."""

    VOID = frozenset({"meta", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.names: list[str] = []
        self.hrefs: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)
        for key, value in attrs:
            self.names += [value or ""] * (key == "id")
            self.hrefs += [value or ""] * (key in ("href", "xlink:href"))
            self.fetched += [value or ""] * (key in ("src", "srcset", "data", "poster"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as source:
        return list(csv.DictReader(source))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return read_record(RECORDS / SMALL / "record.json")


@pytest.fixture(scope="module")
def report(record, tmp_path_factory) -> Path:
    """The folder of a report of one record, made from a copy."""
    folder = tmp_path_factory.mktemp("reports") / "a comparison"
    folder.mkdir()
    page.write_report([(folder / "record.json", record)], folder)
    return folder


def test_every_picture_has_its_three_files_and_they_are_not_empty(report):
    files = {path.stem: set() for path in (report / "report").iterdir()}
    for path in (report / "report").iterdir():
        files[path.stem].add(path.suffix)
        assert path.stat().st_size > 50
    assert {"front", "speedup", "kept", "positions", "time", "latency", "first"} <= {
        name.removeprefix("a-comparison-") for name in files
    }
    assert all(kinds == {".csv", ".svg", ".png"} for kinds in files.values())


def test_times_are_means_over_the_stored_requests(report, record):
    found = {row["arm"]: row for row in table(report / "report" / "a-comparison-time.csv")}
    assert list(found) == [arm["name"] for arm in record["arms"]]
    for arm in record["arms"]:
        times = [request["result"]["times"] for request in arm["requests"]]
        for phase in PHASES:
            assert float(found[arm["name"]][phase]) == pytest.approx(np.mean([t[phase] for t in times]))
        parts = sum(float(found[arm["name"]][key]) for key in (*PHASES, "other_s"))
        assert parts == pytest.approx(np.mean([t["wall_s"] for t in times]), rel=1e-6)


def test_latencies_are_quantiles_over_the_stored_requests(report, record):
    for name, key in (("latency", "wall_s"), ("first", "first_token_s")):
        found = {row["arm"]: row for row in table(report / "report" / f"a-comparison-{name}.csv")}
        for arm in record["arms"]:
            times = [request["result"]["times"][key] for request in arm["requests"]]
            assert int(found[arm["name"]]["n"]) == len(times)
            for q in (5, 50, 95, 99):
                assert float(found[arm["name"]][f"p{q}"]) == pytest.approx(np.quantile(times, q / 100))


def test_shares_of_a_batchs_seconds_are_not_drawn_as_waits(record):
    point = speed.points(record)[0]
    titles = [figure.name for figure in speed.pictures([replace(point, batch=4)], None, "p")]
    assert "p-first" in titles
    assert "p-latency" not in titles
    assert "p-latency" in [figure.name for figure in speed.pictures([point], None, "p")]
    assert [p.batch for p in speed.points(record | {"config": {"batch": 4}})] == [4] * len(record["arms"])


def test_accuracy_and_speed_are_those_of_the_record(report, record):
    found = {row["arm"]: row for row in table(report / "report" / "a-comparison-front.csv")}
    gains = {row["arm"]: row for row in record["comparison"]}
    for arm in record["arms"]:
        row = found[arm["name"]]
        assert float(row["accuracy"]) == np.mean([bool(request["correct"]) for request in arm["requests"]])
        assert [float(row["accuracy_low"]), float(row["accuracy_high"])] == arm["summary"]["accuracy_interval"]
        if gain := gains.get(arm["name"]):
            assert [float(row[f"speed{end}"]) for end in ("", "_low", "_high")] == [
                gain[f"speedup{end}"] for end in ("", "_low", "_high")
            ]
        else:
            assert (float(row["speed"]), row["speed_low"]) == (1.0, "")


def test_kept_shares_count_tokens_and_segments(report, record):
    kept = {row["arm"]: row for row in table(report / "report" / "a-comparison-kept.csv")}
    places = table(report / "report" / "a-comparison-positions.csv")
    drafting = [arm for arm in record["arms"] if arm["summary"]["draft_tokens"]]
    assert set(kept) == {arm["name"] for arm in drafting} != set()
    for arm in drafting:
        counts = [request["result"]["counters"] for request in arm["requests"]]
        share = sum(c["kept_draft_tokens"] for c in counts) / sum(c["draft_tokens"] for c in counts)
        row = kept[arm["name"]]
        assert float(row["kept_share"]) == pytest.approx(share)
        if share < 1:
            assert float(row["kept_share_low"]) <= share <= float(row["kept_share_high"])
        else:
            assert row["kept_share_low"] == row["kept_share_high"] == "", "no odds of what nothing was refused of"
        rounds = [entry for request in arm["requests"] for entry in request["result"]["rounds"]]
        firsts = [entry["segments"][0]["kept"] for entry in rounds if entry["segments"]]
        first = next(r for r in places if r["arm"] == arm["name"] and r["segment"] == "1")
        assert (int(first["drafts"]), int(first["kept"])) == (len(firsts), sum(firsts))
        own = [int(row["drafts"]) for row in places if row["arm"] == arm["name"]]
        assert sum(own) == sum(len(entry["segments"]) for entry in rounds)


def test_the_page_carries_the_same_numbers_and_fetches_nothing(report):
    text = (report / "report.html").read_text()
    seen = Well(text)
    assert len(seen.names) == len(set(seen.names))
    inner = [href[1:] for href in seen.hrefs if href.startswith("#")]
    assert set(inner) <= set(seen.names)
    outer = [href for href in seen.hrefs if not href.startswith(("#", "data:"))]
    assert outer
    assert all(href.startswith("trace.html") for href in outer)
    assert seen.fetched == []
    assert not re.search(r"url\((?!#)|@import", text)
    saved = re.findall(r'href="data:text/csv;charset=utf-8;base64,([^"]+)" download="([^"]+)"', text)
    assert len(saved) == len(list((report / "report").glob("*.csv")))
    for data, name in saved:
        assert base64.b64decode(html.unescape(data)).decode() == (report / "report" / name).read_text()


def test_links_lead_to_the_requests_of_the_trace(report, record):
    text = (report / "report.html").read_text()
    order = [request["id"] for request in record["arms"][0]["requests"]]
    links = re.findall(r'href="trace.html#request-(\d+)">([^<]+)</a>', text)
    assert links
    assert all(order[int(number) - 1] == html.unescape(name) for number, name in links)


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*/record.json*")), ids=lambda path: path.parent.name)
def test_every_record_here_becomes_a_section_with_pictures(path):
    source = sections.sources([(path, read_record(path))], path.parent)[0]
    made = sections.section(source)
    assert made.title == source.record.get("title", made.title)  # loads had none at first
    assert made.figures
    for figure in made.figures:
        assert figure.guide.endswith(".")
        assert len({len(row) for row in figure.rows} | {len(figure.heads)}) == 1
    assert all(len({len(row) for row in one.cells} | {len(one.heads)}) == 1 for one in made.tables)
    assert all("n" in one.heads or "n =" in one.note or "problems" in str(one.note) for one in made.tables)


def calibration() -> dict[str, Any]:
    """What a calibration finds, of six prefixes in two places."""
    share = {"count": 1, "of": 2, "share": 0.5, "interval": [0.1, 0.9]}
    kind = {
        "separation": {"right": 3, "wrong": 3, "auc": 0.75, "interval": [0.4, 1.0], "curve": [[0.0, 0.5], [1.0, 1.0]]},
        "reliability": {
            "bins": [{"low": 0.9, "high": 1.0, "count": 4, "score": 0.95, "right": 0.75, "interval": [0.3, 0.95]}],
            "ece": 0.2,
            "count": 4,
        },
    }
    none = {"auc": None, "interval": None, "curve": []}
    row = {"threshold": 0.5, "kept_share": 0.6, "accepted_whole": 3, "accepted_whole_wrong": 1,
           "errors": 2, "counted": 5, "risk": 0.4, "upper": 0.8}  # fmt: skip
    return {
        "goal": {"risk": 0.1},
        "check": {"kept_share": 0.4},
        "prefixes": kind,
        "complete": {**kind, "separation": kind["separation"] | none},
        "sweep": {"check": [row, row | {"threshold": 0.9, "risk": 0.0}]},
        "by_position": {
            "edges": [0.0, 0.5, 1.0],
            "right": [[0, 2], [0, 1]],
            "wrong": [[1, 0], [1, 1]],
            "positions": [
                {"segment": 0, "false_accepts": share, "false_refusals": share},
                {"segment": 1, "false_accepts": share | {"share": None, "interval": None}, "false_refusals": share},
            ],
        },
    }


def test_pictures_of_a_calibration_hold_its_counts(tmp_path):
    figures = {figure.name: figure for figure in judged.calibration_pictures(calibration(), "c")}
    assert set(figures) == {"c-reliability", "c-roc", "c-sweep", "c-heat", "c-mistakes"}
    assert [list(row[3:]) for row in figures["c-heat"].rows] == [[0, 1, 1.0], [2, 0, 0.0], [0, 1, 1.0], [1, 1, 0.5]]
    assert [row[:4] for row in figures["c-mistakes"].rows] == [
        ["wrong, but passed", 1, 1, 2], ["right, but refused", 1, 1, 2], ["right, but refused", 2, 1, 2]]  # fmt: skip
    assert [(row[0], row[2], row[8]) for row in figures["c-sweep"].rows] == [(0.5, 0.4, 0.1), (0.9, 0.0, 0.1)]
    assert {row[0] for row in figures["c-roc"].rows} == {"prefixes, area 0.750"}
    shown = drawn(figures["c-heat"], tmp_path).svg
    assert re.findall(r">(\d)</text>", shown)[:4] == ["1", "2", "1", "2"]  # a number in every cell that holds something


def test_no_arm_is_on_the_front_that_another_beats():
    at = [(1.0, 0.9), (2.0, 0.9), (2.0, 0.8), (3.0, 0.5), (0.5, 1.0), (3.0, 0.5)]
    assert speed.on_front(at) == [False, True, False, True, True, True]


def test_the_interval_of_a_ratio_is_over_problems():
    rng = np.random.default_rng(0)
    pairs = [(str(i), float(a), 10.0) for i, a in enumerate(rng.integers(0, 11, 400))]
    value, low, high = speed.ratio_interval(pairs)
    shares = np.array([above for _, above, _ in pairs]) / 10
    assert value == pytest.approx(shares.mean())
    spread = 1.96 * shares.std() / 20  # the mean of 400, by the central limit theorem
    assert (low, high) == pytest.approx((value - spread, value + spread), abs=0.15 * spread)
    doubled = speed.ratio_interval(pairs + pairs)  # a second answer to the same problems is no new problem
    assert doubled == pytest.approx((value, low, high))
    assert speed.ratio_interval([("a", 0, 0)]) == (None, None, None)


def sweep_of(record: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """The folder of a sweep over thresholds, made of one arm's requests."""
    arm = next(arm for arm in record["arms"] if arm["summary"]["judge_passes"])
    made = []
    for i, threshold in enumerate((0.5, 0.9)):
        one = json.loads(json.dumps({**record, "arms": [{**arm, "name": "run", "description": ""}]}))
        del one["comparison"], one["baseline"]
        for place in (one["config"], one["config"]["outer"]):
            place["boundary"] = {**place.get("boundary", {}), "threshold": threshold}
        one["config"]["output"] = f"sweep/{i}"
        made.append((Path("sweep") / str(i) / "record.json", one))
    return made


def test_a_sweep_is_laid_side_by_side_under_what_differs(record):
    found = sections.sources(sweep_of(record), Path("sweep"))
    assert [source.anchor for source in found] == ["record-0", "record-1"]
    assert found[1].trace == "1/trace.html"
    (sweep,) = sections.side_by_side(found)
    assert [row[0] for row in sweep.tables[0].cells] == ["boundary.threshold=0.5", "boundary.threshold=0.9"]
    rows = next(figure for figure in sweep.figures if figure.name == "sweep-1-thresholds").rows
    assert [(row[0], row[1]) for row in rows] == [
        ("accuracy", 0.5), ("kept share", 0.5), ("accuracy", 0.9), ("kept share", 0.9)]  # fmt: skip
    assert sections.side_by_side([*found[:1], *sections.sources([(Path("x/record.json"), record)], Path())]) == []


def test_runs_that_differ_in_much_are_known_by_their_folders(record):
    made = sweep_of(record)
    for i, (_, one) in enumerate(made):
        one["config"] |= {"seed": i, "stop": [f"a stop string number {i}, longer than a picture has room for"]}
    (sweep,) = sections.side_by_side(sections.sources(made, Path("sweep")))
    arms, differ = sweep.tables
    assert [row[0] for row in arms.cells] == ["record-0", "record-1"]
    assert [row[0] for row in differ.cells] == ["record-0", "record-1"]
    assert "seed=1" in differ.cells[1][1]
    assert "boundary.threshold=0.9" in differ.cells[1][1]


def test_the_same_run_twice_is_two_arms(record):
    first, (path, _) = sweep_of(record)
    (sweep,) = sections.side_by_side(sections.sources([first, (path, first[1])], Path("sweep")))
    assert [row[0] for row in sweep.tables[0].cells] == ["record-0", "record-1"]


def test_runs_on_other_machines_are_not_laid_side_by_side(record):
    first, (path, other) = sweep_of(record)
    other["provenance"]["device"] = "another machine"
    assert sections.side_by_side(sections.sources([first, (path, other)], Path("sweep"))) == []


def test_what_is_no_record_of_ours_is_named():
    source = sections.sources([(Path("a/record.json"), {"schema_version": 1, "title": "x"})], Path("a"))[0]
    with pytest.raises(ParsedecError, match=r"none of what a report is made of.*schema_version"):
        sections.section(source)


def test_text_of_a_record_is_escaped(tmp_path):
    evil = {**read_record(RECORDS / "zoo_draft" / "record.json"), "title": "<script>alert(1)</script>"}
    made = page.write_report([(tmp_path / "record.json", evil)], tmp_path).read_text()
    assert "<script" not in made
    assert "&lt;script&gt;" in made


def test_the_command_makes_table_trace_and_report(tmp_path, capsys):
    command = runpy.run_path(str(ROOT / "experiments" / "report.py"))["main"]
    copy = tmp_path / "run" / "record.json"
    copy.parent.mkdir()
    copy.write_bytes((RECORDS / SMALL / "record.json").read_bytes())
    assert command([str(copy)]) == 0
    assert capsys.readouterr().out.split() == [
        str(copy.with_name(n)) for n in ("table.md", "trace.html", "report.html")
    ]
    assert command([str(tmp_path / "none")]) == 2
    assert "error: cannot read the record" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command([str(tmp_path / "empty")]) == 2
    assert "no record.json below" in capsys.readouterr().err


def test_a_folder_is_reported_without_what_has_no_section(tmp_path, capsys):
    command = runpy.run_path(str(ROOT / "experiments" / "report.py"))["main"]
    records = {
        "run": read_record(RECORDS / SMALL / "record.json"),
        "other": {"schema_version": 1, "title": "another program's", "fruit": []},
        "newer": {"schema_version": 99},
        "load": LOAD,
    }
    for name, record in records.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    assert command([str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert all(str(tmp_path / name / "record.json") in said for name in ("other", "newer"))
    assert said.count("left out") == 2
    text = (tmp_path / "report.html").read_text()
    Well(text)
    assert "64 clients at once on a server" in text
    assert html.unescape(records["run"]["title"]) in html.unescape(text)
    for name in ("other", "newer"):  # named outright, they are errors
        assert command([str(tmp_path / name / "record.json"), "--output", str(tmp_path / name)]) == 2
        assert command([str(tmp_path / name), "--output", str(tmp_path / name)]) == 2


LOAD = {
    "schema_version": 1, "kind": "load", "provenance": {}, "config": {},
    "summary": {"clients": 64, "seconds": 120.5, "requests": 900, "outcomes": {"own": 890, "lost": 0}, "errors": [],
                "tokens_per_s": 81.25, "answer_s": {"p50": 1.5, "p95": 4.0}, "memory_mb": None,
                "overflow": {"beyond": 4, "statuses": {"429": 4}}},
}  # fmt: skip


def test_a_load_shows_its_figures():
    source = sections.sources([(Path("a/record.json"), LOAD)], Path("a"))[0]
    cells = dict(sections.section(source).tables[0].cells)
    assert (cells["outcomes, own"], cells["answer s, p95"], cells["tokens per s"]) == ("890", "4", "81.25")
    assert "900 requests" in sections.section(source).tables[0].note
