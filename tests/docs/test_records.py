"""The committed records and the tables beside them say the same, and the documents' figures are theirs."""

import re
from pathlib import Path

import pytest

from parsedec.experiment import overhead
from parsedec.experiment.record import read_record
from parsedec.experiment.summary import summarise
from parsedec.experiment.table import markdown, rows

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted(ROOT.glob("experiments/records/*/record.json"))
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
    assert path.with_name("table.md").read_text() == markdown(record)
    for arm in record["arms"]:
        again = summarise(arm["requests"])  # which may hold more than was summed when the record was made
        assert {key: again[key] for key in arm["summary"]} == arm["summary"]


@pytest.mark.parametrize("path", OVERHEAD, ids=name_of)
def test_the_table_of_overhead_is_what_its_record_says(path):
    record = read_record(path)
    assert path.with_name("table.md").read_text() == overhead.markdown(record)
    by_inner = {inner["name"]: inner["rows"] for inner in record["inners"]}
    assert overhead.summarise_steps(by_inner) == {inner["name"]: inner["summary"] for inner in record["inners"]}
    assert overhead.summarise_generate(record["rows"]) == record["summary"]


@pytest.mark.parametrize("path", [path for path in COMPARED if name_of(path) != "zoo_refused"], ids=name_of)
def test_figures_of_the_documents_are_in_a_record(path):
    """Every accuracy with its interval, and every count of target calls (the worst case is told in a sentence)."""
    figures = (ROOT / "docs" / "figures.md").read_text()
    for row in rows(read_record(path)):
        accuracy, calls = row[1], row[3]
        assert re.search(rf"\| {re.escape(accuracy)} \| {calls} \|", figures), f"{row[0]}: {accuracy}, {calls}"


@pytest.mark.parametrize("path", RECORDS, ids=name_of)
def test_records_hold_no_paths_of_a_machine(path):
    text = path.read_text()
    assert not re.search(r'"/(home|root|tmp|work|Users)/', text)
