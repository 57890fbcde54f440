"""The static backend on CUDA: steps replayed from graphs, plain and compiled, against forwards on the CPU."""

import copy
import dataclasses
import random

import pytest
import torch

import eagle3_heads
import tiny
from medusa_heads import taught_heads
from parsedec import Parse, Sampling, TargetOnly
from parsedec.sampling import Sampler, request_generator
from parsedec.sessions.backends import open_session
from parsedec.sessions.session import Session
from parsedec.static import cascade
from parsedec.static.attention import attention, hidden
from parsedec.static.session import StaticSession, machine_of
from parsedec.static.steps import ROWS
from parsedec.types import Outcome, Seen
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.eagle3.graphed import drafting_of
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
    assert machine_of(model).network.kernels is not None, "a GPU has kernels of ours"
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
def test_judge_kernels_equal_an_exact_forward(name, dtype, monkeypatch):
    """Long enough for several pages, squares and groups. In bfloat16 relative to what a plain forward costs."""
    from parsedec.static import fused

    exact = dataclasses.replace(tiny.model("qwen3"), context_limit=1 << 20)
    ids = torch.randint(5, tiny.VOCAB, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    suffix, cuts = [1, 2, 7, 3], list(range(20, 681, 20))
    hf = copy.deepcopy(exact.hf).to("cuda", dtype)
    session = open_session(dataclasses.replace(exact, hf=hf, backend="static", judge_kernel=name))
    session.feed(ids[:20])
    joined, probed = [], fused.probed
    monkeypatch.setattr(fused, "probed", lambda *arguments: joined.append(1) or probed(*arguments))
    ours = session.judge(ids[20:], cuts, suffix).probe_logits.cpu()
    with torch.inference_mode():
        texts = [torch.tensor([[*ids[: 20 + cut], *suffix]]) for cut in cuts]
        expected = torch.cat([exact.hf(input_ids=text, use_cache=False).logits[0, -1:] for text in texts])
        plain = torch.cat([hf(input_ids=text.cuda(), use_cache=False).logits[0, -1:].float().cpu() for text in texts])
    allowed = 1e-3 if dtype is torch.float32 else 2 * float((plain - expected).abs().max())
    assert float((ours - expected).abs().max()) <= allowed
    flash = name == "cascade" and dtype is torch.bfloat16
    assert len(joined) >= exact.num_layers if flash else not joined, "our kernel finishes what flash attention began"


@pytest.mark.parametrize("kept", [True, False], ids=["right_guesses", "wrong_guesses"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_prefetched_equals_the_cpu(family, kept):
    """Tokens that are read before they are known, the right ones and others; forks and rewinds in between; taps."""
    session, rng = StaticSession(on_cuda(family), (0, 4)), random.Random(family)
    ids = [rng.randrange(5, tiny.VOCAB) for _ in range(60)]
    session.feed(ids[:20])
    for i, token in enumerate(ids[20:]):
        guess = token if kept else rng.randrange(tiny.VOCAB)
        assert session.prefetch(torch.tensor(guess, device="cuda")) == guess
        if i % 7 == 3:
            session.fork().feed([1, 2])
        if i % 7 == 5:
            session.rewind(session.length - 2)
            session.feed(ids[session.length : 20 + i])
            session.prefetch(torch.tensor(guess, device="cuda"))
        logits = session.feed([token])
    assert session.tokens == ids
    with torch.inference_mode():
        out = tiny.model(family).hf(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(logits.cpu(), out.logits[0, -1], rtol=0, atol=1e-3)
    taps = torch.stack([out.hidden_states[i][0] for i in (0, 4)], dim=1)
    torch.testing.assert_close(session.seen(0).taps.cpu(), taps, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [Sampling(), Sampling(temperature=0.8, top_k=20)], ids=["greedy", "sampled"])
def test_a_request_is_the_same_without_prefetching(settings, monkeypatch):
    target, draft = on_cuda("llama"), on_cuda("qwen3")
    prompt, results = tiny.plain_answer(tiny.model("llama"))[0], []
    for prefetches in (True, False):
        monkeypatch.setattr(StaticSession, "prefetches", property(lambda self, on=prefetches: on))
        for engine in (Parse(target, outer=TargetOnly()), Parse(target, draft)):
            generator = None if settings.greedy else request_generator(3, 0)
            results.append(engine.generate(prompt, max_new_tokens=40, sampling=settings, generator=generator))
    for having, without in zip(results[:2], results[2:], strict=True):
        assert having.tokens == without.tokens
        assert having.counters == without.counters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16, 8, 128), (32, 8, 128), (64, 8, 128), (4, 2, 16)], ids=str)
def test_steps_have_kernels_of_their_own(shape, dtype):
    """For the heads of Qwen3 1.7B, 8B and 32B, for one row and for a tree, with the numbers of double precision."""
    from parsedec.static import fused

    assert fused.right(torch.device("cuda"), dtype, *shape, 5120, True)
    heads, shared, size = shape
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 768), (8, 768), (64, 768), (1, 8192)):
        q = torch.randn(rows, heads, size, generator=generator)
        states = torch.randn(2, 1, shared, columns + 256, size, generator=generator).narrow(3, 0, columns)
        mask = torch.zeros(rows, columns).index_fill_(1, torch.arange(601, columns), hidden(dtype))
        mask[:, 601 : 601 + rows] += torch.full((rows, rows), -hidden(dtype)).tril()
        ours = fused.seen(*(x.to("cuda", dtype) for x in (q, states, mask)), size**-0.5)
        q, states, mask = (x.to(dtype).double() for x in (q, states, mask))
        expected = attention(q, *states, mask, False, size**-0.5)
        assert float((ours.cpu().double() - expected).abs().max()) <= (1e-4 if dtype is torch.float32 else 2e-2)


def test_flash_attention_is_used_in_half_precision():
    states = torch.zeros(2, 1, 2, 512, 64, device="cuda", dtype=torch.bfloat16)
    assert cascade._flash_agrees(states.device, states.dtype, 2, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eagle3_drafts_from_graphs(dtype):
    """The trees of the CPU in float32; in bfloat16 those of the same head run as it is, but for near ties."""
    cpu = tiny.model("llama", layers=8)
    head = eagle3_heads.random_head(draft_vocab_size=40)
    cuda = dataclasses.replace(cpu, hf=copy.deepcopy(cpu.hf).to("cuda", dtype), backend="static")
    ids = torch.randint(5, tiny.VOCAB, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"tokens": 14, "depth": 3, "top_k": 3}
    graphed = Eagle3(head=head, **settings).bind(cuda, None)
    assert graphed.graphed, "the static backend on CUDA has its heads' graphs"
    if dtype is torch.float32:
        plain = Eagle3(head=copy.deepcopy(head), graphed=False, **settings).bind(cpu, None)
    else:
        plain = Eagle3(head=head, graphed=False, **settings).bind(cuda, None)
    session = Session(cpu, graphed.needs.hidden_layers)
    session.feed(ids)
    seen = session.seen(0).taps
    states = [inner.start(ids[:20], Seen(seen[:19]), Sampler(Sampling())) for inner in (plain, graphed)]
    equal = 0
    for at in range(20, 110, 5):
        outcome = Outcome(tuple(ids[at : at + 5]), Seen(seen[at - 1 : at + 4]))
        states = [inner.commit(state, outcome) for inner, state in zip((plain, graphed), states, strict=True)]
        ours, theirs = graphed.draft(states[1], 4), plain.draft(states[0], 4)
        equal += ours.tree == theirs.tree
        if dtype is torch.float32:
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-2)
    assert equal == 18 if dtype is torch.float32 else equal >= 9
    assert 1 <= drafting_of(graphed.head).graphs.captures <= 2, "the fallback ran, or forwards were captured again"


def test_answers_with_eagle3_equal_the_cpu():
    cpu = tiny.model("llama", layers=8)
    prompt, tokens = tiny.plain_answer(cpu)
    head = eagle3_heads.taught_head(cpu, (*prompt, *tokens))
    cuda = dataclasses.replace(cpu, hf=copy.deepcopy(cpu.hf).cuda(), backend="static")
    result = Parse(cuda, inner=Eagle3(head=head, tokens=14), outer=TargetOnly()).generate(prompt, max_new_tokens=40)
    assert list(result.tokens) == tokens[:40]
    assert sum(result.counters.accepted_by_depth) > 0
