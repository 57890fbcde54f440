"""One row's attention in pieces is attention: against torch's own, and in sessions against plain forwards."""

import dataclasses

import pytest
import torch

import oracle.test_session as walks
import tiny
from parsedec.static import attention
from parsedec.static import session as static
from parsedec.static.attention import hidden, in_pieces, piece_count, reads_in_pieces
from parsedec.static.session import StaticSession
from parsedec.static.steps import PIECES_FROM, Steps, column_bucket
from static.test_static_session import FAMILIES, Replayed, in_steps

EXACT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("seen", [1, 129, 500, 512])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_pieces_together_are_the_whole(dtype, heads, seen):
    """Also where most pieces hold nothing that is seen, in a cache that is longer than the columns."""
    generator, (asking, shared) = torch.Generator().manual_seed(seen), heads
    q = torch.randn(1, asking, 16, generator=generator).to(dtype)
    cache = torch.randn(2, 1, shared, 700, 16, generator=generator).to(dtype)
    keys, values = cache.narrow(3, 0, 512)
    mask = torch.zeros(1, 512, dtype=dtype)
    mask[:, seen:] = hidden(dtype)
    # oracle: a softmax over the columns that are seen, in double precision
    each = (x[0, :, :seen].double().repeat_interleave(asking // shared, 0) for x in (keys, values))
    own_keys, own_values = each
    scores = (own_keys @ q[0].double()[..., None]).squeeze(-1) * 0.25
    expected = (scores.softmax(-1)[:, None] @ own_values).reshape(1, -1)
    for pieces in (1, 2, 4, 8):
        ours = in_pieces(q, keys, values, mask, 0.25, pieces)
        assert ours.dtype is dtype
        assert float((ours.double() - expected).abs().max()) <= EXACT[dtype] * float(expected.abs().max())


def test_every_bucket_has_equal_pieces():
    for count in (1, 257, 500, 769, 1025, 3000, 5000, 9000, 100_000):
        columns = column_bucket(count)
        pieces = piece_count(columns)
        assert columns % pieces == 0
        assert columns // pieces >= min(columns, attention.PIECE)
        assert columns // pieces % attention.ALIGNED == 0
        assert pieces == attention.MOST or columns // pieces < 2 * attention.PIECE
    assert [piece_count(columns) for columns in (256, 768, 4096, 8192)] == [2, 6, 32, 32]


class InPieces(Replayed):
    """Steps that read a text in pieces, as on CUDA; `asked` are the rows and columns they were prepared for."""

    def pieces(self, rows, columns):
        assert super().pieces(rows, columns) == 1, "on the CPU one piece is best"
        self.asked = [*getattr(self, "asked", []), (rows, columns)]
        return piece_count(columns) if rows == 1 else 1


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_that_read_in_pieces_equal_plain_forwards(monkeypatch, family):
    monkeypatch.setattr(attention, "PIECE", 16)
    steps = in_steps(monkeypatch, tiny.model(family), InPieces, prefetches=True)
    monkeypatch.setattr(walks, "Session", StaticSession)
    for seed in range(4):
        walks.test_a_random_walk_equals_a_plain_forward(family, seed)
    session, ids = StaticSession(tiny.model(family)), walks.tokens(300)
    session.feed(ids[:250])
    for token in ids[250:]:
        logits = session.feed([token])
    walks.close(logits, walks.plain(tiny.model(family), ids)[0][-1])
    assert {columns for rows, columns in steps.asked if rows == 1} == {256, 384}


def test_only_single_rows_of_long_texts_on_a_gpu(monkeypatch, tiny_target):
    steps = in_steps(monkeypatch, tiny_target)
    weights = dataclasses.replace(steps.network.weights)
    monkeypatch.setattr(steps.network, "weights", weights)
    monkeypatch.setattr(type(weights), "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr("parsedec.static.steps.reads_in_pieces", lambda *shape: True)
    for compiled, least in PIECES_FROM.items():
        one = Steps.__new__(Steps)
        one.network, one.compiled = steps.network, compiled
        assert [one.pieces(1, least), one.pieces(2, least), one.pieces(1, 256)] == [piece_count(least), 1, 1]
    monkeypatch.setattr("parsedec.static.steps.reads_in_pieces", lambda *shape: False)
    assert one.pieces(1, 4096) == 1


def test_a_device_that_reads_pieces_wrongly_is_found_out(monkeypatch, caplog):
    shape = torch.device("cpu"), torch.float32, 4, 2, 16
    assert reads_in_pieces.__wrapped__(*shape)
    assert not caplog.records
    right = attention.weighed
    monkeypatch.setattr(attention, "weighed", lambda *args: (right(*args)[0], torch.zeros_like(right(*args)[1])))
    assert not reads_in_pieces.__wrapped__(*shape)
    assert "differs by" in caplog.text

    def unknown(*args):
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr(attention, "weighed", unknown)
    assert not reads_in_pieces.__wrapped__(*shape)
    assert "no kernel for this" in caplog.text


@pytest.mark.slow
def test_compiled_steps_read_in_pieces(monkeypatch, tiny_target):
    monkeypatch.setattr(Steps, "pieces", lambda self, rows, columns: 4 if rows == 1 else 1)
    machine = static.machine_of(tiny_target)
    steps = Steps(machine.network, compiled=True)
    monkeypatch.setitem(static._machines, tiny_target.hf, dataclasses.replace(machine, steps={True: steps}))
    session, ids = StaticSession(dataclasses.replace(tiny_target, compiled=True)), walks.tokens(40)
    session.feed(ids[:30])
    for token in ids[30:]:
        logits = session.feed([token])
    walks.close(logits, walks.plain(tiny_target, ids)[0][-1])
