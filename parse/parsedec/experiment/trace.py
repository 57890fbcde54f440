"""Render the record of a run as one self-contained HTML page: who wrote what, what was refused, what it cost.

The page needs no network and no other file. This module turns the record into a view (what is said);
`trace.html.j2` beside it only lays the view out (how it looks), with every value HTML-escaped.
Words as in the record: arm, request, round, segment, span; a *piece* is a run of text drawn in one style.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from parsedec.errors import ParsedecError
from parsedec.experiment.html import rendered
from parsedec.experiment.record import SCHEMA_VERSION, command_line, to_json, write_text
from parsedec.experiment.summary import summarise
from parsedec.types import Result

Json = Mapping[str, Any]

TEMPLATE = Path(__file__).parent / "trace.html.j2"
OPEN_CARDS = 3  # requests that are unfolded when the page is opened
PACKAGES_SHOWN = ("parsedec", "torch", "transformers")  # in the header; all of them are in the provenance
PHASES = ("prefill", "draft", "judge", "decode")
UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Chip:
    """A judge's score at a cut. `look`: pass (kept to here), fail (first refusal), after it, or unasked."""

    look: str
    label: str
    hint: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Text in one style. `kind`: draft (kept), refused or target.

    mark        number of the round that starts here
    fresh_line  drawn on a new line: it replaces refused text that had begun a line
    """

    kind: str
    text: str
    chip: Chip | None = None
    mark: int | None = None
    fresh_line: bool = False

    @property
    def body(self) -> str:
        """The text up to its trailing white space, so that a chip stays on the line it belongs to."""
        return self.text.rstrip()

    @property
    def tail(self) -> str:
        return self.text[len(self.body) :]


class SpanReader:
    """Hands out the text of an answer in order, so many tokens at a time.

    Spans of one author may have been merged across rounds, and the record holds no text offset of a token:
    there the split is taken where the caller expects it (`chars`), else estimated and moved to white space.
    """

    def __init__(self, spans: Sequence[Json]) -> None:
        self._left = [(str(s["author"]), int(s["stop"]) - int(s["start"]), str(s["text"])) for s in spans]

    def take(self, author: str, tokens: int, chars: int | None = None) -> str:
        """The next `tokens` tokens as far as `author` wrote them."""
        taken = ""
        while tokens > 0 and self._left and self._left[0][0] == author:
            _, size, text = self._left.pop(0)
            if size <= tokens:
                taken, tokens = taken + text, tokens - size
                continue
            at = near_space(text, tokens / size) if chars is None else max(0, chars - len(taken))
            self._left.insert(0, (author, size - tokens, text[at:]))
            return taken + text[:at]
        return taken

    def until(self, author: str | None) -> Iterator[Piece]:
        """What is left before the next span of `author`; None: everything."""
        while self._left and self._left[0][0] != author:
            kind, _, text = self._left.pop(0)
            if text:
                yield Piece(kind, text)


def near_space(text: str, share: float) -> int:
    """The offset closest to `share` of the text at which a word ends."""
    goal = len(text) * share
    ends = [i for i in range(1, len(text)) if text[i].isspace() and not text[i - 1].isspace()]
    return min([*ends, len(text)], key=lambda i: abs(i - goal))


def answer_pieces(result: Json) -> list[Piece]:
    """The answer in order, with the refused segments where they were refused."""
    reader = SpanReader(result["spans"])
    pieces: list[Piece] = []
    for number, entry in enumerate(result["rounds"], 1):
        new = list(round_pieces(entry, reader))
        if new and len(result["rounds"]) > 1:
            new[0] = replace(new[0], mark=number)
        pieces += new
    return with_fresh_lines(pieces + list(reader.until(None)))


def round_pieces(entry: Json, reader: SpanReader) -> Iterator[Piece]:
    """Kept draft text, refused draft text, then what the target wrote."""
    segments = entry["segments"]
    chips = segment_chips(segments)
    kept = [i for i, segment in enumerate(segments) if segment["kept"]]
    if entry["kept_tokens"]:
        yield from reader.until("draft")
    text = reader.take("draft", entry["kept_tokens"], sum(len(segments[i]["text"]) for i in kept))
    for i in kept[:-1]:
        size = len(segments[i]["text"])
        yield Piece("draft", text[:size], chips[i])
        text = text[size:]
    if text or kept:
        yield Piece("draft", text, chips[kept[-1]] if kept else None)
    for segment, chip in zip(segments, chips, strict=True):
        if not segment["kept"]:
            yield Piece("refused", segment["text"], chip)
    if written := reader.take("target", entry["target_tokens"]):
        yield Piece("target", written)


def segment_chips(segments: Sequence[Json]) -> list[Chip]:
    """One chip per segment; the first refused one is where the answer left the draft."""
    chips: list[Chip] = []
    for number, segment in enumerate(segments, 1):
        score, kept, before = segment["score"], segment["kept"], segments[: number - 1]
        look = "pass" if kept else "fail" if all(s["kept"] for s in before) else "after"
        said = "not asked" if score is None else f"score {score:.4f}, {'kept' if kept else 'refused'}"
        hint = f"Prefix {number} of {len(segments)}: {said} ({plural(segment['tokens'], 'more token')})"
        chips.append(Chip("unasked" if score is None else look, decimal(score), hint))
    return chips


def with_fresh_lines(pieces: Sequence[Piece]) -> list[Piece]:
    """Start a line after refused text where, without that text, a line would start."""
    placed: list[Piece] = []
    answer, drawn = "\n", "\n"  # the text so far, without and with what was refused
    for piece in pieces:
        stands = piece.kind != "refused"
        fresh = stands and answer.endswith("\n") and not drawn.endswith("\n")
        placed.append(replace(piece, fresh_line=fresh))
        answer, drawn = (piece.text or answer) if stands else answer, piece.text or drawn
    return placed


def phase_view(times: Json, scale_s: float) -> list[dict[str, Any]]:
    """The parts of a request's wall-clock; `share` is of the request, `width` (per cent) of `scale_s`."""
    parts = {name: float(times[f"{name}_s"]) for name in PHASES}
    parts["other"] = max(0.0, float(times["wall_s"]) - sum(parts.values()))
    total = max(sum(parts.values()), 1e-12)
    longest = max(scale_s, total)
    return [
        {"name": name, "seconds": spent, "share": spent / total, "width": 100 * spent / longest}
        for name, spent in parts.items()
    ]


def request_view(arm: str, request: Json, scale_s: float) -> dict[str, Any]:
    """What one arm made of one request; `request` is empty where the run ended before."""
    error, result = request.get("error"), request.get("result")
    graded = {True: "correct", False: "wrong", None: "ungraded"}[request.get("correct")]
    view = {
        "arm": arm,
        "verdict": "error" if error else graded if result else "missing",
        "error": error,
        "detail": request.get("detail") or "",
        "result": result,
        "refused": False,
    }
    if not result:
        return view
    drafted = result["counters"]["draft_tokens"]
    return view | {
        "pieces": answer_pieces(result),
        "phases": phase_view(result["times"], scale_s),
        "drafted": any(r["drafted"] for r in result["rounds"]),
        "refused": any(not s["kept"] for r in result["rounds"] for s in r["segments"]),
        "kept_share": result["counters"]["kept_draft_tokens"] / drafted if drafted else None,
    }


def by_id(requests: Sequence[Json]) -> dict[tuple[str, int], Json]:
    """Requests by id and repetition: a run may answer one request several times."""
    seen: Counter[str] = Counter()
    found: dict[tuple[str, int], Json] = {}
    for request in requests:
        seen[request["id"]] += 1
        found[request["id"], seen[request["id"]]] = request
    return found


def card_views(arms: Sequence[Json]) -> list[dict[str, Any]]:
    """One card per request, in the order of first appearance, holding every arm's answer."""
    keyed = [by_id(arm["requests"]) for arm in arms]
    cards = []
    for number, key in enumerate(dict.fromkeys(key for requests in keyed for key in requests), 1):
        found = [requests.get(key, {}) for requests in keyed]
        scale_s = max(float(r["result"]["times"]["wall_s"]) if r.get("result") else 0.0 for r in found)
        runs = [request_view(arm["name"], r, scale_s) for arm, r in zip(arms, found, strict=True)]
        cards.append(
            {
                "number": number,
                "id": key[0],
                "open": number <= OPEN_CARDS,
                "runs": runs,
                "prompt": next(r["prompt"] for r in found if r),
                "wrong": any(run["verdict"] in ("wrong", "error") for run in runs),
                "refused": any(run["refused"] for run in runs),
            }
        )
    return cards


def arm_views(arms: Sequence[Json], comparison: Sequence[Json]) -> list[dict[str, Any]]:
    """The rows of the summary table. Speed-ups share one axis that contains 1; `axis` is per cent of it."""
    comparison = [row for row in comparison if row["speedup"] is not None]
    ends = [1.0, *(float(x) for row in comparison for x in _marks(row).values())]
    lo, length = min(ends), max(max(ends) - min(ends), 1e-9)
    gains = {row["arm"]: row for row in comparison}
    views = []
    for arm in arms:
        summary, gain = arm["summary"], gains.get(arm["name"])
        drafted = summary.get("draft_tokens")
        marks = {"one": 1.0} | (_marks(gain) if gain else {})
        views.append(
            {
                "name": arm["name"],
                "description": arm.get("description"),
                "summary": summary,
                "gain": gain,
                "kept_share": summary.get("kept_draft_tokens", 0) / drafted if drafted else None,
                "axis": {name: round(4 + 92 * (x - lo) / length, 2) for name, x in marks.items()},  # 4 of margin
            }
        )
    return views


def _marks(row: Json) -> dict[str, float]:
    """The speed-up and the ends of its interval, if it has one."""
    return {x: float(row[x]) for x in ("speedup_low", "speedup", "speedup_high") if row[x] is not None}


def page_view(record: Json) -> dict[str, Any]:
    """Everything the template needs."""
    provenance, config, arms = record.get("provenance") or {}, record.get("config") or {}, record["arms"]
    packages, commit = provenance.get("packages") or {}, provenance.get("git_sha")
    facts = [
        provenance.get("device"),
        *(f"{p} {packages[p]}" for p in PACKAGES_SHOWN if p in packages),
        commit and f"commit {commit[:10]}",
        "seed" in config and f"seed {config['seed']}",
    ]
    return {
        "title": record["title"],
        "command": command_line(record),
        "status": record["status"],
        "facts": list(filter(None, facts)),
        "compared": bool(record.get("comparison")),
        "baseline": record.get("baseline", arms[0]["name"] if arms else None),
        "arms": arm_views(arms, record.get("comparison") or ()),
        "cards": card_views(arms),
        "folded": {
            name: json.dumps(part, indent=2, ensure_ascii=False)
            for name, part in (("Configuration", config), ("Provenance", provenance))
            if part
        },
    }


def decimal(value: float | None, digits: int = 2) -> str:
    unknown = value is None or not math.isfinite(value)
    return UNKNOWN if unknown else f"{value:,.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def seconds(value: float | None) -> str:
    """A duration in the unit that keeps it short."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value >= 60:
        return "{} min {:02} s".format(*divmod(round(value), 60))
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.{int(0 < value < 0.01)}f} ms"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def wrap_indents(text: str) -> Markup:
    """Escaped text whose indentation can be styled: an underline below bare white space is noise."""
    return Markup(re.sub(r"(?m)^[ \t]+", r'<span class="indent">\g<0></span>', str(escape(text))))


def render_trace(record: Mapping[str, Any]) -> str:
    """The page for one run's record."""
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ParsedecError(
            f"The record has schema_version={version!r}; this page is made from version "
            f"{SCHEMA_VERSION}. Render it with the parsedec that wrote it, or run again."
        )
    return rendered(TEMPLATE, page_view(record), (decimal, percent, seconds, plural, wrap_indents))


def write_trace(record: Mapping[str, Any] | Result, path: str | os.PathLike[str]) -> Path:
    """Write the page of a record, or of one result, atomically."""
    return write_text(render_trace(_record_of(record) if isinstance(record, Result) else record), Path(path))


def _record_of(result: Result) -> dict[str, Any]:
    """A record of one request, whose prompt is not known."""
    graded = {"correct": None, "detail": "", "error": None}
    request = {"id": "1", "prompt": "(a result does not hold it)", **graded, "result": to_json(result)}
    arm = {"name": "result", "description": "", "summary": summarise([request]), "requests": [request]}
    head = {"schema_version": SCHEMA_VERSION, "status": "finished", "title": "One result"}
    return head | {"config": {}, "provenance": {}, "arms": [arm]}
