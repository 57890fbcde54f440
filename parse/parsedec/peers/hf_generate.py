"""outer=hf_generate: Hugging Face's `model.generate`, plain or assisted by the stack's draft model (Gante 2023,
assisted generation; Leviathan et al. 2023, arXiv 2211.17192).

It gets the same prompt, limits, end tokens, stop strings and sampling settings as the other outer levels, and its
tokens are counted by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.generation import BaseStreamer

from parsedec.answer import Answer
from parsedec.errors import ConfigError, IncompatibleStack, require_number
from parsedec.inner import InnerSpeculator, NoSpeculation
from parsedec.models.language_model import LanguageModel
from parsedec.models.turns import turns_of
from parsedec.outer import Work, Written
from parsedec.remote.model import RemoteModel
from parsedec.sampling import Sampler
from parsedec.text.spelling import common_prefix
from parsedec.types import Author, Round, Sampling, StopReason

SCHEDULES = ("constant", "heuristic", "heuristic_transient")


@dataclass(frozen=True, kw_only=True)
class HfGenerate:
    """outer=hf_generate: `model.generate` writes the whole answer.

    assisted    whether the stack's draft model drafts, in Hugging Face's own loop
    length      its guesses per target call (`num_assistant_tokens`)
    schedule    how that number changes: constant, heuristic or heuristic_transient
    confidence  end a draft after a guess less probable than this (`assistant_confidence_threshold`); None: never

    The defaults are Hugging Face's. The answer comes in one piece when it is finished, but the time to first token is
    that of the token itself. Changes to the models are undone when the call ends.
    """

    prefill: ClassVar[bool] = False  # `generate` reads the prompt itself

    assisted: bool = False
    length: int = 20
    schedule: str = "constant"
    confidence: float | None = 0.4

    def __post_init__(self) -> None:
        require_number("outer.length", self.length, whole=True, low=1)
        if self.confidence is not None:
            require_number("outer.confidence", self.confidence, low=0, high=1)
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"outer.schedule={self.schedule!r}; expected one of {', '.join(SCHEDULES)}.")

    @property
    def needs_draft(self) -> bool:
        return self.assisted

    def bind(self, target: LanguageModel) -> HfGenerate:
        _check_here(target)
        if self.assisted and target.recurrent:
            raise IncompatibleStack(
                f"outer.assisted=true: Hugging Face's assisted generation cannot roll back {target.name}, which has "
                "recurrent layers. Use outer.assisted=false."
            )
        return self

    def check_stack(self, target: LanguageModel, draft: LanguageModel | None, inner: InnerSpeculator) -> None:
        if not isinstance(inner, NoSpeculation):
            raise IncompatibleStack(
                f"outer=hf_generate decodes by itself and would ignore inner={type(inner).__name__}. Use inner=none; "
                "outer.assisted=true speculates with the draft model."
            )
        if not self.assisted or draft is None:
            return
        _check_here(draft)
        if target.vocab_size == draft.vocab_size and not target.same_vocabulary(draft):
            raise IncompatibleStack(
                f"{draft.name} and {target.name} have vocabularies of the same size but with different tokens, and "
                "Hugging Face's assisted generation compares only sizes. Choose another draft model."
            )

    def run(self, work: Work) -> Iterator[Written]:
        session, answer = work.target.session, work.answer
        target, sampler = session.model, work.target.sampler
        assistant = self._assistant(work, target, sampler)
        follow = Follow(answer, session.length)
        wanted = settings(target, sampler.settings, min(answer.remaining, session.room))
        with ExitStack() as stack:
            stack.enter_context(clean_settings(target.hf))
            stack.enter_context(turns_of(target.hf).plain())
            arguments: dict[str, Any] = {}
            if assistant is not None:
                stack.enter_context(turns_of(assistant.hf).plain())
                own = stack.enter_context(clean_settings(assistant.hf))
                own.num_assistant_tokens, own.num_assistant_tokens_schedule = self.length, self.schedule
                own.assistant_confidence_threshold = self.confidence or 0.0
                arguments["assistant_model"] = assistant.hf
                if target.vocab_size != assistant.vocab_size:  # `generate` then translates by text
                    arguments |= {"tokenizer": target.tokenizer, "assistant_tokenizer": assistant.tokenizer}
            if answer.limits.stop:
                arguments["stopping_criteria"] = [follow]
            stack.enter_context(seeded(sampler))
            watch = stack.enter_context(Watch(work, assistant))
            prompt = torch.tensor([session.tokens], device=target.device)
            with torch.inference_mode():
                sequence = target.hf.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=wanted,
                    streamer=watch,
                    **arguments,
                )
            follow(sequence)
        if answer.stop is None:
            answer.stop = StopReason.CONTEXT_LIMIT
        written = len(answer.tokens)
        work.rounds.append(Round(drafted=False, target_tokens=written, decode_s=work.meter.seconds("decode")))
        yield Author.TARGET, list(answer.tokens)

    def _assistant(self, work: Work, target: LanguageModel, sampler: Sampler) -> LanguageModel | None:
        if not self.assisted or work.drafter is None:
            return None
        model = work.drafter.model
        if target.vocab_size != model.vocab_size and not sampler.greedy:
            raise IncompatibleStack(
                f"{model.name} has {model.vocab_size} output rows and {target.name} {target.vocab_size}; to sample "
                "with such a pair Hugging Face's assisted generation prunes the draft model's output matrix for good. "
                "Use temperature 0, or a draft model with as many rows."
            )
        return model


def _check_here(model: LanguageModel) -> None:
    if isinstance(model, RemoteModel):
        raise IncompatibleStack(
            f"outer=hf_generate runs `model.generate`, and the weights of {model.name} are at {model.server.url}. Use "
            "outer=none, or engine=local."
        )


class Follow(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Brings the answer up to date and returns whether it is finished; a stopping criterion, for stop strings.

    Assisted generation may also ask about guesses (transformers before 5.23), so what was written can change.
    """

    def __init__(self, answer: Answer, prompt: int) -> None:
        self.answer = answer
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: object = None, **_: object) -> Tensor:
        tokens = input_ids[0, self.prompt :].tolist()
        shared = common_prefix(self.answer.tokens, tokens)
        if shared < len(self.answer.tokens):
            self.answer.cut(shared)
        self.answer.extend(tokens[shared:], Author.TARGET)
        return torch.full((1,), self.answer.stop is not None, device=input_ids.device)


class Watch(BaseStreamer):  # type: ignore[misc]
    """Times the first token and counts the forwards of target and assistant while `generate` runs.

    It only looks at shapes, so nothing is copied and nothing waits for the device.
    """

    def __init__(self, work: Work, assistant: LanguageModel | None) -> None:
        self._work = work
        self._assistant = assistant
        self._prompt = work.target.session.length
        self._rows = 0  # of the latest forward
        self._puts = 0  # calls of `put`: first with the prompt, then with the tokens of each step
        self._spans = ExitStack()

    def __enter__(self) -> Watch:
        hook = self._work.target.session.model.hf.register_forward_pre_hook(self._count, with_kwargs=True)
        self._spans.callback(hook.remove)
        if self._assistant is not None and self._assistant.hf is not self._work.target.session.model.hf:
            hook = self._assistant.hf.register_forward_pre_hook(self._count_draft, with_kwargs=True)
            self._spans.callback(hook.remove)
        self._phase = self._spans.enter_context(ExitStack())
        self._phase.enter_context(self._work.meter.span("prefill"))
        return self

    def __exit__(self, *error: object) -> None:
        self._spans.close()

    def put(self, value: Tensor) -> None:
        self._puts += 1
        if self._puts == 1:
            return
        first = self._puts == 2
        if first:
            self._work.meter.saw_token()
            self._phase.close()
            self._phase.enter_context(self._work.meter.span("decode"))
        guesses = self._rows - (self._prompt if first else 1)
        if guesses or not first:
            self._work.target.tally.count_tree(guesses, value.numel() - 1)

    def end(self) -> None:
        self._phase.close()

    def _count(self, module: object, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        session = self._work.target.session
        self._rows = _rows(args, kwargs)
        session.calls += 1
        session.rows += self._rows

    def _count_draft(self, module: object, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        assert self._work.drafter is not None
        session = self._work.drafter.decoder.session
        session.calls += 1
        session.rows += _rows(args, kwargs)


def _rows(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Rows of a forward of batch 1."""
    return int((args[0] if args else kwargs["input_ids"]).shape[1])


def settings(model: LanguageModel, sampling: Sampling, new_tokens: int) -> GenerationConfig:
    """The generation config for `generate`. Filters that are off are set as well, since unset ones get defaults."""
    chosen: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        chosen = {
            "do_sample": True,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
        }
    ends = list(model.end_ids)
    return GenerationConfig(
        max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **chosen
    )


# `generate` draws from torch's global generators and reads settings of the model. Both are lent to one request at a
# time: another thread's would find what was lent to the first, and put that back for good
_GENERATING = RLock()


@contextmanager
def clean_settings(hf: PreTrainedModel) -> Iterator[GenerationConfig]:
    """Replace the model's own generation config in the body: nobody asked for a checkpoint's repetition penalty, and
    `generate` writes into an assistant's config."""
    with _GENERATING:
        theirs = hf.generation_config
        hf.generation_config = GenerationConfig()
        try:
            yield hf.generation_config
        finally:
            hf.generation_config = theirs


@contextmanager
def seeded(sampler: Sampler) -> Iterator[None]:
    """Seed torch's global generators from the request's own for the body, and restore them afterwards."""
    if sampler.greedy:
        yield
        return
    assert sampler.generator is not None
    where = sampler.generator.device
    seed = int(torch.randint(1 << 62, (), generator=sampler.generator, device=where))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with _GENERATING, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
