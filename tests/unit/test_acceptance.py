"""Acceptance rules on single trees: greedy is the same for all, and what each of the others does to the letter.

That the lossless ones keep the target's distribution is shown in tests/stats.
"""

import math

import pytest
import torch

import tiny
from parsedec import Parse, Sampling, TargetOnly
from parsedec.acceptance import Nucleus, Siblings, Traversal, Typical, leaves_of
from parsedec.errors import ConfigError
from parsedec.sampling import Sampler
from parsedec.types import Tree
from parsedec_adapters.draft_model import DraftModel

RULES = [Siblings(), Traversal(), Typical(), Nucleus()]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
#            0
#        1   2   3
#       4 5      6
#       7
PARENTS = (-1, 0, 0, 0, 1, 1, 3, 4)
TOKENS = (9, 1, 2, 3, 4, 5, 6, 7)
VOCAB = 10


def rows(**best):
    """Logits whose argmax at node i is best[n<i>], else token 0."""
    logits = torch.zeros(len(TOKENS), VOCAB)
    logits[:, 0] = 1
    for node, token in best.items():
        logits[int(node[1:]), token] = 5
    return logits


def sampler(temperature=1.0, seed=0, **settings):
    return Sampler(Sampling(temperature=temperature, **settings), torch.Generator().manual_seed(seed))


@every_rule
@pytest.mark.parametrize(
    ("best", "path", "token"),
    [
        (dict(n0=8), [0], 8),
        (dict(n0=1, n1=4, n4=7, n7=3), [0, 1, 4, 7], 3),
        (dict(n0=1, n1=5, n5=7), [0, 1, 5], 7),
        (dict(n0=3, n3=6), [0, 3, 6], 0),
        (dict(n0=3, n3=4), [0, 3], 4),
        (dict(n0=0), [0], 0),
    ],
)
def test_greedy_is_the_same_for_all(rule, best, path, token):
    assert rule.accept(Tree(TOKENS, PARENTS), rows(**best), Sampler(Sampling())) == (path, token)


@every_rule
def test_a_root_alone_gives_the_next_token(rule):
    logits = torch.tensor([[0.0, 0.0, 30.0, 0.0]])
    assert rule.accept(Tree.chain([1]), logits, Sampler(Sampling())) == ([0], 2)
    assert rule.accept(Tree.chain([1]), logits, sampler()) == ([0], 2)


@every_rule
def test_what_the_target_is_sure_of_is_accepted(rule):
    logits = torch.full((4, VOCAB), -60.0)
    logits[torch.arange(4), torch.tensor([1, 2, 3, 4])] = 60
    certain = Tree.chain([0, 1, 2, 3])
    assert rule.accept(certain, logits, sampler()) == ([0, 1, 2, 3], 4)
    drawn = Tree.chain([0, 1, 2, 3], torch.full((4, VOCAB), 1 / VOCAB).log())
    assert rule.accept(drawn, logits, sampler()) == ([0, 1, 2, 3], 4)


@every_rule
def test_what_the_target_never_says_is_refused(rule):
    logits = torch.zeros(len(TOKENS), VOCAB)
    logits[:, list(TOKENS[1:])] = -torch.inf
    path, token = rule.accept(Tree(TOKENS, PARENTS), logits, sampler(seed=3))
    assert path == [0]
    assert token in (0, 8, 9)


@pytest.mark.parametrize("rule", [Siblings(), Traversal()], ids=["siblings", "traversal"])
def test_the_request_s_own_settings_are_honoured(rule):
    """top_k=1 is greedy in other words, whatever the temperature."""
    logits = torch.randn(len(TOKENS), VOCAB, generator=torch.Generator().manual_seed(2))
    greedy = rule.accept(Tree(TOKENS, PARENTS), logits, Sampler(Sampling()))
    assert rule.accept(Tree(TOKENS, PARENTS), logits, sampler(2.0, top_k=1)) == greedy


@pytest.mark.parametrize("rule", [Siblings(), Traversal()], ids=["siblings", "traversal"])
def test_only_the_rows_looked_at_are_made_a_distribution(rule):
    """A vocabulary is wide: softmax over all nodes of a tree would cost more than the decision."""
    asked = []

    class Watched(Sampler):
        def log_distribution(self, logits):
            assert logits.shape == (VOCAB,)
            asked.append(logits)
            return super().log_distribution(logits)

    logits = rows(n0=8) * 20
    settings = Sampling(temperature=1.0)
    assert rule.accept(Tree(TOKENS, PARENTS), logits, Watched(settings, torch.Generator().manual_seed(0)))[0] == [0]
    assert len(asked) == 1 if isinstance(rule, Siblings) else len(asked) <= 4


def test_a_guess_named_twice_is_tried_once():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).repeat(3, 1)
    for seed in range(20):
        path, token = Siblings().accept(Tree((0, 1, 1), (-1, 0, 0)), logits, sampler(seed=seed))
        assert path in ([0], [0, 1])
        assert path == [0, 1] or token != 1


def test_typical_threshold_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    entropy = -float((p * (p + 1e-5).log()).sum())
    bar = 0.3 * math.exp(-entropy)
    assert 0.05 < bar < 0.15
    tree = Tree((0, 3, 2), (-1, 0, 0))
    logits = p.log().repeat(3, 1)
    assert Typical(epsilon=0.9, delta=0.3).accept(tree, logits, sampler()) == ([0, 2], 0)
    assert Typical(epsilon=0.04, delta=0.3).accept(tree, logits, sampler()) == ([0, 2], 0)  # 2 is likelier than 3
    assert Typical(epsilon=0.9, delta=0.9).accept(tree, logits, sampler()) == ([0], 0)
    assert Typical(epsilon=0.09).delta is None  # sqrt(0.09) = 0.3, as Medusa's defaults
    assert Typical().accept(tree, logits, sampler()) == Typical(delta=0.3).accept(tree, logits, sampler())


def test_typical_prefers_depth_then_likelihood():
    p = torch.tensor([0.4, 0.35, 0.25]).log()
    wide = Tree((0, 0, 1, 1, 2), (-1, 0, 0, 2, 2))
    assert Typical(epsilon=0.1).accept(wide, p.repeat(5, 1), sampler()) == ([0, 2, 3], 0)


def test_typical_draws_nothing():
    source = sampler(seed=5)
    before = source.generator.get_state()
    Typical().accept(Tree(TOKENS, PARENTS), rows(n0=1), source)
    assert torch.equal(source.generator.get_state(), before)


@pytest.mark.parametrize("settings", [dict(epsilon=0), dict(epsilon=1.5), dict(delta=0.0), dict(delta=-1)], ids=str)
def test_typical_refuses_thresholds_that_mean_nothing(settings):
    with pytest.raises(ConfigError, match="epsilon"):
        Typical(**settings)


def test_leaves_come_last_first():
    assert leaves_of(Tree(TOKENS, PARENTS)) == [7, 6, 5, 2]
    assert leaves_of(Tree.chain([1])) == []


@every_rule
def test_the_engine_uses_the_rule_and_says_what_it_keeps(rule, tiny_target, tiny_draft):
    engine = Parse(tiny_target, tiny_draft, inner=DraftModel(length=3), acceptance=rule, outer=TargetOnly())
    assert engine.lossless is rule.lossless
    prompt, tokens = tiny.plain_answer(tiny_target)
    assert list(engine.generate(prompt, max_new_tokens=24).tokens) == tokens[:24]
    warm = Sampling(temperature=0.9)
    texts = [
        engine.generate(
            prompt, max_new_tokens=24, sampling=warm, generator=torch.Generator().manual_seed(seed)
        ).tokens
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert Parse(tiny_target).lossless


def test_the_rule_serves_the_draft_model_too(tiny_target, tiny_draft):
    seen = []

    class Watched(Siblings):
        def accept(self, tree, logits, sampler):
            seen.append(tree.size)
            return super().accept(tree, logits, sampler)

    engine = Parse(tiny_target, tiny_draft, draft_inner=DraftModel(length=2, model=tiny_draft), acceptance=Watched())
    engine.generate("w1w2w3", max_new_tokens=16)
    assert 3 in seen  # trees of two guesses: only the draft model has a speculator here
