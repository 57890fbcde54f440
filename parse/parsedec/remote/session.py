"""One request in a model on a server: its committed tokens are kept here, and all work is done by HTTP requests.

There is no cache to manage: every HTTP request names all tokens, and the server's prefix cache knows what it has read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from parsedec.acceptance import Acceptance
from parsedec.answer import Answer
from parsedec.batching.wanted import pause
from parsedec.errors import IncompatibleStack, PromptError, ServerError, ServerRefused, TargetLost, TargetRefused
from parsedec.inner import Decoder, InnerSpeculator
from parsedec.meter import Tally
from parsedec.models.language_model import LanguageModel
from parsedec.remote import wire
from parsedec.remote.capabilities import Labels, TokensBack
from parsedec.remote.client import LONGEST_ASKED_S, LONGEST_WAIT_S
from parsedec.remote.model import RemoteModel
from parsedec.remote.reading import reader
from parsedec.sampling import Sampler
from parsedec.sessions.session import Session
from parsedec.sessions.staged import JudgeRows, check_cuts
from parsedec.types import Author, JudgePath, StopReason

MOST_PROMPTS = 64  # in one HTTP request
NOTHING = -1e9  # log-probability of the impossible; finite, since judges refuse scores that are not
COUNTED = "target_calls and draft_calls are requests to servers; the rows they compute are not known and count as 0"


class RemoteSession(Session):
    """The tokens of one request, and the judging of a draft that would follow them."""

    def __init__(self, model: RemoteModel) -> None:
        super().__init__(model)
        self.remote = model
        self.notes: set[str] = set()
        self._draft: list[int] | None = None  # judged, not committed

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Commit `tokens`. The server reads them with its next request. Returns an empty tensor: it gives no logits."""
        self._draft = None
        self._check_room(len(tokens))
        self.tokens.extend(tokens)
        return torch.empty(0)

    def judge(
        self,
        draft: Sequence[int],
        cuts: Sequence[int],
        suffix: Sequence[int],
        *,
        probes: Sequence[int] | None = None,
        path: JudgePath = JudgePath.REMOTE,
        wanted: Sequence[int] | None = None,
    ) -> JudgeRows:
        """Ask for the next token behind every probe, by K prompts in one HTTP request or by one request each.

        The K prompts share prompt and draft, so with a prefix cache they cost one prefill and K suffixes.

        wanted  ids whose logits the caller will read, the one in favour of the draft first; all others are -inf. If
                there are none, the draft is only staged. Where a server shows only its most probable tokens, `least`
                says what the others count as: a score is then never higher than the right one
        """
        if wanted is None:
            raise IncompatibleStack(
                f"this judge reads all logits, and {self.model.name} shows only some. Use judge=label, or engine=local."
            )
        if not self.tokens:
            raise PromptError("a draft was judged on an empty session; feed the prompt first.")
        probes = list(cuts if probes is None else probes)
        check_cuts(len(draft), cuts, probes)
        self._check_room(len(draft) + len(suffix))
        self._draft = list(draft)
        items = [[*draft[:cut], *suffix] for cut in probes] if wanted else []
        at_once = MOST_PROMPTS if self.remote.together else 1
        try:
            found = [f for i in range(0, len(items), at_once) for f in self._ask(items[i : i + at_once], wanted)]
        except ServerError as error:
            raise _failed(self.model, error) from error
        logits = torch.full((len(probes), self.model.vocab_size), -math.inf)  # [K, V]
        for row, shown in zip(logits, found, strict=False):  # `found` is empty if nothing was wanted
            row[list(wanted)] = torch.tensor(self._logprobs(shown, wanted))
        return JudgeRows(logits, torch.empty(0), 0, JudgePath.REMOTE)

    def keep_draft(self, cut: int) -> None:
        """Commit the first `cut` tokens of the judged draft."""
        if self._draft is None or cut > len(self._draft):
            raise ValueError(f"keep_draft({cut}) needs a judged draft of at least so many tokens; call judge() first")
        self.tokens.extend(self._draft[:cut])
        self._draft = None

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` committed tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"rewind({length}) on a session of {self.length} tokens; expected 0 to {self.length}")
        self._draft = None
        del self.tokens[length:]

    def _ask(self, items: list[list[int]], wanted: Sequence[int]) -> list[wire.Found]:
        server, can = self.remote.server, self.remote.can
        self.calls += 1
        if can.labels is Labels.SCORING:
            return wire.scored(server, can, self.tokens, items, wanted)
        prompts = [self.remote.prompt([*self.tokens, *item]) for item in items]
        return wire.labels(server, can, prompts, wanted)

    def _logprobs(self, shown: wire.Found, wanted: Sequence[int]) -> list[float]:
        found = [shown.of(token, self.remote.spellings(token)) for token in wanted]
        missing = [token for token, logprob in zip(wanted, found, strict=True) if logprob is None]
        if missing and self.remote.can.labels is not Labels.TOP:
            raise ServerError(f"{self.remote.server.url} did not show the labels {missing} that it was asked for.")
        if missing:
            most = f"the {self.remote.can.top} most probable tokens"
            self.notes.add(f"a label was not among {most}: scores are lower bounds")
        return least(found, shown.floor)


def least(found: Sequence[float | None], floor: float) -> list[float]:
    """Log-probabilities of labels, with the unknown ones (None) filled in so that the score is the lowest possible.

    found  of labels that stand for marks in equal steps down to 0, the one in favour of the draft first
    floor  an unknown one is at most this

    The mean mark is lowest if unknown marks below it have all the probability they can, and those above it none.
    """
    known = [(mark, logprob) for mark, logprob in enumerate(reversed(found)) if logprob is not None]
    top = max([floor, *(logprob for _, logprob in known)])
    mass = sum(math.exp(logprob - top) for _, logprob in known)
    total = sum(mark * math.exp(logprob - top) for mark, logprob in known)
    filled = []
    for mark, logprob in enumerate(reversed(found)):
        if logprob is None and (mark * mass < total or mass == 0):
            logprob = floor
            mass, total = mass + math.exp(floor - top), total + mark * math.exp(floor - top)
        filled.append(NOTHING if logprob is None else logprob)
    return filled[::-1]


class RemoteDecoder(Decoder):
    """Writes by streamed completions. A stream that breaks off is continued from where it broke.

    If the target stays unreachable, it raises TargetLost. A draft that cannot be finished ends where it is: what there
    is of it is judged, and the target goes on alone.
    """

    session: RemoteSession

    def __init__(
        self,
        model: RemoteModel,
        inner: InnerSpeculator,
        sampler: Sampler,
        tally: Tally,
        acceptance: Acceptance | None = None,
    ) -> None:
        super().__init__(model, inner, sampler, tally, acceptance, session=RemoteSession(model))
        self.model = model
        self.notes = self.session.notes
        self.notes |= {COUNTED, *model.can.workarounds}

    def write(self, answer: Answer, author: Author, *, whole: bool = True) -> Iterator[list[int]]:
        server = self.model.server
        if author is Author.DRAFT and server.resting:
            self._give_up(answer, "it was lost a short time ago")
        waits = server.waits()
        while answer.stop is None:
            if self.session.room <= 0:
                answer.stop = StopReason.CONTEXT_LIMIT
                return
            before = len(answer.tokens)
            try:
                yield from self._stream(answer, author)
            except ServerError as error:
                if len(answer.tokens) > before:
                    waits = server.waits()
                # the target can go on at once, so a draft is not worth a longer wait than our own back-off
                longest_s = LONGEST_WAIT_S if author is Author.DRAFT else LONGEST_ASKED_S
                wait = server.wait_after(error, waits, longest_s)
                if wait is not None:
                    pause(wait)
                elif author is Author.DRAFT:
                    if not isinstance(error, ServerRefused):  # a refusal concerns this request, not the server
                        server.note_lost()
                    self._give_up(answer, str(error))
                else:
                    raise _failed(self.model, error) from error

    def _stream(self, answer: Answer, author: Author) -> Iterator[list[int]]:
        """One completion behind the committed tokens. Yields what became part of the answer."""
        model, session, settings = self.model, self.session, self.sampler.settings
        seed = None
        if not self.sampler.greedy:
            assert self.sampler.generator is not None
            seed = int(torch.randint(1 << 31, (), generator=self.sampler.generator))
        new, came, finish = min(answer.remaining, session.room), 0, None
        session.calls += 1
        tokens_of, prompt = reader(model, session.tokens, self.notes), model.prompt(session.tokens)
        with closing(wire.stream(model.server, model.can, prompt, new, settings, seed)) as pieces:
            for piece in pieces:
                tokens, finish = tokens_of.push(piece), piece.finish
                over = finish not in (None, "length")  # whatever a server calls it, it has nothing to add
                if over and finish != "stop":
                    self.notes.add(f"{model.server.url} ended its text with finish_reason '{finish}', taken as its end")
                if over and model.end_token is not None:
                    tokens.append(model.end_token)  # not taken if the server had sent it already
                taken = answer.extend(tokens, author)
                session.tokens.extend(taken)
                came += len(taken)
                if taken:
                    yield taken
                if answer.stop is not None:
                    return
        if finish == "length":
            answer.stop = _limit(came, new, piece.count, self.model.can.tokens_back)
        elif finish is not None:  # of a model without an end token
            answer.stop = StopReason.END_TOKEN
        elif not came:
            raise ServerError(f"{model.server.url} ended a stream with neither text nor a reason.")

    def _give_up(self, answer: Answer, reason: str) -> None:
        answer.stop = StopReason.SERVER_LOST
        self.notes.add(f"the draft model did not finish a draft, and the target went on alone: {reason}")


def _limit(came: int, new: int, count: int | None, way: TokensBack) -> StopReason | None:
    """Why a completion that asked for `new` tokens, of which `came` arrived, ended by length; None: it can go on.

    `count` is how many the server says it wrote; if fewer than asked for, it has a limit of its own. Tokens that it
    counts but does not show begin a character, which does not come if there is no room for its end.
    """
    if count is None:
        return StopReason.CONTEXT_LIMIT if came < (1 if way is TokensBack.TEXT else new) else None
    if count < new:
        return StopReason.CONTEXT_LIMIT
    return None if came else StopReason.TOKEN_LIMIT


def _failed(model: LanguageModel, error: ServerError) -> TargetLost | TargetRefused:
    """The error that ends a request whose target cannot go on, and will not be back in time."""
    where = "What was finished is in `partial`."
    if isinstance(error, ServerRefused):
        told = f"the target {model.name} did not take a request. {error} {where}"
        return TargetRefused(told, error.status, error.said)
    return TargetLost(f"the target {model.name} was lost in the middle of a request: {error} {where}")
