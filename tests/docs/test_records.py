"""The committed records and the tables beside them say the same, and the documents' figures are theirs."""

import gzip
import json
import re
from pathlib import Path

import pytest

import commands
from parsedec.errors import ConfigError, ParsedecError
from parsedec.experiment import overhead
from parsedec.experiment.record import read_record, write_record
from parsedec.experiment.summary import again, batch_of
from parsedec.experiment.table import markdown
from parsedec.reporting.documents import with_tables

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted(ROOT.glob("experiments/records/*/record.json*"))  # large ones are packed by gzip
TABLES = [path for path in RECORDS if path.with_name("table.md").is_file()]
OVERHEAD = [path for path in TABLES if path.parent.name == "overhead"]
COMPARED = [path for path in TABLES if "comparison" in read_record(path)]


def name_of(path):
    return path.parent.name


def test_there_are_records():
    assert len(RECORDS) >= 6
    assert len(COMPARED) >= 5


@pytest.mark.parametrize("path", COMPARED, ids=name_of)
def test_a_table_is_what_its_record_says(path):
    record = read_record(path)
    assert record["status"] == "finished"
    today = again(record)
    assert path.with_name("table.md").read_text() == markdown(today)
    for arm, now in zip(record["arms"], today["arms"], strict=True):
        # more may be summed than when the record was made; of a batch, shares of its seconds were taken for waits
        keys = [key for key in arm["summary"] if batch_of(record) == 1 or not key.startswith("latency")]
        assert {key: now["summary"][key] for key in keys} == {key: arm["summary"][key] for key in keys}


@pytest.mark.parametrize("path", OVERHEAD, ids=name_of)
def test_the_table_of_overhead_is_what_its_record_says(path):
    record = read_record(path)
    assert path.with_name("table.md").read_text() == overhead.markdown(record)
    by_inner = {inner["name"]: inner["rows"] for inner in record["inners"]}
    assert overhead.summarise_steps(by_inner) == {inner["name"]: inner["summary"] for inner in record["inners"]}
    assert overhead.summarise_generate(record["rows"]) == record["summary"]


def test_the_documents_say_what_the_records_do():
    done = commands.run("figures.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_table_of_a_page_is_made_anew_and_an_unknown_column_refused():
    records = ROOT / "experiments" / "records"
    page = "before\n<!-- table zoo_arms: arm, target calls -->\n| stale |\n<!-- end -->\nbehind\n"
    made = with_tables(page, records)
    arms = read_record(records / "zoo_arms" / "record.json")["arms"]
    assert made.splitlines()[4:-2] == [f"| {arm['name']} | {arm['summary']['target_calls']} |" for arm in arms]
    assert with_tables(made, records) == made
    with pytest.raises(ConfigError, match="kept shear"):
        with_tables(page.replace("target calls", "kept shear"), records)


@pytest.mark.parametrize("path", RECORDS, ids=name_of)
def test_records_hold_no_paths_of_a_machine(path):
    text = json.dumps(read_record(path))
    assert not re.search(r'"/(home|root|tmp|work|Users)/', text)


def test_a_packed_record_is_read_by_its_plain_name(tmp_path):
    path = tmp_path / "record.json"
    write_record({"schema_version": 1, "title": "ä"}, path)
    plain = read_record(path)
    path.with_name("record.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert read_record(path) == read_record(path.with_name("record.json.gz")) == plain
    path.with_name("record.json.gz").write_bytes(b"no gzip")
    with pytest.raises(ParsedecError, match="cannot read"):
        read_record(path)
