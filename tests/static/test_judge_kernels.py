"""Every kernel of the judge pass against separate forwards in double precision, and against the mask drawn by hand."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.nn.attention.varlen import AuxRequest
from torch.utils._python_dispatch import TorchDispatchMode

import oracle.test_judge_pass as judging
import static.test_static_session as backend
import tiny
from parsedec import masks
from parsedec.errors import ConfigError
from parsedec.sessions import session as eager
from parsedec.sessions.session import Session
from parsedec.static import cascade, flex
from parsedec.static import judging as kernels
from parsedec.static.attention import Rows
from parsedec.static.judging import KERNELS, Block, CascadeRows
from parsedec.static.memory import Buffers
from parsedec.static.session import StaticSession
from parsedec.static.weights import read_weights
from parsedec.types import JudgePath

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
CPU = torch.device("cpu")
BLOCKS = [Block(7, 5, (8, 10, 12), 3), Block(0, 9, (), 4), Block(20, 0, (3, 20), 5), Block(300, 40, (2, 301, 340), 90)]


def with_kernel(model, name):
    return dataclasses.replace(model, backend="static", judge_kernel=name)


def in_small_pieces(monkeypatch):
    """So that a small pass has several groups of probes, buckets and squares."""
    monkeypatch.setattr(cascade, "GROUP", 10)
    monkeypatch.setattr(flex, "SQUARE", 16)
    monkeypatch.setattr(flex, "LEAST_ROWS", 16)


@pytest.fixture(autouse=True)
def static_sessions(monkeypatch):
    monkeypatch.setattr(judging, "Session", StaticSession)


@pytest.mark.parametrize("block", [512, 17, 4])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_separate_forwards_in_double_precision(monkeypatch, family, name, block):
    in_small_pieces(monkeypatch)
    model = tiny.model(family)
    backend.in_blocks(monkeypatch, model, block)
    exact = dataclasses.replace(model, hf=copy.deepcopy(model.hf).double())
    session, rows = judging.judged(with_kernel(model, name), JudgePath.PACKED)
    assert judging.max_error(rows.probe_logits, judging.separate(exact)) <= judging.ATOL
    plain = judging.forward(exact, judging.PROMPT + judging.DRAFT)
    expected = plain[len(judging.PROMPT) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(judging.DRAFT)[:, None])
    assert judging.max_error(rows.draft_logprobs, expected[:, 0]) <= judging.ATOL
    session.keep_draft(12)
    assert judging.max_error(session.next_logits, plain[len(judging.PROMPT) + 11]) <= judging.ATOL


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_leaks(monkeypatch, name):
    """A probe's logits do not change by a bit with draft tokens behind its cut, nor with another probe's suffix."""
    in_small_pieces(monkeypatch)
    monkeypatch.setattr(tiny, "model", lambda family, **more: with_kernel(original(family), name))
    judging.test_leak_is_bit_exact("qwen3")


original = tiny.model


@pytest.mark.parametrize("name", KERNELS)
def test_bf16_is_as_exact_as_a_plain_forward(monkeypatch, name):
    monkeypatch.setattr(tiny, "model", lambda family, **more: with_kernel(original(family, **more), name))
    judging.test_bf16_error_is_at_most_twice_that_of_a_plain_forward("qwen3")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_two_integers_a_row_say_what_the_mask_draws(block):
    """The block is the last part of the drawn pass: its rows of the draft, then its probes."""
    drawn = masks.probe_mask(0, block.text, list(block.cuts), block.suffix)[block.before :]
    assert torch.equal(block.allowed(CPU), drawn)
    assert torch.equal(
        block.positions(), masks.probe_positions(0, block.text, list(block.cuts), block.suffix)[block.before :]
    )


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_squares_of_flex_cover_the_mask(block):
    rows, columns = flex.bucket(block.rows, 128), flex.bucket(block.before + block.rows, 256)
    mask = flex.block_mask(block.reach(), block.own(), block.before, rows, columns, CPU)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    allowed = mask.mask_mod(torch.tensor(0), torch.tensor(0), row, column)
    assert torch.equal(allowed[: block.rows, : block.before + block.rows], block.allowed(CPU))
    assert not allowed[: block.rows, block.before + block.rows :].any()
    assert allowed.any(1).all(), "a softmax of nothing is not a number"
    squares = allowed.view(rows // 128, 128, columns // 128, 128).transpose(1, 2).flatten(2)
    some, full = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    for i, per_row in enumerate(squares):
        for j, square in enumerate(per_row):
            assert ((i, j) in full) <= bool(square.all())
            assert ((i, j) in full or (i, j) in some) >= bool(square.any())
            assert not ((i, j) in full and (i, j) in some), "read twice"


def listed(counts, order):
    return {(i, int(j)) for i, row in enumerate(order[0, 0]) for j in row[: counts[0, 0, i]]}


def random_pass(block, *, heads=4, shared=2, size=16, dtype=torch.float32, seed=0):
    """(buffers with random rows before the block, q, k, v)"""
    generator = torch.Generator().manual_seed(seed)
    weights = dataclasses.replace(
        read_weights(tiny.model("llama", layers=1).hf), query_heads=heads, kv_heads=shared, head_size=size
    )
    buffers = Buffers(weights, 1024)
    buffers.states = torch.randn(buffers.states.shape, generator=generator).to(dtype)
    shapes = [(block.rows, heads, size), (block.rows, shared, size), (block.rows, shared, size)]
    return buffers, *(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def exact_attention(buffers, q, k, v, block, scale):
    """Softmax attention under the drawn mask, in double precision: [R, A * d]."""
    group = q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat([buffers.states[i, 0, :, : block.before].double(), new.transpose(0, 1).double()], 1)
        for i, new in enumerate((k, v))
    )
    scores = q.double().transpose(0, 1) @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
    drawn = masks.probe_mask(0, block.text, list(block.cuts), block.suffix)[block.before :]
    scores = scores.masked_fill(~drawn, -torch.inf)
    return (scores.softmax(-1) @ values.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("heads", [(4, 2), (6, 6), (8, 1)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_attention_of_a_block(name, block, heads):
    buffers, q, k, v = random_pass(block, heads=heads[0], shared=heads[1])
    expected = exact_attention(buffers, q, k, v, block, 0.3)
    out = KERNELS[name](buffers, block, 0.3)(0, q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    written = buffers.states[:2, 0, :, block.before : block.before + block.rows]
    assert torch.equal(written, torch.stack([k, v]).transpose(1, 2)), "what the next blocks read"


def test_parts_without_torchs_kernel_are_the_same():
    """Where the fused kernel of the CPU is not, the log-sum-exp is made by hand."""
    generator = torch.Generator().manual_seed(3)
    q, keys = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(1, 2, 5, 8, generator=generator)
    mask = torch.zeros(5, 5).masked_fill_(torch.rand(5, 5, generator=generator) < 0.3, torch.finfo(torch.float32).min)
    for arguments in (dict(mask=None), dict(mask=mask), dict(mask=None, causal=True)):
        fused = cascade.part(q, keys, keys, scale=0.4, **arguments)
        plain = cascade.by_hand(q, keys[0, :, None], keys[0, :, None], arguments["mask"], 0.4, "causal" in arguments)
        for one, other in zip(fused, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def flash_as_documented(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn, written from its documentation: a loop over sequences."""
    outs, weights = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seq_q)):
        q = query[start:stop].double()
        if block_table is None:
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        else:
            k, v = (x[block_table[i].long()].flatten(0, 1)[: seqused_k[i]] for x in (key, value))
        assert len(q) <= max_q
        assert len(k) <= max_k
        group = q.shape[1] // k.shape[1]
        assert enable_gqa
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if window_size == (-1, 0):
            scores += torch.full(scores.shape[1:], -torch.inf).triu_(1 + len(k) - len(q))
        weights.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    out, weight = torch.cat(outs).to(query.dtype), torch.cat(weights, 1).float()
    return (out, weight) if return_aux is not None and return_aux.lse else out


@pytest.mark.parametrize("heads", [(4, 2), (6, 6), (8, 1)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_calls_of_flash_attention_are_right(monkeypatch, block, heads):
    """What is asked of it, with a stand-in that does what its documentation says: the kernel itself needs CUDA."""
    monkeypatch.setattr(cascade, "PAGED", True)
    monkeypatch.setattr(cascade, "varlen_attn", flash_as_documented)
    monkeypatch.setattr(cascade, "fused_for", lambda buffers, suffix: True)
    buffers, q, k, v = random_pass(block, heads=heads[0], shared=heads[1])
    expected = exact_attention(buffers, q, k, v, block, 0.3)
    attend = CascadeRows(buffers, block, 0.3)
    assert attend._pages is not None
    torch.testing.assert_close(attend(0, q, k, v).double(), expected, rtol=0, atol=1e-5)


def operator_of_torch_2_11(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None):  # fmt: skip
    """aten::_flash_attention_forward over sequences of their own length, a loop: columns begin where `cum_seq_k` says,
    and are as many as `seqused_k` says."""
    assert not dropout_p
    used = cum_seq_k.diff() if seqused_k is None else seqused_k
    outs, weights = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(cum_seq_q)):
        columns = slice(int(cum_seq_k[i]), int(cum_seq_k[i] + used[i]))
        one = torch.tensor([0, stop - start]), torch.tensor([0, used[i]])
        out, weight = flash_as_documented(
            query[start:stop], key[columns], value[columns], *one, max_q, max_k, return_aux=AuxRequest(lse=True),
            scale=scale, window_size=(-1, 0) if is_causal else (-1, -1), enable_gqa=True)  # fmt: skip
        outs.append(out)
        weights.append(weight)
    return torch.cat(outs), torch.cat(weights, 1), None, None, None


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_calls_of_flash_attention_are_right_without_pages(monkeypatch, block):
    monkeypatch.setattr(cascade, "PAGED", False)
    monkeypatch.setattr(cascade, "flash_forward", operator_of_torch_2_11)
    monkeypatch.setattr(cascade, "fused_for", lambda buffers, suffix: True)
    buffers, q, k, v = random_pass(block, heads=4, shared=2)
    expected = exact_attention(buffers, q, k, v, block, 0.3)
    torch.testing.assert_close(CascadeRows(buffers, block, 0.3)(0, q, k, v).double(), expected, rtol=0, atol=1e-5)


def test_flash_attention_is_used_only_if_its_numbers_are_right(monkeypatch, caplog):
    def broken(*arguments, window_size=(-1, -1), **more):
        return flash_as_documented(*arguments, window_size=(-1, -1), **more)

    for stand_in, agrees in ((flash_as_documented, True), (broken, False)):
        monkeypatch.setattr(cascade, "PAGED", True)
        monkeypatch.setattr(cascade, "varlen_attn", stand_in)
        assert cascade._flash_agrees.__wrapped__(CPU, torch.bfloat16, 2, 16) is agrees
    assert "differs by" in caplog.text
    monkeypatch.undo()
    assert cascade._flash_agrees.__wrapped__(CPU, torch.bfloat16, 2, 16) is False  # there is none for the CPU
    assert "runs without flash attention" in caplog.text


def test_auto_goes_by_length(monkeypatch):
    monkeypatch.setitem(kernels.CASCADE_COLUMNS, "cpu", 100)
    for before, kind in ((50, Rows), (150, CascadeRows)):
        block = Block(before, 5, (before,), 3)
        buffers = random_pass(block)[0]
        assert type(kernels.kernel("auto", buffers, block, 0.3)) is kind
    monkeypatch.setattr(cascade, "fused_for", lambda buffers, suffix: True)
    monkeypatch.setattr(kernels, "FLASH_COLUMNS", 200)  # another length where flash attention is
    assert type(kernels.kernel("auto", buffers, block, 0.3)) is Rows
    monkeypatch.setattr(kernels, "FLASH_COLUMNS", 150)
    assert type(kernels.kernel("auto", buffers, block, 0.3)) is CascadeRows


def test_an_unknown_kernel_is_refused(tiny_target):
    with pytest.raises(ConfigError, match=r"judge_kernel='flash'.*auto, sdpa, cascade, flex"):
        with_kernel(tiny_target, "flash")


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor) and tensor._base is None:
                self.size = max(self.size, tensor.nbytes)
        return out


def largest_of_a_pass(model, n, k, s=8):
    """Bytes of the largest tensor made in a judge pass over n draft rows and k probes, the cache itself aside."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, tiny.VOCAB, (n + 20 + s,), generator=generator).tolist()
    session = (StaticSession if model.backend == "static" else Session)(model)
    session.feed(ids[:20])
    if isinstance(session, StaticSession):
        session._lease.writable(n + 512)
    with Largest() as largest:
        rows = session.judge(ids[20 : 20 + n], [n * (i + 1) // k for i in range(k)], ids[-s:])
    assert rows.rows == n + k * s
    return largest.size


@pytest.mark.parametrize("name", ["sdpa", "cascade"])
def test_memory_grows_with_the_rows_not_with_their_square(name):
    """4096 draft rows and 128 probes: no tensor is larger than a block of rows by all columns."""
    model = dataclasses.replace(with_kernel(tiny.model("llama", layers=1), name), context_limit=1 << 20)
    small, large = (largest_of_a_pass(model, n, k) for n, k in ((2048, 64), (4096, 128)))
    assert large <= 2.2 * small
    assert large <= 4 * 512 * (4096 + 20 + 512)
    assert large < (4096 + 128 * 8) ** 2 / 2, "one byte for every second pair of rows"


@pytest.mark.parametrize("rows", [40, 9, 5, 1])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "mixtral"])
def test_the_eager_backend_takes_long_passes_in_blocks(monkeypatch, family, rows):
    monkeypatch.setattr(judging, "Session", Session)
    monkeypatch.setattr(eager, "PACKED_ROWS", rows)
    judging.test_packed_scores_equal_separate_forwards(family, "sdpa")
    judging.test_two_passes_reuse_the_draft_rows(family)
    judging.test_a_pending_token_is_a_prefix_every_probe_sees(family)
    judging.test_draft_logprobs_and_cut_logits_come_with_the_pass(family)


def test_memory_of_the_eager_backend(monkeypatch):
    monkeypatch.setattr(eager, "PACKED_ROWS", 512)
    model = dataclasses.replace(tiny.model("llama", layers=1), context_limit=1 << 20)
    small, large = (largest_of_a_pass(model, n, k, s=24) for n, k in ((1024, 32), (2048, 64)))
    assert large <= 2.2 * small


@pytest.mark.slow
def test_flex_is_compiled_once_a_bucket(monkeypatch):
    """Blocks of other sizes in the same bucket find the compiled code."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "uncompiled", flex.compiled())
    counts = []
    for block in (Block(100, 40, (20, 101, 140), 9), Block(120, 50, (21, 99), 9), Block(300, 40, (20, 101, 340), 9)):
        buffers, q, k, v = random_pass(block)
        out = KERNELS["flex"](buffers, block, 0.3)(0, q, k, v)
        expected = exact_attention(buffers, q, k, v, block, 0.3)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] < counts[2]
