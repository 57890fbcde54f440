"""The outer draft model at work: it writes whole answers, and follows the answer as the target leaves it."""

from __future__ import annotations

from collections.abc import Sequence

from parsedec.acceptance import Acceptance
from parsedec.answer import Answer
from parsedec.inner import Decoder, InnerSpeculator
from parsedec.meter import Tally
from parsedec.model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.text import Draft, carried, common_prefix
from parsedec.types import Author, Limits, StopReason


class Drafter:
    """One request in the draft model. Its own decoding may be sped up by an inner speculator as well.

    Pairs with different tokenizers meet in text: the draft's text is encoded for the target, the answer's for the
    draft model.
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
    ) -> None:
        self.model = model
        self.target = target
        self.prompt = list(prompt)
        self.stop = stop
        self.same_vocabulary = target.same_vocabulary(model)
        self.decoder = Decoder(model, inner, sampler, Tally(), acceptance)

    def write(self, answer: Answer, limit: int) -> Draft:
        """Go on from `answer` until the end token, a stop string or `limit` tokens; the draft in target tokens."""
        if not self._follow(answer):
            return Draft((), "", (), ended=False)
        before = self.decoder.session.tokens[len(self.prompt) :]
        own = Answer(self.model, Limits(max_new_tokens=limit, stop=self.stop))
        for _ in self.decoder.write(own, Author.DRAFT):
            pass
        ended = own.stop is StopReason.END_TOKEN
        tokens = own.tokens[:-1] if ended else own.tokens
        if not self.same_vocabulary:
            tokens = carried(self.model, before, tokens, self.target, answer.tokens)
        return Draft.of(self.target, tokens[:limit], ended and len(tokens) <= limit)

    def _follow(self, answer: Answer) -> bool:
        """Bring the draft model to the answer as it stands: keep the tokens it shares, read the others.

        False if prompt and answer fill its context, which may be shorter than the target's: it then drafts no more.
        """
        tokens = answer.tokens if self.same_vocabulary else self.model.encode(answer.text, plain=True)
        wanted = [*self.prompt, *tokens]
        if len(wanted) >= self.model.context_limit:
            return False
        session = self.decoder.session
        shared = common_prefix(session.tokens, wanted)
        if shared < session.length:
            self.decoder.rewind(shared)
        session.feed(wanted[shared:])
        return True
