"""The report in a real browser: it renders in light and dark, narrow and on paper, and fetches nothing."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from browser import DARK, NEEDS_BROWSER, READABLE, WATCH, browse, is_drawn_on, luminance
from parsedec.experiment.record import read_record

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

from parsedec.reporting.page import write_report

pytestmark = NEEDS_BROWSER

RECORDS = Path(__file__).resolve().parents[2] / "experiments" / "records"
CLOSED = "default-src 'none'"

LOOK = """<script>
addEventListener("load", () => {
  const pictures = [...document.querySelectorAll(".plot svg")];
  const words = element => ({color: getComputedStyle(element).fill, size: element.getBoundingClientRect().width});
  const report = {
    failures, resources: performance.getEntriesByType("resource").length,
    page: getComputedStyle(document.body).backgroundColor,
    card: getComputedStyle(document.querySelector("figure")).backgroundColor,
    ink: getComputedStyle(document.body).color, soft: getComputedStyle(document.querySelector("figcaption p")).color,
    pictures: pictures.map(svg => ({
      width: svg.getBoundingClientRect().width, height: svg.getBoundingClientRect().height,
      inside: svg.getBBox().width > 100, words: [...svg.querySelectorAll("text")].slice(0, 3).map(words)})),
    sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    folded: [...document.querySelectorAll("figure details")].filter(one => one.open).length,
  };
  const out = document.createElement("pre");
  out.id = "report";
  out.textContent = JSON.stringify(report);
  document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    paths = [RECORDS / name / "record.json" for name in ("zoo_refused", "zoo_judge")]
    plain = write_report([(path, read_record(path)) for path in paths], folder)
    text = plain.read_text("utf-8")
    assert CLOSED in text
    watched = text.replace(CLOSED, f"{CLOSED}; script-src 'unsafe-inline'")  # for the test's own script
    watched = watched.replace("<title>", WATCH + "<title>", 1).replace("</body>", LOOK + "</body>")
    (folder / "watched.html").write_text(watched, "utf-8")
    return folder


def report_of(folder: Path, *arguments: str) -> dict[str, Any]:
    done = browse(folder / "watched.html", "--dump-dom", *arguments)
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S)
    assert found, "the page's scripts did not run to their end"
    loaded: dict[str, Any] = json.loads(html.unescape(found[1]))
    return loaded | {"console": [line for line in done.stderr.splitlines() if ":CONSOLE" in line]}


@pytest.fixture(scope="module", params=["light", "dark"])
def report(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    mode = [DARK] if request.param == "dark" else []
    return report_of(folder, "--window-size=1280,1600", *mode) | {"mode": request.param}


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_nothing_failed_and_nothing_was_fetched(report):
    assert report["failures"] == []
    assert report["console"] == []
    assert report["resources"] == 0


def test_text_is_readable_in_both_modes_in_pictures_too(report):
    assert (luminance(report["page"]) < 0.5) == (report["mode"] == "dark")
    assert contrast(report["ink"], report["page"]) >= READABLE
    assert contrast(report["soft"], report["card"]) >= READABLE
    words = [word for picture in report["pictures"] for word in picture["words"]]
    assert words
    for word in words:
        assert contrast(word["color"], report["card"]) >= READABLE


def test_pictures_fill_the_page(report):
    assert len(report["pictures"]) >= 8
    for picture in report["pictures"]:
        assert picture["width"] > 700
        assert picture["height"] > 100
        assert picture["inside"]
    assert report["folded"] == 0


def test_a_narrow_window_does_not_scroll_sideways(folder):
    assert report_of(folder, "--window-size=500,900")["sideways"] == 0


def test_it_is_drawn(folder):
    shot = folder / "shot.png"
    browse(folder / "report.html", f"--screenshot={shot}", "--window-size=1280,1600")
    assert is_drawn_on(shot)


def test_it_prints(folder):
    paper = folder / "paper.pdf"
    browse(folder / "report.html", f"--print-to-pdf={paper}", "--no-pdf-header-footer", DARK)
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert 2 <= pages <= 12
