"""Acceptance rules by adding up all drafts, decisions and draws of a tiny vocabulary, each with its probability.

The rules run as they are. Their sampler is replaced by one that takes every decision both ways and every draw all ways,
so what a rule writes is known exactly, and compared with the target's own distribution of texts.
"""

import itertools

import pytest
import torch

from parsedec.acceptance import Nucleus, Siblings, Traversal, Typical
from parsedec.types import Tree

VOCAB = 3
LOSSLESS = [Siblings(), Traversal()]
every_lossless = pytest.mark.parametrize("rule", LOSSLESS, ids=lambda rule: type(rule).__name__)
CHAIN = (-1, 0, 1, 2)
SHAPES = {
    "siblings": (-1, 0, 0, 0),
    "first_grows": (-1, 0, 0, 1, 1, 2),
    "last_grows": (-1, 0, 0, 2, 3),
    "in_depth_first_order": (-1, 0, 1, 2, 1, 0),
}


class Scripted:
    """Decides as the script says and with the first option after it; remembers the other options and the weight."""

    greedy = False

    def __init__(self, script=()):
        self.script, self.taken, self.others, self.weight = list(script), [], [], 1.0

    def log_distribution(self, logits):
        return logits.log_softmax(-1)

    def choose(self, options):
        options = [(value, weight) for value, weight in options if weight > 0]
        at = len(self.taken)
        value = self.script[at] if at < len(self.script) else options[0][0]
        self.taken.append(value)
        self.others.append([other for other, _ in options if other != value])
        self.weight *= dict(options)[value]
        return value

    def draw(self, p):
        return self.choose(list(enumerate(p.tolist())))

    def uniform(self):
        return Coin(self)


class Coin:
    """A uniform number that has not been drawn yet: it is below `chance` with that probability."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __lt__(self, chance):
        return self.sampler.choose([(True, chance), (False, 1 - chance)])


def outcomes(rule, tree, logits):
    """Every (path, token after it) with its probability."""
    waiting = [()]
    while waiting:
        script = waiting.pop()
        sampler = Scripted(script)
        yield rule.accept(tree, logits, sampler), sampler.weight
        for at in range(len(script), len(sampler.taken)):
            waiting += [(*sampler.taken[:at], other) for other in sampler.others[at]]


class Model:
    """A random distribution for every text, the same whenever it is asked."""

    def __init__(self, seed, peaked=1.5):
        self.seed, self.peaked, self.known = seed, peaked, {}

    def __call__(self, text):
        if text not in self.known:
            seed = self.seed * 10007 + sum((token + 1) * 5**i for i, token in enumerate(text))
            noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            self.known[text] = (noise * self.peaked).softmax(-1)
        return self.known[text]

    def probability(self, text):
        return float(torch.stack([self(text[:i])[token] for i, token in enumerate(text)]).prod()) if text else 1.0


def text_of(parents, tokens, node):
    return (*text_of(parents, tokens, parents[node]), tokens[node]) if node > 0 else ()


def drawn_trees(draft, parents, *, replacement=True):
    """Every tree of a shape with its probability: nodes drawn from the draft model in order."""
    waiting = [((0,), 1.0, [torch.zeros(VOCAB, dtype=torch.float64)])]
    while waiting:
        tokens, weight, rows = waiting.pop()
        node = len(tokens)
        if node == len(parents):
            yield Tree(tokens, parents, torch.stack(rows).log()), weight
            continue
        q = draft(text_of(parents, tokens, parents[node])).clone()
        if not replacement:
            q[[tokens[i] for i in range(1, node) if parents[i] == parents[node]]] = 0
            q = q / q.sum()
        for token in range(VOCAB):
            if q[token] > 0:
                waiting.append(((*tokens, token), weight * float(q[token]), [*rows, q]))


def certain_trees(draft, parents):
    """The one tree of the draft model's best tokens: siblings are its first, second … choice."""
    tokens = [0]
    for node in range(1, len(parents)):
        rank = sum(parents[i] == parents[node] for i in range(1, node))
        tokens.append(int(draft(text_of(parents, tokens, parents[node])).argsort(descending=True)[rank]))
    yield Tree(tuple(tokens), parents), 1.0


def written(rule, trees, target, length):
    """Distribution of the first `length` tokens: what the rule accepts, its token, then the target on its own.

    Returns it with the mean number of accepted guesses.
    """
    texts, accepted = dict.fromkeys(itertools.product(range(VOCAB), repeat=length), 0.0), 0.0
    for tree, weight in trees:
        logits = torch.stack([target(text_of(tree.parents, tree.tokens, node)) for node in range(tree.size)]).log()
        for (path, token), chance in outcomes(rule, tree, logits):
            start = (*(tree.tokens[node] for node in path[1:]), token)
            accepted += weight * chance * (len(path) - 1)
            for rest in itertools.product(range(VOCAB), repeat=length - len(start)):
                text = (*start, *rest)
                going_on = [float(target(text[:i])[text[i]]) for i in range(len(start), length)]
                texts[text] += weight * chance * float(torch.tensor(going_on, dtype=torch.float64).prod())
    return texts, accepted


def distance(rule, trees, target, depth):
    """Total variation between what is written and what the target would write."""
    texts, _ = written(rule, trees, target, depth + 1)
    return sum(abs(weight - target.probability(text)) for text, weight in texts.items()) / 2


def depth_of(parents):
    return Tree((0,) * len(parents), parents).depth


@every_lossless
@pytest.mark.parametrize("seed", range(3))
def test_chains_keep_the_distribution(rule, seed):
    target, draft = Model(seed), Model(100 + seed)
    assert distance(rule, drawn_trees(draft, CHAIN), target, 3) < 1e-12


@every_lossless
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("replacement", [True, False], ids=["replaced", "not_replaced"])
def test_drawn_trees_keep_the_distribution(rule, shape, replacement):
    parents = SHAPES[shape]
    trees = drawn_trees(Model(7), parents, replacement=replacement)
    assert distance(rule, trees, Model(3), depth_of(parents)) < 1e-12


@every_lossless
@pytest.mark.parametrize("shape", [*SHAPES, "chain"])
@pytest.mark.parametrize("seed", range(3))
def test_certain_trees_keep_the_distribution(rule, shape, seed):
    parents = SHAPES.get(shape, CHAIN)
    assert distance(rule, certain_trees(Model(50 + seed), parents), Model(seed), depth_of(parents)) < 1e-12


@every_lossless
def test_equal_and_disjoint_models(rule):
    """Rounding has no room to hide: the draft model is the target, or guesses only what the target never says."""
    model = Model(1)
    _, accepted = written(rule, drawn_trees(model, CHAIN), model, 4)
    assert abs(accepted - 3) < 1e-9
    every_text = [text for length in range(4) for text in itertools.product(range(VOCAB), repeat=length)]
    for says, guesses in (((0.4, 0.6, 0), (0, 0, 1)), ((0, 1, 0), (0.5, 0.2, 0.3)), ((0.5, 0.5, 0), (0, 0.5, 0.5))):
        target, draft = Model(0), Model(0)
        for one, row in ((target, says), (draft, guesses)):
            one.known = dict.fromkeys(every_text, torch.tensor(row, dtype=torch.float64))
        assert distance(rule, drawn_trees(draft, CHAIN), target, 3) < 1e-12
        assert distance(rule, drawn_trees(draft, SHAPES["last_grows"]), target, 3) < 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_traversal_accepts_no_less_than_token_by_token_on_chains(seed):
    """And exactly what block verification promises: the chance of a path is min(1, chance before it * p / q)."""
    target, draft = Model(seed), Model(100 + seed)
    by_token, by_path = (written(rule, drawn_trees(draft, CHAIN), target, 4)[1] for rule in LOSSLESS)
    promised = 0.0
    for length in (1, 2, 3):
        for text in itertools.product(range(VOCAB), repeat=length):
            chance = 1.0
            for i, token in enumerate(text):
                chance = min(1.0, chance * float(target(text[:i])[token] / draft(text[:i])[token]))
            promised += draft.probability(text) * chance
    assert abs(by_path - promised) < 1e-12
    assert by_path > by_token + 1e-3


def test_a_tree_chosen_by_what_was_drawn_is_not_valid():
    """The limits of the module's docstring are real: putting the likelier sibling first spoils both rules; …"""
    target, draft = Model(3), Model(7)

    def sorted_by_q(trees):
        for tree, weight in trees:
            order = sorted((1, 2), key=lambda node: -float(tree.logq[node][tree.tokens[node]]))
            yield Tree((0, *(tree.tokens[i] for i in order)), tree.parents, tree.logq), weight

    for rule in LOSSLESS:
        assert distance(rule, sorted_by_q(drawn_trees(draft, (-1, 0, 0))), target, 1) > 1e-3


@every_lossless
def test_growing_by_what_was_drawn_before_is_valid(rule):
    """… stopping after an unlikely guess is fine, …"""
    target, draft = Model(3), Model(7)

    def stopped(trees):
        for tree, weight in trees:
            stop = next((node for node in range(1, 4) if tree.logq[node][tree.tokens[node]].exp() < 0.3), 3)
            yield Tree(tree.tokens[: stop + 1], CHAIN[: stop + 1], tree.logq[: stop + 1]), weight

    assert distance(rule, stopped(drawn_trees(draft, CHAIN)), target, 3) < 1e-12


@every_lossless
def test_growing_by_nodes_drawn_before_is_valid_wherever_they_stand(rule):
    """… and so is growing one branch by what was drawn in another, verified before it or behind it."""
    target, draft = Model(3), Model(7)

    def grown(trees):
        for tree, weight in trees:
            # node 3 below 1 only where its later sibling 2 is token 0; node 4 beside 2 only where node 3 is not token 1
            size = 3 if tree.tokens[2] != 0 else 4 if tree.tokens[3] == 1 else 5
            yield Tree(tree.tokens[:size], (-1, 0, 0, 1, 0)[:size], tree.logq[:size]), weight

    assert distance(rule, grown(drawn_trees(draft, (-1, 0, 0, 1, 0))), target, 2) < 1e-12


@pytest.mark.parametrize("rule", [Typical(), Nucleus()], ids=["typical", "nucleus"])
def test_medusas_rules_are_not_lossless(rule):
    assert not rule.lossless
    assert distance(rule, certain_trees(Model(7), SHAPES["first_grows"]), Model(3), 2) > 0.01
