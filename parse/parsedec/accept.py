"""Which guesses of a tree stand, so that the output keeps the target's distribution.

Greedy: a node stands if the target's argmax at its parent is its token.
Sampled: Leviathan et al. 2023 (arXiv 2211.17192), Algorithm 1, and its extension to several siblings by SpecInfer
(arXiv 2305.09781), Algorithm 2 - siblings are tried in order, each against what its predecessors left of p:

    p  target's next-token distribution at the parent        q  distribution the node was drawn from
    accept x with min(1, p(x) / q(x));  refused: p <- norm(max(p - q, 0)), and the next sibling is tried

A guess without q was certain (q is a point mass at x): accept with p(x), else p(x) <- 0 and renormalise.
Shapes in this file:  N nodes, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from parsedec.sampling import Sampler
from parsedec.types import Tree


def accept(tree: Tree, logits: Tensor, sampler: Sampler) -> tuple[list[int], int]:
    """The accepted path (node indices from the root) and the target's next token after it. logits [N, V]."""
    return accept_greedy(tree, logits) if sampler.greedy else accept_sampled(tree, logits, sampler)


def accept_greedy(tree: Tree, logits: Tensor) -> tuple[list[int], int]:
    best = logits.argmax(-1).tolist()  # [N]
    path = [0]
    for node in range(1, tree.size):
        if tree.parents[node] == path[-1] and tree.tokens[node] == best[path[-1]]:
            path.append(node)
    return path, best[path[-1]]


def accept_sampled(tree: Tree, logits: Tensor, sampler: Sampler) -> tuple[list[int], int]:
    """Lossless if every node was drawn from its row of `tree.logq`, or is certain where there is none."""
    path = [0]
    p = sampler.log_distribution(logits[0]).exp()  # [V]
    for node in range(1, tree.size):  # siblings stand in the order they were drawn, children behind their parents
        if tree.parents[node] != path[-1]:
            continue
        q = None if tree.logq is None else tree.logq[node].exp().to(p.device)  # [V]
        if sampler.uniform() < accept_probability(p, q, tree.tokens[node]):
            path.append(node)
            p = sampler.log_distribution(logits[node]).exp()
        else:
            p = residual(p, q, tree.tokens[node])
    return path, sampler.draw(p)


def accept_probability(p: Tensor, q: Tensor | None, token: int) -> float:
    """Chance that a guess of `token` stands: min(1, p/q), or p where the guess was certain."""
    if q is None:
        return float(p[token])
    return min(1.0, float(p[token]) / float(q[token])) if float(q[token]) > 0 else 0.0


def residual(p: Tensor, q: Tensor | None, token: int) -> Tensor:
    """What is left of p after a refused guess, normalised, [V]."""
    if q is None:
        left = p.clone()
        left[token] = 0
    else:
        left = (p - q).clamp_(min=0)
    total = left.sum()
    # p == q up to rounding: a refusal then has probability ~0, and p itself is the right distribution
    return left / total if float(total) > 0 else p
