"""The trace page says what the record says: who wrote what, in order, escaped, and without any other file."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from parsedec.errors import ParsedecError
from parsedec.experiment import trace
from parsedec.types import (
    Author,
    Counters,
    JudgePath,
    PhaseTimes,
    Result,
    Round,
    Segment,
    Span,
    StopReason,
)

KEPT, REFUSED = True, False


def words(text: str) -> int:
    """One token a word: enough for a record that is consistent with itself."""
    return len(text.split())


def segment(text: str, score: float | None, kept: bool) -> Segment:
    return Segment(text=text, tokens=words(text), score=score, kept=kept)


def drafted(*segments: Segment, target: str = "", whole: bool = False) -> tuple[Round, str]:
    """A drafted round and the text the target wrote after it."""
    kept = sum(s.tokens for s in segments if s.kept) + whole  # whole: the drafted end token is kept too
    judged = sum(s.tokens for s in segments)
    return Round(
        drafted=True,
        judged_tokens=judged,
        kept_tokens=kept,
        draft_ended=True,
        accepted_whole=whole,
        segments=segments,
        judge_path=JudgePath.PACKED,
        judge_passes=1,
        judge_rows=judged + 9,
        mean_draft_logprob=-0.5,
        target_tokens=words(target),
        draft_s=0.2,
        judge_s=0.1,
        decode_s=0.4,
    ), target


def alone(target: str) -> tuple[Round, str]:
    return Round(drafted=False, target_tokens=words(target), decode_s=0.4), target


def result(*rounds: tuple[Round, str], merge: bool = True, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON form of a result. `merge`: neighbouring spans of one author are one, across rounds too."""
    spans: list[Span] = []
    counters = Counters(
        target_calls=5,
        target_rows=50,
        draft_tokens=sum(entry.judged_tokens + entry.draft_ended for entry, _ in rounds),
        kept_draft_tokens=sum(entry.kept_tokens for entry, _ in rounds),
    )
    for entry, target in rounds:
        draft = "".join(s.text for s in entry.segments if s.kept)
        for author, text, size in (
            (Author.DRAFT, draft, entry.kept_tokens),
            (Author.TARGET, target, entry.target_tokens),
        ):
            start = spans[-1].stop if spans else 0
            if size and merge and spans and spans[-1].author == author:
                spans[-1] = Span(author=author, start=spans[-1].start, stop=start + size, text=spans[-1].text + text)
            elif size:
                spans.append(Span(author=author, start=start, stop=start + size, text=text))
    finished = Result(
        text="".join(s.text for s in spans),
        tokens=tuple(range(spans[-1].stop)),
        prompt_tokens=7,
        stop=StopReason.END_TOKEN,
        spans=tuple(spans),
        rounds=tuple(r for r, _ in rounds),
        counters=counters,
        times=PhaseTimes(prefill_s=0.1, draft_s=0.2, judge_s=0.1, decode_s=0.4, wall_s=1.0, first_token_s=0.4),
        judge_path=JudgePath.PACKED,
        notes=notes,
    )
    loaded: dict[str, Any] = json.loads(json.dumps(asdict(finished)))
    return loaded


def request(outcome: dict[str, Any] | None, key: str = "q1", **changes: Any) -> dict[str, Any]:
    return {
        "id": key,
        "prompt": f"Prompt of {key}",
        "correct": True,
        "detail": "",
        "error": None,
        "result": outcome,
    } | changes


def arm(*requests: dict[str, Any], name: str = "parse") -> dict[str, Any]:
    return {
        "name": name,
        "description": "",
        "requests": list(requests),
        "summary": {
            "accuracy": 0.5,
            "requests": len(requests),
            "new_tokens": 1234,
            "target_calls": 56,
            "judge_passes": 2,
            "draft_tokens": 200,
            "kept_draft_tokens": 150,
            "decode_s": 1.0,
            "wall_s": 2.0,
            "tokens_per_s": 61.7,
        },
    }


def record(*arms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "status": "finished",
        "title": "A run",
        "config": {"seed": 17},
        "arms": list(arms),
        "provenance": {
            "git_sha": "0123456789abcdef",
            "device": "one CPU",
            "packages": {"torch": "2.1"},
            "command": "run.py seed=17",
        },
    } | changes


MIXED = (segment("Good start.\n", 0.93, KEPT), segment("bad turn\n", 0.21, REFUSED), segment("worse end", 0.4, REFUSED))


class Page(HTMLParser):
    """What a reader sees of a page: elements with their classes and text, the answers as (kind, text)."""

    VOID = frozenset({"br", "meta", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, frozenset[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.answers: list[list[tuple[str, str]]] = []
        self.texts: list[tuple[frozenset[str], str]] = []
        self.feed(html)
        assert not self.stack, f"unclosed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            classes = frozenset((dict(attrs).get("class") or "").split())
            self.stack.append((tag, classes))
            if "answer" in classes:
                self.answers.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = frozenset().union(*(classes for _, classes in self.stack))
        self.texts.append((inside, data))
        if "answer" not in inside:
            return
        kinds = ("chip", "mark", "stop", "draft", "refused", "target")
        kind = next((k for k in kinds if k in inside), "bare")
        last = self.answers[-1]
        if last and last[-1][0] == kind:
            last[-1] = (kind, last[-1][1] + data)
        else:
            last.append((kind, data))

    def by_class(self, name: str) -> list[str]:
        return [text for classes, text in self.texts if name in classes and text.strip()]

    def answer(self, number: int = 0) -> list[tuple[str, str]]:
        """The flow of texts alone, without chips, marks and stop reason; neighbours of one kind joined."""
        flow: list[tuple[str, str]] = []
        for kind, text in self.answers[number]:
            if kind in ("chip", "mark", "stop"):
                continue
            if flow and flow[-1][0] == kind:
                text = flow.pop()[1] + text
            flow.append((kind, text))
        return flow


def page_of(*arms: dict[str, Any], **changes: Any) -> Page:
    return Page(trace.render_trace(record(*arms, **changes)))


def test_three_kinds_of_text_stand_in_order():
    page = page_of(arm(request(result(drafted(*MIXED, target="Right end.")))))
    assert page.answer() == [("draft", "Good start.\n"), ("refused", "bad turn\nworse end"), ("target", "Right end.")]


def test_a_chip_follows_every_cut_and_only_the_first_refusal_looks_refused():
    pieces = trace.answer_pieces(result(drafted(*MIXED, target="Right end.")))
    assert [(p.chip.label, p.chip.look) for p in pieces if p.chip] == [
        ("0.93", "pass"),
        ("0.21", "fail"),
        ("0.40", "after"),
    ]
    page = Page(trace.render_trace(record(arm(request(result(drafted(*MIXED, target="Right end.")))))))
    assert [kind for kind, _ in page.answers[0]][:3] == ["draft", "chip", "draft"], "before the line break"


def test_a_score_the_judge_was_not_asked_for_says_so():
    pieces = trace.answer_pieces(result(drafted(segment("All of it.", None, KEPT), whole=True)))
    assert [(p.chip.label, p.chip.look) for p in pieces if p.chip] == [("–", "unasked")]


def test_draft_accepted_whole():
    page = page_of(
        arm(request(result(drafted(segment("First. ", 0.9, KEPT), segment("Last.", 0.95, KEPT), whole=True))))
    )
    assert page.answer() == [("draft", "First. Last.")]
    assert "draft accepted whole" in page.by_class("rounds")
    assert "3 of 3 tokens" in "".join(page.by_class("rounds")), "two words and the end token"


def test_nothing_kept_puts_the_refused_text_before_the_target():
    page = page_of(arm(request(result(drafted(segment("No.", 0.1, REFUSED), target="Yes indeed.")))))
    assert page.answer() == [("refused", "No."), ("target", "Yes indeed.")]
    assert "nothing kept of 1 segment" in page.by_class("rounds")


@pytest.mark.parametrize("merge", [True, False])
def test_refused_text_of_a_later_round_splits_the_target_where_that_round_began(merge):
    page = page_of(
        arm(
            request(
                result(
                    drafted(segment("One.", 0.9, KEPT), target=" two three"),
                    drafted(segment(" wrong", 0.1, REFUSED), target=" four five six"),
                    merge=merge,
                )
            )
        )
    )
    assert page.answer() == [
        ("draft", "One."),
        ("target", " two three"),
        ("refused", " wrong"),
        ("target", " four five six"),
    ]
    assert [text for kind, text in page.answers[0] if kind == "mark"] == ["1", "2"]


def test_gate_skipped_rounds_have_target_text_only():
    fine = drafted(segment(" Fine.", 0.9, KEPT), whole=True)
    page = page_of(arm(request(result(alone("Hello there."), fine))))
    assert page.answer() == [("target", "Hello there."), ("draft", " Fine.")]
    assert "no draft: the target wrote alone" in page.by_class("rounds")


def test_a_request_without_any_draft_needs_no_rounds_table():
    page = page_of(arm(request(result(alone("Hello there.")))))
    assert page.by_class("alone") == ["No draft: the target wrote alone."]
    assert not page.by_class("rounds")


def test_spans_beyond_the_rounds_are_still_shown():
    outcome = result(alone("Hello there."))
    outcome["rounds"] = []
    assert page_of(arm(request(outcome))).answer() == [("target", "Hello there.")]


def test_target_text_that_replaces_a_refused_line_starts_a_line():
    pieces = trace.answer_pieces(result(drafted(*MIXED, target="Right end.")))
    assert [p.fresh_line for p in pieces] == [False, False, False, True]
    inline = drafted(segment("Good ", 0.9, KEPT), segment("bad", 0.2, REFUSED), target="end")
    assert not any(p.fresh_line for p in trace.answer_pieces(result(inline)))


def test_indentation_survives():
    code = "def f():\n    return 1\n"
    page = page_of(arm(request(result(drafted(segment(code, 0.9, KEPT), whole=True)))))
    assert page.answer() == [("draft", code)]


def test_everything_from_the_record_is_escaped():
    evil = """</script><script>alert(1)</script><b>"bold"</b> & 'more' {{ 7 * 7 }}"""
    outcome = result(drafted(segment(evil, 0.9, KEPT), segment(evil, 0.2, REFUSED), target=evil), notes=(evil,))
    page = page_of(
        arm(request(outcome, evil, prompt=evil, detail=evil), request(None, "q2", error=evil), name=evil),
        title=evil,
        command=evil,
        config={"seed": evil, evil: evil},
        status="interrupted",
    )
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.answer() == [("draft", evil), ("refused", evil), ("target", evil)]
    assert page.by_class("failure") == [evil]
    assert evil in page.by_class("prompt")
    assert not {"onclick", "onerror"} & {name for _, attrs in page.tags for name in attrs}


def test_page_is_self_contained():
    html = trace.render_trace(record(arm(request(result(drafted(*MIXED, target="Right end."))))))
    page = Page(html)
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert links
    assert all(link and link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"@import|url\(|https?://|fetch\(", html)
    assert any("default-src 'none'" in (attrs.get("content") or "") for _, attrs in page.tags)


def test_links_inside_the_page_lead_somewhere():
    page = page_of(
        arm(request(result(drafted(*MIXED, target="two three"), alone(" four"))), request(result(alone("Hi.")), "q2"))
    )
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links >= {"#request-1", "#request-2", "#request-1-arm-1-round-2"}
    assert {link[1:] for link in links if link} <= set(ids)


def test_header_names_machine_versions_seed_and_command():
    page = page_of(arm(request(result(alone("Hi.")))))
    assert page.by_class("facts")[:4] == ["one CPU", "torch 2.1", "commit 0123456789", "seed 17"]
    assert page.by_class("command") == ["python experiments/run.py seed=17"]
    assert page.by_class("status") == ["finished"]
    assert not page.by_class("notice")


@pytest.mark.parametrize(("status", "says"), [("interrupted", "was interrupted"), ("running", "had not ended")])
def test_an_unfinished_run_says_so(status, says):
    page = page_of(arm(request(result(alone("Hi.")))), status=status)
    assert page.by_class("status") == [status]
    assert says in page.by_class("notice")[0]


def test_a_request_with_an_error_shows_it_and_counts_as_wrong():
    page = page_of(arm(request(None, correct=None, error="PromptError: too long")))
    assert page.by_class("failure") == ["PromptError: too long"]
    assert any("data-wrong" in attrs for _, attrs in page.tags)
    assert not page.answers


def test_cards_carry_what_the_filters_ask_for():
    page = page_of(
        arm(
            request(result(drafted(*MIXED, target="Right end."))),
            request(result(alone("Hi.")), "q2", correct=False),
            request(result(alone("Hi.")), "q3", correct=None),
        )
    )
    cards = [attrs for tag, attrs in page.tags if tag == "details" and attrs.get("class") == "card"]
    assert [("data-wrong" in c, "data-refused" in c) for c in cards] == [(False, True), (True, False), (False, False)]


def test_first_cards_are_open():
    page = page_of(arm(*(request(result(alone("Hi.")), f"q{i}") for i in range(trace.OPEN_CARDS + 2))))
    cards = [attrs for tag, attrs in page.tags if tag == "details" and attrs.get("class") == "card"]
    assert [("open" in c) for c in cards] == [True] * trace.OPEN_CARDS + [False] * 2


def test_comparison_shows_the_arms_of_a_request_one_below_another():
    base = arm(request(result(alone("Base one."))), request(result(alone("Base two.")), "q2"), name="target alone")
    ours = arm(request(result(drafted(segment("Ours one.", 0.9, KEPT), whole=True))), name="parse")
    page = page_of(
        base, ours, comparison=[{"arm": "parse", "speedup": 1.87, "speedup_low": 1.61, "speedup_high": 2.09}]
    )
    headings = [text for text in page.by_class("run") if text in ("target alone", "parse")]
    assert headings == ["target alone", "parse", "target alone", "parse"]
    assert [page.answer(i) for i in range(3)] == [
        [("target", "Base one.")],
        [("draft", "Ours one.")],
        [("target", "Base two.")],
    ]
    assert page.by_class("missing").count("not run") == 2, "in the card's summary and at the arm"
    gains = [text.strip() for text in page.by_class("gain")]
    assert gains == ["Speed-up in tok/s, with interval", "baseline", "1.87×", "1.61 to 2.09"]


def test_speed_up_axis_holds_one_and_both_ends():
    rows = [
        {"arm": "a", "speedup": 0.8, "speedup_low": 0.7, "speedup_high": 0.9},
        {"arm": "b", "speedup": 2, "speedup_low": 1, "speedup_high": 3},
    ]
    first, second, base = trace.arm_views([arm(name=n) for n in ("a", "b", "base")], rows)
    assert first["axis"]["speedup_low"] == 4
    assert second["axis"]["speedup_high"] == 96
    assert base["axis"] == {"one": second["axis"]["speedup_low"]}


def test_a_run_without_comparison_has_no_speed_up_column():
    assert not page_of(arm(request(result(alone("Hi."))))).by_class("gain")


def test_summary_row_shows_counts_and_kept_share():
    said = " ".join(page_of(arm(request(result(alone("Hi."))))).by_class("arms"))
    for text in ("50.0 %", "1,234", "56", "75 %", "of 200", "61.7", "2.00 s"):
        assert text in said


def test_unknown_numbers_are_a_dash():
    blank = arm(request(result(alone("Hi.")), correct=None))
    blank["summary"] = {"accuracy": None, "tokens_per_s": float("nan")}
    assert page_of(blank).by_class("arms").count("–") == 5


def test_phases_add_up_and_compare_on_one_scale():
    times = {"prefill_s": 0.1, "draft_s": 0.2, "judge_s": 0.1, "decode_s": 0.4, "wall_s": 1.0}
    phases = trace.phase_view(times, scale_s=2.0)
    assert [p["name"] for p in phases] == ["prefill", "draft", "judge", "decode", "other"]
    assert sum(p["share"] for p in phases) == pytest.approx(1)
    assert sum(p["width"] for p in phases) == pytest.approx(50)
    assert phases[-1]["seconds"] == pytest.approx(0.2)


def test_counters_notes_and_stop_reason_are_shown():
    outcome = result(drafted(*MIXED, target="Right end."), notes=("forked judge: sliding window",))
    outcome["counters"] |= {"inner_steps": 3, "offered_by_depth": [3, 2], "accepted_by_depth": [2, 1]}
    page = page_of(arm(request(outcome)))
    assert page.by_class("notes") == ["forked judge: sliding window"]
    assert page.by_class("stop") == ["■ end token"]
    assert "".join(page.by_class("depths")) == "2/31/2"
    said = " ".join(page.by_class("counters"))
    for label in ("Target calls", "Draft tokens", "Prompt", "First token", "Inner steps"):
        assert label in said


def test_repeated_ids_keep_every_answer():
    page = page_of(arm(request(result(alone("First."))), request(result(alone("Second.")))))
    assert [page.answer(i) for i in (0, 1)] == [[("target", "First.")], [("target", "Second.")]]


def test_a_run_that_reached_no_request_still_renders():
    assert "No request was reached." in page_of(arm(), status="interrupted").by_class("quiet")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0 ms"), (0.0042, "4.2 ms"), (0.083, "83 ms"), (1.239, "1.24 s"), (119.7, "2 min 00 s")],
)
def test_durations_are_short(value, text):
    assert trace.seconds(value) == text


def test_another_schema_is_refused_with_advice():
    with pytest.raises(ParsedecError, match=r"schema_version=2.*version 1.*Render it"):
        trace.render_trace(record(schema_version=2))


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    goal = trace.write_trace(record(arm(request(result(alone("Old."))))), tmp_path / "new" / "trace.html")
    before = goal.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        trace.write_trace(record(arm(request(result(alone("New."))))), goal)
    assert goal.read_bytes() == before
    assert [p.name for p in goal.parent.iterdir()] == ["trace.html"]


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path):
    broken = record(arm(request(result(alone("broken \ud83d here")))))
    goal = trace.write_trace(broken, tmp_path / "trace.html")
    assert "broken ? here" in goal.read_text("utf-8")
