"""EAGLE-3 with all sizes fixed, as it runs on CUDA, against the same head run as it is; and what its requests share."""

import copy
import gc
import random
import weakref

import pytest
import torch

import cuda_graphs
import eagle3_heads
import tiny
from parsedec import Parse, Sampling, TargetOnly
from parsedec.sampling import Sampler, request_generator
from parsedec.sessions.session import Session
from parsedec.types import Outcome, Seen
from parsedec_adapters.eagle3 import Eagle3, tree
from parsedec_adapters.eagle3.graphed import drafting_of

GREEDY = Sampler(Sampling())
HEADS = {
    "plain": {},
    "deep": {"num_layers": 2, "qk_norm": True, "norm_output": True, "draft_vocab_size": 40},
    "mlp stream": {"num_layers": 3, "mlp_stream": True, "norm_before_residual": True},
    "half rotated": {"rope": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "by length": {"rope": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 16},
    "ungrouped": {"num_kv_heads": 4, "norm_before_fc": True, "fc_bias": True},
}


@pytest.fixture(scope="module")
def target():
    return tiny.model("llama", layers=8, dtype=torch.float64)  # so that near ties do not decide


@pytest.fixture
def replayed(monkeypatch):
    """Forwards are captured and replayed, as on CUDA."""
    cuda_graphs.replay(monkeypatch)


def pair(target, head, **settings):
    """One head as it is, and a copy of it with all sizes fixed."""
    settings = {"tokens": 14, "depth": 3, "top_k": 3, **settings}
    plain, fixed = (Eagle3(head=copy.deepcopy(head), graphed=on, **settings) for on in (False, True))
    return plain.bind(target, None), fixed.bind(target, None)


def taps_of(target, inner, tokens):
    session = Session(target, inner.needs.hidden_layers)
    session.feed(tokens)
    return session.seen(0).taps


def text(target, inner, length):
    """Random tokens, and the taps of each."""
    tokens = torch.randint(5, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return tokens, taps_of(target, inner, tokens)


def same(ours, theirs):
    assert ours.tree == theirs.tree
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "top_k"), [*((name, 3) for name in HEADS), ("plain", 1), ("by length", 1)], ids=lambda value: str(value)
)
def test_a_walk_of_commits_and_rewinds_drafts_the_same(target, replayed, name, top_k):
    plain, fixed = pair(target, eagle3_heads.random_head(**HEADS[name]), top_k=top_k)
    rng = random.Random(name)
    tokens = [rng.randrange(5, tiny.VOCAB) for _ in range(400)]
    seen = taps_of(target, plain, tokens)
    states = [inner.start(tokens[:20], Seen(seen[:19]), GREEDY) for inner in (plain, fixed)]
    older = list(states)
    for step in range(28):
        if (length := states[0].length) > 20 and rng.random() < 0.3:
            back = rng.randint(10, length)
            states = [inner.rewind(state, back) for inner, state in zip((plain, fixed), states, strict=True)]
        length = states[0].length
        count = rng.choice([1, 2, 5, 9, 16, 17, 40])
        new = Outcome(tuple(tokens[length + 1 : length + 1 + count]), Seen(seen[length : length + count]))
        states = [inner.commit(state, new) for inner, state in zip((plain, fixed), states, strict=True)]
        budget = rng.choice([1, 2, 3, 4, 9])
        same(fixed.draft(states[1], budget), plain.draft(states[0], budget))
        if step % 9 == 0:
            same(fixed.draft(older[1], 4), plain.draft(older[0], 4))
            older, length = list(states), states[0].length
            anew = plain.start(tokens[: length + 1], Seen(seen[:length]), GREEDY)
            same(fixed.draft(states[1], 4), plain.draft(anew, 4))
        if states[0].length > 300:
            states = [inner.rewind(state, 30) for inner, state in zip((plain, fixed), states, strict=True)]
    assert fixed.graphed
    assert drafting_of(fixed.head).graphs.captures > 2


def spoil(store, start, value):
    store.keys_values[..., start:, :] = value
    store.outputs[start:] = value


def test_what_stands_behind_the_rows_of_a_request_is_not_seen(target):
    """Drafted rows, padding, and on the CPU what an earlier request has left in the store."""
    plain, fixed = pair(target, eagle3_heads.random_head())
    tokens, seen = text(target, plain, 30)
    states = [inner.start(tokens, Seen(seen[:29]), GREEDY) for inner in (plain, fixed)]
    expected = plain.draft(states[0], 4)
    for state in states:
        spoil(state.rows.store, 29, 1e4)
    same(fixed.draft(states[1], 4), expected)
    same(plain.draft(states[0], 4), expected)


def test_numbers_that_were_too_large_once_do_no_harm_for_good(target, monkeypatch):
    """What is no number goes through every mask: it costs a tree, or none where the request is another one."""
    plain, fixed = pair(target, eagle3_heads.random_head())
    tokens, seen = text(target, plain, 40)
    expected = plain.draft(plain.start(tokens[:30], Seen(seen[:29]), GREEDY), 4)
    state = fixed.start(tokens[:30], Seen(seen[:29]), GREEDY)
    store = state.rows.store
    spoil(store, 29, torch.nan)
    assert not fixed.draft(state, 4).sound
    same(fixed.draft(state, 4), expected)
    lost = Seen(torch.full_like(seen[:5], torch.inf))  # taps of the request itself: its trees are worth nothing
    state = fixed.commit(state, Outcome(tuple(tokens[30:35]), lost))
    assert not fixed.draft(state, 4).sound
    same(fixed.draft(fixed.rewind(state, 30), 4), expected)
    monkeypatch.setattr(drafting_of(fixed.head).stock, "clears", True)  # as on CUDA
    spoil(store, 0, torch.nan)
    del state
    state = fixed.start(tokens[:30], Seen(seen[:29]), GREEDY)
    assert state.rows.store is store
    same(fixed.draft(state, 4), expected)


@pytest.mark.parametrize("settings", [Sampling(), Sampling(temperature=0.8)], ids=["greedy", "sampled"])
def test_answers_are_the_same(target, replayed, settings):
    prompt, tokens = tiny.plain_answer(tiny.model("llama", layers=8))
    head = eagle3_heads.taught_head(tiny.model("llama", layers=8), (*prompt, *tokens))
    results = []
    for inner in pair(target, head, tokens=9):
        generator = None if settings.greedy else request_generator(3, 0)
        engine = Parse(target, inner=inner, outer=TargetOnly())
        results.append(engine.generate(prompt, max_new_tokens=40, sampling=settings, generator=generator))
    assert results[0].tokens == results[1].tokens
    assert results[0].counters == results[1].counters
    assert sum(results[0].counters.accepted_by_depth) > 0


def test_the_next_request_replays_what_was_captured_for_the_first(replayed):
    """The arms of a comparison bind the head anew; buckets are captured once for all of them."""
    target = tiny.model("llama", layers=8)
    head, captures = eagle3_heads.random_head(), []
    for _ in range(3):
        inner = Eagle3(head=head, tokens=9, depth=2, top_k=2, graphed=True).bind(target, None)
        engine = Parse(target, inner=inner, outer=TargetOnly())
        engine.generate([9, 30, 12, 44], max_new_tokens=60)
        gc.collect()
        captures.append(drafting_of(inner.head).graphs.captures)
    assert captures == [2, 2, 2]


def test_a_rewound_request_goes_on_in_its_own_store(target):
    """As after every judge pass that refuses something: no copy, and no store whose graphs would be captured anew."""
    inner = pair(target, eagle3_heads.random_head())[1]
    tokens, seen = text(target, inner, 60)
    state = inner.start(tokens[:40], Seen(seen[:39]), GREEDY)
    store = state.rows.store
    for back in (30, 20, 10):
        state = inner.rewind(state, back)
        inner.propose(state, 4)
        state = inner.commit(state, Outcome(tuple(tokens[back:41]), Seen(seen[back - 1 : 40])))
        assert state.rows.store is store
    held = state
    other = inner.commit(inner.rewind(state, 12), Outcome(tuple(tokens[12:14]), Seen(seen[11:13])))
    assert other.rows.store is not store, "somebody holds the later rows"
    assert inner.propose(held, 4) == inner.propose(inner.start(tokens[:41], Seen(seen[:40]), GREEDY), 4)


def test_a_store_that_is_outgrown_is_free_again(target):
    inner = pair(target, eagle3_heads.random_head())[1]
    tokens, seen = text(target, inner, 300)
    state = inner.start(tokens[:200], Seen(seen[:199]), GREEDY)
    small = state.rows.store
    state = inner.commit(state, Outcome(tuple(tokens[200:]), Seen(seen[199:299])))
    assert state.rows.store.capacity > small.capacity
    assert inner.start(tokens[:20], Seen(seen[:19]), GREEDY).rows.store is small


def test_a_request_frees_what_it_had_when_it_ends(target, replayed):
    """By reference counts: a store that waits for the garbage collector is a second store, captured anew."""
    inner = pair(target, eagle3_heads.random_head())[1]
    stock = drafting_of(inner.head).stock
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            Parse(target, inner=inner, outer=TargetOnly()).generate([9, 30, 12, 44], max_new_tokens=20)
        found = weakref.ref(inner.head), weakref.ref(stock.take(1, stock))
        assert len(stock._all) == 1
        del inner, stock
        assert [each() for each in found] == [None, None]
    finally:
        gc.enable()


def test_a_used_head_is_copied_and_saved_as_a_new_one_is(tmp_path):
    target = tiny.model("llama", layers=8)
    head = eagle3_heads.random_head()
    inner = Eagle3(head=head, tokens=9, depth=2, top_k=2, graphed=True).bind(target, None)
    Parse(target, inner=inner, outer=TargetOnly()).generate([9, 30, 12, 44], max_new_tokens=8)
    torch.save(head, tmp_path / "head.pt")
    for twin in (copy.deepcopy(head), torch.load(tmp_path / "head.pt", weights_only=False)):
        assert torch.equal(twin.fc.weight, head.fc.weight)
        assert not twin.shared


def test_one_head_serves_two_targets():
    """Each with the embeddings of its own."""
    head, trees = eagle3_heads.random_head(), []
    for seed in (0, 1, 0):
        target = tiny.model("llama", seed=seed, layers=8)
        inner = Eagle3(head=head, tokens=9, depth=2, top_k=2, graphed=True).bind(target, None)
        state = inner.start([9, 30, 12], Seen(torch.ones(2, 3, target.hidden_size)), GREEDY)
        trees.append(inner.draft(state, 3))
    assert trees[0].scores == trees[2].scores != trees[1].scores


def test_another_dtype_is_another_head():
    """A head that was given as an object is copied for its target, without what was captured for the original."""
    head = eagle3_heads.random_head()
    target = tiny.model("llama", layers=8)
    inner = Eagle3(head=head, graphed=True).bind(target, None)
    assert drafting_of(inner.head) is drafting_of(Eagle3(head=head).bind(target, None).head)
    doubled = Eagle3(head=head).bind(tiny.model("llama", layers=8, dtype=torch.float64), None)
    assert drafting_of(doubled.head) is not drafting_of(inner.head)
    assert drafting_of(doubled.head).stock.take(1, head).outputs.dtype == torch.float64
    overridden = Eagle3(head=head, rope_theta=77.0).bind(target, None)
    assert drafting_of(overridden.head) is not drafting_of(inner.head)


@pytest.mark.parametrize(
    ("width", "top_k", "parts"), [(640, 10, 64), (640, 11, 64), (641, 3, 64), (96, 3, 4), (96, 3, 1)]
)
def test_the_likeliest_of_parts_are_the_likeliest(width, top_k, parts):
    """Also where the parts hold as few as are wanted, fewer, or are not of one size."""
    for rows in (1, 10):
        scores = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(width)).log_softmax(-1)
        best, ids = tree.likeliest(scores, top_k, parts)
        expected = scores.topk(top_k)
        assert torch.equal(best, expected.values)
        assert torch.equal(ids, expected.indices)
