"""The trace page in a real browser: the three kinds of text differ for every eye, and nothing fails to load.

A script added by the test writes what the browser computed into the page; `--dump-dom` hands it back.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from browser import DARK, NEEDS_BROWSER, READABLE, WATCH, browse, channels, is_drawn_on, luminance
from parsedec.experiment.trace import render_trace

pytestmark = NEEDS_BROWSER

KINDS = (".draft", ".refused", ".target")
CANVAS = ""  # the answer's own element
REPORT = """<script>
const look = element => {
  const style = getComputedStyle(element);
  return {color: style.color, background: style.backgroundColor, image: style.backgroundImage,
          line: style.textDecorationLine, stroke: style.textDecorationStyle};
};
const visible = () => cards.filter(card => !card.hidden).map(card => card.querySelector("h3").textContent);
const toggle = name => { document.querySelector(`input[name=${name}]`).click(); return visible(); };
const report = {failures, resources: performance.getEntriesByType("resource").length, all: visible(),
                wrong: toggle("wrong"), both: toggle("refused"), refused: toggle("wrong"), looks: {}};
toggle("refused");
for (const kind of [".draft", ".refused", ".target", ""])
  report.looks[kind] = look(document.querySelector(`.answer ${kind}`.trim()));
location.hash = "#request-5";
openLinked();
report.opened = document.getElementById("request-5").open;
report.sideways = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const out = document.createElement("pre");
out.id = "report";
out.textContent = JSON.stringify(report);
document.body.append(out);
</script>"""


def request(key: str, correct: bool, refused: bool) -> dict[str, Any]:
    segments = [
        {"text": "The draft began well.\n", "tokens": 5, "score": 0.93, "kept": True},
        {"text": "Then it went wrong.\n", "tokens": 4, "score": 0.2, "kept": False},
    ]
    entry = {
        "drafted": True,
        "judged_tokens": 9 if refused else 5,
        "kept_tokens": 5,
        "draft_ended": False,
        "accepted_whole": False,
        "segments": segments[: 1 + refused],
        "judge_path": "packed",
        "judge_passes": 1,
        "judge_rows": 40,
        "mean_draft_logprob": -0.3,
        "target_tokens": 6,
        "draft_s": 0.1,
        "judge_s": 0.1,
        "decode_s": 0.3,
    }
    spans = [
        {"author": "draft", "start": 0, "stop": 5, "text": "The draft began well.\n"},
        {"author": "target", "start": 5, "stop": 11, "text": "The target ended it. </script><b>"},
    ]
    counters = {
        "target_calls": 9,
        "target_rows": 60,
        "judge_passes": 1,
        "judge_rows": 40,
        "draft_calls": 9,
        "draft_rows": 20,
        "draft_tokens": 9,
        "kept_draft_tokens": 5,
        "inner_steps": 0,
        "offered_by_depth": [],
        "accepted_by_depth": [],
    }
    times = {"prefill_s": 0.1, "draft_s": 0.1, "judge_s": 0.1, "decode_s": 0.3, "wall_s": 0.7, "first_token_s": 0.3}
    return {
        "id": key,
        "prompt": "A question?",
        "correct": correct,
        "detail": "",
        "error": None,
        "result": {
            "text": "",
            "tokens": list(range(11)),
            "prompt_tokens": 4,
            "stop": "end_token",
            "spans": spans,
            "rounds": [entry],
            "counters": counters,
            "times": times,
            "judge_path": "packed",
            "notes": [],
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    kinds = [
        ("good", True, False),
        ("cut", True, True),
        ("bad", False, False),
        ("fine", True, False),
        ("last", True, False),
    ]
    summary = {
        "accuracy": 0.8,
        "requests": 5,
        "new_tokens": 55,
        "target_calls": 45,
        "draft_tokens": 29,
        "kept_draft_tokens": 25,
        "tokens_per_s": 15.0,
        "wall_s": 3.5,
    }
    page = render_trace(
        {
            "schema_version": 1,
            "status": "finished",
            "title": "A run",
            "config": {"seed": 1},
            "provenance": {"device": "one CPU", "command": "run.py"},
            "arms": [
                {"name": "parse", "description": "", "summary": summary, "requests": [request(*kind) for kind in kinds]}
            ],
        }
    )
    (folder / "plain.html").write_text(page, "utf-8")
    watched = page.replace("<title>", WATCH + "<title>").replace("</body>", REPORT + "</body>")
    (folder / "watched.html").write_text(watched, "utf-8")
    return folder


def report_of(folder: Path, *arguments: str) -> dict[str, Any]:
    dom = browse(folder / "watched.html", "--dump-dom", *arguments).stdout
    found = re.search(r'<pre id="report">(.*?)</pre>', dom, re.S)
    assert found, "the page's scripts did not run to their end"
    loaded: dict[str, Any] = json.loads(html.unescape(found[1]))
    return loaded


@pytest.fixture(scope="module", params=["light", "dark"])
def report(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    return report_of(folder, *([DARK] if request.param == "dark" else [])) | {"mode": request.param}


def test_mode_is_followed(report):
    assert (luminance(report["looks"][CANVAS]["background"]) < 0.5) == (report["mode"] == "dark")


def test_kinds_of_text_differ_in_colour_and_in_texture(report):
    for one, other in itertools.combinations((report["looks"][kind] for kind in KINDS), 2):
        assert one["color"] != other["color"]
        assert (one["background"], one["image"]) != (other["background"], other["image"])
        assert (one["line"], one["stroke"]) != (other["line"], other["stroke"]), "for the colour-blind"
    assert report["looks"][".refused"]["line"] == "line-through"


def test_text_is_readable(report):
    canvas = report["looks"][CANVAS]["background"]
    for kind in KINDS:
        own = report["looks"][kind]["background"]
        behind = own if len(channels(own)) == 3 else canvas  # rgba(…, 0): see-through
        low, high = sorted(map(luminance, (report["looks"][kind]["color"], behind)))
        assert (high + 0.05) / (low + 0.05) >= READABLE, kind


def test_nothing_failed_and_nothing_was_fetched(report):
    assert report["failures"] == []
    assert report["resources"] == 0


def test_filters_and_links_work(report):
    assert report["all"] == ["good", "cut", "bad", "fine", "last"]
    assert report["wrong"] == ["bad"]
    assert report["both"] == []
    assert report["refused"] == ["cut"]
    assert report["opened"], "a link to a folded request opens it"


@pytest.mark.parametrize("width", [1280, 500])  # 500: the narrowest window of a headless browser
def test_screenshot_is_not_blank(folder, width):
    shot = folder / f"{width}.png"
    browse(folder / "plain.html", f"--screenshot={shot}", f"--window-size={width},1600")
    assert is_drawn_on(shot)


def test_a_narrow_window_does_not_scroll_sideways(folder):
    assert report_of(folder, "--window-size=500,900")["sideways"] == 0
