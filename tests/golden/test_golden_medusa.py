"""Medusa against vectors recorded from the reference: a few the repository owns, and all where they are at hand."""

import json
import shutil
from pathlib import Path

import pytest

from parsedec_adapters.golden.medusa import check, check_tree_buffers

OWN = Path(__file__).parent / "data" / "medusa"
FULL = Path(__file__).resolve().parents[3] / "shared" / "golden" / "medusa"


def cases(root):
    return sorted(path.parent for path in root.glob("cases/*/case.json"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", [*cases(OWN), *cases(FULL)], ids=lambda case: f"{case.parts[-4]}-{case.name}")
def test_every_recorded_item_is_equal(case, attention):
    items = list(check(case, attention))
    assert len(items) > 20
    assert [name for name, equal in items if not equal] == []


def test_the_repository_owns_greedy_typical_and_nucleus_cases():
    kinds = {json.loads((case / "case.json").read_text())["args"].get("sampling", "typical") for case in cases(OWN)}
    assert kinds == {"typical", "nucleus"}
    assert any(json.loads((case / "case.json").read_text())["args"]["temperature"] == 0 for case in cases(OWN))


def test_the_full_set_is_checked_where_it_is():
    if not FULL.is_dir():
        pytest.skip("the full set of golden vectors is not beside the repository")
    assert len(cases(FULL)) > len(cases(OWN))


def test_tree_buffers():
    items = list(check_tree_buffers(OWN / "tree_buffers.json"))
    assert len(items) == 72
    assert [name for name, equal in items if not equal] == []


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("candidates", "head_top10", 2, 4), "head_top10"),
        (("candidates", "tree_candidates", 3), "tree_candidates"),
        (("candidates", "cart_candidates", 1, 2), "cart_candidates"),
        (("verify", "argmax_per_candidate", 2, 1), "argmax_per_candidate"),
        (("verify", "accept_length"), "accept_length"),
        (("accepted_tokens", 0), "accepted_tokens"),
    ],
)
def test_a_changed_record_is_noticed(path, named, tmp_path):
    (tmp_path / "medusa").mkdir()
    (tmp_path / "medusa" / "models").symlink_to(OWN / "models")
    case = shutil.copytree(OWN / "cases" / "greedy_small_tree", tmp_path / "medusa" / "cases" / "changed")
    record = json.loads((case / "case.json").read_text())
    at = record["steps"][3]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = at[path[-1]] + 1 if named != "accept_length" else 0 if at[path[-1]] else 1
    (case / "case.json").write_text(json.dumps(record))
    assert f"step 3: {named}" in [name for name, equal in check(case, "eager") if not equal]
