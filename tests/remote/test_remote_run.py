"""`engine=openai` from the command line, and the cost model of docs/scale-out.md."""

import json
from pathlib import Path

import pytest

import commands
from fake_server import FakeServer
from parsedec import load
from parsedec.experiment.table import markdown, sections
from parsedec.hardware.scale import Gpus, Request, Served, expected, table, tabulate

ROOT = Path(__file__).resolve().parents[2]
GPU = dict(bandwidth_tb_s=2.0, matrix_tflop_s=100.0, bandwidth_share=0.5, matrix_share=0.5)


def test_run_with_servers_writes_the_record_of_a_local_run(tmp_path):
    """The zoo pair behind two servers and in the process: same answer, same kept tokens; the record names them."""
    target, draft = (load(f"zoo:{name}", dtype="float32", device="cpu") for name in ("target", "draft"))
    records = {}
    with FakeServer(target, name="big") as first, FakeServer(draft, name="small") as second:
        remote = ["engine=openai", f"engine.target.url={first.url}", "engine.target.tokenizer=zoo:target",
                  f"engine.draft.url={second.url}", "engine.draft.model=small"]  # fmt: skip
        for name, overrides in (("local", []), ("remote", remote)):
            done = commands.run(
                "run.py", "task.n=1", "warmup=0", "max_new_tokens=32", "runtime=cpu", f"output={tmp_path / name}",
                *overrides, cwd=tmp_path)  # fmt: skip
            assert done.returncode == 0, done.stderr
            records[name] = json.loads(Path(done.stdout.strip().splitlines()[-1]).read_text())
    results = {name: record["arms"][0]["requests"][0]["result"] for name, record in records.items()}
    assert results["remote"]["tokens"] == results["local"]["tokens"]
    assert results["remote"]["judge_path"] == "remote"
    kept = {name: [r["kept_tokens"] for r in result["rounds"]] for name, result in results.items()}
    assert kept["remote"] == kept["local"]
    servers = records["remote"]["provenance"]["servers"]
    assert {entry["model"] for entry in servers.values()} == {"big", "small"}
    assert all((entry["kind"], entry["version"]) == ("vllm", "9.9.9") for entry in servers.values())
    assert "servers" not in records["local"]["provenance"]
    sizes = {name: record["arms"][0]["models"] for name, record in records.items()}
    assert {facts.keys() == {"name"} for facts in sizes["remote"].values()} == {True}, "what is over there is not known"
    assert sizes["local"]["target"]["row_parameters"] > 0
    assert "Tier: models on servers." in markdown(records["remote"])
    (_, _, [[_, *work]], _), *_ = sections(records["remote"])
    assert work[2:] == ["-", "-", "-"]
    assert "small" in records["remote"]["title"]


def test_cost_model_by_hand():
    gpus = Gpus(count=2, exchange_us=10.0, **GPU)
    dense = Served(total_b=10.0, active_b=10.0, layers=10, bytes_per_weight=2.0, tokens_per_call=1.0, call_rows=1)
    # 20 GB over 2 x 1 TB/s is 10 ms, plus 10 layers x 10 us; 2 x 1e10 x 1000 flop over 2 x 5e13 a second is 200 ms
    assert dense.pass_s(1, gpus) == pytest.approx(0.0101)
    assert dense.pass_s(1000, gpus) == pytest.approx(0.2001)
    experts = Served(total_b=100.0, active_b=10.0, layers=10, bytes_per_weight=2.0, tokens_per_call=1.0, call_rows=1)
    assert experts.pass_s(1, gpus) == pytest.approx(0.0101)
    assert experts.pass_s(2, gpus) == pytest.approx(0.0191)  # 19 of 100 billion are read
    fast = Served(total_b=10.0, active_b=10.0, layers=10, bytes_per_weight=2.0, tokens_per_call=2.0, call_rows=4)
    assert fast.token_s(gpus) == pytest.approx(0.00505)
    request = Request(prompt=100, answer=100, probes=10, suffix=10, http_s=0.0)
    small = Served(total_b=1.0, active_b=1.0, layers=10, bytes_per_weight=2.0, tokens_per_call=1.0, call_rows=1)
    row = expected(dense, small, gpus, gpus, request, kept=0.5)
    assert row["decode_s"] == pytest.approx(50 * 0.0101)
    assert row["judge_s"] == pytest.approx(0.0601)
    assert row["speedup"] == pytest.approx(row["alone_s"] / (row["draft_s"] + row["judge_s"] + row["decode_s"]))
    rows = tabulate(fast, small, (gpus, gpus), request, [0.0, 1.0])
    assert [name for name, _ in rows] == ["plain decoding"] * 2 + ["speculation, 2 tokens a call"] * 2
    assert table(rows).count("\n") == 6


def test_document_has_the_table_of_the_command():
    """docs/scale-out.md prints what the committed assumptions give."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(ROOT / "conf/scale_out.yaml")
    gpus = (instantiate(cfg.target_gpus), instantiate(cfg.draft_gpus))
    rows = tabulate(instantiate(cfg.target), instantiate(cfg.draft), gpus, instantiate(cfg.request), list(cfg.kept))
    assert table(rows) in (ROOT / "docs/scale-out.md").read_text()
