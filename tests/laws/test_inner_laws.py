"""The law book: what every inner speculator must hold to, whoever wrote it (CONTRIBUTING, "Add an inner speculator").

`SPECULATORS` names one for every YAML of conf/inner, and a test makes sure that none is missing.
"""

import random
from pathlib import Path

import pytest
import torch

import tiny
from eagle3_heads import tiny_head
from medusa_heads import random_heads
from parallel_heads import new_head
from parsedec import Parse, TargetOnly
from parsedec.inner import NoSpeculation
from parsedec.sampling import Sampler
from parsedec.sessions.session import Session
from parsedec.types import Outcome, Sampling, Seen
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.eagle3.random import RandomEagle3
from parsedec_adapters.early_exit import SelfEarlyExit
from parsedec_adapters.hf_assisted import HfAssisted
from parsedec_adapters.medusa import Medusa
from parsedec_adapters.ngram import Ngram
from parsedec_adapters.parallelspec import ParallelSpec
from parsedec_adapters.pard import Pard
from parsedec_adapters.scripted import Scripted

CONF = Path(__file__).resolve().parents[2] / "conf"
TOKENS = torch.randint(5, tiny.VOCAB, (64,), generator=torch.Generator().manual_seed(3)).tolist()
SPECULATORS = {
    "none": NoSpeculation(),
    "draft_model": DraftModel(length=3),
    "eagle3": Eagle3(head=tiny_head(), tokens=12, depth=2, top_k=3),
    "eagle3_graphed": Eagle3(head=tiny_head(), tokens=12, depth=2, top_k=3, graphed=True),
    "eagle3_random": RandomEagle3(tokens=9, depth=1, top_k=2),
    "medusa": Medusa(heads=random_heads(), nodes=12),
    "draft_model_unsure": DraftModel(length=4, confidence=0.6),
    "hf_assisted": HfAssisted(length=3, confidence=0.2),
    "pard": Pard(length=3, mask_token=4),
    "parallelspec": ParallelSpec(head=new_head(tiny.model("llama"), slots=3), tokens=9, top_k=3),
    "self_early_exit": SelfEarlyExit(layers=2, length=3),
    "ngram": Ngram(length=3, longest=3, shortest=1),
    "scripted": Scripted(answer=tuple(TOKENS), rate=0.7, depth=3),
    "scripted_asking": Scripted(rate=0.7, depth=3),
}
every_speculator = pytest.mark.parametrize("name", SPECULATORS)
every_mode = pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])


@pytest.fixture
def bound(name, tiny_target, tiny_draft):
    return SPECULATORS[name].bind(tiny_target, tiny_draft)


def sampler(temperature=0.0, seed=0):
    return Sampler(Sampling(temperature=temperature), torch.Generator().manual_seed(seed))


class Target:
    """What the target would hand over: taps of the tokens it has read."""

    def __init__(self, model, needs):
        self.session = Session(model, needs.hidden_layers)

    def seen(self, tokens, start=0):
        """Taps of tokens[start:-1]; the last token is the root, which the target has not read."""
        self.session.rewind(0)
        if len(tokens) > 1:
            self.session.feed(tokens[:-1])
        return self.session.seen(start) if self.session.taps else Seen()


def fresh(bound, target, tokens, how):
    return bound.start(tokens, target.seen(tokens), how)


def same_tree(a, b):
    logq = a.logq is b.logq is None or torch.allclose(a.logq, b.logq, atol=1e-5)
    return a.tokens == b.tokens and a.parents == b.parents and logq


def test_every_yaml_has_its_laws():
    assert {path.stem for path in (CONF / "inner").glob("*.yaml")} <= set(SPECULATORS)


@every_speculator
@every_mode
@pytest.mark.parametrize("budget", [0, 1, 2, 7])
def test_proposals_start_at_the_root_and_fit_the_budget(bound, tiny_target, temperature, budget):
    state = fresh(bound, Target(tiny_target, bound.needs), TOKENS[:12], sampler(temperature))
    tree = bound.propose(state, budget)
    assert tree.tokens[0] == TOKENS[11]
    assert max(tree.depths()) <= budget
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert tree.logq is None or tree.logq.shape == (tree.size, tiny_target.vocab_size)


@every_speculator
@every_mode
def test_proposing_leaves_the_state_as_it_was(bound, tiny_target, temperature):
    target = Target(tiny_target, bound.needs)
    state = fresh(bound, target, TOKENS[:12], sampler(temperature, seed=1))
    generator = torch.Generator().manual_seed(1)
    trees = []
    for _ in range(2):
        state_sampler = getattr(state, "sampler", None)
        if state_sampler is not None and state_sampler.generator is not None:
            state_sampler.generator.set_state(generator.get_state())
        trees.append(bound.propose(state, 3))
    assert same_tree(*trees)


@every_speculator
@every_mode
def test_commits_add_up(bound, tiny_target, temperature):
    target = Target(tiny_target, bound.needs)

    def committed(*stops):
        state, at = fresh(bound, target, TOKENS[:10], sampler(temperature, seed=2)), 10
        for stop in stops:
            state = bound.commit(state, Outcome(tuple(TOKENS[at:stop]), target.seen(TOKENS[:stop], at - 1)))
            at = stop
        return bound.propose(state, 3)

    assert same_tree(committed(12, 17), committed(17))


@every_speculator
def test_an_old_state_still_works(bound, tiny_target):
    target = Target(tiny_target, bound.needs)
    old = fresh(bound, target, TOKENS[:10], sampler())
    before = bound.propose(old, 3)
    new = bound.commit(old, Outcome(tuple(TOKENS[10:15]), target.seen(TOKENS[:15], 9)))
    bound.propose(new, 3)
    assert same_tree(bound.propose(old, 3), before)
    assert same_tree(bound.propose(new, 3), bound.propose(fresh(bound, target, TOKENS[:15], sampler()), 3))


@every_speculator
@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_equals_a_fresh_build(bound, tiny_target, seed):
    """Propose, commit, rewind and inject in any order: the state is that of its tokens, however it came about."""
    rng, target = random.Random(seed), Target(tiny_target, bound.needs)
    tokens = TOKENS[:8]
    state = fresh(bound, target, tokens, sampler())
    for _ in range(16):
        move = rng.choice(["propose", "accept", "inject", "rewind"])
        if move == "propose":
            bound.propose(state, rng.randint(0, 4))
        elif move == "rewind" and len(tokens) > 2:
            tokens = tokens[: rng.randint(1, len(tokens))]
            state = bound.rewind(state, len(tokens))
        else:
            tree = bound.propose(state, 3)
            guessed = list(tree.tokens[1 : rng.randint(1, tree.size)]) if move == "accept" else []
            new = [*guessed, *(rng.randrange(5, tiny.VOCAB) for _ in range(rng.randint(1, 3)))]
            start = len(tokens)
            tokens = [*tokens, *new]
            state = bound.commit(state, Outcome(tuple(new), target.seen(tokens, start - 1)))
        expected = bound.propose(fresh(bound, target, tokens, sampler()), 3)
        assert same_tree(bound.propose(state, 3), expected), f"after {move} at {len(tokens)} tokens"


@every_speculator
def test_one_speculator_serves_many_requests(name, tiny_target, tiny_draft):
    engine = Parse(tiny_target, tiny_draft, inner=SPECULATORS[name], outer=TargetOnly())
    alone = [engine.generate(TOKENS[:n], max_new_tokens=12).tokens for n in (5, 9)]
    streams = [engine.stream(TOKENS[:n], max_new_tokens=12) for n in (5, 9)]
    results = [None, None]
    while None in results:  # two requests in turn, step by step
        for i, stream in enumerate(streams):
            delta = next(stream, None)
            results[i] = delta.result.tokens if delta is not None and delta.result else results[i]
    assert results == alone
