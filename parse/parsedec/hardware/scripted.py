"""Decisions from a stated trace in place of the models' own, for replays. Every forward is computed all the same.

    ScriptedJudge        scores that keep a drawn share of the draft; the judge's pass is run and its scores are read
    ScriptedAcceptance   how many guesses of a verified tree stand; the tree is verified and its tokens are read
    ScriptedHfGenerate   Hugging Face's own loops, their models' logits overwritten by a text that both know

So seconds are those of the real work, and what is kept is what the trace says. Shapes: K probes, N nodes, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parsedec.acceptance import Accepted
from parsedec.errors import ConfigError
from parsedec.judge import LabelJudge, Scores
from parsedec.models.language_model import LanguageModel
from parsedec.outer import Work, Written
from parsedec.peers import HfGenerate
from parsedec.sampling import Sampler
from parsedec.sessions.session import Session
from parsedec.text.chat import suffix_text
from parsedec.text.spelling import Draft
from parsedec.types import Tree

CERTAIN = 1e4  # a logit above any that a model makes


@dataclass(frozen=True, kw_only=True)
class ScriptedJudge(LabelJudge):
    """The packed label judge: its pass is really computed, but scores are 1 up to a drawn position and 0 behind it.

    kept    mean share of a draft's tokens that stand
    spread  standard deviation of that share over drafts that are not kept whole, before it is cut off at 0 and 1
    whole   share of drafts that are kept whole
    length  tokens of a whole draft
    rows    S, rows a probe costs, at least what the chat template needs
    seed    of the draws; one draw a prompt, so that all arms decide alike
    """

    kept: float = 0.6
    spread: float = 0.2
    whole: float = 0.35
    length: int = 512
    rows: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        LabelJudge.__post_init__(self)
        if not 0 <= self.whole <= self.kept <= 1 or self.spread < 0 or (self.whole == 1 and self.kept < 1):
            raise ConfigError(
                f"judge has kept={self.kept}, spread={self.spread}, whole={self.whole}; expected 0 <= whole <= kept "
                "<= 1 and spread >= 0: drafts kept whole count among what is kept."
            )

    def bind(self, target: LanguageModel) -> Self:
        least = len(target.encode(suffix_text(target, "w0")))
        if self.rows < least:
            raise ConfigError(f"judge.rows={self.rows}; {target.name}'s chat template alone takes {least}. Raise it.")
        asked = replace(self, question=" ".join(["w0"] * (self.rows - least + 1)))
        return super(ScriptedJudge, asked).bind(target)

    def score(self, session: Session, draft: Draft, cuts: Sequence[int], probes: Sequence[int]) -> Scores:
        measured = LabelJudge.score(self, session, draft, cuts, probes)
        stands = self.share(session.tokens) * self.length
        starts = dict(zip(cuts, [0, *cuts], strict=False))
        # a segment stands if its middle does: on average nothing is lost to whole segments
        values = tuple(float((starts[cut] + cut) / 2 < stands) for cut in probes)
        return replace(measured, values=values)

    def share(self, tokens: Sequence[int]) -> float:
        """Share of the draft behind `tokens` that stands."""
        rng = random.Random(f"{self.seed}:{list(tokens)}")
        if rng.random() < self.whole:
            return 1.0
        mean = (self.kept - self.whole) / (1 - self.whole)
        return min(1.0, max(0.0, rng.gauss(mean, self.spread)))


@dataclass(frozen=True, kw_only=True)
class ScriptedAcceptance:
    """Accepts a verified tree down its longest path to a drawn depth, so that a step commits `tau` tokens on average.
    Every level is equally likely to hold.

    tau    tokens per target call, its own token included
    depth  levels of guesses below the root in a full tree
    """

    lossless: ClassVar[bool] = False

    tau: float = 4.0
    depth: int = 8

    def __post_init__(self) -> None:
        rate_for(self.tau, self.depth)

    def accept(self, tree: Tree, logits: Tensor, sampler: Sampler) -> Accepted:
        best = logits.argmax(-1).tolist()  # of all rows, which a real rule would read, too
        rate, children, path = rate_for(self.tau, self.depth), tree.children(), [0]
        below = [0] * tree.size
        for node in range(tree.size - 1, 0, -1):
            below[tree.parents[node]] = max(below[tree.parents[node]], below[node] + 1)
        while children[path[-1]] and float(torch.rand((), generator=_generator(sampler))) < rate:
            path.append(max(children[path[-1]], key=below.__getitem__))
        return path, best[path[-1]]


@cache
def rate_for(tau: float, depth: int) -> float:
    """The chance r of a guess to be right with which a chain of `depth` of them commits tau = 1 + r + … + r^depth."""
    if not 1 <= tau <= depth + 1:
        raise ConfigError(f"tau={tau} with {depth} levels of guesses; expected 1 to {depth + 1}.")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(depth + 1)) < tau else (low, middle)
    return high


def _generator(sampler: Sampler) -> torch.Generator:
    if sampler.generator is None:
        raise ConfigError("acceptance=scripted draws how much is accepted; pass generate() a torch.Generator.")
    return sampler.generator


@dataclass(frozen=True, kw_only=True)
class ScriptedHfGenerate(HfGenerate):
    """`HfGenerate` on models whose logits say a made-up text: the target's always, the draft model's at the rate with
    which `length` guesses commit `tau` tokens. Forwards, caches and loop are Hugging Face's.

    tau   assisted: tokens per target call
    seed  of the text
    """

    tau: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        HfGenerate.__post_init__(self)
        rate_for(self.tau, self.length)

    def run(self, work: Work) -> Iterator[Written]:
        with ExitStack() as stack:
            stack.enter_context(writing(work.target.session.model.hf, self.seed, 1.0))
            if self.assisted and work.drafter is not None:
                stack.enter_context(writing(work.drafter.model.hf, self.seed, rate_for(self.tau, self.length)))
            yield from HfGenerate.run(self, work)


@contextmanager
def writing(hf: PreTrainedModel, seed: int, rate: float) -> Iterator[None]:
    """In the body, the model's best token at a position is that of the text `seed`; at a share 1 - rate, another."""
    plain = hf.forward
    vocabulary = hf.config.get_text_config().vocab_size

    @wraps(plain)
    def forward(*arguments: Any, **named: Any) -> Any:
        cache = named.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        out = plain(*arguments, **named)
        ids = arguments[0] if arguments else named["input_ids"]
        stop = start + ids.shape[1]
        tokens = [_token(seed, at, rate, vocabulary) for at in range(stop - out.logits.shape[1], stop)]
        index = torch.tensor(tokens, device=out.logits.device)[None, :, None]
        out.logits.scatter_(-1, index, CERTAIN)
        return out

    hf.forward = forward
    try:
        yield
    finally:
        del hf.forward


def _token(seed: int, at: int, rate: float, vocabulary: int) -> int:
    """The token after position `at`; the last ids, which are words in every vocabulary here."""
    rng = random.Random(f"{seed}:{at}")
    right = vocabulary - 1 - rng.randrange(vocabulary // 2)
    return right if rng.random() < rate else right - 1
