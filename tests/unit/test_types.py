"""What crosses a seam refuses to be wrong; ratios follow from raw counts."""

import dataclasses
import math

import pytest
import torch

from parsedec.errors import ConfigError
from parsedec.meter import Tally
from parsedec.types import Counters, Limits, PhaseTimes, Result, Round, Sampling, StopReason, Tree

# --- trees ---


@pytest.mark.parametrize(
    ("tokens", "parents", "complaint"),
    [
        ((), (), "at least the root"),
        ((5, 6), (-1,), "2 tokens and 1 parents"),
        ((5,), (-1, 0), "1 tokens and 2 parents"),
        ((5, 6), (0, 0), r"start with -1.*\[0\]"),
        ((5, 6), (-1, -1), r"point backwards; nodes \[1\]"),
        ((5, 6, 7), (-1, 1, 0), r"nodes \[1\]"),
        ((5, 6, 7), (-1, 2, 0), r"nodes \[1\]"),
    ],
)
def test_tree_refuses_wrong_parents(tokens, parents, complaint):
    with pytest.raises(ValueError, match=complaint):
        Tree(tokens, parents)


def test_tree_refuses_probabilities_of_another_size():
    with pytest.raises(ValueError, match=r"logq has 3 rows for 2 nodes"):
        Tree.chain([5, 6], torch.zeros(3, 10))


def test_chain():
    chain = Tree.chain([5, 6, 7], torch.zeros(3, 10))
    assert (chain.parents, chain.size, chain.is_chain) == ((-1, 0, 1), 3, True)
    assert chain.depths() == [0, 1, 2]


def test_branches_depths_and_paths():
    tree = Tree((9, 1, 2, 3, 4), (-1, 0, 0, 1, 3))
    assert not tree.is_chain
    assert tree.depths() == [0, 1, 1, 2, 3]
    assert [tree.path_to(node) for node in range(5)] == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 3, 4]]


def test_depth_first_is_the_same_tree_in_another_order():
    tree = Tree((9, 1, 2, 3, 4, 5), (-1, 0, 0, 1, 2, 1), torch.arange(6.0)[:, None])
    laid, place = tree.depth_first()
    assert (laid.tokens, laid.parents) == ((9, 1, 3, 5, 2, 4), (-1, 0, 1, 1, 0, 4))
    assert laid.logq.flatten().tolist() == [0, 1, 3, 5, 2, 4]
    for node in range(tree.size):
        assert laid.tokens[place[node]] == tree.tokens[node]
        assert laid.path_to(place[node]) == [place[at] for at in tree.path_to(node)]
    swapped = Tree((9, 1, 2, 3), (-1, 0, 0, 1)).depth_first()  # an order that is its own inverse
    assert (swapped[0].tokens, swapped[0].parents, swapped[1]) == ((9, 1, 3, 2), (-1, 0, 1, 0), [0, 1, 3, 2])
    assert laid.depth_first() == (laid, list(range(6)))
    assert laid.depth_first()[0] is laid


def test_what_crosses_a_seam_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tree.chain([5]).tokens = (6,)


# --- settings ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": -1.0},
        {"top_p": math.nan},
        {"top_k": -1},
    ],
    ids=str,
)
def test_sampling_refuses(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=rf"{name}={value}.*expected.*Use"):
        Sampling(**wrong)


def test_greedy_is_temperature_0():
    assert Sampling().greedy
    assert not Sampling(temperature=0.1).greedy


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens=0; expected a whole number, at least 1"),
        ({"max_new_tokens": -5}, r"max_new_tokens=-5"),
        ({"max_new_tokens": 16.5}, r"max_new_tokens=16.5"),
        ({"stop": ("a", "")}, r"\['a', ''\].*empty string.*Remove"),
    ],
    ids=str,
)
def test_limits_refuse(wrong, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Limits(**wrong)


# --- counts ---


def test_round_refuses_to_keep_more_than_was_drafted():
    assert Round(drafted=True, judged_tokens=4, kept_tokens=5).kept_tokens == 5  # four and the end token
    with pytest.raises(ValueError, match="keeps 6 of 4"):
        Round(drafted=True, judged_tokens=4, kept_tokens=6)


def test_trees_are_counted_by_depth():
    tally = Tally()
    for depth, accepted in [(3, 1), (0, 0), (2, 2), (4, 0)]:
        tally.count_tree(depth, accepted)
    counters = tally.counters(target_calls=7)
    assert (counters.inner_steps, counters.target_calls) == (4, 7)
    assert counters.offered_by_depth == (3, 3, 2, 1)
    assert counters.accepted_by_depth == (2, 1, 0, 0)


@pytest.mark.parametrize(
    "wrong", [{"offered_by_depth": (3, 1), "accepted_by_depth": (2, 2)}, {"draft_tokens": 4, "kept_draft_tokens": 5}]
)
def test_more_than_was_offered_is_refused(wrong):
    with pytest.raises(ValueError, match="nothing can exceed what was offered"):
        Counters(**wrong)


def test_ratios_of_a_result():
    def result(wall_s, drafted, kept):
        times = PhaseTimes(prefill_s=0, draft_s=0, judge_s=0, decode_s=0, wall_s=wall_s, first_token_s=0)
        counters = Counters(draft_tokens=drafted, kept_draft_tokens=kept)
        return Result(
            text="", tokens=(1, 2, 3), prompt_tokens=1, stop=StopReason.END_TOKEN, spans=(), rounds=(),
            counters=counters, times=times)  # fmt: skip

    assert result(0.5, 40, 10).tokens_per_s == 6.0
    assert result(0.5, 40, 10).kept_share == 0.25
    assert (result(0.0, 0, 0).tokens_per_s, result(0.0, 0, 0).kept_share) == (0.0, 0.0)
