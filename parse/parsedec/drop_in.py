"""Drop-in use: PARSE (arXiv 2605.04263) behind Hugging Face's own `model.generate`.

    parse = hf_generate(draft=load("zoo:draft"), tokenizer=tokenizer)
    ids = model.generate(**inputs, custom_generate=parse, max_new_tokens=200, streamer=TextStreamer(tokenizer))

`generate` prepares prompt, generation config, logits processors and stopping criteria as usual, and then calls its
`custom_generate`, which is an engine here and returns what `generate` returns, in the same shape. (The peer
`outer=hf_generate` is the other way round: Hugging Face's decoding inside our engine.)

An option that the engine cannot honour is refused by name; none that changes the text is ignored.
Shapes: P prompt tokens, padding included; A tokens of the answer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    EosTokenCriteria,
    GenerationConfig,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from parsedec.acceptance import Acceptance
from parsedec.engine import Parse
from parsedec.errors import ConfigError, IncompatibleStack, PromptError
from parsedec.inner import InnerSpeculator
from parsedec.judge import Judge
from parsedec.models.checkpoints import Checkpoint
from parsedec.models.judge_card import read_judge_card
from parsedec.models.language_model import LanguageModel, load
from parsedec.outer import Outer
from parsedec.types import Delta, Result, Sampling, warmth

log = logging.getLogger(__name__)
MODES = ("greedy_search", "sample")
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)  # in the order in which Sampler applies them
RECORDED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# arguments passed on by `generate` that do not affect the text, or that are checked separately
HANDLED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def hf_generate(
    *,
    draft: LanguageModel | PreTrainedModel | str | Path | None = None,
    inner: InnerSpeculator | None = None,
    draft_inner: InnerSpeculator | None = None,
    acceptance: Acceptance | None = None,
    outer: Outer | None = None,
    judge: Judge | None = None,
    target: LanguageModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> DropIn:
    """A callable for `model.generate(…, custom_generate=…)`; make it once, and use it for many requests of one model.

    draft      the draft model: a loaded one, a transformers model that shares the target's tokenizer, or what `load`
               takes
    inner, draft_inner, acceptance, outer, judge   as in `Parse`
    target     the model `generate` is called on, wrapped; for settings of its own (template, judge card, backend)
    tokenizer  of the model `generate` is called on; None: loaded from where the model came from
    stop       stop strings. (generate's own stop_strings cannot be used: transformers does not pass the tokenizer on to
               a callable. `stopping_criteria` are honoured.)
    generator  for sampled decoding, on the CPU; None: torch's global one, as in `generate`
    on_result  called with each finished answer's `Result`, except if the caller's stopping criteria cut it short

    Takes one request at a time: batch 1, greedy or sampled with temperature, top_k and top_p, and no more tokens than
    the model has positions. The generation config decides the rest: end tokens, limits, what is returned.
    """
    if target is not None and tokenizer is not None:
        raise ConfigError("both target and tokenizer are given; the wrapped target has its tokenizer. Leave it out.")
    return DropIn(
        draft=load(draft) if isinstance(draft, (str, Path)) else draft,
        inner=inner,
        draft_inner=draft_inner,
        acceptance=acceptance,
        outer=outer,
        judge=judge,
        target=target,
        tokenizer=tokenizer,
        stop=tuple(stop) if not isinstance(stop, str) else stop,
        generator=generator,
        on_result=on_result,
    )


@dataclass(kw_only=True, eq=False)
class DropIn:
    """The callable that `hf_generate` makes: its settings, and the engine for the latest model it was called on."""

    draft: LanguageModel | PreTrainedModel | None
    inner: InnerSpeculator | None
    draft_inner: InnerSpeculator | None
    acceptance: Acceptance | None
    outer: Outer | None
    judge: Judge | None
    target: LanguageModel | None
    tokenizer: PreTrainedTokenizerBase | None
    stop: Sequence[str]
    generator: torch.Generator | None
    on_result: Callable[[Result], None] | None
    _built: tuple[PreTrainedModel, tuple[int, ...], Parse] | None = field(default=None, init=False, repr=False)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Answer the request that `generate` prepared; returns ids [1, P + A], or its output object if asked for.

        Raises IncompatibleStack or ConfigError for unsupported options, PromptError for a prompt that cannot be run.
        """
        asked = _arguments_of_generate(model)
        streamer = streamer if streamer is not None else asked.get("streamer")
        try:
            if asked.get("assistant_model") is not None:
                raise IncompatibleStack(
                    "assistant_model is given, but custom_generate decodes by itself and would ignore it. "
                    "Use hf_generate(inner=…) for token-level speculation, or hf_generate(draft=…)."
                )
            _check_request(model, input_ids, generation_config, model_kwargs)
            prompt = _prompt(input_ids, model_kwargs)
            written = self._write(model, prompt, logits_processor, generation_config, input_ids.shape[1])
            criteria = _Criteria(_callers(stopping_criteria, generation_config), input_ids.cpu())
            _send(written, criteria, streamer)
        finally:
            if streamer is not None:
                streamer.end()  # whatever happens, or a reader in another thread would wait forever
        sequence = criteria.ids.to(input_ids.device)  # [1, P + A]
        return GenerateDecoderOnlyOutput(sequences=sequence) if generation_config.return_dict_in_generate else sequence

    def _write(
        self,
        model: PreTrainedModel,
        prompt: list[int],
        processors: LogitsProcessorList,
        config: GenerationConfig,
        given: int,
    ) -> Iterator[list[int]]:
        """The answer's tokens, piece by piece; errors in the request are raised at once."""
        sampling = _sampling(processors, bool(config.do_sample))
        pieces = self._engine(model, _end_ids(config)).stream(
            prompt,
            max_new_tokens=int(config.max_length) - given,
            stop=self.stop,
            sampling=sampling,
            generator=None if sampling.greedy else self.generator or torch.default_generator,
        )
        return self._tokens(pieces)

    def _tokens(self, pieces: Iterator[Delta]) -> Iterator[list[int]]:
        for piece in pieces:
            if piece.tokens:
                yield list(piece.tokens)
            if piece.result is not None and self.on_result is not None:
                self.on_result(piece.result)

    def _engine(self, model: PreTrainedModel, end_ids: tuple[int, ...]) -> Parse:
        """The engine for `model` and these end tokens; the latest one is kept, with its gate's history."""
        if self._built is None or self._built[0] is not model or self._built[1] != end_ids:
            engine = Parse(
                self._wrapped(model).ending_with(end_ids),
                self._draft_for(model),
                inner=self.inner,
                draft_inner=self.draft_inner,
                acceptance=self.acceptance,
                outer=self.outer,
                judge=self.judge,
            )
            _check_vocabulary(engine)
            self._built = (model, end_ids, engine)
        return self._built[2]

    def _wrapped(self, model: PreTrainedModel) -> LanguageModel:
        if self.target is not None:
            if self.target.hf is not model:
                raise ConfigError(
                    f"generate was called on {model.config.name_or_path or type(model).__name__}, but hf_generate was "
                    f"given target={self.target.name}. Call target.hf.generate, or leave target out."
                )
            return self.target
        where = model.config.name_or_path
        if self.tokenizer is None and not where:
            raise ConfigError(
                "the model does not say where it was loaded from, so its tokenizer is not known. "
                "Give it: hf_generate(tokenizer=…)."
            )
        place = Checkpoint(where, revision=getattr(model.config, "_commit_hash", None))
        tokenizer = self.tokenizer
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(where, **place.arguments)
        return LanguageModel.wrap(model, tokenizer, judge_card=read_judge_card(place) if where else None)

    def _draft_for(self, model: PreTrainedModel) -> LanguageModel | None:
        if isinstance(self.draft, PreTrainedModel):
            return LanguageModel.wrap(self.draft, self._wrapped(model).tokenizer)
        return self.draft


class _Criteria:
    """The caller's stopping criteria, evaluated after every token as `generate` does."""

    def __init__(self, criteria: StoppingCriteriaList, prompt: Tensor) -> None:
        self.criteria = criteria
        self.ids = prompt  # [1, P + tokens so far]

    def take(self, piece: Sequence[int]) -> tuple[list[int], bool]:
        """(the tokens up to and including the first that ends the answer, whether one does)."""
        for i, token in enumerate(piece):
            self.ids = torch.cat([self.ids, torch.tensor([[token]])], dim=1)
            if len(self.criteria) and bool(self.criteria(self.ids, None).all()):
                return list(piece[: i + 1]), True
        return list(piece), False


def _callers(criteria: StoppingCriteriaList, config: GenerationConfig) -> StoppingCriteriaList:
    """The criteria without those that the engine knows of already: the token limit and the end tokens."""

    def known(criterion: object) -> bool:
        if isinstance(criterion, MaxLengthCriteria):
            return bool(criterion.max_length >= config.max_length)
        return isinstance(criterion, EosTokenCriteria) and set(criterion.eos_token_id.tolist()) == set(_end_ids(config))

    return StoppingCriteriaList([criterion for criterion in criteria if not known(criterion)])


def _send(pieces: Iterator[list[int]], criteria: _Criteria, streamer: BaseStreamer | None) -> None:
    """Send each piece to the streamer as soon as it is final; `generate` has already sent the prompt."""
    for piece in pieces:
        taken, ended = criteria.take(piece)
        if streamer is not None:
            streamer.put(torch.tensor(taken))
        if ended:
            return


def _arguments_of_generate(model: PreTrainedModel) -> Mapping[str, Any]:
    """The streamer and the assistant model that `generate` was called with.

    transformers (up to 5.23 at least) passes neither to a callable, only the arguments that `_sample` does not name.
    So both are read from the stack frame of the nearest call of the model's `generate`.
    """
    caller: FrameType | None = sys._getframe(2)
    while caller is not None:
        if caller.f_code.co_name == "generate" and caller.f_locals.get("self") is model:
            return {name: caller.f_locals.get(name) for name in ("streamer", "assistant_model")}
        caller = caller.f_back
    log.warning(
        "hf_generate(…) was not called from the `generate` of its model in this thread, so it cannot see a streamer or "
        "an assistant_model given there: the streamer gets nothing. Give `generate` the object itself as "
        "custom_generate, or call it with streamer=…"
    )
    return {}


def _check_request(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> None:
    """Raise for any option that the engine would not follow, naming it."""
    if model.config.is_encoder_decoder or input_ids.shape[1] == 0:
        raise IncompatibleStack(
            f"{model.config.name_or_path or type(model).__name__} is not asked to continue input_ids; expected a "
            "decoder-only model and a prompt of at least one token, not inputs_embeds."
        )
    for name, value, wanted in (
        ("num_return_sequences", config.num_return_sequences or 1, 1),
        ("num_beams", config.num_beams or 1, 1),
        ("batch size", input_ids.shape[0], 1),
        ("generation mode", str(config.get_generation_mode().value), MODES),
        ("cache_implementation", config.cache_implementation, (None, "dynamic")),
    ):
        if value not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise IncompatibleStack(
                f"{name} is {value!r}; custom_generate=hf_generate(…) expects {wanted!r}. Call generate once per "
                "prompt, with greedy or sampled decoding, or leave custom_generate out."
            )
    recorded = [name for name in RECORDED if getattr(config, name)]
    if config.return_dict_in_generate and recorded:
        raise IncompatibleStack(
            f"{', '.join(recorded)} cannot be returned: tokens of a kept draft have no decoding step of their own. "
            "Only the sequences can; hf_generate(on_result=…) reports what was drafted, judged and kept."
        )
    given = {name for name, value in model_kwargs.items() if value is not None}
    if strange := sorted(given - HANDLED):
        raise IncompatibleStack(
            f"the arguments {strange} are for the model's forward, which the engine calls in its own way. Expected "
            "only input_ids and attention_mask; leave the others out, or leave custom_generate out."
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", False) or int(cache.get_seq_length())):
        raise IncompatibleStack(
            "past_key_values is given, but the engine keeps a cache of its own. Leave it out and give the whole prompt."
        )


def _prompt(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> list[int]:
    """The prompt's ids without padding on the left."""
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    seen = torch.ones_like(input_ids[0]) if mask is None else mask[0].to(input_ids.device)
    start = int((seen == 0).sum())
    if not bool(seen[start:].all()) or start == len(seen):
        raise PromptError("attention_mask hides tokens inside or after the prompt; expected only padding on the left.")
    plainly = torch.arange(len(seen) - start, device=input_ids.device)
    if positions is not None and not torch.equal(positions[0, start:].to(input_ids.device), plainly):
        raise PromptError("position_ids do not count up from 0; the engine counts positions itself. Leave them out.")
    return [int(i) for i in input_ids[0, start:]]


def _sampling(processors: LogitsProcessorList, sampled: bool) -> Sampling:
    """The sampling settings that the logits processors stand for: those from the config, and the caller's own."""
    found = [p for p in processors if not isinstance(p, LogitNormalization)]
    kinds = [WARPERS.index(type(p)) if type(p) in WARPERS else -1 for p in found]
    if strange := [type(p).__name__ for p, kind in zip(found, kinds, strict=True) if kind < 0]:
        raise IncompatibleStack(
            f"the logits processors {strange} are not supported: guesses and drafts are verified against the plain "
            "distribution. They come from logits_processor=… or from the generation config (repetition_penalty=1.0, "
            "min_new_tokens=None and min_p=None switch off the usual ones)."
        )
    if kinds != sorted(set(kinds)):
        raise IncompatibleStack(
            f"the logits processors are {[type(p).__name__ for p in found]}; expected at most one each of temperature, "
            "top_k and top_p, in this order. Set them by name in generate."
        )
    if not sampled:
        return Sampling()
    temperature, top_k, top_p = 1.0, 0, 1.0
    for processor in found:
        temperature = getattr(processor, "temperature", temperature)
        top_k, top_p = getattr(processor, "top_k", top_k), getattr(processor, "top_p", top_p)
    return Sampling(temperature=warmth(float(temperature)), top_k=int(top_k), top_p=float(top_p))


def _end_ids(config: GenerationConfig) -> tuple[int, ...]:
    """The ids that end an answer; empty if `generate` has none."""
    ends = config.eos_token_id
    return () if ends is None else tuple(int(i) for i in (ends if isinstance(ends, (list, tuple)) else [ends]))


def _check_vocabulary(engine: Parse) -> None:
    """Raise IncompatibleStack for a draft model that cannot read the token ids `generate` gives."""
    draft, target = engine.draft, engine.target
    if draft is not None and engine.outer.needs_draft and not target.same_vocabulary(draft):
        raise IncompatibleStack(
            f"{draft.name} has a different vocabulary from {target.name}, and generate gives the prompt as token ids "
            "of the target. Choose a draft model with the same vocabulary, or give text to Parse(…).generate."
        )
