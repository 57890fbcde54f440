"""What ships in the zoo: every file is the one its checksum was taken of, and the whole stays small."""

import hashlib
import json
import shutil
import struct
import subprocess

import pytest

from parsedec.training.checksums import NAME, ZOO, digests, shipped, write_checksums

MODELS = sorted(path.parent for path in ZOO.glob("*/config.json"))
FLOATS = {"F64", "F32", "F16", "BF16"}


def header(path):
    """Names, types and shapes of a safetensors file, read by its specification: length, then JSON."""
    with path.open("rb") as source:
        (size,) = struct.unpack("<Q", source.read(8))
        tensors = json.loads(source.read(size))
    tensors.pop("__metadata__", None)
    return tensors


def listed(folder):
    """What the list says, by path; `sha256sum` writes the digest, two blanks and the path."""
    return {line[66:]: line[:64] for line in (folder / NAME).read_text().splitlines()}


def test_every_file_is_listed_and_unchanged():
    """After a deliberate change: python -m parsedec.training.checksums."""
    recomputed = {
        path.relative_to(ZOO).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in ZOO.rglob("*")
        if path.is_file() and path.name not in ("README.md", NAME)
    }
    assert recomputed, "the zoo is empty"
    assert listed(ZOO) == recomputed


def test_sha256sum_reads_the_list():
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    done = subprocess.run(["sha256sum", "--check", "--strict", NAME], cwd=ZOO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": OK") == len(shipped())


def test_zoo_fits_its_budget():
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) <= 40e6


def test_weights_are_bfloat16_safetensors():
    weights = list(ZOO.rglob("*.safetensors"))
    assert len(weights) >= 2
    for path in weights:
        kinds = {tensor["dtype"] for tensor in header(path).values()}
        assert kinds & FLOATS == {"BF16"}, path
    known = {".safetensors", ".json", ".md", ""}  # no pickles, which run code when they are read
    assert {path.suffix for path in ZOO.rglob("*") if path.is_file()} <= known


def test_target_is_deep_enough_to_tap():
    """EAGLE-3 takes hidden states of a low, a middle and a high layer; its default choice needs 7 layers."""
    config = json.loads((ZOO / "target" / "config.json").read_text())
    assert config["num_hidden_layers"] >= 8
    layers = {name.split(".")[2] for name in header(ZOO / "target" / "model.safetensors") if ".layers." in name}
    assert len(layers) == config["num_hidden_layers"]


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_configuration_describes_the_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    named = config.get("dtype", config.get("torch_dtype"))  # heads have none in some layouts
    assert named in (None, "bfloat16")


def test_a_changed_added_or_lost_file_shows(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("a document")
    written = write_checksums(tmp_path)
    assert written.read_text() == "".join(
        f"{hashlib.sha256(data).hexdigest()}  {name}\n"
        for name, data in (("a/config.json", b"{}"), ("model.safetensors", b"weights"))
    )
    assert listed(tmp_path) == digests(tmp_path)
    (tmp_path / "a" / "config.json").write_text("{ }")
    assert listed(tmp_path) != digests(tmp_path)
    write_checksums(tmp_path)
    (tmp_path / "more.json").write_text("{}")
    assert set(digests(tmp_path)) - set(listed(tmp_path)) == {"more.json"}
