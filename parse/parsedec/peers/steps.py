"""Steps of reasoning, for outer levels that work step by step: the draft model's next one, and the target's own.

A segmenter defines what a step is. The draft model's steps are cut before the line break that follows, as everywhere;
the target's end with the token that shows them to be complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parsedec.answer import Answer
from parsedec.drafter import NOTHING, Drafter, Writing
from parsedec.inner import Decoder
from parsedec.segmenters import FirstSegment, Segmenter
from parsedec.text.spelling import Draft
from parsedec.types import Author, Limits, StopReason


class DraftSteps:
    """The draft model's text, taken one step at a time. As long as its steps are kept, it simply writes on."""

    def __init__(self, drafter: Drafter, answer: Answer, segmenter: Segmenter) -> None:
        self._drafter = drafter
        self._answer = answer
        self._segmenter = segmenter
        self._writing: Writing | None = None
        self._taken: tuple[int, ...] = ()  # tokens of the steps taken so far from the text being written
        self._more = False

    def next(self, limit: int) -> Draft:
        """The next step after those taken since `restart`. Empty if there is none: the draft model has ended its
        answer, `limit` tokens are written, or nothing can be drafted.

        limit   most tokens of all steps until the next `restart`; used only by the first call after one
        """
        if self._writing is None:
            self._writing = self._drafter.begin(self._answer, limit)
            self._taken, self._more = (), True
        if self._writing is None:
            return NOTHING
        start = len(self._taken)
        while True:
            draft = self._writing.draft(final=not self._more)
            if draft.tokens[:start] != self._taken:  # from another vocabulary: what follows has changed its encoding
                return NOTHING
            rest = draft.part(start, len(draft.tokens))
            end = self._segmenter.first_end(rest)
            if end is not None or not self._more:
                step = rest.part(0, len(rest.tokens) if end is None else end)
                self._taken += step.tokens
                return step
            self._more = self._writing.step()

    def restart(self) -> None:
        """Let the next step follow the answer: what was taken has not been kept as it is."""
        self._writing = None


@dataclass(frozen=True, slots=True)
class OwnStep:
    """A step the target wrote: its tokens, including an end token; its text, without one; and whether it ends the
    answer."""

    tokens: tuple[int, ...]
    text: str
    ended: bool


class OwnWriting:
    """A step that the target is writing; takes its tokens one by one."""

    def __init__(self, answer: Answer, segmenter: Segmenter, limit: int) -> None:
        self.text = Answer(answer.model, Limits(max_new_tokens=limit, stop=answer.limits.stop))
        self._segment = FirstSegment(segmenter, answer.model)

    @property
    def complete(self) -> bool:
        return self._segment.complete

    @property
    def done(self) -> bool:
        return self.complete or self.text.stop is not None

    def push(self, token: int) -> None:
        """Read a token just written into `text`; tokens after the step are ignored."""
        self._segment.push(token)

    def step(self) -> OwnStep:
        tokens = tuple(self._segment.growing.tokens)
        ended = self.text.stop is StopReason.END_TOKEN and len(tokens) == len(self.text.tokens)
        return OwnStep(tokens, self.text.model.decode(tokens[:-1] if ended else tokens), ended)


def write_own(target: Decoder, answer: Answer, segmenter: Segmenter, limit: int) -> OwnStep:
    """Let the target write its next step after the committed tokens, with its inner speculator; `answer` is unchanged.

    The step has at most `limit` tokens (1 or more), and none if the context is full. It is committed in the target's
    session; tokens that an inner speculator commits beyond it are taken back.
    """
    base = target.session.length
    own = OwnWriting(answer, segmenter, limit)
    for tokens in target.write(own.text, Author.TARGET, whole=False):
        for token in tokens:
            own.push(token)
        if own.complete:
            break
    step = own.step()
    if target.session.length > base + len(step.tokens):
        target.rewind(base + len(step.tokens))
    return step


def joined(steps: list[Draft]) -> Iterator[int]:
    """The tokens of several steps, one after another."""
    for step in steps:
        yield from step.tokens
