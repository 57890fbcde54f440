"""Which precision a model is computed in where none is named."""

import json
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from parsedec import load
from parsedec.errors import ConfigError
from parsedec.models.checkpoints import in_zoo
from parsedec.models.placement import multiplies
from parsedec.sessions.backends import runs_static


@pytest.fixture
def checkpoint(tmp_path):
    """The embedded draft model, stored in bfloat16, as a folder of somebody's."""
    folder = shutil.copytree(in_zoo("zoo:draft"), tmp_path / "draft")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    return folder


def test_that_of_the_checkpoint_where_the_processor_has_it(monkeypatch, checkpoint, caplog):
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        caplog.clear()
        monkeypatch.setattr("parsedec.models.placement.multiplies", lambda device, dtype, has=has: has)
        assert load(checkpoint, device="cpu").dtype is expected
        assert ("is computed in float32 and takes 0.0 GB" in caplog.text) is not has
        assert ("dtype=bfloat16 computes in it" in caplog.text) is not has
        assert load(checkpoint, device="cpu", dtype="bfloat16").dtype is torch.bfloat16, "what is asked for is done"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_precision_is_a_name_or_torchs_object(checkpoint, dtype):
    for given in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
        assert load(checkpoint, device="cpu", dtype=given).dtype is dtype
    for wrong in (torch.int8, "double", None):
        with pytest.raises(ConfigError, match=f"dtype='{wrong}' is unknown"):
            load(checkpoint, device="cpu", dtype=wrong)


def test_what_is_quantised_or_spread_stays_as_it_is(monkeypatch, checkpoint):
    monkeypatch.setattr("parsedec.models.placement.multiplies", lambda device, dtype: False)
    assert load(checkpoint, device_map="cpu").dtype is torch.bfloat16
    monkeypatch.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)
    assert load(checkpoint, device="cpu").dtype is torch.bfloat16


def test_the_embedded_models_are_computed_in_float32_and_quickly():
    for name in ("draft", "target"):
        model = load(f"zoo:{name}", device="cpu")
        assert model.dtype is torch.float32
        assert model.backend == "auto"
        assert runs_static(model)


def test_what_is_asked_of_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        assert multiplies(torch.device("cuda"), dtype)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not multiplies(cpu, dtype)
        monkeypatch.undo()
        assert multiplies(cpu, dtype) is bool(
            {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
             torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}[dtype]()
        )  # fmt: skip
        assert multiplies(cpu, torch.float32)
