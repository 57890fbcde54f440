"""The outer draft model at work: it writes whole answers, and follows the answer as the target leaves it."""

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
    """One request in the draft model. Its own decoding may be sped up by an inner speculator as well.

    Pairs with different tokenizers meet in text: the draft's text is encoded for the target, the answer's for the
    draft model.

    Every draft is sampled from a generator of its own, seeded by the request's when the draft begins. So the rest of
    the request does not depend on how far a draft had come when it was stopped.
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
        """`logprobs`: its drafts hold the log-probabilities of their tokens; for models of one vocabulary, not on a
        server."""
        self.model = model
        self.target = target
        self.prompt = list(prompt)
        self.stop = stop
        self.same_vocabulary = target.same_vocabulary(model)
        # in one vocabulary both models' end tokens end a draft, but only the target's own close its answer; a padded
        # id that the target has no row for ends it, too
        padded = range(target.vocab_size, model.vocab_size)
        ends = (*model.end_ids, *target.end_ids, *padded) if self.same_vocabulary else model.end_ids
        self.writer = model.ending_with(tuple(dict.fromkeys(ends)))
        self._requests = sampler
        self.sampler = sampler.apart()
        self.decoder = open_decoder(model, inner, self.sampler, Tally(), acceptance)
        self.logprobs = logprobs and not isinstance(model, RemoteModel)

    def write(self, answer: Answer, limit: int) -> Draft:
        """Go on from `answer` until the end token, a stop string or `limit` tokens; the draft in target tokens."""
        if not self._follow(answer):
            return NOTHING
        writing = Writing(self, answer, limit)
        while writing.step():
            pass
        tokens, ended = writing.tokens()
        return replace(Draft.of(self.target, tokens, ended), logprobs=writing.logprobs(len(tokens)))

    def begin(self, answer: Answer, limit: int) -> Writing | None:
        """As `write`, but to be taken a step at a time; None where nothing can be drafted."""
        return Writing(self, answer, limit) if self._follow(answer) else None

    def reseed(self) -> None:
        """A draft begins."""
        self.sampler.start_from(self._requests)

    def _follow(self, answer: Answer) -> bool:
        """Bring the draft model to the answer as it stands: keep the tokens it shares, read the others.

        False if prompt and answer fill its context, which may be shorter than the target's: it then drafts no more.
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
    """A draft being written. What is not wanted any more is simply not asked for.

    `step` reads and writes the draft model alone, never the target.
    """

    def __init__(self, drafter: Drafter, answer: Answer, limit: int) -> None:
        session = drafter.decoder.session
        self._drafter = drafter
        self._limit = limit
        self._before = session.tokens[len(drafter.prompt) :]  # the answer so far in the draft model's tokens
        self._after = list(answer.tokens)  # and in the target's, as it was when the draft began
        drafter.reseed()
        drafter.decoder.logprobs = [] if drafter.logprobs else None
        self._own = Answer(drafter.writer, Limits(max_new_tokens=limit, stop=drafter.stop))
        self._steps = drafter.decoder.write(self._own, Author.DRAFT)
        self._growing = GrowingDraft(drafter.target)

    def step(self) -> bool:
        """Write on; whether there is more to write. A step is a token, or what a speculator got right and one more."""
        wanted.check()
        next(self._steps, None)
        return self._own.stop is None

    @property
    def written(self) -> int:
        """Tokens written so far, in the draft model's vocabulary, its end token included."""
        return len(self._own.tokens)

    def tokens(self) -> tuple[list[int], bool]:
        """The draft so far in target tokens without its end token, and whether the draft model has closed it."""
        drafter, ended = self._drafter, self._own.stop is StopReason.END_TOKEN
        tokens = self._own.tokens[:-1] if ended else self._own.tokens
        if drafter.same_vocabulary:
            ended = ended and self._own.tokens[-1] in drafter.target.end_ids
        else:
            tokens = carried(drafter.model, self._before, tokens, drafter.target, self._after)
        return tokens[: self._limit], ended and len(tokens) <= self._limit

    def logprobs(self, n: int) -> tuple[float, ...] | None:
        """The draft model's log-probabilities of the first n tokens, if they are recorded."""
        known = self._drafter.decoder.logprobs
        return None if known is None else tuple(known[:n])

    def draft(self, *, final: bool = False) -> Draft:
        """The draft so far.

        final   no more will be asked for. Otherwise text from another vocabulary is without its last tokens: what the
                draft model writes next may still make other tokens of them.
        """
        tokens, ended = self.tokens()
        if not final and not self._drafter.same_vocabulary:
            tokens = tokens[: max(0, len(tokens) - UNSETTLED)]
        if tokens[: len(self._growing.tokens)] != self._growing.tokens:
            self._growing = GrowingDraft(self._drafter.target)
        for token in tokens[len(self._growing.tokens) :]:
            self._growing.add(token)
        return replace(self._growing.draft(), ended=ended, logprobs=self.logprobs(len(tokens)))
