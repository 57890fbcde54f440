"""Which of the heads' guesses are verified together (Cai et al. 2024, arXiv 2401.10774, 2.3 and appendix C).

A tree is a list of choices. (c_0, ..., c_d) is a node d + 1 levels below the root: the c_d-th best guess of head d,
under the node (c_0, ..., c_d-1), which must be in the list as well. `trees.json` holds the reference's lists by name,
in the order in which they were grown, so that a list cut short is still a tree, of its most promising nodes.

Shapes in this file:  N nodes with the root, K heads, R ranks of a head's guesses.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from parsedec.errors import ConfigError

Choices = tuple[tuple[int, ...], ...]
CHAIN = 16  # levels of tree=chain; more than any public set of heads has


@dataclass(frozen=True, slots=True)
class TreeShape:
    """A tree with its nodes level by level, each level in lexicographic order; node 0 is the root.

    parents  N indices, -1 for the root
    heads    N - 1: the head that guesses nodes 1 …
    ranks    N - 1: which of its guesses they are, 0 the best
    sizes    number of nodes if the tree is cut below level 0, 1 …: its first sizes[d] nodes are at most d levels deep
    """

    parents: tuple[int, ...]
    heads: tuple[int, ...]
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, choices: Choices) -> TreeShape:
        """The shape of a list of choices; raises ConfigError if a parent is not in the list."""
        nodes = [(), *sorted(set(choices) - {()}, key=lambda choice: (len(choice), choice))]
        index = {choice: node for node, choice in enumerate(nodes)}
        wrong = [choice for choice in nodes[1:] if choice[:-1] not in index or min(choice) < 0]
        if wrong:
            raise ConfigError(
                f"inner.tree holds {list(wrong[0])}, but not its parent {list(wrong[0][:-1])}; "
                "expected every prefix of a choice in the list, and no number below 0."
            )
        depth = len(nodes[-1])
        return cls(
            parents=(-1, *(index[choice[:-1]] for choice in nodes[1:])),
            heads=tuple(len(choice) - 1 for choice in nodes[1:]),
            ranks=tuple(choice[-1] for choice in nodes[1:]),
            sizes=tuple(sum(len(choice) <= level for choice in nodes) for level in range(depth + 1)),
        )

    @property
    def depth(self) -> int:
        return len(self.sizes) - 1

    @property
    def width(self) -> int:
        """Number of guesses needed from every head."""
        return max(self.ranks, default=-1) + 1

    @property
    def branches(self) -> bool:
        return len(set(self.parents)) < len(self.parents)


@cache
def named_trees() -> dict[str, Choices]:
    """The reference's lists, and "chain": every head's best guess."""
    lists = json.loads((files("parsedec_adapters.medusa") / "trees.json").read_text())
    chain = tuple((0,) * length for length in range(1, CHAIN + 1))
    return {name: _choices(tree) for name, tree in lists.items()} | {"chain": chain}


def read_tree(tree: str | Sequence[Sequence[int]]) -> Choices:
    """A tree given by name, as a list of choices, or as the path of a JSON file that holds one."""
    if not isinstance(tree, str):
        return _choices(tree)
    if tree in named_trees():
        return named_trees()[tree]
    path = Path(tree).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"inner.tree='{tree}' is neither a known tree ({', '.join(named_trees())}) nor a file. Check the spelling."
        )
    try:
        return _choices(json.loads(path.read_text()))
    except ValueError as error:
        raise ConfigError(f"inner.tree='{tree}' is not a JSON file with a list of choices: {error}.") from error


def clip(choices: Choices, *, heads: int, ranks: int, nodes: int | None) -> Choices:
    """The part of a tree that `heads` heads with `ranks` guesses each can fill; of it the first `nodes` guesses."""
    possible = [choice for choice in choices if len(choice) <= heads and max(choice) < ranks]
    return tuple(possible[:nodes])


def tree_from_accuracies(accuracies: Sequence[Sequence[float]], nodes: int) -> Choices:
    """The tree of at most `nodes` guesses with the highest expected number of accepted ones.

    accuracies  [K][R] share of positions where the r-th best guess of head k is right (`head_accuracies`)

    A node is accepted with the product of the accuracies on its path - heads are taken for independent, as in the
    reference. No node is likelier than its parent, so taking the likeliest nodes first gives the best tree of every
    size, and a list that may be cut short. Guesses that were never right are left out.
    """
    if nodes < 1 or not accuracies or not all(0 <= share <= 1 for head in accuracies for share in head):
        raise ConfigError(
            f"a tree of {nodes} nodes from accuracies of {len(accuracies)} heads; expected at least 1 node and 1 head, "
            "and shares from 0 to 1."
        )
    chosen: list[tuple[int, ...]] = []
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    while heap and len(chosen) <= nodes:
        value, depth, choice = heapq.heappop(heap)
        chosen.append(choice)
        if depth < len(accuracies):
            for rank, share in enumerate(accuracies[depth]):
                if share > 0:
                    heapq.heappush(heap, (value * share, depth + 1, (*choice, rank)))
    return tuple(chosen[1:])


def _choices(tree: Sequence[Sequence[int]]) -> Choices:
    try:
        choices = tuple(tuple(int(rank) for rank in choice) for choice in tree)
    except TypeError as error:
        raise ConfigError(f"inner.tree={tree!r}; expected a name, a file or a list such as [[0], [0, 0]].") from error
    if not choices or not all(choices):
        raise ConfigError(f"inner.tree={list(tree)!r}; expected at least one choice, and none that is empty.")
    return choices
