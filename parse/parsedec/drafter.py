"""The outer draft model at work: it writes whole drafts, and reads the answer as the target leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from parsedec.acceptance import Acceptance
from parsedec.answer import Answer
from parsedec.batching import wanted
from parsedec.inner import InnerSpeculator
from parsedec.meter import Tally
from parsedec.models.language_model import LanguageModel
from parsedec.remote.model import RemoteModel
from parsedec.remote.stack import open_decoder
from parsedec.sampling import Sampler
from parsedec.text.spelling import UNSETTLED, Draft, GrowingDraft, carried, common_prefix
from parsedec.types import Author, Limits, StopReason

NOTHING = Draft((), "", (), ended=False)


class Drafter:
    """One request in the draft model, whose own decoding may use an inner speculator as well.

    Models with different tokenizers exchange text: the draft is encoded for the target, the answer for the draft model.

    Every draft is sampled from a generator of its own, which the request's seeds when the draft begins. So the rest of
    the request does not depend on how far a draft had got when it was stopped.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: LanguageModel,
        inner: InnerSpeculator,
        sampler: Sampler,
        prompt: Sequence[int],
        stop: Sequence[str],
        acceptance: Acceptance | None = None,
        logprobs: bool = False,
    ) -> None:
        """`logprobs`: whether drafts hold their tokens' log-probabilities; needs a shared vocabulary, and no server."""
        self.model = model
        self.target = target
        self.prompt = list(prompt)
        self.stop = stop
        self.same_vocabulary = target.same_vocabulary(model)
        # with a shared vocabulary, either model's end tokens end a draft, but only the target's complete it; a padded
        # id that the target has no row for ends the draft, too
        padded = range(target.vocab_size, model.vocab_size)
        ends = (*model.end_ids, *target.end_ids, *padded) if self.same_vocabulary else model.end_ids
        self.writer = model.ending_with(tuple(dict.fromkeys(ends)))
        self._requests = sampler
        self.sampler = sampler.apart()
        self.decoder = open_decoder(model, inner, self.sampler, Tally(), acceptance)
        self.logprobs = logprobs and not isinstance(model, RemoteModel)

    def write(self, answer: Answer, limit: int) -> Draft:
        """Continue `answer` up to an end token, a stop string or `limit` tokens; returns the draft in target tokens."""
        if not self._follow(answer):
            return NOTHING
        writing = Writing(self, answer, limit)
        while writing.step():
            pass
        tokens, ended = writing.tokens()
        return replace(Draft.of(self.target, tokens, ended), logprobs=writing.logprobs(len(tokens)))

    def begin(self, answer: Answer, limit: int) -> Writing | None:
        """As `write`, but one step at a time; None if nothing can be drafted."""
        return Writing(self, answer, limit) if self._follow(answer) else None

    def reseed(self) -> None:
        """Seed the generator of the draft that begins."""
        self.sampler.start_from(self._requests)

    def _follow(self, answer: Answer) -> bool:
        """Bring the draft model up to date with the answer: keep the tokens in common, and read the others.

        Returns False if prompt and answer fill its context, which may be shorter than the target's: no more is drafted.
        """
        tokens = answer.tokens if self.same_vocabulary else self.model.encode(answer.text, plain=True)
        wanted = [*self.prompt, *tokens]
        if self.same_vocabulary and self.target.vocab_size > self.model.vocab_size:
            wanted = self.model.readable(wanted)
        if len(wanted) >= self.model.context_limit:
            full = f"prompt and answer fill its context of {self.model.context_limit} tokens"
            self.decoder.notes.add(f"{self.model.name} drafted no more: {full}")
            return False
        session = self.decoder.session
        shared = common_prefix(session.tokens, wanted)
        if shared < session.length:
            self.decoder.rewind(shared)
        session.feed(wanted[shared:])
        return True


class Writing:
    """A draft being written. To stop it, simply call `step` no more.

    `step` touches only the draft model, never the target.
    """

    def __init__(self, drafter: Drafter, answer: Answer, limit: int) -> None:
        session = drafter.decoder.session
        self._drafter = drafter
        self._limit = limit
        self._before = session.tokens[len(drafter.prompt) :]  # the answer at the draft's beginning, in its own tokens
        self._after = list(answer.tokens)  # the same in the target's tokens
        drafter.reseed()
        drafter.decoder.logprobs = [] if drafter.logprobs else None
        self._own = Answer(drafter.writer, Limits(max_new_tokens=limit, stop=drafter.stop))
        self._steps = drafter.decoder.write(self._own, Author.DRAFT)
        self._growing = GrowingDraft(drafter.target)

    def step(self) -> bool:
        """Write one token, or a speculator's right guesses and one more; returns whether there is more to write."""
        wanted.check()
        next(self._steps, None)
        return self._own.stop is None

    @property
    def written(self) -> int:
        """Tokens written so far, in the draft model's vocabulary, its end token included."""
        return len(self._own.tokens)

    def tokens(self) -> tuple[list[int], bool]:
        """The draft so far in target tokens, without its end token, and whether the draft is complete."""
        drafter, ended = self._drafter, self._own.stop is StopReason.END_TOKEN
        tokens = self._own.tokens[:-1] if ended else self._own.tokens
        if drafter.same_vocabulary:
            ended = ended and self._own.tokens[-1] in drafter.target.end_ids
        else:
            tokens = carried(drafter.model, self._before, tokens, drafter.target, self._after)
        return tokens[: self._limit], ended and len(tokens) <= self._limit

    def logprobs(self, n: int) -> tuple[float, ...] | None:
        """The draft model's log-probabilities of the first n tokens; None if they are not recorded."""
        known = self._drafter.decoder.logprobs
        return None if known is None else tuple(known[:n])

    def draft(self, *, final: bool = False) -> Draft:
        """The draft so far.

        final   whether the draft is finished. If not, a draft from another vocabulary leaves out its last tokens: what
                the draft model writes next may still change how they are encoded.
        """
        tokens, ended = self.tokens()
        if not final and not self._drafter.same_vocabulary:
            tokens = tokens[: max(0, len(tokens) - UNSETTLED)]
        if tokens[: len(self._growing.tokens)] != self._growing.tokens:
            self._growing = GrowingDraft(self._drafter.target)
        for token in tokens[len(self._growing.tokens) :]:
            self._growing.add(token)
        return replace(self._growing.draft(), ended=ended, logprobs=self.logprobs(len(tokens)))
