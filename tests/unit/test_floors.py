"""Floors: what is read and computed is counted right, and every pass leaves the session as it was."""

import pytest
import torch

from parsedec.errors import ConfigError
from parsedec.hardware import floors
from parsedec.hardware.floors import TOKENS, Device, JudgeSize, measure, passes, weights_of, wide_tree
from parsedec.hardware.shapes import random_model


@pytest.fixture(scope="module")
def model():
    return random_model("replay:tiny_draft", dtype="float32", device="cpu", backend="static")


def test_a_floor_is_the_longer_of_bytes_and_matrix():
    device = Device(bandwidth=4e12, rate=800e12)
    seconds, bound = device.floor(weights=30_000_000_000, width=2, rows=1)
    assert (seconds, bound) == (pytest.approx(0.015), "bytes")
    seconds, bound = device.floor(weights=30_000_000_000, width=2, rows=1280)
    assert (seconds, bound) == (pytest.approx(0.096), "matrix")


def test_weights_that_a_pass_reads(model):
    h, i, v = 64, 128, 512
    layers = 2 * (2 * h * h + 2 * h * 32 + 3 * h * i + 2 * h + 2 * 32)
    assert weights_of(model) == layers + h + v * h  # tied: the table is the output matrix
    untied = random_model("replay:tiny", dtype="float32", device="cpu")
    assert weights_of(untied) == sum(p.numel() for p in untied.hf.parameters()) - 512 * 128


def test_the_tree_branches():
    tree = wide_tree(7, list(range(63)))
    assert tree.size == 64
    assert not tree.is_chain
    assert tree.depth == 32


def test_every_pass_is_what_it_says_and_can_be_repeated(model):
    sizes = [JudgeSize(draft=30, probes=4, suffix=5)]
    names = []
    for name, rows, run, times in passes(model, 20, 16, sizes, ["sdpa", "cascade"]):
        for _ in range(2):
            session = run()
            assert (session.calls, session.rows) == (times, times * rows), name
        assert session.length == 20 + (0 if name.startswith("judge") else 1 + TOKENS if name == "decode" else 1)
        names.append(name)
    assert names == ["decode", "tree of 16", "judge 30 + 4 x 5, sdpa", "judge 30 + 4 x 5, cascade"]


def test_a_record_and_its_table(model):
    device, rows = measure(
        model, context=16, nodes=8, sizes=[JudgeSize(draft=12, probes=3, suffix=4)], kernels=["cascade"], repeats=2,
        after_each=lambda name: None)  # fmt: skip
    assert device.bandwidth > 1e8
    assert device.rate > 1e8
    assert [row["rows"] for row in rows] == [1, 8, 24]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    cells = floors.cells({"rows": rows})
    assert cells[0][4] == "1.00"
    for row, cell in zip(rows, cells, strict=True):
        share = row["floor_s"] / (sum(row["seconds"]) / 2)
        assert cell[7] == f"{100 * share:.0f} %"


def test_a_pass_that_cannot_run_is_said_and_costs_no_other(model, monkeypatch, caplog):
    def short_of_memory(base, size):
        def call():
            raise torch.OutOfMemoryError("no room")

        return call

    monkeypatch.setattr(floors, "judging", short_of_memory)
    _, rows = measure(
        model, context=16, nodes=8, sizes=[JudgeSize(draft=12, probes=3, suffix=4)], kernels=["cascade"], repeats=1,
        after_each=lambda name: None)  # fmt: skip
    assert [bool(row["seconds"]) for row in rows] == [True, True, False]
    assert "OutOfMemoryError: no room" in rows[2]["error"]
    assert "no room" in caplog.text
    assert [cell[3] == "failed" for cell in floors.cells({"rows": rows})] == [False, False, True]


@pytest.mark.parametrize("size", [(4, 5, 3), (4, 0, 3), (4, 2, 0)])
def test_impossible_passes_are_refused(size):
    with pytest.raises(ConfigError, match="probes"):
        JudgeSize(**dict(zip(("draft", "probes", "suffix"), size, strict=True)))


def test_the_device_is_measured():
    assert Device.measured(torch.device("cpu"), torch.float32, 1).rate > 1e8
