"""Acceptance rules: which guesses of a tree to accept, and the target's own token after them.

In greedy decoding every rule accepts a node if its token is the target's argmax at its parent. In sampled decoding:

    Siblings   Leviathan et al. 2023 (arXiv 2211.17192), Algorithm 1, extended to several siblings by SpecInfer
               (arXiv 2305.09781), Algorithm 2. From the root down; lossless.
    Traversal  Weng et al. 2025 (arXiv 2505.12398). Whole paths are accepted, from the leaves up; on a chain it is block
               verification (Sun et al. 2024, arXiv 2403.10444). Lossless, and accepts more than Siblings.
    Typical    Cai et al. 2024 (Medusa, arXiv 2401.10774): accepts what is likely enough. Not lossless.
    Nucleus    Medusa's other rule: accepts what a sample from the target agrees with. Not lossless.

    p  target's next-token distribution at a node        q  distribution a node was drawn from (`Tree.logq`)
    a guess without q is a certain one: q is a point mass at its token

The lossless rules need valid trees: siblings come in the order they were drawn, and every node was drawn from its row
of `logq`, given all that was drawn before it. So siblings may be drawn independently or without replacement (each row
is then what the earlier siblings left over), guesses may be certain (chosen in any way, since the target chooses
later), and a tree may stop or grow depending on what was drawn so far. What is not valid is to drop or reorder nodes
after they were drawn. No rule can detect that in a finished tree, so speculators have to take care of it.

Shapes in this file:  N nodes, V vocabulary, M inner nodes (those with children).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from parsedec.errors import ConfigError
from parsedec.sampling import Sampler
from parsedec.types import Tree

Accepted = tuple[list[int], int]  # node indices from the root on, and the token after the last of them


class Acceptance(Protocol):
    """Decides what to accept of a verified tree. Rules hold settings only; all randomness comes from the sampler."""

    lossless: ClassVar[bool]
    """Whether sampled output keeps the target's distribution (greedy output is the target's under every rule)."""

    def accept(self, tree: Tree, logits: Tensor, sampler: Sampler) -> Accepted:
        """The accepted path, and the next token after it. logits [N, V], one row per node.

        A tree of only the root asks for the next token where nothing was guessed.
        """


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """Tries siblings in order, from the root down, each against what its refused predecessors left of p.

    Accepts x with probability min(1, p(x) / q(x)). If x is refused, p <- norm(max(p - q, 0)), and the next sibling is
    tried.
    """

    lossless: ClassVar[bool] = True

    def accept(self, tree: Tree, logits: Tensor, sampler: Sampler) -> Accepted:
        if sampler.greedy:
            return accept_greedy(tree, logits)
        path, children = [0], tree.children()
        while True:
            p = sampler.log_distribution(logits[path[-1]]).exp()  # [V]; rows off the path are never needed
            if tree.logq is None:
                node, p = _first_of_certain(p, children[path[-1]], tree.tokens, sampler)
            else:
                node, p = _first_of_drawn(p, children[path[-1]], tree, sampler)
            if node is None:
                return path, sampler.draw(p)
            path.append(node)


@dataclass(frozen=True, kw_only=True)
class Traversal:
    """Tries whole paths, from the leaves up: a refused leaf leaves its weight to its ancestors and later siblings.

    Every node has a, the probability that the path to it is accepted, given what was refused so far: 1 at the root,
    a(x) = min(1, a(parent) p(x) / q(x)) below. The first leaf in depth-first order is accepted with probability a.
    If it is refused, it is deleted, and its parent continues with what is left of the target's mass a p there:

        left = max(a p - q, 0);     p <- left / sum(left);     a <- sum(left) / (sum(left) + 1 - a)

    A parent with no children left becomes a leaf itself; the root is always accepted.
    """

    lossless: ClassVar[bool] = True

    def accept(self, tree: Tree, logits: Tensor, sampler: Sampler) -> Accepted:
        if sampler.greedy:
            return accept_greedy(tree, logits)
        waiting = [nodes[::-1] for nodes in tree.children()]  # the next child to visit comes last
        path = [_OnPath(0, 1.0)]
        while True:
            last = path[-1]
            if last.chance > 0 and waiting[last.node]:
                child, p = waiting[last.node].pop(), last.distribution(logits, sampler)
                path.append(_OnPath(child, _path_chance(last.chance, p, _q(tree, child, p), tree.tokens[child])))
            elif len(path) == 1 or (last.chance > 0 and sampler.uniform() < last.chance):
                return [step.node for step in path], sampler.draw(last.distribution(logits, sampler))
            else:
                path.pop()
                p = path[-1].distribution(logits, sampler)
                q = _q(tree, last.node, p)
                path[-1].chance, path[-1].p = _left_over(path[-1].chance, p, q, tree.tokens[last.node])


@dataclass(slots=True)
class _OnPath:
    """A node on Traversal's current path: its probability a, and what is left of p (None while all of it is)."""

    node: int
    chance: float
    p: Tensor | None = None

    def distribution(self, logits: Tensor, sampler: Sampler) -> Tensor:
        if self.p is None:
            self.p = sampler.log_distribution(logits[self.node]).exp()  # [V]; most leaves never need theirs
        return self.p


@dataclass(frozen=True, kw_only=True)
class Typical:
    """Medusa's typical acceptance: accepts x if p(x) > min(epsilon, delta exp(-entropy of p)). No randomness.

    The deepest such path wins; among equally deep ones, the likeliest. The token after it is the target's argmax. So
    the output is not a sample from the target: at any temperature it stays close to the greedy output.

    epsilon  guesses more likely than this are always accepted
    delta    scales the threshold where the target is undecided; null: sqrt(epsilon), as in the paper
    """

    lossless: ClassVar[bool] = False

    epsilon: float = 0.09
    delta: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1 or (self.delta is not None and not 0 < self.delta <= 1):
            raise ConfigError(
                f"acceptance has epsilon={self.epsilon}, delta={self.delta}; expected both above 0 and at most 1 "
                "(delta may be null)."
            )

    def accept(self, tree: Tree, logits: Tensor, sampler: Sampler) -> Accepted:
        if sampler.greedy:
            return accept_greedy(tree, logits)
        inner = sorted({parent for parent in tree.parents if parent >= 0})
        best, best_rank = 0, (0, 0.0)
        if inner:
            guesses, stands = self._judge(tree, sampler.log_distribution(logits[inner]), inner)
            ranks = {0: (0, 0.0)}  # node on a standing path -> (depth, log-probability of the path)
            for node in range(1, tree.size):
                parent = ranks.get(tree.parents[node])
                if parent is not None and stands[node - 1]:
                    ranks[node] = (parent[0] + 1, parent[1] + guesses[node - 1])
                    if ranks[node] > best_rank:
                        best, best_rank = node, ranks[node]
        return tree.path_to(best), int(logits[best].argmax())

    def _judge(self, tree: Tree, logp: Tensor, inner: Sequence[int]) -> tuple[list[float], list[bool]]:
        """For every guess, its log p and whether it is likely enough. logp [M, V], one row per node in `inner`."""
        p = logp.exp()
        entropy = -(p * (p + 1e-5).log()).sum(-1)  # [M]
        delta = self.epsilon**0.5 if self.delta is None else self.delta
        threshold = (delta * (-entropy).exp()).clamp(max=self.epsilon)  # [M]
        row_of = {node: row for row, node in enumerate(inner)}
        rows = torch.tensor([row_of[parent] for parent in tree.parents[1:]], device=p.device)
        tokens = torch.tensor(tree.tokens[1:], device=p.device)
        chosen = logp[rows, tokens]  # [N - 1]
        return chosen.tolist(), (p[rows, tokens] > threshold[rows]).tolist()


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """Medusa's nucleus rule: on every path to a leaf, accepts a guess if a token drawn from p there is the same.

    The deepest path wins (among equally deep ones, the one whose leaf comes last), and the token after it is drawn
    afresh. Draws follow the request's own sampling settings; Medusa uses top_p=0.8. A guess gets several chances - one
    per leaf below it, and the fresh draw - so guessed tokens come out too often: not lossless.
    """

    lossless: ClassVar[bool] = False

    def accept(self, tree: Tree, logits: Tensor, sampler: Sampler) -> Accepted:
        if sampler.greedy:
            return accept_greedy(tree, logits)
        p: dict[int, Tensor] = {}
        best = [0]
        for leaf in leaves_of(tree):
            path = tree.path_to(leaf)
            for at, (node, child) in enumerate(pairwise(path), 1):
                if node not in p:
                    p[node] = sampler.log_distribution(logits[node]).exp()
                if sampler.draw(p[node]) != tree.tokens[child]:
                    break
                if at >= len(best):
                    best = path[: at + 1]
        last = p.get(best[-1])
        return best, sampler.draw(sampler.log_distribution(logits[best[-1]]).exp() if last is None else last)


def accept_greedy(tree: Tree, logits: Tensor) -> Accepted:
    """The path of the target's own best tokens. logits [N, V]."""
    best = logits.argmax(-1).tolist()  # [N]
    path, last, wanted = [0], 0, best[0]
    for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True)):
        if parent == last and token == wanted:
            path.append(node)
            last, wanted = node, best[node]
    return path, wanted


def accept_probability(p: Tensor, q: Tensor | None, token: int) -> float:
    """Probability of accepting a guess of `token`: min(1, p/q), or p if the guess was certain."""
    return _path_chance(1.0, p, q, token)


def residual(p: Tensor, q: Tensor | None, token: int) -> Tensor:
    """What is left of p [V] after a refused guess, normalised."""
    return _left_over(1.0, p, q, token)[1]


def leaves_of(tree: Tree) -> list[int]:
    """Nodes without children, the last one first."""
    inner = set(tree.parents)
    return [node for node in range(tree.size - 1, 0, -1) if node not in inner]


def _q(tree: Tree, node: int, p: Tensor) -> Tensor | None:
    """The distribution a node was drawn from [V], on the device of p; None for a certain guess."""
    return None if tree.logq is None else tree.logq[node].to(p.device).exp()


def _first_of_drawn(p: Tensor, nodes: Sequence[int], tree: Tree, sampler: Sampler) -> tuple[int | None, Tensor]:
    """The first drawn sibling that is accepted (None: none is), and what those before it leave of p [V]."""
    for node in nodes:
        q = _q(tree, node, p)
        if sampler.uniform() < accept_probability(p, q, tree.tokens[node]):
            return node, p
        p = residual(p, q, tree.tokens[node])
    return None, p


def _first_of_certain(
    p: Tensor, nodes: Sequence[int], tokens: Sequence[int], sampler: Sampler
) -> tuple[int | None, Tensor]:
    """As `_first_of_drawn`, for certain guesses. Reads p once for all siblings, since each read waits for a GPU."""
    if not nodes:
        return None, p
    guessed = [tokens[node] for node in nodes]
    left, refused = 1.0, set[int]()
    for node, token, mass in zip(nodes, guessed, p[guessed].tolist(), strict=True):
        if token in refused:
            continue
        if sampler.uniform() < (min(1.0, mass / left) if left > 0 else 0.0):
            return node, p
        left -= mass
        refused.add(token)
    remainder = p.clone()
    remainder[guessed] = 0
    return None, _normalised(remainder, p)


def _path_chance(a: float, p: Tensor, q: Tensor | None, token: int) -> float:
    """min(1, a p / q): the probability of a path that ends in `token`, given that of the path before it, a."""
    if q is None:
        return min(1.0, a * float(p[token]))
    wanted, drawn = a * float(p[token]), float(q[token])
    return min(1.0, wanted / drawn) if drawn > 0 else 0.0


def _left_over(a: float, p: Tensor, q: Tensor | None, token: int) -> tuple[float, Tensor]:
    """What a node's probability a and distribution p [V] become once a child is refused."""
    if q is None:
        left = p * a
        left[token] = 0
    else:
        left = (p * a - q).clamp_(min=0)
    total = float(left.sum())
    if total > 0:
        return total / (total + (1 - a)), left / total
    # p == q up to rounding at a = 1: a refusal then has probability ~0, and p itself is the right distribution
    return (1.0 if a == 1 else 0.0), p


def _normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    total = weights.sum()
    return weights / total if float(total) > 0 else otherwise
