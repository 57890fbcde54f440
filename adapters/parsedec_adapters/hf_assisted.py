"""Hugging Face's assisted generation as a drafter: its own candidate generator proposes for our loop.

`AssistedCandidateGenerator` (transformers; Gante 2023) has a small model write a chain with `generate`, ended early
after a guess it is not sure of. It is here for comparison with `draft_model`, which does the same without `generate`
around every draft. For Hugging Face's whole loop, see `outer=hf_generate`.

The generator keeps one cache and adapts its settings as it goes. Here it gets the state's own copy of the cache and
fixed settings for every proposal, so that a state depends only on its tokens, not on how it came about. So the adaptive
parts, the `heuristic` schedules and the threshold fitted with scikit-learn, are left out.

Lossless: candidates are drawn with the request's sampling settings, and the scores they were drawn from are `logq`.
Where the chain ends depends only on the candidates already in it (see `draft_model`).

Shapes in this file:  T committed tokens, m guesses, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from parsedec.errors import IncompatibleStack, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.models.turns import turns_of
from parsedec.peers import clean_settings, seeded, settings
from parsedec.sampling import Sampler
from parsedec.sessions import kv
from parsedec.text.spelling import common_prefix
from parsedec.types import Needs, Outcome, Seen, Tree
from parsedec_adapters.draft_model import drafting_model, fitted


@dataclass(slots=True)
class AssistedState:
    """The committed tokens, and a cache that holds some of the first of them (attention layers only).

    `ahead` caches the last proposal: its guesses, and the cache after them. It never changes proposals, only the cost
    of the next one.
    """

    tokens: tuple[int, ...]
    cache: DynamicCache
    settings: GenerationConfig
    sampler: Sampler
    ahead: tuple[tuple[int, ...], DynamicCache] | None = None


@dataclass(frozen=True, kw_only=True)
class HfAssisted:
    """A chain of up to `length` guesses by transformers' own candidate generator.

    length      `num_assistant_tokens`, with a constant schedule
    confidence  `assistant_confidence_threshold`; None: never end a chain early
    model       as in `DraftModel`
    """

    lossless: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs()

    length: int = 20
    confidence: float | None = 0.4
    model: LanguageModel | str | None = None
    target: LanguageModel | None = None  # set by `bind`

    def __post_init__(self) -> None:
        require_number("inner.length", self.length, whole=True, low=1)
        if self.confidence is not None:
            require_number("inner.confidence", self.confidence, low=0, high=1)

    def bind(self, target: LanguageModel, draft: LanguageModel | None) -> HfAssisted:
        model = drafting_model("hf_assisted", self.model, target, draft)
        if model.recurrent:
            raise IncompatibleStack(
                f"inner=hf_assisted cannot roll back {model.name}, which has recurrent layers that Hugging Face's "
                "assisted generation does not support. Use inner=draft_model."
            )
        return replace(self, model=model, target=target)

    def start(self, tokens: Sequence[int], seen: Seen, sampler: Sampler) -> AssistedState:
        model, target = self._bound()
        chosen = settings(target, sampler.settings, self.length)
        if model.vocab_size > target.vocab_size:
            chosen.suppress_tokens = list(range(target.vocab_size, model.vocab_size))
        return AssistedState(tuple(tokens), kv.new_cache(model.hf), chosen, sampler)

    def propose(self, state: AssistedState, budget: int) -> Tree:
        model, target = self._bound()
        root, length = state.tokens[-1], min(self.length, budget, model.context_limit - len(state.tokens))
        if length < 1:
            return Tree.chain([root])
        cache = kv.snapshot(state.cache)
        fewer = model.vocab_size < target.vocab_size
        text = torch.tensor([model.readable(state.tokens) if fewer else state.tokens], device=model.device)
        with clean_settings(model.hf), turns_of(model.hf).plain(), seeded(state.sampler), torch.inference_mode():
            generator = self._generator(text, model, state.settings, length)
            generator.assistant_kwargs["past_key_values"] = cache
            found, scores = generator.get_candidates(text)
        guesses = tuple(found[0, len(state.tokens) :].tolist())
        state.ahead = guesses, cache
        if state.sampler.greedy:
            return Tree.chain([root, *guesses])
        logq: Tensor = fitted(scores[0].float(), target.vocab_size).log_softmax(-1)  # [m, V]
        return Tree.chain([root, *guesses], logq[[0, *range(len(guesses))]])

    def commit(self, state: AssistedState, outcome: Outcome) -> AssistedState:
        guesses, cache = state.ahead or ((), state.cache)
        right = len(state.tokens) + common_prefix(guesses, outcome.tokens)
        tokens = (*state.tokens, *outcome.tokens)
        return replace(state, tokens=tokens, cache=_cut(cache, right), ahead=None)

    def rewind(self, state: AssistedState, length: int) -> AssistedState:
        return replace(state, tokens=state.tokens[:length], cache=_cut(state.cache, length), ahead=None)

    def _generator(
        self, text: Tensor, model: LanguageModel, chosen: GenerationConfig, length: int
    ) -> AssistedCandidateGenerator:
        generator = AssistedCandidateGenerator(
            input_ids=text,
            assistant_model=model.hf,
            generation_config=chosen,
            model_kwargs={"attention_mask": torch.ones_like(text), "use_cache": True},
        )
        generator.num_assistant_tokens = length
        generator.main_model_min_length, generator.main_model_max_length = 0, text.shape[1] + length + 1
        # this draft's threshold; the one in the assistant's settings would be adapted
        generator.generation_config.assistant_confidence_threshold = self.confidence or 0.0
        generator.assistant_generation_config.assistant_confidence_threshold = None
        return generator

    def _bound(self) -> tuple[LanguageModel, LanguageModel]:
        if self.target is None or not isinstance(self.model, LanguageModel):
            raise IncompatibleStack("inner=hf_assisted was not bound to a target; call bind(target, draft) first.")
        return self.model, self.target


def _cut(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of the first `rows` rows, or of all if there are fewer."""
    short = kv.snapshot(cache)
    kv.cut_tail(short, max(0, short.get_seq_length() - rows))
    return short
