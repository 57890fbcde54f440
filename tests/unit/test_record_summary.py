"""Records survive what happens while they are written; summaries and comparisons give the numbers they promise."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from parsedec.errors import OutputExistsError, ParsedecError
from parsedec.experiment import claim as claims
from parsedec.experiment import record as records
from parsedec.experiment.claim import release
from parsedec.experiment.intervals import FEWEST
from parsedec.experiment.record import (
    SCHEMA_VERSION,
    command_line,
    earlier_record,
    provenance,
    read_record,
    to_json,
    write_record,
)
from parsedec.experiment.summary import compare, summarise, wilson
from parsedec.experiment.table import columns, markdown, rows, terminal
from parsedec.experiment.trace import arm_views
from parsedec.meter import Tally
from parsedec.types import Author, Sampling, Span

CONFIG = {"seed": 0, "task": {"n": 2}, "resume": False, "output": "a"}
RECORD = {"schema_version": SCHEMA_VERSION, "config": CONFIG, "text": "naïve 🎉", "none": None}

# --- writing and reading ---


def test_record_round_trip(tmp_path):
    path = write_record(RECORD, tmp_path / "new" / "folder" / "record.json")
    assert read_record(path) == RECORD
    assert os.listdir(path.parent) == ["record.json"]
    assert path.stat().st_mode & 0o777 == 0o644


class FullDisk:
    """A file that takes some characters and then has no room, as `os.fdopen` gives it."""

    def __init__(self, handle, *_, **__):
        self.sink = handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.sink)

    def write(self, text):
        os.write(self.sink, text[:10].encode())
        raise OSError(28, "No space left on device")


@pytest.fixture
def failing(request, monkeypatch):
    """A write that fails: in the middle, or when the finished file should take its place."""
    if request.param == "in the middle":
        monkeypatch.setattr(records.os, "fdopen", FullDisk)
    else:
        monkeypatch.setattr(records.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))


FAILURES = pytest.mark.parametrize("failing", ["in the middle", "at the end"], indirect=True)


@FAILURES
def test_a_write_that_fails_leaves_the_old_record(tmp_path, failing):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(RECORD))
    with pytest.raises(OSError, match=r"No space|Permission"):
        write_record(RECORD | {"text": "new"}, path)
    assert read_record(path) == RECORD


@FAILURES
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, failing):
    with pytest.raises(OSError, match=r"No space|Permission"):
        write_record(RECORD, tmp_path / "record.json")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ["in the middle"], indirect=True)
def test_a_write_that_fails_says_what_is_kept_and_how_to_go_on(tmp_path, failing):
    def ended_by(error):
        try:
            raise error
        finally:
            write_record(RECORD, path)

    path = tmp_path / "record.json"
    with pytest.raises(ParsedecError, match=r"record\.json: .*No space left.* bytes.*Nothing of this run.*again\.$"):
        write_record(RECORD, path)
    path.write_text(json.dumps(RECORD))
    with pytest.raises(ParsedecError, match=rf"is kept: resume=true output={tmp_path} goes on from it\.$") as refused:
        write_record(RECORD, path)
    with pytest.raises(ParsedecError, match=r"from it\. The run had failed before that: ValueError: too odd\.$"):
        ended_by(ValueError("too odd"))
    with pytest.raises(ParsedecError, match=r"goes on from it\.$"):  # the last of several saves that fail
        ended_by(refused.value)
    with pytest.raises(ParsedecError, match=r"saved last is kept\.$"):
        write_record(RECORD | {"config": {}}, path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read.*No such file.*written by a run"),
        ("", "cannot read.*Expected a record.json"),
        ('{"schema_version": 1, "conf', "cannot read"),
        (b"\xff\xfe\x00", "cannot read"),
        ("[1, 2]", "'list'; expected 1"),
        ("{}", "schema_version None; expected 1"),
        ('{"schema_version": 999}', "schema_version 999; expected 1.*another version"),
    ],
    ids=["missing", "empty", "cut off", "not text", "a list", "no record", "another version"],
)
def test_what_is_no_record_is_refused(tmp_path, content, complaint):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParsedecError, match=complaint) as refused:
        read_record(path)
    assert str(path) in str(refused.value)


def test_new_folder_has_no_earlier_record(tmp_path):
    assert earlier_record(tmp_path / "record.json", CONFIG, resume=False) is None
    assert earlier_record(tmp_path / "record.json", CONFIG, resume=True) is None
    assert earlier_record(tmp_path / "record.json", CONFIG, resume=None) is None


def test_a_record_is_never_overwritten(tmp_path):
    path = write_record(RECORD, tmp_path / "record.json")
    with pytest.raises(OutputExistsError, match=r"exists already.*output=DIR.*resume=true"):
        earlier_record(path, CONFIG, resume=False)
    with pytest.raises(OutputExistsError, match=r"cannot be resumed.*output=DIR") as refused:
        earlier_record(path, CONFIG, resume=None)
    assert "resume=true" not in str(refused.value)


CLAIMS = """
import sys
from pathlib import Path
from parsedec.experiment.claim import claim
claim(Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process that has begun to write in the folder and has saved nothing."""
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIMS, tmp_path / "record.json"], env=paths, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("resume", [True, False, None])
def test_a_folder_where_another_run_has_begun_is_refused(tmp_path, other_run, resume):
    """Though it holds no record yet: what is finished first would be overwritten by who is finished last."""
    other_run.send_signal(signal.SIGSTOP)
    with pytest.raises(OutputExistsError, match=rf"another run \(process {other_run.pid} on .*output=DIR"):
        earlier_record(tmp_path / "record.json", CONFIG, resume=resume)


def test_a_killed_run_does_not_block_its_resumption(tmp_path, other_run):
    other_run.kill()
    other_run.wait()
    path = tmp_path / "record.json"
    assert earlier_record(path, CONFIG, resume=True) is None
    assert earlier_record(path, CONFIG, resume=True) is None  # of the same process, as in a notebook
    release(path)
    assert os.listdir(tmp_path) == []


def test_what_is_refused_or_ended_frees_the_folder(tmp_path, other_run):
    other_run.communicate("")  # it ends by itself
    path = write_record(RECORD, tmp_path / "record.json")
    with pytest.raises(OutputExistsError):
        earlier_record(path, CONFIG, resume=False)
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_folder_that_cannot_be_locked_is_read(tmp_path, monkeypatch):
    path = write_record(RECORD, tmp_path / "record.json")
    monkeypatch.setattr(claims.os, "open", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    assert earlier_record(path, CONFIG, resume=True) == RECORD


def test_resuming_needs_the_same_configuration(tmp_path):
    path = write_record(RECORD, tmp_path / "record.json")
    same = CONFIG | {"resume": True, "output": "elsewhere"}
    assert earlier_record(path, same, resume=True) == RECORD
    for changed, said in [
        ({"seed": 1}, "seed: 0, now 1"),
        ({"task": {"n": 3}}, r"task\.n: 2, now 3"),
        ({"extra": 1}, "extra: null, now 1"),
        ({"task": {"n": 2, "seed": None}}, r"task\.seed: absent, now null"),
        ({"task": {}}, r"task\.n: 2, now absent"),
    ]:
        with pytest.raises(OutputExistsError, match=rf"configuration \({said}\).*same overrides"):
            earlier_record(path, same | changed, resume=True)
    many = {f"more{i}": i for i in range(9)}
    with pytest.raises(OutputExistsError, match=r"more0: null, now 0; .*more4: null, now 4; …\)"):
        earlier_record(path, same | many, resume=True)


def test_to_json_of_what_results_are_made_of():
    value = {"span": Span(author=Author.DRAFT, start=0, stop=2, text="ab"), 3: (Path("a/b"), [Sampling()])}
    plain = to_json(value)
    assert plain == {
        "span": {"author": "draft", "start": 0, "stop": 2, "text": "ab"},
        "3": ["a/b", [{"temperature": 0.0, "top_p": 1.0, "top_k": 0}]],
    }
    assert json.loads(json.dumps(plain)) == plain


def test_provenance_says_what_made_the_record():
    made = provenance()
    assert json.loads(json.dumps(made)) == made
    assert made["packages"]["torch"]
    assert {"git_sha", "git_dirty", "device", "threads", "omp_wait_policy", "started_at", "command"} <= set(made)


# --- summaries ---


def request(name, tokens, wall_s, correct=True, **counters):
    """An answered request as a run records it."""
    return {
        "id": name,
        "correct": correct,
        "error": None,
        "result": {
            "tokens": [1] * tokens,
            "rounds": [{"accepted_whole": bool(counters.pop("whole", False))}],
            "judge_path": counters.pop("path", None),
            "times": {
                "prefill_s": 0.1, "draft_s": 0.2, "judge_s": 0.3, "decode_s": wall_s - 0.6, "wall_s": wall_s,
                "first_token_s": counters.pop("first", 0.1)},
            "counters": dict.fromkeys(
                ("target_calls", "target_rows", "judge_passes", "judge_rows", "draft_tokens", "kept_draft_tokens",
                 "inner_steps"), 0) | counters,
        },
    }  # fmt: skip


FAILED = {"id": "too long", "correct": False, "error": "PromptError: too long", "result": None}


def test_summary_sums_what_has_a_result_and_counts_errors_as_wrong():
    requests = [
        request("a", 10, 1.0, whole=True, path="packed", first=0.1, target_calls=3, draft_tokens=8,
                kept_draft_tokens=6, judge_rows=20),
        FAILED,
        request("b", 30, 4.0, correct=False, first=0.3, target_calls=30, draft_tokens=12),
        request("c", 5, 1.5, first=0.2, target_calls=5, inner_steps=4, judge_passes=1),
    ]  # fmt: skip
    summary = summarise(requests)
    expected = dict(
        requests=4, errors=1, accuracy=0.5, new_tokens=45, rounds=3, accepted_whole=1, target_calls=38,
        draft_tokens=20, kept_draft_tokens=6, kept_share=0.3, judge_rows=20, inner_steps=4, judge_passes=1,
        judge_paths=["packed"], first_token_s_p50=0.2)  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["wall_s"] == pytest.approx(6.5)
    assert summary["draft_s"] == pytest.approx(0.6)
    assert summary["tokens_per_s"] == pytest.approx(45 / 6.5)
    assert summary["accuracy_interval"] == wilson(2, 4)


def test_requests_without_a_verdict_do_not_count_for_accuracy():
    assert summarise([request("a", 1, 1.0), request("b", 1, 1.0, correct=None)])["accuracy"] == 1.0


def test_summary_of_nothing():
    summary = summarise([])
    assert (summary["requests"], summary["new_tokens"], summary["judge_paths"]) == (0, 0, [])
    for ratio in ("accuracy", "accuracy_interval", "tokens_per_s", "kept_share", "first_token_s_p50", "tau"):
        assert summary[ratio] is None
    assert summarise([FAILED])["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_published_values(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx([low, high], abs=6e-5)


@pytest.mark.parametrize("hits", range(0, 21, 4))
def test_wilson_bounds_solve_its_equation(hits):
    """The bounds are the shares p at which the observed one is z standard errors of p away."""
    for bound in wilson(hits, 20):
        if 0 < bound < 1:
            assert abs(hits / 20 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 20), abs=1e-6)


def guessing(name, trees):
    """A request whose trees had these (levels, accepted levels), counted as a run counts them."""
    tally = Tally()
    for depth, accepted in trees:
        tally.count_tree(depth, accepted)
    counts = tally.counters()
    return request(
        name, 10, 1.0, inner_steps=counts.inner_steps, offered_by_depth=list(counts.offered_by_depth),
        accepted_by_depth=list(counts.accepted_by_depth))  # fmt: skip


def test_tau_is_the_mean_of_what_the_trees_committed():
    rng = random.Random(3)
    trees = [(depth, rng.randint(0, depth)) for depth in rng.choices(range(6), k=60)]
    requests = [guessing("a", trees[:13]), FAILED, guessing("b", trees[13:14]), guessing("c", trees[14:])]
    summary = summarise(requests)
    assert summary["tau"] == pytest.approx(sum(1 + accepted for _, accepted in trees) / 60)
    assert summary["inner_steps"] == 60
    for level in range(5):
        assert summary["offered_by_depth"][level] == sum(depth > level for depth, _ in trees)
        assert summary["accepted_by_depth"][level] == sum(accepted > level for _, accepted in trees)


def test_requests_of_different_depths_are_padded():
    summary = summarise([guessing("a", [(1, 1)]), guessing("b", [(4, 2), (0, 0)]), guessing("c", [])])
    assert summary["offered_by_depth"] == [2, 1, 1, 1]
    assert summary["accepted_by_depth"] == [2, 1, 0, 0]
    assert summary["tau"] == 2.0


@pytest.mark.parametrize("requests", [[], [FAILED], [request("a", 5, 1.0)], [guessing("a", [(0, 0)] * 4)]])
def test_no_tau_where_nothing_was_guessed(requests):
    summary = summarise(requests)
    assert summary["tau"] is None
    assert summary["offered_by_depth"] == summary["accepted_by_depth"] == []


def record_of(**arms):
    """A record of a comparison, with what a table reads of it."""
    return {
        "title": "Two arms",
        "config": {"seed": 0, "max_new_tokens": 10, "target": {"source": "zoo:target"}},
        "provenance": {
            "git_sha": "abc", "git_dirty": False, "packages": {"torch": "1", "transformers": "2"}, "device": "CPU",
            "command": "compare.py"},
        "arms": [{"name": name, "summary": summarise(requests)} for name, requests in arms.items()],
    }  # fmt: skip


def printed(record):
    console = Console(width=200, record=True, file=StringIO())
    console.print(terminal(record))
    return console.export_text()


def test_tables_tell_how_deep_guesses_were_accepted():
    trees = [(3, 3)] * 2 + [(2, 0)] * 8
    record = record_of(target=[request("a", 5, 1.0)], chain=[guessing("a", trees)], short=[guessing("a", [(1, 1)])])
    table, below = markdown(record).split("## Accepted by depth")
    assert "| arm | accuracy | new tokens | target calls | tau | kept share |" in table
    assert re.findall(r"\| (\w+) \| .*? \| 0 \| (-|[\d.]+) \| - \|", table) == [
        ("target", "-"), ("chain", "1.60"), ("short", "2.00")]  # fmt: skip
    assert re.findall(r"^\| .*", below, re.M) == [
        "| arm | 1 | 2 | 3 |", "| --- | ---: | ---: | ---: |", "| chain | 0.20 | 0.20 | 0.20 of 0.20 |",
        "| short | 1.00 | - | - |"]  # fmt: skip
    assert "0.20 of 0.20" in printed(record)


def test_only_the_first_levels_of_deep_trees_are_shown():
    below = markdown(record_of(chain=[guessing("a", [(20, 20)])])).split("## Accepted by depth")[1]
    assert re.search(r"^\| arm \|.*", below, re.M)[0] == "| arm | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |"


def test_records_without_guesses_or_from_before_they_were_summed_have_one_table():
    plain = record_of(target=[request("a", 5, 1.0)])
    old = record_of(target=[request("a", 5, 1.0)], chain=[guessing("a", [(3, 3)])])
    for arm in old["arms"]:
        for key in ("tau", "offered_by_depth", "accepted_by_depth"):
            del arm["summary"][key]
    for record in (plain, old):
        assert "depth" not in markdown(record) + printed(record)
        assert "tau" not in markdown(record) + printed(record)


# --- comparisons ---


def pair(n, speedup, seed=0, spread=0.3):
    """Requests of a baseline and of an arm that is `speedup` times as fast but for noise."""
    rng = random.Random(seed)
    baseline, arm = [], []

    def noise():
        return math.exp(rng.gauss(-(spread**2) / 2, spread))  # 1 on average

    for i in range(n):
        tokens = rng.randint(20, 200)
        wall = tokens * 0.02 * noise()
        baseline.append(request(str(i), tokens, wall, correct=rng.random() < 0.8))
        arm.append(request(str(i), tokens, wall / speedup * noise(), correct=rng.random() < 0.8))
    return baseline, arm


def test_comparison_of_arms_that_differ_by_a_constant():
    baseline, arm = pair(12, 2.0, spread=0.0)
    got = compare(baseline, arm)
    for ratio in ("speedup", "time_ratio"):
        assert [got[ratio], got[f"{ratio}_low"], got[f"{ratio}_high"]] == pytest.approx([2.0] * 3)
    assert got["requests"] == 12


def test_too_few_problems_have_no_interval():
    baseline, arm = pair(FEWEST, 3.0)
    enough, few = compare(baseline, arm), compare(baseline[1:], arm[1:])
    assert enough["speedup_low"] < enough["speedup"] < enough["speedup_high"]
    assert few["speedup"] > 0
    assert {few[f"{ratio}{end}"] for ratio in ("speedup", "time_ratio") for end in ("_low", "_high")} == {None}
    record = record_of(target=baseline, other=arm) | {"comparison": [{"arm": "other"} | few]}
    cells = dict(zip([name for name, _ in columns(record)], rows(record)[1][1:], strict=True))
    assert cells["speed-up in tok/s"] == f"{few['speedup']:.2f} [-]"
    axis = arm_views(record["arms"], record["comparison"])[1]["axis"]
    assert set(axis) == {"one", "speedup"}


def test_speedup_counts_tokens_and_time_ratio_does_not():
    """Half the tokens in half the time is no speed-up in tokens per second."""
    got = compare([request("a", 100, 4.0)] * 1, [request("a", 50, 2.0)])
    assert (got["speedup"], got["time_ratio"], got["accuracy_change"]) == (1.0, 2.0, 0.0)


def test_accuracy_change_is_paired():
    baseline = [request(str(i), 10, 1.0, correct=i < 5) for i in range(10)]
    arm = [request(str(i), 10, 1.0, correct=i < 8) for i in range(10)]
    got = compare(baseline, arm)
    assert got["accuracy_change"] == pytest.approx(0.3)
    assert -0.1 < got["accuracy_change_low"] < 0, "three coins fall alike every fourth time"
    assert 0.3 < got["accuracy_change_high"] <= 0.7
    alike = compare(baseline, baseline)  # all agree, which ten problems may do by chance
    assert -alike["accuracy_change_low"] == alike["accuracy_change_high"] == pytest.approx(3.841 / 13.841, abs=1e-3)


def test_answers_that_no_program_scores_are_neither_right_nor_wrong():
    baseline, arm = ([request(str(i), 10, 1.0, correct=None) for i in range(4)] for _ in range(2))
    got = compare(baseline, arm)
    assert [got[f"accuracy_change{end}"] for end in ("", "_low", "_high")] == [None] * 3
    assert (got["mcnemar_p"], got["better"], got["worse"], got["time_ratio"]) == (None, 0, 0, 1.0)
    record = record_of(target=baseline, other=arm) | {"comparison": [{"arm": "other"} | got]}
    assert dict(zip([name for name, _ in columns(record)], rows(record)[1][1:], strict=True))["McNemar p"] == "-"
    # of a mixture only the pairs that were scored count
    baseline += [request("r", 10, 1.0, correct=False), request("s", 10, 1.0, correct=True)]
    arm += [request("r", 10, 1.0, correct=True), request("s", 10, 1.0, correct=None)]
    got = compare(baseline, arm)
    assert (got["accuracy_change"], got["better"], got["worse"], got["mcnemar_p"]) == (1.0, 1, 0, 1.0)
    assert (got["requests"], got["scored"]) == (6, 1)
    assert -0.6 < got["accuracy_change_low"] < 0, "one pair says little"


def test_intervals_hold_the_truth_as_often_as_they_say():
    """40 experiments with a true speed-up of 1.5: a right 95 % interval misses 8 or more once in 1,400 seed sets."""
    hits = 0
    for seed in range(40):
        got = compare(*pair(30, 1.5, seed=seed))
        assert got["speedup_low"] < got["speedup"] < got["speedup_high"]
        hits += got["speedup_low"] <= 1.5 <= got["speedup_high"]
    assert hits > 32


def test_comparison_is_over_requests_both_answered():
    baseline, arm = pair(6, 2.0, spread=0.0)
    alone = request("only here", 10_000, 0.7)
    got = compare([*baseline, FAILED, alone], [FAILED, *reversed(arm)])
    assert got["requests"] == 6
    assert got["speedup"] == pytest.approx(2.0)
    assert (got["scored"], got["problems"]) == (7, 6)
    assert compare([FAILED | {"correct": None}], [FAILED]) is None
    assert compare([], arm) is None


def test_what_an_arm_cannot_answer_it_has_not_got_right():
    """As in its own accuracy: 90 of 100 right, and of the same ones 40 where 50 failed."""
    baseline = [request(str(i), 10, 1.0, correct=i % 10 > 0) for i in range(100)]
    arm = [request(str(i), 10, 0.5, correct=i % 10 > 0) if i < 50 else FAILED | {"id": str(i)} for i in range(100)]
    arm[3] |= {"correct": False}
    got = compare(baseline, arm)
    assert got["accuracy_change"] == pytest.approx(summarise(arm)["accuracy"] - summarise(baseline)["accuracy"])
    assert got["accuracy_change"] == pytest.approx(-0.46)
    assert got["accuracy_change_high"] < -0.3
    assert (got["better"], got["worse"], got["scored"]) == (0, 46, 100)
    assert got["mcnemar_p"] < 1e-9
    assert (got["requests"], got["problems"], got["time_ratio"]) == (50, 50, pytest.approx(2.0))


def test_an_arm_that_answers_nothing_has_no_speed_and_is_wrong():
    baseline = [request(str(i), 10, 1.0) for i in range(20)]
    failed = [FAILED | {"id": str(i), "prompt": "p"} for i in range(20)]
    got = compare(baseline, failed)
    assert (got["requests"], got["scored"], got["accuracy_change"], got["worse"]) == (0, 20, -1.0, 20)
    assert {got[f"{ratio}{end}"] for ratio in ("speedup", "time_ratio") for end in ("", "_low", "_high")} == {None}
    record = record_of(target=baseline, other=failed) | {"comparison": [{"arm": "other"} | got]}
    cells = dict(zip([name for name, _ in columns(record)], rows(record)[1][1:], strict=True))
    assert (cells["speed-up in tok/s"], cells["in time"], cells["McNemar p"]) == ("-", "-", "1.9e-06 (+0 -20)")
    assert arm_views(record["arms"], record["comparison"])[1]["gain"] is None


def test_a_page_shows_a_command_that_can_be_run():
    """Scripts are in experiments/; installed commands are found by their names."""
    assert command_line({"provenance": {"command": "run.py task.n=3"}}) == "python experiments/run.py task.n=3"
    assert command_line({"provenance": {"command": "parsedec-eval --tasks gsm8k"}}) == "parsedec-eval --tasks gsm8k"
    assert command_line({}) is None
