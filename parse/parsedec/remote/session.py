"""A request in a model that is on a server: the committed tokens are here, everything else is a request over there.

There is no cache to keep: every request names all its tokens, and the server's prefix cache finds what it has read.
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

MOST_PROMPTS = 64  # in one request
NOTHING = -1e9  # log-probability of what counts as impossible; finite, since judges refuse scores that are no numbers
COUNTED = "target_calls and draft_calls are requests to servers; the rows they compute are not known and count as 0"


class RemoteSession(Session):
    """Tokens of one request, and the judge's questions about a draft that would follow them."""

    def __init__(self, model: RemoteModel) -> None:
        super().__init__(model)
        self.remote = model
        self.notes: set[str] = set()
        self._draft: list[int] | None = None  # judged, not committed

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Commit `tokens`. They are read over there with the next request; there are no logits here: [0]."""
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
        """Ask for the next token behind every probe: K prompts of one request, or one request each.

        The K prompts share prompt and draft, so with a prefix cache they are one prefill and K suffixes.

        wanted  ids whose logits are to be read, the one that speaks most for the draft first; the others are -inf. None
                at all: the draft is staged and nobody is asked. Where a server shows only its most probable tokens,
                `least` says what the others count as: a score is never higher than the right one.
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
        for row, shown in zip(logits, found, strict=False):  # nothing was found where nothing was wanted
            row[list(wanted)] = torch.tensor(self._logprobs(shown, wanted))
        return JudgeRows(logits, torch.empty(0), 0, JudgePath.REMOTE)

    def keep_draft(self, cut: int) -> None:
        """Commit the first `cut` tokens of the judged draft."""
        if self._draft is None or cut > len(self._draft):
            raise ValueError(f"keep_draft({cut}) needs a judged draft of at least so many tokens; call judge() first")
        self.tokens.extend(self._draft[:cut])
        self._draft = None

    def rewind(self, length: int) -> None:
        """Go back to the first `length` committed tokens."""
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
    """Log-probabilities of labels, the one that speaks most for the draft first, None where one is not known.

    An unknown one is at most `floor`. The labels stand for marks in equal steps, down to 0; their mean is least if the
    unknown marks below it have all they can, and those above it nothing.
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
    """Writes by streamed completions. A stream that breaks off is taken up again where it broke.

    A target that stays away raises TargetLost. A draft that cannot be finished ends where it is: what is there of it is
    judged, and the target goes on alone.
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
                # the target can go on at once: a draft is not worth a longer wait than one's own
                longest_s = LONGEST_WAIT_S if author is Author.DRAFT else LONGEST_ASKED_S
                wait = server.wait_after(error, waits, longest_s)
                if wait is not None:
                    pause(wait)
                elif author is Author.DRAFT:
                    if not isinstance(error, ServerRefused):  # what one request may not do, others may
                        server.note_lost()
                    self._give_up(answer, str(error))
                else:
                    raise _failed(self.model, error) from error

    def _stream(self, answer: Answer, author: Author) -> Iterator[list[int]]:
        """One completion behind the committed tokens; yields what became part of the answer."""
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
                over = finish not in (None, "length")  # whatever a server calls it: it has nothing to add
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
    """Why a completion of `new` tokens ended for its length, of which `came` arrived here; None: it is to go on.

    The server counts what it wrote, and fewer is its own limit. Tokens that it counts and does not show are the
    beginning of a character; asking on does not bring it if there is no room for its end.
    """
    if count is None:
        return StopReason.CONTEXT_LIMIT if came < (1 if way is TokensBack.TEXT else new) else None
    if count < new:
        return StopReason.CONTEXT_LIMIT
    return None if came else StopReason.TOKEN_LIMIT


def _failed(model: LanguageModel, error: ServerError) -> TargetLost | TargetRefused:
    """What becomes of a request whose target cannot go on, and will not come back in time."""
    where = "What was finished is in `partial`."
    if isinstance(error, ServerRefused):
        told = f"the target {model.name} did not take a request. {error} {where}"
        return TargetRefused(told, error.status, error.said)
    return TargetLost(f"the target {model.name} was lost in the middle of a request: {error} {where}")
