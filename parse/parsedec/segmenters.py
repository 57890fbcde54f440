"""Where a draft may be cut. A segmenter proposes ends of segments; the rules below turn them into usable cuts.

`min_tokens` and `max_tokens` bound a segment's length, `max_cuts` the number of probes: surplus cuts are thinned
evenly, since the first error may be anywhere. The last cut is always the end of the draft. Where the three bounds
conflict, `max_cuts` wins over `max_tokens`, and `max_tokens` over `min_tokens`. Any other cut inside a character that
spans several tokens moves behind the character, since models with different vocabularies exchange text.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from parsedec.errors import ConfigError, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.text.spelling import Draft, GrowingDraft


@dataclass(frozen=True, kw_only=True)
class Segmenter(ABC):
    """Base of all segmenters; to write your own, derive a class and define `ends`."""

    min_tokens: int = 1
    max_tokens: int | None = None
    max_cuts: int = 32

    def __post_init__(self) -> None:
        require_number("segmenter.min_tokens", self.min_tokens, whole=True, low=1)
        require_number("segmenter.max_cuts", self.max_cuts, whole=True, low=1)
        if self.max_tokens is not None:
            require_number("segmenter.max_tokens", self.max_tokens, whole=True, low=1)
            if self.max_tokens < self.min_tokens:
                raise ConfigError(
                    f"segmenter has min_tokens={self.min_tokens}, max_tokens={self.max_tokens}; expected min_tokens <= "
                    "max_tokens, or max_tokens=null for no bound."
                )

    @abstractmethod
    def ends(self, draft: Draft) -> Iterable[int]:
        """Ascending token positions at which segments end; the end of the draft may be left out."""

    def cuts(self, draft: Draft, *, thinned: bool = True) -> list[int]:
        """Strictly ascending positions in 1..N, the last one N; none for an empty draft. If not `thinned`, `max_cuts`
        is ignored."""
        total = len(draft.tokens)
        cuts = [*self._behind_characters(self._ends(draft), draft), total] if total else []
        if thinned and len(cuts) > self.max_cuts:
            # cut j of max_cuts sits at the fraction (j + 1) / max_cuts of the list, rounded up: the last stays last
            cuts = [cuts[-(-len(cuts) * (j + 1) // self.max_cuts) - 1] for j in range(self.max_cuts)]
        return cuts

    def sure_cuts(self, draft: Draft) -> list[int]:
        """The cuts that a draft still being written will have however it goes on; its present end is never one.

        A segment's end is sure once `min_tokens` tokens follow it, and so are the cuts that split such a segment. They
        are not thinned, since it is not known how many will come.
        """
        return self._behind_characters(self._ends(draft)[:-1], draft)

    def first_end(self, draft: Draft) -> int | None:
        """Position at which the first segment of a text still being written ends, or None."""
        return self._first(self.ends(draft), draft)

    def new_ends(self, growing: GrowingDraft, word: int) -> Iterable[int] | None:
        """The `ends` that the last token has added, and possibly older ones; None if a search from the beginning is
        needed. `word`: offset of the last word before that token."""
        return None

    def first_new_end(self, growing: GrowingDraft, word: int) -> int | None:
        """`first_end` of a text that had none before its last token; arguments as in `new_ends`."""
        ends = self.new_ends(growing, word) if type(self).first_end is Segmenter.first_end else None
        return self.first_end(growing.draft()) if ends is None else self._first(ends, growing)

    def _first(self, ends: Iterable[int], draft: Draft | GrowingDraft) -> int | None:
        total = len(draft.tokens)
        end = next((end for end in ends if self.min_tokens <= end), None)
        if end is None and self.max_tokens is not None and total >= self.max_tokens:
            end = self.max_tokens
        if end is not None:
            end = _behind_character(end, draft)
        return end if end is not None and end <= total else None

    def _ends(self, draft: Draft) -> list[int]:
        """Ends of segments of at least `min_tokens`; the last one is the end of the draft."""
        total, ends = len(draft.tokens), [0]
        if not total:
            return []
        for end in self.ends(draft):
            if end - ends[-1] >= self.min_tokens and total - end >= self.min_tokens:
                ends.append(end)
        return [*ends[1:], total]

    def _behind_characters(self, ends: list[int], draft: Draft) -> list[int]:
        """The cuts for segments with these ends, moved behind characters; the draft's own end is left out."""
        moved = {_behind_character(cut, draft) for cut in self._split_long(ends)}
        return sorted(cut for cut in moved if cut < len(draft.tokens))

    def _split_long(self, ends: list[int]) -> list[int]:
        """These ends, and those of the parts into which segments longer than `max_tokens` are split."""
        if self.max_tokens is None:
            return ends
        split: list[int] = []
        for start, end in pairwise([0, *ends]):
            parts = -(-(end - start) // self.max_tokens)
            split += [start + (end - start) * part // parts for part in range(1, parts + 1)]
        return split


def _behind_character(cut: int, draft: Draft | GrowingDraft) -> int:
    """The cut itself, or the first one behind the character that it stands in."""
    while cut in draft.inside:
        cut += 1
    return cut


@dataclass(frozen=True, kw_only=True)
class EveryTokens(Segmenter):
    """A cut every `delta` tokens: the paper's grid."""

    delta: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("segmenter.delta", self.delta, whole=True, low=1)

    def ends(self, draft: Draft) -> Iterable[int]:
        return self._grid(len(draft.tokens))

    def new_ends(self, growing: GrowingDraft, word: int) -> Iterable[int] | None:
        return self._grid(len(growing.tokens)) if type(self).ends is EveryTokens.ends else None

    def _grid(self, total: int) -> Iterable[int]:
        return range(self.delta, total + 1, self.delta)


@dataclass(frozen=True, kw_only=True)
class PatternSegmenter(Segmenter):
    """Segments end where `pattern` matches: at the end of group 1, or without groups at the start of the match."""

    pattern: str

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(f"segmenter.pattern={self.pattern!r} is not a regular expression: {error}.") from error

    def ends(self, draft: Draft) -> Iterable[int]:
        return self._matches(draft, 0)

    def new_ends(self, growing: GrowingDraft, word: int) -> Iterable[int] | None:
        known = self.pattern in BY_WORDS and type(self).ends is PatternSegmenter.ends
        return self._matches(growing, word) if known else None

    def _matches(self, draft: Draft | GrowingDraft, start: int) -> Iterator[int]:
        for match in re.compile(self.pattern).finditer(draft.text, start):  # lookbehinds still see text before `start`
            offset = match.end(1) if match.re.groups else match.start()
            if self._counts(draft.text, match) and draft.text[:offset].strip():
                yield draft.position(offset)

    def _counts(self, text: str, match: re.Match[str]) -> bool:
        """Whether a match in `text` ends a segment; for checks that a fixed-length lookbehind cannot make."""
        return True


@dataclass(frozen=True, kw_only=True)
class Lines(PatternSegmenter):
    """A segment is a line. The cut comes before the line break, so the judged text does not end in one."""

    pattern: str = r"(?<=\S)[^\S\n]*\n"  # matches "\r\n" as well


@dataclass(frozen=True, kw_only=True)
class Paragraphs(PatternSegmenter):
    """A segment is a paragraph or step: text up to a blank line."""

    pattern: str = r"(?<=\S)[^\S\n]*\n\s*\n"


@dataclass(frozen=True, kw_only=True)
class Sentences(PatternSegmenter):
    """A segment is a sentence: up to . ! ? and any closing quotes, brackets or emphasis, or up to the end of a line.

    A full stop after a single letter, between digits or after a list number ends nothing ("e. g.", "3.5", "1. Add").
    Ideographic stops count, together with the closing quotes, brackets and further stops after them.
    """

    pattern: str = (
        r"(?:(?:(?<!\b[^\W\d_])\.|[!?])[\"'”’»)\]*_]*(?=\s)"
        # a closing quote that is still to come would move the end, so the next character has to be known
        r"|[。！？]+[」』”’）】》]*(?=[^。！？」』”’）】》])"
        r"|(?<=\S)(?=[^\S\n]*\n))()"
    )

    def _counts(self, text: str, match: re.Match[str]) -> bool:
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        return not (match[0] == "." and line.strip().isdecimal())


@dataclass(frozen=True, kw_only=True)
class CodeStatements(Segmenter):
    """A segment is a statement of source code: up to a line end outside brackets, strings and continuations."""

    def ends(self, draft: Draft) -> Iterable[int]:
        for offset in statement_ends(draft.text):
            yield draft.position(offset)

    def new_ends(self, growing: GrowingDraft, word: int) -> Iterable[int] | None:
        """None of them without a new line end; with one, the text has to be read from the beginning."""
        return None if "\n" in growing.text[word:] or type(self).ends is not CodeStatements.ends else ()


# Patterns whose matches, where more text may complete them, begin in the last word or after it
BY_WORDS = {Lines.pattern, Paragraphs.pattern, Sentences.pattern}


class FirstSegment:
    """The first segment of a growing text: `push` returns, token by token, whether it is complete (`first_end`).

    The segmenters of this file look only at the last word and what is new, since a text without an end may be long.
    """

    def __init__(self, segmenter: Segmenter, model: LanguageModel) -> None:
        self.growing = GrowingDraft(model)
        self.complete = False
        self._segmenter = segmenter
        self._word = 0  # the offset at which the last word begins

    def push(self, token: int) -> bool:
        """Read one more token, unless the segment is already complete; returns whether it is complete now."""
        if not self.complete:
            self.growing.add(token)
            self.complete = self._segmenter.first_new_end(self.growing, self._word) is not None
            tail = self.growing.text[self._word :]
            if words := tail.split():
                self._word += tail.rindex(words[-1])
        return self.complete


def statement_ends(text: str) -> list[int]:
    """Offsets of line ends at which a statement is complete: brackets closed, no open string, no continuation.

    Comments, blank lines and code fences are not statements. Lines that open a block, and decorators, belong to what
    follows them. Written for Python, but close enough for other languages with the same brackets and quotes.
    """
    ends: list[int] = []
    depth, quote = 0, ""
    first = last = ""  # first and last significant characters of the statement being read
    i = 0
    while i < len(text):
        char = text[i]
        if quote:
            if char == "\\":
                i += 1
            elif text.startswith(quote, i) or (char == "\n" and len(quote) == 1):  # a line end closes an apostrophe
                i += len(quote) - 1 if char != "\n" else -1
                quote = ""
        elif char == "#" or (not first and text.startswith(("//", "```"), i)):
            i = (text.find("\n", i) if "\n" in text[i:] else len(text)) - 1
        elif char == "\n":
            if first and depth == 0 and first != "@" and last not in "\\:,":
                ends.append(i - text.startswith("\r\n", i - 1))
            if depth == 0 and last != "\\":
                first = last = ""
        elif not char.isspace():
            first, last = first or char, char
            depth = max(0, depth + (char in "([{") - (char in ")]}"))
            if char in "\"'":
                quote = char * 3 if text.startswith(char * 3, i) else char
                i += len(quote) - 1
        i += 1
    return ends
