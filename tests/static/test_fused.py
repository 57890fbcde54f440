"""Kernels of decode steps against torch's, interpreted where there is no CUDA."""

import importlib
import os

import numpy as np
import pytest
import torch

import tiny
from parsedec.static import steps
from parsedec.static.attention import attention, hidden
from parsedec.static.memory import Lease, Pool
from parsedec.static.network import Network
from parsedec.static.rotary import rotated
from parsedec.static.weights import Norm, join_weights, read_weights

triton = pytest.importorskip(
    "triton", reason="Triton is not installed: it comes with torch for CUDA, or by make test-kernels"
)


def release(package):
    return tuple(int(part) for part in package.__version__.split(".")[:2])


if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is a driver for GPUs and no GPU", allow_module_level=True)
if not torch.cuda.is_available() and release(triton) < (3, 9) and release(np) >= (2, 4):
    pytest.skip(
        f"Triton {triton.__version__} cannot interpret loops with numpy {np.__version__}", allow_module_level=True
    )

fused = importlib.import_module("parsedec.static.fused")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = [(4, 2, 16), (4, 4, 32), (16, 2, 64), (8, 1, 128)]  # of queries, of keys, their size
CLOSE = {torch.float32: 1e-5, torch.float16: 5e-3}  # and no bfloat16: the interpreter multiplies its bits


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_are_normed_turned_and_put_in_their_columns(heads, normed, dtype):
    queries, shared, size = heads
    rows, columns, capacity = 3, 40, 50
    product = numbers(rows, (queries + 2 * shared) * size, dtype=dtype)
    states = numbers(4, 1, shared, capacity, size, dtype=dtype, seed=1)
    norms = tuple(Norm(numbers(size, dtype=dtype, seed=seed), 1e-5, None, None) for seed in (2, 3)) if normed else None
    angles = tuple(numbers(rows, 1, size, dtype=dtype, seed=seed) for seed in (4, 5))
    slots = torch.tensor([7, 30, 8], device=DEVICE)

    q, k, v = product.float().view(rows, -1, size).split_with_sizes((queries, shared, shared), 1)
    if norms:
        q, k = (Norm(norm.weight.float(), 1e-5, None, None)(x) for norm, x in zip(norms, (q, k), strict=True))
    q, k = (rotated(x, tuple(angle.float() for angle in angles)) for x in (q, k))
    expected = states.clone()
    for row, slot in enumerate(slots.tolist()):
        expected[2, 0, :, slot], expected[3, 0, :, slot] = k[row].to(dtype), v[row].to(dtype)

    made = fused.placed(product, norms, angles, states.narrow(3, 0, columns)[2:], slots)
    torch.testing.assert_close(made, q.to(dtype), atol=CLOSE[dtype], rtol=CLOSE[dtype])
    torch.testing.assert_close(states, expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert torch.equal(states[:2], numbers(4, 1, shared, capacity, size, dtype=dtype, seed=1)[:2]), "another layer's"


def test_without_slots_rows_stand_one_behind_another():
    rows, (queries, shared, size) = 4, HEADS[0]
    product, angles = numbers(rows, (queries + 2 * shared) * size), tuple(numbers(rows, 1, size) for _ in range(2))
    made = []
    for slots in (None, torch.arange(rows, device=DEVICE)):
        states = numbers(2, 1, shared, rows, size)
        made.append((fused.placed(product, None, angles, states, slots), states))
    for without, there in zip(*made, strict=True):
        assert torch.equal(without, there)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", [64, 72, 1000])
def test_rows_are_added_and_normed(size, dtype):
    x, more, weight = (numbers(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((3, size), (3, size), (size,))))
    norm = Norm(weight, 1e-5, None, None)
    for added in (None, more):
        whole, y = fused.normed(x, added, norm)
        expected = x if added is None else x + added
        assert torch.equal(whole, expected), "as the sum of torch's, which the next layer reads"
        exact = torch.nn.functional.rms_norm(expected.double(), (size,), weight.double(), 1e-5)
        torch.testing.assert_close(y.double(), exact, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("size", [8, 1024, 1100])
def test_the_gate(size, dtype):
    product = numbers(2, 2 * size, dtype=dtype) * 5
    gate, up = product.double().chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(fused.gated(product).double(), exact, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("programs", [fused.PROGRAMS, 4])
@pytest.mark.parametrize("columns", [48, 256, 455])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_tree_of_rows_sees_what_its_mask_shows(heads, rows, columns, programs, dtype):
    queries, shared, size = heads
    q = numbers(rows, queries, size, dtype=dtype)
    states = numbers(2, 1, shared, columns + 9, size, dtype=dtype, seed=1)
    states[..., columns:, :] = torch.nan  # beyond the bucket
    states = states.narrow(3, 0, columns)
    start = columns // 2
    mask = torch.full((rows, columns), hidden(dtype), dtype=dtype, device=DEVICE)
    mask[:, :start] = 0
    for row in range(rows):  # a path of its own
        mask[row, [start + other for other in range(row + 1) if other == row or other % 3 == 0]] = 0
    expected = attention(q.double(), *states.double(), mask.double(), False, size**-0.5)
    made = fused.seen(q, states, mask, size**-0.5, programs)
    torch.testing.assert_close(made.double(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("suffix", [1, 5, 24, 33])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rows_of_probes_see_the_text_and_themselves(heads, suffix, dtype):
    """As one softmax over both: the text in a part of its own, with the logarithm of what it weighs."""
    (queries, shared, size), probes, columns, scale = heads, 3, 40, heads[2] ** -0.5
    group, rows = queries // shared, probes * suffix
    q = numbers(rows, queries, size, dtype=dtype)
    k, v = numbers(2, shared, rows, size, dtype=dtype, seed=1).transpose(1, 2)  # as `placed` leaves them
    keys, values = numbers(2, columns, shared, size, dtype=dtype, seed=2)
    packed = q.view(rows, shared, group, size).transpose(1, 2).reshape(rows * group, shared, size)
    scores = torch.einsum("rgd,tgd->grt", packed.double(), keys.double()) * scale
    text = torch.einsum("grt,tgd->rgd", scores.softmax(-1), values.double()).to(dtype).contiguous()
    weight = scores.logsumexp(-1).float().t()  # as flash attention gives it

    every = torch.full((suffix, suffix), -torch.inf, dtype=torch.float64, device=DEVICE).triu(1)
    expected = []
    for probe in range(probes):
        own = slice(probe * suffix, (probe + 1) * suffix)
        both = [torch.cat(parts).double().transpose(0, 1) for parts in ((keys, k[own]), (values, v[own]))]
        mask = torch.cat([every.new_zeros(suffix, columns), every], 1)
        expected.append(attention(q[own].double(), *(x[None] for x in both), mask, False, scale))
    whole = numbers(2 + rows, queries, size, dtype=dtype)  # behind the rows of the draft
    fused.probed(q, k, v, text, weight, whole[2:], suffix, scale)
    torch.testing.assert_close(whole[2:].flatten(1).double(), torch.cat(expected), atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert torch.equal(whole[:2], numbers(2 + rows, queries, size, dtype=dtype)[:2])


def test_as_many_pieces_as_keep_a_gpu_busy(monkeypatch):
    grids = []

    class Counting:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    for name in ("seen", "together"):
        monkeypatch.setattr(fused.kernels, name, Counting())
    for rows, columns in ((1, 64), (1, 768), (1, 8192), (64, 768)):
        states = torch.zeros(2, 1, 8, columns, 128, dtype=torch.bfloat16)
        mask = torch.zeros(rows, columns, dtype=torch.bfloat16)
        fused.seen(torch.zeros(rows, 64, 128, dtype=torch.bfloat16), states, mask, 1.0)
    tiles_heads_pieces, put_together = (
        [grid for grid in grids if len(grid) == 3],
        [grid for grid in grids if len(grid) == 1],
    )
    assert tiles_heads_pieces == [(1, 8, 1), (1, 8, 12), (1, 8, 32), (8, 8, 4)], "tiles, heads of keys, pieces"
    assert put_together == [(64,), (64,), (64 * 64,)], "one piece is the whole"


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_they_are_found_right(heads, dtype):
    assert fused.right(DEVICE, dtype, *heads, 72, heads[1] > 1)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 64), (torch.float32, 80)], ids=str)
def test_what_they_are_not_made_for_is_left_to_torch(dtype, size):
    assert not fused.right(DEVICE, dtype, 4, 2, size, 64, True)


OUTPUTS = {
    "normed": [4],
    "gated": [1],
    "placed": [1],
    "seen": [3, 4],
    "together": [2],
    "probed": [5],
}  # which arguments they are


@pytest.mark.parametrize("broken", OUTPUTS)
def test_wrong_numbers_are_noticed(broken, monkeypatch, caplog):
    class Broken:
        def __getitem__(self, grid):
            return lambda *arguments, **_: [arguments[i].fill_(torch.nan) for i in OUTPUTS[broken]]

    monkeypatch.setattr(fused.kernels, broken, Broken())
    assert not fused.right.__wrapped__(DEVICE, torch.float32, 4, 2, 16, 64, True)
    assert "the static backend runs without kernels of its own: its output differs" in caplog.text


@pytest.mark.parametrize("error", fused.kernels.FAILS)
def test_what_cannot_be_compiled_or_launched_is_left_to_torch(error, monkeypatch, caplog):
    class Fails:
        def __getitem__(self, grid):
            raise error("no such target\nand more")

    monkeypatch.setattr(fused.kernels, "placed", Fails())
    assert not fused.right.__wrapped__(DEVICE, torch.float32, 4, 2, 16, 64, True)
    assert caplog.messages == ["the static backend runs without kernels of its own: no such target"]


def test_pieces_of_one_block_and_of_several_are_tried(monkeypatch):
    widths = []
    real = fused.kernels.seen

    class Watched:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                widths.append((arguments[5], arguments[7] // fused.COLUMNS, grid[2]))
                return real[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(fused.kernels, "seen", Watched())
    assert fused.right.__wrapped__(DEVICE, torch.float32, 4, 2, 16, 64, True)
    assert widths == [(1, 3, 2), (5, 1, 6), (64, 6, 1)], "rows, blocks a piece, pieces"


def test_a_step_by_them_equals_one_by_torch(monkeypatch):
    """Through the network, on buffers that a lease holds: a chain and then a tree."""
    hf = tiny.model("qwen3").hf.to(DEVICE)
    join_weights(hf)
    monkeypatch.setattr("parsedec.static.weights.PACK_LIMIT", 0)
    weights = read_weights(hf)
    found = {}
    for kind in (fused, None):
        monkeypatch.setattr("parsedec.static.network.kernels_for", lambda _, kind=kind: kind)
        ours = steps.Steps(Network(weights), compiled=False)
        lease = Lease(Pool(weights))
        sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
        with torch.inference_mode():
            first, _ = ours.run(lease, [1, 2, 3], None, None, ())
            second, taps = ours.run(lease, [4, 5, 6, 7], [3, 4, 4, 5], sees, (1, 2))
        found[kind] = first, second, taps
    for ours, torchs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, torchs, atol=1e-4, rtol=1e-4)
