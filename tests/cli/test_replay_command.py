"""experiments/replay.py end to end on tiny shapes: every arm, the record, the table and the plot."""

import runpy
from pathlib import Path

import pytest

import commands
from parsedec.experiment.record import read_record
from parsedec.hardware import replay

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["task.n=1", "warmup=0", "max_new_tokens=12", "task.words=8", "runtime.device=cpu", "runtime.threads=1"]


def test_a_replay_leaves_record_table_and_plot(tmp_path):
    more = ["target.source=replay:tiny_draft", "segmenter.delta=2", "judge.kept=0.5", "judge.whole=0", "judge.spread=0"]
    done = commands.run("replay.py", *SMALL, *more, f"output={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    record = read_record(path)
    assert record["status"] == "finished"
    table = path.with_name("table.md").read_text()
    assert table == replay.markdown(record)
    pytest.importorskip("matplotlib", reason="a report needs matplotlib")
    report = runpy.run_path(str(ROOT / "experiments" / "report.py"))["main"]
    path.with_name("table.md").unlink()
    assert report([str(path)]) == 0
    assert path.with_name("table.md").read_text() == table
    assert path.with_name("plot.png").read_bytes().startswith(b"\x89PNG")
    by_name = {arm["name"]: arm["summary"] for arm in record["arms"]}
    assert len(by_name) == 12
    assert {summary["new_tokens"] for summary in by_name.values()} == {12}
    assert {summary["errors"] for summary in by_name.values()} == {0}
    for name, summary in by_name.items():
        assert summary["kept_draft_tokens"] == (6 if name.startswith("parse") else 0)
    assert by_name["hf_assisted"]["target_calls"] < by_name["hf_generate"]["target_calls"] == 12
    assert by_name["parse_streamed"]["draft_tokens"] < by_name["parse"]["draft_tokens"] == 12
    cells = {row[0]: row for row in replay.rows(record)}
    assert all(cells[name][-2] != "-" for name in by_name if name.startswith(("parse", "eagle3")))
    assert "speed and nothing else" in replay.caption(record)
