"""The Python API: `Parse`, which combines a target, optionally a draft model, and the two levels of decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from parsedec.acceptance import Acceptance, Siblings
from parsedec.answer import Answer
from parsedec.batching.batch import Batch, BatchResult
from parsedec.batching.fibers import clock
from parsedec.drafter import Drafter
from parsedec.errors import (
    ConfigError,
    IncompatibleStack,
    ParsedecError,
    PromptError,
    TargetLost,
    TargetRefused,
    require_number,
)
from parsedec.gate import GateHistory
from parsedec.inner import InnerSpeculator, NoSpeculation
from parsedec.judge import Judge, LabelJudge
from parsedec.meter import Meter, Tally
from parsedec.models import ranks
from parsedec.models.language_model import LanguageModel
from parsedec.outer import ChecksStack, DraftVerification, Outer, PrefixVerification, TargetOnly, Work
from parsedec.remote.model import RemoteModel
from parsedec.remote.stack import check_inner, open_decoder
from parsedec.sampling import Sampler, check_numbers, chosen_generator
from parsedec.sessions.selftest import check_decoding
from parsedec.stack import bind_inner, check_draft, check_models, check_parts, judge_needs
from parsedec.text.chat import read_prompt
from parsedec.text.prompt import Prompt, ReadPrompt, check_length, token_ids
from parsedec.text.spelling import Draft, StopText, TextStream
from parsedec.types import Author, Delta, Limits, Result, Sampling, StopReason


class Parse:
    """A two-level engine: an outer segment-level loop around a swappable inner speculator.

        engine = Parse(load("zoo:target"), load("zoo:draft"), inner=DraftModel(length=4))
        print(engine.generate("Tom has 3 apples. …").text)

    target       the model whose quality is to be kept
    draft        the model that writes drafts; None: only the inner level runs
    inner        speculator for the target's decoding (None: plain)
    draft_inner  speculator for the draft model's decoding (None: plain)
    acceptance   rule that accepts the inner speculators' guesses, for both models (None: Siblings, lossless)
    outer        the outer level; None: PrefixVerification with `judge`, or TargetOnly without a draft model
    judge        shorthand for outer=PrefixVerification(judge=…)

    Combinations known not to work are refused here, before any request. Errors that only a request can show are raised
    by it: sampling settings that a part of the stack does not take, prompts that a model cannot read, a server's
    refusals.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: LanguageModel | None = None,
        *,
        inner: InnerSpeculator | None = None,
        draft_inner: InnerSpeculator | None = None,
        acceptance: Acceptance | None = None,
        outer: Outer | None = None,
        judge: Judge | None = None,
    ) -> None:
        check_models(target, draft)
        check_parts(inner=inner, draft_inner=draft_inner, acceptance=acceptance, outer=outer, judge=judge)
        if outer is not None and judge is not None:
            raise ConfigError("both outer and judge are given; put the judge into the outer level: outer=…(judge=…).")
        if draft is None and (draft_inner is not None or (judge is not None and outer is None)):
            given = "draft_inner" if draft_inner is not None else "judge"
            raise IncompatibleStack(f"{given} is given, but no draft model for it to work with; set draft.")
        chosen = outer or (TargetOnly() if draft is None else PrefixVerification(judge=judge or LabelJudge()))
        check_draft(chosen, target, draft)
        for model in (target, draft) if chosen.needs_draft and draft is not None else (target,):
            check_decoding(model)
        if target.shared:
            ranks.check_gate(getattr(chosen, "gate", None))
        self.target = target
        self.draft = draft
        self.acceptance: Acceptance = acceptance or Siblings()
        check_inner(inner or NoSpeculation(), target, self.acceptance)
        if draft is not None:
            check_inner(draft_inner or NoSpeculation(), draft)
        if isinstance(chosen, ChecksStack):
            chosen.check_stack(target, draft, inner or NoSpeculation())
        self.outer: Outer = chosen.bind(target)
        self.judge_needs = judge_needs(self.outer, target, draft)
        self.inner = bind_inner(inner or NoSpeculation(), target, draft)
        self.draft_inner = None if draft is None else bind_inner(draft_inner or NoSpeculation(), draft, None)
        self.history = GateHistory()

    @property
    def lossless(self) -> bool:
        """Whether outputs follow the target's own distribution exactly."""
        return isinstance(self.outer, TargetOnly) and self.inner.lossless and self.acceptance.lossless

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Result:
        """Answer one request.

        prompt      a user message, a list of {"role", "content"} messages, or target token ids to use as they are: a
                    list, a tensor, or what the tokenizer returns. If the last message is the assistant's, it is
                    continued, and the result holds only what follows it; `parsedec.NewTurn(messages)` opens a new turn
                    after it instead. `parsedec.BareText(text)` is continued as it is, without a chat template
        seed        for sampled decoding; run.py writes the same text with this seed for the first problem of a task
        generator   a source of randomness on the CPU, in place of a seed; greedy decoding needs neither

        Raises PromptError for a prompt that cannot be run, and LogitsError if the target's logits after the prompt, or
        those that a token is drawn from, are not numbers; the engine stays usable. Greedy tokens after the first are
        not checked, since each check would make the host wait: a model that overflows later in an answer writes
        nonsense. Nor are logits on a server or in outer=hf_generate.
        """
        result = None
        limits, source = Limits(max_new_tokens=max_new_tokens, stop=stop), chosen_generator(seed, generator)
        for delta in self._begin(prompt, limits, sampling, source, False):
            result = delta.result or result
        assert result is not None
        return result

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        top: int | None = None,
    ) -> Iterator[Delta]:
        """As `generate`, but yields the answer piece by piece. Every piece is final; the last one carries the result.

        top  if set, pieces have `shown`: the target's log-probability of each token and of the `top` most probable ones

        Errors in the request are raised here; the work begins when the first piece is asked for. Raises
        IncompatibleStack if log-probabilities are asked for but not defined (`no_logprobs`).
        """
        if top is not None:
            require_number("top", top, whole=True, low=0)
            if self.no_logprobs is not None:
                raise IncompatibleStack(
                    f"no log-probabilities: {self.no_logprobs}. Leave `top` out, or use outer=none."
                )
        limits = Limits(max_new_tokens=max_new_tokens, stop=stop)
        return self._begin(prompt, limits, sampling, chosen_generator(seed, generator), True, top)

    @property
    def no_logprobs(self) -> str | None:
        """Why the tokens of an answer have no log-probabilities; None if they have.

        A draft's tokens are judged as text and kept as they are: the target chose none of them. How likely it finds
        them is another question than what it would have written, and needs rows that a judge pass may not have.
        """
        if not isinstance(self.outer, TargetOnly):
            return "an answer has two authors, and the parts the draft model wrote were never sampled from the target"
        if isinstance(self.target, RemoteModel):
            return "the tokens are chosen on a model server, which is asked for no log-probabilities of them"
        return None

    def _begin(
        self,
        prompt: Prompt,
        limits: Limits,
        sampling: Sampling | None,
        generator: torch.Generator | None,
        spelt: bool,
        top: int | None = None,
    ) -> Iterator[Delta]:
        """`spelt`: whether pieces have text; decoding it takes longer than all else the engine does in a step."""
        sampler = Sampler(sampling or Sampling(), generator)
        ids = self.target_ids(prompt)
        if self.target.shared:
            ranks.check_same(self.target.name, self.target.device, (ids, limits, sampler.settings))
            ranks.share_generator(generator, self.target.device)
        return self._answer(ids, self.open_drafter(prompt, ids, sampler, limits), sampler, limits, spelt, top)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        size: int = 16,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> BatchResult:
        """Answer many requests, `size` at a time: their forward passes are shared (`batch`).

        prompts     each as in `generate`
        seed        for sampled decoding; each request draws independently, as the problems of a task do in run.py
        generators  one per request, in place of a seed

        Every request gets the answer it would get alone, apart from rounding, and from a gate that learns from earlier
        requests, which may have seen others. An error of one request is returned as its answer and leaves the others
        alone; an error of all of them is raised: a wrong setting, or a defect that fails each of them. Other threads of
        this library wait for their turn at a model. Code that runs its Hugging Face module directly, such as
        `model.generate`, must not do so meanwhile.
        """
        start = time.perf_counter()
        options: dict[str, Any] = dict(size=size, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)
        answers = dict(self.stream_batch(prompts, seed=seed, generators=generators, **options))
        wall = time.perf_counter() - start
        return BatchResult(answers=tuple(answers[i] for i in range(len(prompts))), wall_s=wall)

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        size: int = 16,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Iterator[tuple[int, Result | ParsedecError]]:
        """As `generate_batch`, but yields (index, answer) of every request as soon as it is finished. A request that
        failed through a defect is held back until another one has succeeded."""
        limits = Limits(max_new_tokens=max_new_tokens, stop=stop)
        own = sampling or Sampling()
        batch = Batch(prompts=prompts, size=size, limits=limits, sampling=own, seed=seed, generators=generators)
        return batch.answers(self)

    def _answer(
        self,
        ids: list[int],
        drafter: Drafter | None,
        sampler: Sampler,
        limits: Limits,
        spelt: bool,
        top: int | None = None,
    ) -> Iterator[Delta]:
        answer, meter = Answer(self.target, limits), Meter(self.target.device, clock())
        layers = self.judge_needs.hidden_layers
        target = open_decoder(self.target, self.inner, sampler, Tally(), self.acceptance, layers)
        target.top = top
        if self.outer.prefill:
            with meter.span("prefill"):
                check_numbers(target.session.feed(ids), self.target.name)  # the span's end waits for it in any case
        else:
            target.session.tokens.extend(ids)
        work = Work(len(ids), target, drafter, answer, meter, self.history)
        text = StopText(TextStream(self.target), limits.stop)
        author = Author.TARGET
        try:
            for author, tokens in self.outer.run(work):
                meter.saw_token()
                if spelt:
                    shown, target.shown = tuple(target.shown[: len(tokens)]), []  # beyond the end nothing was written
                    piece = Delta(text=text.push(*tokens), tokens=tuple(tokens), author=author, shown=shown)
                    with meter.away():
                        yield piece
        except (TargetLost, TargetRefused) as failed:
            lost = isinstance(failed, TargetLost)
            answer.stop = StopReason.SERVER_LOST if lost else StopReason.SERVER_REFUSED
            failed.partial = self._result(ids, work)
            raise
        finally:  # an answer that its reader leaves early counts as far as it got
            self.history.add_answer(len(answer.tokens))
        yield Delta(text=text.rest(answer.text), tokens=(), author=author, result=self._result(ids, work))

    def _result(self, ids: list[int], work: Work) -> Result:
        times = work.meter.times()
        drafting = work.drafter.decoder.session if work.drafter else None
        counters = work.target.tally.counters(
            target_calls=work.target.session.calls,
            target_rows=work.target.session.rows,
            draft_calls=drafting.calls if drafting else 0,
            draft_rows=drafting.rows if drafting else 0,
        )
        assert work.answer.stop is not None
        paths = [r.judge_path for r in work.rounds if r.judge_path]
        return Result(
            text=work.answer.text,
            tokens=tuple(work.answer.tokens),
            prompt_tokens=len(ids),
            stop=work.answer.stop,
            spans=work.answer.spans(),
            rounds=tuple(work.rounds),
            counters=counters,
            times=times,
            judge_path=paths[0] if paths else None,
            notes=tuple(
                sorted(work.notes | work.target.notes | (work.drafter.decoder.notes if work.drafter else set()))
            ),
        )

    def open_drafter(self, prompt: Prompt, ids: list[int], sampler: Sampler, limits: Limits) -> Drafter | None:
        """A drafter for one request; None if the outer level uses none. `ids`: the prompt in target tokens."""
        own = self._draft_ids(prompt, ids)
        if own is None or self.draft is None or self.draft_inner is None:
            return None
        recorded = self.judge_needs.draft_logprobs
        return Drafter(self.draft, self.target, self.draft_inner, sampler, own, limits.stop, self.acceptance, recorded)

    def read(self, prompt: Prompt) -> ReadPrompt:
        """The prompt in both models' tokens, which may be given in its place. Long prompts take seconds to encode, so
        this may run in another thread than the answers. Raises as `generate` does."""
        ids = self.target_ids(prompt)
        return ReadPrompt(ids, self._draft_ids(prompt, ids))

    def _draft_ids(self, prompt: Prompt, ids: list[int]) -> list[int] | None:
        """The prompt in the draft model's tokens; None if the outer level uses none. `ids`: it in the target's."""
        if not self.outer.needs_draft or self.draft is None:
            return None
        if isinstance(prompt, ReadPrompt):
            return prompt.draft
        shared = self.target.same_vocabulary(self.draft)
        if token_ids(prompt):
            if not shared:
                raise PromptError(
                    f"the prompt is given as token ids of {self.target.name}, but {self.draft.name} has "
                    "another vocabulary. Give text or messages, or use outer=none."
                )
            return ids
        if shared and not self.draft.has_template:
            return ids  # the draft is a base model, which can read the target's own prompt
        return read_prompt(self.draft, prompt)

    def write_draft(self, prompt: Prompt, ids: list[int], sampler: Sampler, limits: Limits) -> Draft:
        """The first draft of a request as the outer level asks for it, not judged. `ids` as in `open_drafter`.

        Raises IncompatibleStack for an outer level that drafts no whole answers, and PromptError if the prompt leaves
        no room for a draft.
        """
        drafter = self.open_drafter(prompt, ids, sampler, limits)
        if drafter is None or not isinstance(self.outer, DraftVerification):
            raise IncompatibleStack(
                f"{type(self.outer).__name__} asks for no draft of an answer; expected outer=parse or parse_streamed."
            )
        check_length(drafter.model, drafter.prompt)
        limit = self.outer.draft_limit(limits.max_new_tokens, self.target.context_limit - len(ids))
        if limit < 1:
            raise PromptError(
                f"the prompt of {len(ids)} tokens leaves no room for a draft and its judge in the context of "
                f"{self.target.name}, {self.target.context_limit} tokens. Shorten it."
            )
        return drafter.write(Answer(self.target, limits), limit)

    def target_ids(self, prompt: Prompt) -> list[int]:
        """The prompt in the target's tokens, as a request reads it. Raises PromptError if it cannot be run."""
        if isinstance(prompt, ReadPrompt):
            return prompt.target
        ids = token_ids(prompt) or read_prompt(self.target, prompt)
        wrong = [i for i in ids if not 0 <= i < self.target.vocab_size]
        if wrong:
            raise PromptError(
                f"prompt ids {wrong[:5]} are outside the vocabulary of {self.target.name} (0 to "
                f"{self.target.vocab_size - 1}). Were they made by another tokenizer?"
            )
        check_length(self.target, ids)
        return ids
