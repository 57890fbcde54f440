"""The table of claims, from a record that was made up: every verdict follows from the numbers in it."""

import copy

import pytest
from hydra import compose, initialize_config_dir

from parsedec.experiment.build import plain
from parsedec.experiment.nodes import conf_folder
from parsedec.experiment.summary import summarise
from parsedec.hardware import claims, replay

TARGET, ALSO, DRAFT = "replay:qwen3_32b", "replay:qwen3_8b", "replay:qwen3_1.7b"
JUDGE, LONG = "judge 512 + 32 x 24", "judge 16384 + 512 x 24"


def row(shape, name, seconds, floor=0.01, **more):
    return {"shape": shape, "pass": name, "rows": 1, "floor_s": floor, "bound": "bytes", "seconds": seconds,
            "peak_bytes": 90 << 30} | more  # fmt: skip


def request(i, wall, tokens=100, kept=0, drafted=0):
    counters = dict(draft_tokens=drafted, kept_draft_tokens=kept)
    times = dict(wall_s=wall, decode_s=wall, prefill_s=0.0, draft_s=0.0, judge_s=0.0, first_token_s=wall)
    result = dict(tokens=[7] * tokens, times=times, counters=counters, rounds=[], judge_path=None)
    return {"id": f"p{i}", "seed": 0, "correct": None, "error": None, "result": result}


def arm(name, walls, description="", **more):
    requests = [request(i, wall, **more) for i, wall in enumerate(walls)]
    return {"name": name, "description": description, "summary": summarise(requests), "requests": requests}


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return plain(compose("gpu", overrides=["output=unused"]))


@pytest.fixture
def record(config):
    made = {"git_sha": None, "git_dirty": False, "packages": {"torch": "1", "transformers": "1"}, "device": "made up",
            "command": "gpu.py"}  # fmt: skip
    return {
        "title": "made up", "kind": "gpu", "config": config, "provenance": made, "status": "finished", "stages": [],
        "warnings": [], "floors": {"devices": {}, "rows": []},
    }  # fmt: skip


def line(record, what):
    found = [claim for claim in claims.claims(record) if claim.what.startswith(what)]
    assert len(found) == 1, what
    return found[0]


def test_nothing_measured_is_said_of_every_line(record):
    made = claims.claims(record)
    assert len(made) > 20
    assert {claim.cells()[-1] for claim in made} == {"not measured"}
    assert "| not measured |" in claims.markdown(record)


def test_what_slowed_requests_down_is_said(record):
    record["captured_late"] = {"hf": 0, "replay": 0}
    assert "captured while" not in claims.markdown(record)
    record["captured_late"]["replay"] = 3
    assert "CUDA graphs captured while requests were timed: 3." in claims.markdown(record)


@pytest.mark.parametrize(("seconds", "holds"), [([0.019, 0.02, 0.5], True), ([0.0201], False)])
def test_a_token_is_the_median_of_its_repeats(record, seconds, holds):
    record["floors"]["rows"] = [row(TARGET, "decode", seconds, 0.0149), row(DRAFT, "decode", [])]
    claim = line(record, "one token, 32B")
    assert (claim.holds, claim.n, claim.wanted) == (holds, len(seconds), "<= 20 ms")
    assert claim.ceiling == "floor 14.90 ms"
    assert line(record, "one token, 1.7B").cells()[-1] == "not measured"


def test_a_tree_is_measured_in_decode_steps(record):
    record["floors"]["rows"] = [row(TARGET, "decode", [0.02]), row(TARGET, "tree of 64", [0.025, 0.026, 0.027])]
    claim = line(record, "tree of 64")
    assert claim.holds
    assert claim.measured.startswith("1.30 steps")
    record["floors"]["rows"][1]["seconds"] = [0.0261]
    assert line(record, "tree of 64").holds is False


@pytest.mark.parametrize(("seconds", "floor", "holds"), [(0.12, 0.08, True), (0.16, 0.14, True), (0.13, 0.11, False)])
def test_a_judge_pass_holds_by_its_floor_or_its_time(record, seconds, floor, holds):
    record["floors"]["rows"] = [row(TARGET, f"{JUDGE}, auto", [seconds], floor)]
    assert line(record, JUDGE).holds is holds
    record["floors"]["rows"].append(row(TARGET, f"{JUDGE}, cascade", [0.1], floor))
    assert line(record, f"{JUDGE}, 32B, cascade").holds


def test_the_long_pass_fits_or_says_why_not(record):
    record["floors"]["rows"] = [row(TARGET, f"{LONG}, auto", [5.0])]
    assert line(record, "16384 draft rows").measured == "peak 90.0 GiB, 5.00 s"
    record["floors"]["rows"] = [row(TARGET, f"{LONG}, auto", [], error="OutOfMemoryError: no room")]
    claim = line(record, "16384 draft rows")
    assert (claim.holds, claim.measured) == (False, "OutOfMemoryError: no room")


def with_arms(record, *arms):
    return record | {"replay": {"title": "replay", "arms": list(arms), "status": "finished"}}


def test_speed_ups_are_over_the_target_alone_with_the_ceiling_beside(record):
    target, draft = arm("target", [9.9, 9.9]), arm("draft", [0.99, 0.99])
    parse = arm("parse_95", [1.8, 1.8], "outer=parse", kept=95, drafted=100)
    record = with_arms(record, target, draft, parse)
    claim = line(record, "parse_95 over target")
    assert claim.what.endswith("95 % kept")
    guessing = {**parse, "summary": parse["summary"] | {"tau": 3.94}}
    told = line(with_arms(record, target, draft, guessing), "parse_95 over target").what
    assert told.endswith("95 % kept, tau 3.9")
    assert (claim.measured, claim.holds, claim.n) == ("5.50", True, 2)
    assert claim.ceiling == f"{replay.ceiling(parse, replay.paces(record['replay'])):.2f}"
    assert line(record, "parse_85 over target").cells()[-1] == "not measured"
    slower = with_arms(record, target, draft, arm("parse_95", [1.9, 1.9], kept=95, drafted=100))
    assert line(slower, "parse_95 over target").holds is False


def test_streamed_is_no_slower_if_the_interval_reaches_one_and_faster_if_all_of_it_does(record):
    walls = {"target": [9, 9], "parse_100": [1.0, 1.0], "streamed_100": [0.98, 1.1],
             "parse_eagle3_10": [4, 4], "streamed_eagle3_10": [3.5, 3.9], "streamed_narrow_eagle3_10": [3.9, 4.1],
             "parse_eagle3_85": [2, 2], "parse_both_85": [1, 1]}  # fmt: skip
    record = with_arms(record, *(arm(name, seconds) for name, seconds in walls.items()))
    verdicts = {claim.what.split()[0]: claim.holds for claim in claims.claims(record) if "in time" in claim.what}
    assert verdicts == {"streamed_100": True, "streamed_narrow_100": None, "streamed_eagle3_10": True,
                        "streamed_narrow_eagle3_10": False}  # fmt: skip
    added = line(record, "parse_both_85 over parse_eagle3_85")
    assert (added.measured, added.holds, added.cells()[-1]) == ("2.00", None, "-")


def test_hugging_face_is_told_beside_the_target(record):
    record["hf"] = {"title": "hf", "arms": [arm("target", [0.99]), arm("hf_generate", [3.96])]}
    assert line(record, "Hugging Face").measured == "40.00 ms a token, 4.00 x target"


@pytest.mark.parametrize(("passed", "verdict"), [(True, "yes"), (False, "no"), (None, "not measured")])
def test_the_tests_pass_fail_or_did_not_run(record, passed, verdict):
    record["tests"] = {"passed": passed, "said": "9 passed"}
    assert line(record, "CUDA tests").cells()[-1] == verdict


def test_verdicts_come_from_what_a_slim_record_keeps(record):
    run = {"arms": [arm("target", [9.0]), arm("parse_95", [1.0])], "provenance": {}, "overrides": []}
    for one in run["arms"]:
        one["requests"][0]["prompt"] = "w1"
    before = copy.deepcopy(run)
    slim = claims.slim(run)
    assert run == before
    assert "provenance" not in slim
    assert set(slim["arms"][0]["requests"][0]["result"]) == set(claims.KEPT_OF_RESULT)
    assert line(record | {"replay": slim}, "parse_95 over target").measured == "9.00"
