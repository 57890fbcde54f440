"""Golden cases of EAGLE-3: what its repository drafted, verified and committed, step by step.

The recorded loop is the reference's: it commits the root with the accepted guesses, does not cut the end of an answer,
and stops by its own rules. All else is ours: `Session`, `Eagle3`, `Siblings`. Sampling cases replay the recorded draws.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from parsedec import masks
from parsedec.acceptance import Siblings
from parsedec.errors import ConfigError
from parsedec.inner import Decoder, NoSpeculation
from parsedec.meter import Tally
from parsedec.models.language_model import LanguageModel, load
from parsedec.sampling import Sampler
from parsedec.sessions.session import Session
from parsedec.types import Outcome, Sampling, Tree
from parsedec_adapters.eagle3 import Eagle3, EagleHead, load_head
from parsedec_adapters.eagle3.rotation import CosSin

Items = Iterator[tuple[str, bool]]
TOLERANCE = 1e-4
# relative to the largest value: how differently float32 rounds on other processors than the recorded one, four levels
# deep in a head (seen: 1.4e-4 at logits of 10.7, 2.1e-4 at scores of 3.7)
ROUNDING = 5e-5
TREE_FIELDS = ("draft_tokens", "parents", "tree_position_ids")
GREEDY_BELOW = 1e-5  # the temperature below which the reference decodes greedily


class Replay(Sampler):
    """Replays recorded draws; `impossible` counts those of tokens with no mass in the request's distributions."""

    def __init__(self, args: dict[str, Any]) -> None:
        temperature = args["temperature"] if args["temperature"] > GREEDY_BELOW else 0.0
        nucleus = args["top_p"] if 1e-8 <= args["top_p"] < 1 else 1.0
        super().__init__(Sampling(temperature=temperature, top_p=nucleus), torch.Generator())
        # the reference filters by nucleus first and then by rank, ours the other way round
        self.ranks = Sampler(Sampling(temperature=1.0, top_k=int(args["sampling_top_k"])), torch.Generator())
        self.uniforms: deque[float] = deque()
        self.tokens: deque[int] = deque()
        self.impossible = 0

    def log_distribution(self, logits: Tensor) -> Tensor:
        return self.ranks.log_distribution(super().log_distribution(logits))

    def uniform(self) -> float:
        return self.uniforms.popleft() if self.uniforms else 2.0  # none recorded: accepts nothing, which will show

    def draw(self, probabilities: Tensor) -> int:
        token = self.tokens.popleft() if self.tokens else int(probabilities.argmax())
        self.impossible += float(probabilities[token]) <= 0
        return token


@dataclass(slots=True)
class Calls:
    """The head's calls since the last `take`: the ids, first position and earlier rows of every forward."""

    levels: list[dict[str, Any]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def take(self) -> tuple[list[dict[str, Any]], list[Tensor]]:
        taken = self.levels, self.logits
        self.levels, self.logits = [], []
        return taken


def check(case: Path, attention: str) -> Items:
    """Every recorded item of a case folder, (name, equal?), with that attention implementation in the target."""
    record = json.loads((case / "case.json").read_text())
    tensors = load_file(case / "tensors.safetensors")
    root, args = case.parent.parent, record["args"]
    target = _target(root / "targets" / record["target"], attention)
    head, calls = watched(load_head(root / "heads" / record["head"]))
    inner = Eagle3(head=head, tokens=args["total_token"], depth=args["depth"], top_k=args["top_k"]).bind(target, None)
    yield from Replayed(record, tensors, target, inner, calls).items()
    if "naive_output_ids" in record["result"]:
        yield "naive_output_ids", _naive(target, record) == record["result"]["naive_output_ids"]


def watched(head: EagleHead) -> tuple[EagleHead, Calls]:
    """A head whose forwards and draft logits are recorded from outside."""
    calls, advance = Calls(), EagleHead.advance

    class Watched(EagleHead):
        def advance(
            self, hidden: Tensor, tokens: Tensor, rotation: CosSin, *, mask: Tensor | None = None, cache: Any = None
        ) -> Tensor:
            calls.levels.append({"input_ids": tokens[0].tolist(), "past_len": cache.start, "rotation": rotation})
            return advance(self, hidden, tokens, rotation, mask=mask, cache=cache)

        def logits(self, hidden: Tensor) -> Tensor:
            logits = EagleHead.logits(self, hidden)  # [1, n, W]
            calls.logits.append(logits[0])
            return logits

    head.__class__ = Watched
    return head, calls


class Replayed:
    """One case, run step by step beside its record."""

    def __init__(
        self, record: dict[str, Any], tensors: dict[str, Tensor], target: LanguageModel, inner: Eagle3, calls: Calls
    ) -> None:
        self.record, self.tensors, self.inner, self.calls = record, tensors, inner, calls
        self.args, self.prompt = record["args"], record["prompt"]
        self.sampler, self.acceptance = Replay(self.args), Siblings()
        self.session = Session(target, inner.needs.hidden_layers)
        self.accepted: list[int] = []  # guesses accepted at every step

    def items(self) -> Items:
        session, args = self.session, self.args
        logits = session.feed(self.prompt)
        if not self.sampler.greedy:
            self.sampler.tokens.append(self.record["first_multinomial"])
        session.append(self.sampler.pick(logits))
        seen = session.seen(0)
        state = self.inner.start(session.tokens, seen, self.sampler)
        for at, step in enumerate(self.record["steps"]):
            name, told = f"step {at}", session.length
            yield f"{name}: input_len_before", told - 1 == step["input_len_before"]
            drafted = self.inner.draft(state, session.room - 1)
            yield from self._drafting(name, step["draft"], drafted.tree, drafted.scores, told, seen.taps)
            yield from self._verifying(name, at, step, drafted.tree)
            seen = session.seen(told - 1)
            state = self.inner.commit(state, Outcome(tuple(session.tokens[told:]), seen))
            if self._stopped():
                break
        yield "number of steps", len(self.accepted) == len(self.record["steps"])
        last = self.record.get("unused_final_draft")
        if last is not None:
            drafted = self.inner.draft(state, args["depth"] + 1)
            yield from self._drafting("final", last, drafted.tree, drafted.scores, session.length, seen.taps)
        yield from self._results()

    def _drafting(
        self, name: str, step: dict[str, Any], tree: Tree, scores: Sequence[float], told: int, taps: Tensor | None
    ) -> Items:
        """Check the tree of one step, how the head came to it, and the taps it was given for it."""
        levels, logits = self.calls.take()
        yield f"{name}: root_token", tree.tokens[0] == step["root_token"]
        yield f"{name}: input_ids_len", told == step["input_ids_len"]
        yield f"{name}: fused_hidden_rows", taps is not None and len(taps) == step["fused_hidden_rows"]
        yield f"{name}: number of levels", len(levels) == len(logits) == len(step["levels"])
        for i, (ours, theirs) in enumerate(zip(levels, step["levels"], strict=False)):
            yield f"{name}: level {i} input_ids", ours["input_ids"] == theirs["input_ids"]
            yield f"{name}: level {i} past_len", ours["past_len"] == theirs["past_len"]
            yield f"{name}: level {i} position_ids", self._stand_at(ours, theirs)
        depths = tree.depths()
        for field_name, value in zip(TREE_FIELDS, (tree.tokens, tree.parents, depths), strict=True):
            yield f"{name}: {field_name}", list(value) == step[field_name]
        yield f"{name}: node_scores", close(torch.tensor(scores), torch.tensor(step["node_scores"]))
        yield f"{name}: retrieve_indices", paths(tree, sort=not self.sampler.greedy) == step["retrieve_indices"]
        if (fused := self.tensors.get(f"call{step['call']}.fused_hidden")) is not None:
            yield f"{name}: fused_hidden", taps is not None and close(taps.flatten(1), fused[0])
        for i, scored in enumerate(logits):
            if (expected := self.tensors.get(f"call{step['call']}.level{i}.draft_logits")) is not None:
                yield f"{name}: level {i} draft_logits", close(scored, expected)
        if (mask := self.tensors.get(f"call{step['call']}.tree_mask")) is not None:
            yield f"{name}: tree_mask", torch.equal(masks.tree_mask(0, tree.parents), mask[0, 0].bool())

    def _stand_at(self, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
        """Whether a forward's rows were rotated by the recorded positions."""
        wanted = theirs["position_ids"]
        if wanted is None:
            wanted = list(range(theirs["past_len"], theirs["past_len"] + len(theirs["input_ids"])))
        assert isinstance(self.inner.head, EagleHead)
        cos, sin = self.inner.head.rotations.at(torch.tensor([wanted]), ours["rotation"][0])
        given = ours["rotation"]  # one row for all, or one each
        if len(given[0]) not in (1, len(wanted)):
            return False
        return bool((given[0] == cos[0, 0]).all() and (given[1] == sin[0, 0]).all())

    def _verifying(self, name: str, at: int, step: dict[str, Any], tree: Tree) -> Items:
        """Check the target's verdict on the tree, and what is committed."""
        verify, rows = step["verify"], paths(tree, sort=not self.sampler.greedy)
        self.sampler.uniforms.extend(verify["uniform_draws"])
        self.sampler.tokens.extend(step["multinomial_tokens"])
        logits = self.session.tree(tree)
        path, bonus = self.acceptance.accept(tree, logits, self.sampler)
        self.session.keep(path)
        self.session.append(bonus)
        self.accepted.append(len(path) - 1)
        found = [[tree.tokens[node] if node >= 0 else -1 for node in row] for row in rows]
        best = next((i for i, row in enumerate(rows) if row[: len(path)] == path), -1)
        yield f"{name}: candidates", found == verify["candidates"]
        yield f"{name}: tree_argmax", logits.argmax(-1).tolist() == verify["tree_argmax"]
        yield f"{name}: best_candidate", best == verify["best_candidate"]
        yield f"{name}: accept_length", len(path) - 1 == verify["accept_length"]
        yield f"{name}: accepted_tokens", [tree.tokens[node] for node in path] == step["accepted_tokens"]
        yield f"{name}: next_root_token", bonus == step["next_root_token"]
        yield f"{name}: uniform_draws", not self.sampler.uniforms
        yield f"{name}: multinomial_tokens", not self.sampler.tokens and not self.sampler.impossible
        self.sampler.uniforms.clear()
        self.sampler.tokens.clear()
        self.sampler.impossible = 0
        if (theirs := self.tensors.get(f"step{at}.tree_logits")) is not None:
            yield f"{name}: tree_logits", close(logits, theirs[0])

    @property
    def _output(self) -> list[int]:
        return self.session.tokens[:-1]  # the pending root is not part of the reference's output

    def _stopped(self) -> bool:
        """The reference's own rules: an end token, more tokens than asked for, or a full context."""
        new = self._output[len(self.prompt) :]
        room = self.args["max_length"] - (self.args["total_token"] - 1) - 10
        return self.args["eos_token_id"] in new or len(new) > self.args["max_new_tokens"] or len(self._output) > room

    def _results(self) -> Items:
        result, steps, new = self.record["result"], len(self.accepted), len(self._output) - len(self.prompt)
        yield "output_ids", self._output == result["output_ids"]
        yield "new_token", new == result["new_token"]
        yield "last_step_idx", steps - 1 == result["last_step_idx"]
        yield "tau", abs(new / steps - self.record["tau"]) < 1e-9
        mean = sum(self.accepted) / steps
        yield "mean_accept_length", abs(mean - self.record["mean_accept_length"]) < 1e-9
        if "lossless_prefix_equal" in result:
            naive = result["naive_output_ids"]
            both = min(len(naive), len(self._output))
            yield "lossless_prefix_equal", (naive[:both] == self._output[:both]) == result["lossless_prefix_equal"]


def paths(tree: Tree, *, sort: bool) -> list[list[int]]:
    """Node lists from the root to every leaf, in the leaves' order, padded with -1. `sort`: sorted, padding last."""
    inner = set(tree.parents)
    leaves = [node for node in range(tree.size) if node not in inner]
    rows = [tree.path_to(leaf) for leaf in leaves]
    width = tree.depth + 1
    if sort:
        rows.sort(key=lambda row: row + [tree.size] * (width - len(row)))
    return [row + [-1] * (width - len(row)) for row in rows]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether shapes are equal and no difference exceeds the tolerance plus what rounding may add."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).abs().max()) <= TOLERANCE + ROUNDING * float(theirs.abs().max())


def _naive(target: LanguageModel, record: dict[str, Any]) -> list[int]:
    """Plain decoding of as many tokens as were recorded."""
    decoder = Decoder(target, NoSpeculation(), Sampler(Sampling()), Tally())
    decoder.session.feed(record["prompt"])
    tokens: list[int] = list(record["prompt"])
    while len(tokens) < len(record["result"]["naive_output_ids"]):
        tokens += decoder.step(1)
    return tokens


@lru_cache(maxsize=4)
def _target(path: Path, attention: str) -> LanguageModel:
    if not path.is_dir():
        raise ConfigError(f"the case's target {path} does not exist; expected it beside the cases.")
    return load(path, dtype="float32", device="cpu", attention=attention)
