"""Medusa against vectors recorded from the reference (FasterDecoding/Medusa at e2a5d20, float32, CPU).

The adapter, the session and the acceptance rules run as they do for a user; only the sampler is replaced by one that
replays the recorded draws. Every recorded item is compared at every step: integers must be equal, logits within 1e-4.

The reference pads short paths with token id 0 and can "accept" a pad. If a record shows that, its steps from there on
are not compared; if it is greedy, our own output must still be the target's greedy one.

Shapes in this file:  N nodes of a tree, K heads, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from parsedec.acceptance import Acceptance, Accepted, Nucleus, Siblings, Typical, leaves_of
from parsedec.inner import Decoder, NoSpeculation
from parsedec.meter import Tally
from parsedec.models.language_model import LanguageModel, load
from parsedec.sampling import Sampler
from parsedec.types import Sampling, Tree
from parsedec_adapters.medusa.speculator import Medusa
from parsedec_adapters.medusa.trees import TreeShape, named_trees, read_tree

Item = tuple[str, bool]
TOLERANCE = 1e-4
RANKS = 10  # the reference keeps ten guesses per head


class Replay(Sampler):
    """Gives recorded tokens instead of drawing. Each must have been possible, and exactly those must be asked for."""

    def __init__(self, settings: Sampling) -> None:
        super().__init__(settings, torch.Generator())
        self._tokens: list[int | None] = []
        self._right = True

    def expect(self, tokens: Sequence[int | None]) -> None:
        """Set the next draws; None where the record does not say."""
        self._tokens, self._right = list(tokens), True

    def draw(self, probabilities: Tensor) -> int:
        self._right = self._right and bool(self._tokens)
        token = self._tokens.pop(0) if self._tokens else None
        if token is None:
            return int(probabilities.argmax())
        self._right = self._right and float(probabilities[token]) > 0
        return token

    @property
    def as_expected(self) -> bool:
        return self._right and not self._tokens


class Watched:
    """An acceptance rule that remembers its last input and result."""

    lossless: ClassVar[bool] = False

    def __init__(self, rule: Acceptance) -> None:
        self.rule = rule
        self.tree = Tree.chain([0])
        self.logits = torch.empty(0)
        self.path: list[int] = []

    def accept(self, tree: Tree, logits: Tensor, sampler: Sampler) -> Accepted:
        self.tree, self.logits = tree, logits
        self.path, token = self.rule.accept(tree, logits, sampler)
        return self.path, token


def check(case: Path, attention: str) -> Iterator[Item]:
    """(item, equal?) for everything a case folder records. `attention`: of the target, "eager" or "sdpa"."""
    record = json.loads((case / "case.json").read_text())
    tensors = load_file(case / "tensors.safetensors")
    target, heads = _target(case.parent.parent / "models" / record["model"], attention)
    inner = Medusa(heads=heads, tree=record["medusa_choices"]).bind(target, None)
    replay, watched = _sampler(record["args"]), Watched(_rule(record["args"]))
    decoder = Decoder(target, inner, replay, Tally(), watched)
    decoder.session.feed(record["prompt"])
    after = decoder.session.next_logits  # the target's logits that the root comes from [V]
    replay.expect(_root_draw(record, 0))
    decoder.step(1)
    yield "first root", replay.as_expected
    ours, defect = list(record["prompt"]), False
    for number, step in enumerate(record["steps"]):
        assert after is not None
        head_logits = _head_logits(decoder, inner)
        replay.expect([*_verify_draws(record, number), *_root_draw(record, number + 1)])
        before = decoder.session.length - 1
        decoder.step(target.context_limit)
        paths = [watched.tree.path_to(leaf) for leaf in leaves_of(watched.tree)]
        defect = step["verify"]["accept_length"] >= len(paths[step["verify"]["best_candidate"]])
        if defect:
            break
        items = [
            ("input_len_before", step["input_len_before"] == before),
            ("draws", replay.as_expected),
            *_candidate_items(step["candidates"], watched.tree, paths, head_logits),
            *_verdict_items(step, watched, paths),
            *_logit_items(tensors, number, after, head_logits),
        ]
        yield from ((f"step {number}: {name}", equal) for name, equal in items)
        after = watched.logits[watched.path[-1]]
        ours += [watched.tree.tokens[node] for node in watched.path]
    yield from _result_items(record, target, ours, decoder, defect)


def check_tree_buffers(path: Path) -> Iterator[Item]:
    """(item, equal?) for the tables the reference makes of every tree it ships."""
    for name, table in json.loads(path.read_text()).items():
        choices = named_trees().get(name, ((0,),))
        shape = TreeShape.of(choices)
        tree = Tree((0,) * len(shape.parents), shape.parents)
        depths = tree.depths()
        index = [1 + RANKS * head + rank for head, rank in zip(shape.heads, shape.ranks, strict=True)]
        for item, ours in (
            ("choices", [list(choice) for choice in choices]),
            ("n_choices", len(choices)),
            ("tree_len", tree.size),
            ("depth_counts", [depths.count(level) for level in range(1, shape.depth + 1)]),
            ("tree_indices", [0, *index]),
            ("medusa_position_ids", depths),
            ("parents", list(shape.parents)),
            ("retrieve_indices", _padded([tree.path_to(leaf) for leaf in leaves_of(tree)], -1)),
        ):
            yield f"{name}: {item}", ours == table[item]


@lru_cache(maxsize=4)
def _target(folder: Path, attention: str) -> tuple[LanguageModel, Path]:
    """The target of a model folder, and the folder its heads are in."""
    base = folder
    if not (folder / "model.safetensors").is_file():  # heads beside a base model, named by a path of another machine
        named = json.loads((folder / "config.json").read_text())["base_model_name_or_path"]
        base = folder.parent / Path(named).name
    return load(base, dtype="float32", device="cpu", attention=attention), folder


def _rule(args: dict[str, Any]) -> Acceptance:
    if args["temperature"] == 0:
        return Siblings()
    if args.get("sampling", "typical") == "nucleus":
        return Nucleus()
    return Typical(epsilon=args.get("posterior_threshold", 0.09), delta=args.get("posterior_alpha", 0.3))


def _sampler(args: dict[str, Any]) -> Replay:
    nucleus = args.get("sampling", "typical") == "nucleus"
    return Replay(Sampling(temperature=args["temperature"], top_p=args.get("top_p", 0.8) if nucleus else 1.0))


def _root_draw(record: dict[str, Any], number: int) -> list[int | None]:
    """The draw of a step's root; None after the last step. Rules other than Nucleus draw nothing."""
    if not isinstance(_rule(record["args"]), Nucleus):
        return []
    return [record["steps"][number]["candidates"]["root_token"] if number < len(record["steps"]) else None]


def _verify_draws(record: dict[str, Any], number: int) -> list[int]:
    """What Nucleus draws in a step. The reference draws for every place of every padded path, row by row. Draws up to
    the first that differs decide a path, and our rule makes no others."""
    step = record["steps"][number]
    drawn, shape = step["verify"]["multinomial"], TreeShape.of(read_tree(record["medusa_choices"]))
    if not drawn:
        return []
    tree = Tree(tuple(step["candidates"]["tree_candidates"]), shape.parents)
    used: list[int] = []
    for row, leaf in enumerate(leaves_of(tree)):
        for place, node in enumerate(tree.path_to(leaf)[1:]):
            used.append(drawn[row * shape.depth + place])
            if used[-1] != tree.tokens[node]:
                break
    return used


def _head_logits(decoder: Decoder, inner: Medusa) -> Tensor:
    """The heads' logits [K, V] at the last token read, the one before the root."""
    taps = decoder.session.seen(decoder.session.cached - 1).taps
    assert taps is not None
    return inner.logits(taps[-1, 0])


def _candidate_items(wanted: dict[str, Any], tree: Tree, paths: list[list[int]], head_logits: Tensor) -> list[Item]:
    rows = [[tree.tokens[node] for node in path] for path in paths]
    return [
        ("root_token", wanted["root_token"] == tree.tokens[0]),
        ("head_top10", wanted["head_top10"] == head_logits.topk(RANKS).indices.tolist()),
        ("tree_candidates", wanted["tree_candidates"] == list(tree.tokens)),
        ("cart_candidates", wanted["cart_candidates"] == _padded(rows, 0)),
    ]


def _verdict_items(step: dict[str, Any], watched: Watched, paths: list[list[int]]) -> list[Item]:
    wanted, tree, path = step["verify"], watched.tree, watched.path
    best = watched.logits.argmax(-1).tolist()  # [N]
    by_row = [[best[node] for node in row] for row in _padded(paths, tree.size - 1)]
    first = next(row for row, nodes in enumerate(paths) if nodes[: len(path)] == path)
    # under Nucleus every row draws on its own: one that shares the accepted nodes need not have won
    row = wanted["best_candidate"] if isinstance(watched.rule, Nucleus) else first
    return [
        ("argmax_per_candidate", wanted["argmax_per_candidate"] == by_row),
        ("accept_length", wanted["accept_length"] == len(path) - 1),
        ("best_candidate", wanted["best_candidate"] == row and paths[row][: len(path)] == path),
        ("accepted_tokens", step["accepted_tokens"] == [tree.tokens[node] for node in path]),
    ]


def _logit_items(tensors: dict[str, Tensor], number: int, base: Tensor, heads: Tensor) -> list[Item]:
    return [
        (name, wanted.shape == logits.shape and float((logits - wanted).abs().max()) <= TOLERANCE)
        for name, logits in (("base_logits", base), ("medusa_logits", heads))
        if (wanted := tensors.get(f"step{number}.{name}")) is not None
    ]


def _result_items(
    record: dict[str, Any], target: LanguageModel, ours: list[int], decoder: Decoder, defect: bool
) -> Iterator[Item]:
    """Check the whole output and that of plain decoding. After a defect in a greedy record, ours must be the latter."""
    prompt, greedy = record["prompt"], record["greedy_output_ids"]
    yield "greedy_output_ids", _plain(target, prompt, len(greedy)) == greedy
    if defect and record["args"]["temperature"] > 0:
        return  # the record does not show what should follow
    if defect:
        while decoder.session.length < len(greedy):
            decoder.step(target.context_limit)
        yield "greedy in spite of the reference's defect", decoder.session.tokens[: len(greedy)] == greedy
        return
    written, steps = len(ours) - len(prompt), len(record["steps"])
    end, limit = record["args"]["eos_token_id"], record["args"]["max_steps"]
    yield "output_ids", ours == record["output_ids"]
    yield "equals_greedy", (ours == greedy) == record["equals_greedy"]
    yield "tau", abs(written / steps - record["tau"]) < TOLERANCE
    yield "stop", steps == limit or end in ours[len(prompt) :]


def _plain(target: LanguageModel, prompt: list[int], length: int) -> list[int]:
    decoder = Decoder(target, NoSpeculation(), Sampler(Sampling()), Tally())
    decoder.session.feed(prompt)
    while decoder.session.length < length:
        decoder.step(1)
    return decoder.session.tokens


def _padded(rows: list[list[int]], value: int) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [value] * (width - len(row)) for row in rows]
