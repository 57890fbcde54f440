"""The CUDA tests, on a stand-in for a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="the stand-in takes the place of CUDA in a torch without"
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in is built with g++"),
]


def run(*arguments):
    paths = os.pathsep.join(str(path) for path in (TESTS, TESTS.parent / "parse", TESTS.parent / "adapters"))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "cuda_standin", "-m", "gpu", *arguments],
        cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_cuda_tests_pass_on_it():
    done = run("tests/gpu", "tests/oracle/test_streamed.py")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_it_is_a_device_of_its_own(tmp_path):
    """What would fail on a GPU fails."""
    (tmp_path / "test_device.py").write_text(
        """
import pytest, torch

pytestmark = pytest.mark.gpu

def test_devices_do_not_mix():
    here, there = torch.ones(2), torch.ones(2, device="cuda")
    at = torch.tensor([0])
    for wrong in (
        lambda: here + there, lambda: there @ here, lambda: torch.cat([here, there]), lambda: there.index_select(0, at)
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="cpu"):
        there.numpy()
    assert (there + torch.tensor(1.0)).tolist() == [2, 2]

def test_views_share_memory_and_nothing_starts_as_a_number():
    x = torch.empty(3, 4, device="cuda")
    assert x.isnan().all()
    x.narrow(1, 0, 2).fill_(5)
    assert x[:, :2].eq(5).all() and x[:, 2:].isnan().all()
    assert x.view(12).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    grown = torch.empty(0, device="cuda")
    torch.add(x[0, :2], 1, out=grown)
    assert grown.tolist() == [6, 6] and grown.is_cuda
"""
    )
    done = run(str(tmp_path))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
