"""What EAGLE-3 keeps between forwards - masks, rotations, the order of a tree - against each computed anew."""

import pytest
import torch

import eagle3_heads
import tiny
from parsedec.sampling import Sampler
from parsedec.sessions.session import Session
from parsedec.types import Sampling
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.eagle3.rows import FEW, Sight, Store, causal_mask
from parsedec_adapters.eagle3.speculator import Eagle3State

CPU = torch.device("cpu")


@pytest.mark.parametrize("start", [0, 1, 5, 64, 300])
@pytest.mark.parametrize("count", [1, 2, FEW, FEW + 1])
def test_a_mask_cut_from_the_staircase_is_causal(start, count):
    rows, columns = torch.arange(count)[:, None] + start, torch.arange(start + count)
    assert torch.equal(causal_mask(start, count, CPU), columns <= rows)


def test_every_level_sees_the_stable_rows_its_ancestors_and_itself():
    generator = torch.Generator().manual_seed(0)
    k, levels, sight = 3, 4, Sight(3, 4, 20, CPU)
    for stable in (1, 7, 20):  # the next tree overwrites what the one before has written
        parents = [torch.randint(k, (k,), generator=generator) for _ in range(levels - 1)]
        seen = [sight.first(stable), *(sight.below(i, chosen, stable) for i, chosen in enumerate(parents, 1))]
        for level, mask in enumerate(seen):
            assert mask.shape == (k, stable + (level + 1) * k)
            for rank in range(k):
                own, at = set(range(stable)), rank
                for up in range(level, -1, -1):
                    own.add(stable + up * k + at)
                    at = int(parents[up - 1][at]) if up else at
                assert set(mask[rank].nonzero().flatten().tolist()) == own


def test_sight_grows_with_rows_and_levels():
    head = eagle3_heads.random_head()
    small = Store(head.config, head.fc.weight, 8).sight(2, 3)
    store = Store(head.config, head.fc.weight, 300)
    assert store.sight(2, 3) is store.sight(2, 2)
    assert store.sight(3, 3).first(8).shape == (3, 11)
    assert small.first(8).shape == (2, 10)
    assert store.sight(3, 4).first(300).all(1).tolist() == [False] * 3


def test_single_rotations_are_rows_of_the_table():
    rotations = eagle3_heads.random_head().rotations
    for dtype, start, stop in ((torch.float32, 0, 4), (torch.float32, 2, 600), (torch.float64, 1, 3)):
        like = torch.zeros((), dtype=dtype)
        cos, sin = rotations.rows(start, stop, like)
        for i, (one_cos, one_sin) in enumerate(rotations.singles(start, stop, like)):
            assert one_cos.dtype == dtype
            assert torch.equal(one_cos, cos[i : i + 1])
            assert torch.equal(one_sin, sin[i : i + 1])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_trees_are_laid_as_the_target_reads_them(seed):
    """The same nodes, depth-first; a request that samples gets them level by level, as EAGLE's own code lays them."""
    target = tiny.model("llama", layers=8)
    inner = Eagle3(head=eagle3_heads.random_head(), tokens=14, depth=3, top_k=3).bind(target, None)
    tokens = torch.randint(5, tiny.VOCAB, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    session = Session(target, inner.needs.hidden_layers)
    session.feed(tokens[:-1])
    state = inner.start(tokens, session.seen(0), Sampler(Sampling()))
    sampled = Eagle3State(state.tokens, state.rows, greedy=False)
    by_level = inner.draft(state, 4)
    laid, place = by_level.tree.depth_first()
    assert inner.propose(state, 4) == laid
    assert inner.propose(sampled, 4) == by_level.tree
    scores = inner.draft(state, 4, depth_first=True).scores
    assert [scores[at] for at in place] == pytest.approx(by_level.scores, abs=1e-6)
