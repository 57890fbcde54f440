"""What EAGLE's own repository drafted, verified and committed, step by step, comes out of ours.

Three cases travel with the tests: recorded in float32 on the CPU from SafeAILab/EAGLE cb7e084, with a tiny target and
head made for it. The full set is replayed where it lies beside the repository.
"""

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest
import torch

import commands
from parsedec.errors import ConfigError
from parsedec_adapters.eagle3 import EagleHead, load_head, rows
from parsedec_adapters.eagle3.head import Layer
from parsedec_adapters.golden import eagle3, find_cases, run_case

ROOT = Path(__file__).resolve().parents[2]
OURS = Path(__file__).parent / "data" / "eagle3.zip"
FULL = ROOT.parent / "shared" / "golden"
CASES = ["greedy_chain", "greedy_one_token_prompt", "sample_t04_topk"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(OURS) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_every_recorded_item_is_equal(golden, case, attention):
    result = run_case(golden / "eagle3/cases" / case, [attention])
    assert result.unequal == ()
    assert result.items > 400


@pytest.mark.parametrize("path", sorted(FULL.glob("eagle3/cases/*")) or [None], ids=lambda path: path and path.name)
def test_the_full_set(path):
    if path is None:
        pytest.skip("the full set of golden vectors is not beside the repository (../shared/golden)")
    if path.name == "greedy_long":
        pytest.skip("150 steps; experiments/golden.py replays it")
    result = run_case(path, ["sdpa"])
    assert result.unequal == ()


def swapped(monkeypatch):
    read = Layer.read

    def wrong(self, hidden, embedded, norm_before_residual):
        x, residual = read(self, hidden, embedded, norm_before_residual)
        return x.roll(x.shape[-1] // 2, -1), residual

    monkeypatch.setattr(Layer, "read", wrong)


def normed_residual(monkeypatch):
    read = Layer.read
    monkeypatch.setattr(Layer, "read", lambda self, hidden, embedded, _: read(self, hidden, embedded, True))


def normed_feedback(monkeypatch):
    advance = EagleHead.advance
    monkeypatch.setattr(EagleHead, "advance", lambda self, *a, **k: self.norm(advance(self, *a, **k)))
    monkeypatch.setattr(EagleHead, "logits", lambda self, hidden: self.lm_head(hidden))


def absolute_ids(monkeypatch):
    monkeypatch.setattr(EagleHead, "target_ids", lambda self, ids: self.d2t[ids])


def visible_siblings(monkeypatch):
    monkeypatch.setattr(rows.torch, "eye", lambda k, **options: torch.ones(k, k, **options))


@pytest.mark.parametrize("fault", [swapped, normed_residual, normed_feedback, absolute_ids, visible_siblings])
def test_a_deliberate_error_shows(golden, monkeypatch, fault):
    fault(monkeypatch)
    items = list(eagle3.check(golden / "eagle3/cases/greedy_one_token_prompt", "sdpa"))
    assert sum(not equal for _, equal in items) > len(items) // 10


def test_a_folder_without_cases_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no golden case"):
        find_cases(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        find_cases(tmp_path / "nowhere")


def test_the_command_counts_and_fails(golden, tmp_path):
    """One item is changed in a copy of a case: it is named, and the command's exit code is 1."""
    root = tmp_path / "changed"
    for name in ("targets", "heads"):
        (root / "eagle3").mkdir(parents=True, exist_ok=True)
        (root / "eagle3" / name).symlink_to(golden / "eagle3" / name)
    case = root / "eagle3/cases/renamed"
    case.mkdir(parents=True)
    record = json.loads((golden / "eagle3/cases/greedy_chain/case.json").read_text())
    record["steps"][2]["verify"]["tree_argmax"][0] += 1
    (case / "case.json").write_text(json.dumps(record))
    (case / "tensors.safetensors").symlink_to(golden / "eagle3/cases/greedy_chain/tensors.safetensors")
    done = commands.run("golden.py", f"root={root}", "attention=[sdpa]", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    items = len(list(eagle3.check(case, "sdpa")))
    assert done.stdout.splitlines()[-1] == f"golden: {items - 1}/{items} items equal in 1 cases"
    assert "step 2: tree_argmax" in done.stdout


@pytest.mark.parametrize(
    "path", sorted(FULL.glob("eagle3/formats/speculators/*")) or [None], ids=lambda path: path and path.name
)
def test_converted_heads_are_the_heads_they_were_made_of(path):
    if path is None:
        pytest.skip("the full set of golden vectors is not beside the repository (../shared/golden)")
    ours, theirs = load_head(FULL / "eagle3/heads" / path.name), load_head(path)
    assert "eagle3/targets/tiny-llama" in theirs.config.trained_for
    changed = dict(trained_for="", max_position_embeddings=ours.config.max_position_embeddings)
    assert dataclasses.replace(theirs.config, **changed) == ours.config
    weights = theirs.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in ours.state_dict().items())
