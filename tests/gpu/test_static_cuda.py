"""The static backend on CUDA: steps replayed from graphs, plain and compiled, against forwards on the CPU."""

import copy
import dataclasses

import pytest
import torch

import tiny
from medusa_heads import taught_heads
from parsedec import Parse, TargetOnly
from parsedec.backends import open_session
from parsedec.static import cascade
from parsedec.static.session import StaticSession
from parsedec.static.steps import ROWS
from parsedec_adapters.medusa import Medusa

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def on_cuda(family, *, compiled=False):
    cpu = tiny.model(family)
    return dataclasses.replace(cpu, hf=copy.deepcopy(cpu.hf).cuda(), backend="static", compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_cpu(family, compiled):
    prompt, tokens = tiny.plain_answer(tiny.model(family))
    model = on_cuda(family, compiled=compiled)
    heads = taught_heads(tiny.model(family), prompt, tokens, share=0.6)
    for inner in (None, Medusa(heads=heads, tree="mc_sim_7b_63")):
        result = Parse(model, inner=inner, outer=TargetOnly()).generate(prompt, max_new_tokens=len(tokens))
        assert list(result.tokens) == tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_captured_once_a_bucket(family):
    model = on_cuda(family)
    ids = torch.randint(5, tiny.VOCAB, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    session = open_session(model)
    assert isinstance(session, StaticSession)
    session.feed(ids[:80])
    for token in ids[80:]:
        logits = session.feed([token])
    with torch.inference_mode():
        expected = tiny.model(family).hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-3)
    steps = session._steps
    assert 1 <= steps.captures <= len(ROWS), "the fallback ran, or steps were captured again"


@pytest.mark.parametrize("family", FAMILIES)
def test_judge_pass_equals_the_cpu(family):
    ids = torch.randint(5, tiny.VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for model in (tiny.model(family), on_cuda(family)):
        session = open_session(model)
        session.feed(ids[:20])
        rows.append(session.judge(ids[20:], [5, 12, 20], [1, 2, 7, 3]).probe_logits.cpu())
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sdpa", "cascade", "flex"])
def test_judge_kernels_equal_an_exact_forward(name, dtype):
    """Long enough for several pages, squares and groups. In bfloat16 relative to what a plain forward costs."""
    exact = dataclasses.replace(tiny.model("qwen3"), context_limit=1 << 20)
    ids = torch.randint(5, tiny.VOCAB, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    suffix, cuts = [1, 2, 7, 3], list(range(20, 681, 20))
    hf = copy.deepcopy(exact.hf).to("cuda", dtype)
    session = open_session(dataclasses.replace(exact, hf=hf, backend="static", judge_kernel=name))
    session.feed(ids[:20])
    ours = session.judge(ids[20:], cuts, suffix).probe_logits.cpu()
    with torch.inference_mode():
        texts = [torch.tensor([[*ids[: 20 + cut], *suffix]]) for cut in cuts]
        expected = torch.cat([exact.hf(input_ids=text, use_cache=False).logits[0, -1:] for text in texts])
        plain = torch.cat([hf(input_ids=text.cuda(), use_cache=False).logits[0, -1:].float().cpu() for text in texts])
    allowed = 1e-3 if dtype is torch.float32 else 2 * float((plain - expected).abs().max())
    assert float((ours - expected).abs().max()) <= allowed


def test_flash_attention_is_used_in_half_precision():
    states = torch.zeros(2, 1, 2, 512, 64, device="cuda", dtype=torch.bfloat16)
    assert cascade._flash_agrees(states.device, states.dtype, 2, 64)
