"""CUDA: the same scores and the same tokens as on the CPU."""

import copy
import dataclasses

import pytest
import torch

import tiny
from parsedec import Parse, TargetOnly
from parsedec.sessions.session import Session
from parsedec.types import JudgePath
from parsedec_adapters.draft_model import DraftModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_cuda(model):
    return dataclasses.replace(model, hf=copy.deepcopy(model.hf).cuda())


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_judge_pass_equals_the_cpu(family):
    cpu = tiny.model(family)
    gpu = on_cuda(cpu)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, tiny.VOCAB, (40,), generator=generator).tolist()
    path = JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED
    rows = []
    for model in (cpu, gpu):
        session = Session(model)
        session.feed(ids[:20])
        rows.append(session.judge(ids[20:], [5, 12, 20], [1, 2, 7, 3], path=path).probe_logits.cpu())
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_equal_the_cpu(family):
    cpu = tiny.model(family)
    prompt, tokens = tiny.plain_answer(cpu)
    gpu = on_cuda(cpu)
    engine = Parse(gpu, on_cuda(tiny.model("llama", seed=7, layers=1)), inner=DraftModel(length=3), outer=TargetOnly())
    assert list(engine.generate(prompt, max_new_tokens=len(tokens)).tokens) == tokens
