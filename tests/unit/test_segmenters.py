"""Where drafts are cut: each segmenter on texts as models write them, and what holds for any text."""

import argparse
import inspect
import io
import itertools
import textwrap
import tokenize
from time import process_time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsedec.errors import ConfigError
from parsedec.segmenters import (
    CodeStatements,
    EveryTokens,
    FirstSegment,
    Lines,
    Paragraphs,
    PatternSegmenter,
    Sentences,
    statement_ends,
)
from parsedec.text.spelling import Draft

CHARACTERS = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
BYTES = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))
EVERY = [Lines, Paragraphs, Sentences, CodeStatements, EveryTokens]


def characters(text):
    """A draft with one token a character, so that cuts are text offsets."""
    return Draft.of(CHARACTERS, [ord(c) for c in text], ended=True)


def words(*pieces):
    """A draft of tokens that spell `pieces`."""
    model = SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids))
    return Draft.of(model, range(len(pieces)), ended=True)


def pieces(segmenter, text):
    """The segments' texts."""
    draft = characters(text)
    cuts = segmenter.cuts(draft)
    return [draft.piece(start, stop) for start, stop in itertools.pairwise([0, *cuts])]


# --- segmenters on real-looking text ---


def test_lines():
    text = "12 + 30 = 42.\n\n  So, 42 - 7 = 35.  \nThe answer is 35."
    assert pieces(Lines(), text) == ["12 + 30 = 42.", "\n\n  So, 42 - 7 = 35.", "  \nThe answer is 35."]


def test_cut_at_a_line_end_takes_the_token_that_holds_it():
    """The end of line 1 is in the middle of token 1: text up to it is complete after two tokens."""
    assert Lines().cuts(words("So 1", ".\nT", "hen", " 2.", "\n", "Done")) == [2, 4, 6]


def test_leading_blank_lines_are_no_segment():
    assert pieces(Lines(), "\n\n \nFirst.\nSecond.") == ["\n\n \nFirst.", "\nSecond."]


def test_paragraphs():
    text = "Step 1: add.\nIt gives 42.\n\nStep 2: subtract.\n \nAnswer: 35"
    assert pieces(Paragraphs(), text) == ["Step 1: add.\nIt gives 42.", "\n\nStep 2: subtract.", "\n \nAnswer: 35"]


def test_sentences():
    text = 'He said "Go!" She asked: "Why?" (It rained.) Then they left.\nThe end'
    assert pieces(Sentences(), text) == [
        'He said "Go!"', ' She asked: "Why?"', " (It rained.)", " Then they left.", "\nThe end"]  # fmt: skip


@pytest.mark.parametrize(
    "sentence",
    [
        "Pi is about 3.14 in base 10, and e is 2.72 there.",
        "Take a prime, e.g. 7 or i.e. an odd one, as the U.S. does.",
        "See parsedec.text or version 1.2.3 of it.",
        "It costs $4.50 per J. Smith.",
    ],
)
def test_decimals_and_abbreviations_end_no_sentence(sentence):
    assert pieces(Sentences(), f"{sentence} That is all.") == [sentence, " That is all."]


@pytest.mark.parametrize("sentence", ["So 2 + 3 = 5.", "That leaves Tom with 7.", "Is it larger than 9?"])
def test_sentence_may_end_with_a_single_digit(sentence):
    assert pieces(Sentences(), f"{sentence} Then add 1.") == [sentence, " Then add 1."]


@pytest.mark.parametrize("sentence", ["What is x?", "Was it I!"])
def test_only_a_full_stop_can_be_an_abbreviation(sentence):
    assert pieces(Sentences(), f"{sentence} Yes.") == [sentence, " Yes."]


def test_ideographic_sentences():
    assert pieces(Sentences(), "答えは三。次は四？はい！以上") == ["答えは三。", "次は四？", "はい！", "以上"]
    assert pieces(Sentences(), "「本当？！」はい。以上") == ["「本当？！」", "はい。", "以上"]


def test_the_number_of_a_lists_item_is_no_sentence():
    text = "1. Add 2. Go on.\n  12. That gives 3. Stop.\n7.\n"
    assert pieces(Sentences(), text) == [
        "1. Add 2.", " Go on.", "\n  12. That gives 3.", " Stop.", "\n7.", "\n"]  # fmt: skip


@pytest.mark.parametrize("sentence", ["It is **three.**", "She said “three.”", "(_It is three._)", "«Trois.»"])
def test_what_closes_with_a_sentence_belongs_to_it(sentence):
    assert pieces(Sentences(), f"{sentence} Then four.") == [sentence, " Then four."]


LINE_BREAKS = pytest.mark.parametrize("line_break", ["\r\n", " \r\n", "\xa0\n", "\u3000\n"], ids=ascii)


@LINE_BREAKS
@pytest.mark.parametrize("segmenter", [Lines(), Sentences(), CodeStatements()], ids=lambda s: type(s).__name__)
def test_every_kind_of_line_end(segmenter, line_break):
    cuts = pieces(segmenter, f"a = 1{line_break}b = 2{line_break}c")
    assert [piece.strip() for piece in cuts] == ["a = 1", "b = 2", "c"]
    assert not any("\r" in piece.lstrip() for piece in cuts), "no judged text ends in half a line break"


@LINE_BREAKS
def test_every_kind_of_blank_line(line_break):
    text = f"a{line_break}b{line_break * 2}c"
    assert pieces(Paragraphs(), text) == [f"a{line_break}b", f"{line_break * 2}c"]


PYTHON = '''\
import os
from math import (
    pi,
    tau,
)

# the radius, in metres
@cache
def area(radius: float) -> float:
    """The area.

    Of a disc: pi (r)^2.
    """
    if radius < 0:
        raise ValueError(f"radius {radius!r} < 0")  # not 0 itself
    values = [radius,
              {"a": 1}["a"]]
    total = pi * \\
        radius**2
    return total


print("don't", area(2.0))
'''
STATEMENTS = [
    "import os",
    "\nfrom math import (\n    pi,\n    tau,\n)",
    '\n\n# the radius, in metres\n@cache\ndef area(radius: float) -> float:\n    """The area.\n\n'
    '    Of a disc: pi (r)^2.\n    """',
    '\n    if radius < 0:\n        raise ValueError(f"radius {radius!r} < 0")  # not 0 itself',
    '\n    values = [radius,\n              {"a": 1}["a"]]',
    "\n    total = pi * \\\n        radius**2",
    "\n    return total",
    '\n\n\nprint("don\'t", area(2.0))',
    "\n",
]


def test_code_statements():
    assert pieces(CodeStatements(), PYTHON) == STATEMENTS


@pytest.mark.parametrize(
    ("code", "statements"),
    [
        pytest.param("x = 1  # note:\ny = 2", ["x = 1  # note:", "\ny = 2"], id="comment ending in a colon"),
        pytest.param("if x:  # why\n    y = 2\nz", ["if x:  # why\n    y = 2", "\nz"], id="comment behind a colon"),
        pytest.param(
            's = """\n# title"""\nx = 1', ['s = """\n# title"""', "\nx = 1"], id="string that looks like a comment"
        ),
        pytest.param("@f(\n    1,\n)\ndef g(): ...\nx", ["@f(\n    1,\n)\ndef g(): ...", "\nx"], id="long decorator"),
        pytest.param("// don't\nx = 1;\ny = 2;", ["// don't\nx = 1;", "\ny = 2;"], id="apostrophe in a // comment"),
        pytest.param("x = 'a#b'\ny = 2", ["x = 'a#b'", "\ny = 2"], id="hash in a string"),
        pytest.param("x = '\\''\ny = 2", ["x = '\\''", "\ny = 2"], id="escaped quote"),
        pytest.param("x = f(')')\ny = 2", ["x = f(')')", "\ny = 2"], id="bracket in a string"),
        pytest.param("def f(\n    a,\n):\n    return a\nx", ["def f(\n    a,\n):\n    return a", "\nx"], id="long def"),
        pytest.param('x = """a\n(\n"""\ny = 2', ['x = """a\n(\n"""', "\ny = 2"], id="bracket in a long string"),
    ],
)
def test_code_that_is_easy_to_misread(code, statements):
    assert pieces(CodeStatements(), code) == statements


@pytest.mark.parametrize("module", [argparse, inspect, textwrap, tokenize], ids=lambda m: m.__name__)
def test_no_cut_inside_a_statement_of_the_standard_library(module):
    """Python's own tokenizer knows where logical lines end; every cut must be there."""
    source = inspect.getsource(module)
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    logical = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            logical.add(starts[token.start[0] - 1] + token.start[1])
    commented = {source.index("\n", end) for end in logical if "\n" in source[end:]}  # behind a comment on the line
    ends = statement_ends(source)
    assert set(ends) - commented == set()
    assert len(ends) > 0.5 * len(logical)


def test_every_tokens():
    assert EveryTokens(delta=4).cuts(characters("x" * 12)) == [4, 8, 12]
    assert EveryTokens(delta=5).cuts(characters("x" * 12)) == [5, 10, 12]
    assert EveryTokens(delta=50).cuts(characters("x" * 12)) == [12]


def test_first_end_of_a_text_still_being_written():
    assert Lines().first_end(characters("So far no line end")) is None
    assert Lines().first_end(characters("One.\nTwo.\nThr")) == 4
    assert Lines(min_tokens=6).first_end(characters("One.\nTwo.\nThr")) == 9


class Own(Lines):
    """A segmenter somebody made of ours."""

    def ends(self, draft):
        return [i + 1 for i, end in enumerate(draft.ends) if draft.text[:end].endswith(";")]


GROWING = [
    *(kind(min_tokens=least) for kind in EVERY for least in (1, 5)),
    *(kind(max_tokens=9) for kind in EVERY),
    EveryTokens(delta=4, min_tokens=6),
    PatternSegmenter(pattern=r"[ab].*;", min_tokens=3),  # begins far before the character that completes it
    Lines(pattern=";"),
    Own(min_tokens=2),
]
PIECES = [*" \n\ta!\";。」()'#:\\", " \n", "\n\n", "\r\n", "b.", ". ", " a", "1.", "3.5", '")']


@pytest.mark.parametrize("segmenter", GROWING, ids=repr)
@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(range(len(PIECES))), max_size=30))
def test_a_growing_texts_first_segment_is_that_of_the_whole_text(segmenter, tokens):
    model = SimpleNamespace(decode=lambda ids: "".join(PIECES[i] for i in ids))
    segment, complete = FirstSegment(segmenter, model), False
    for n, token in enumerate(tokens, 1):
        complete = complete or segmenter.first_end(Draft.of(model, tokens[:n], ended=False)) is not None
        assert segment.push(token) is segment.complete is complete
        if complete:
            assert len(segment.growing.tokens) <= n
            return
    assert segment.growing.tokens == tokens


def test_half_characters_complete_nothing():
    for text in ("Ende 🎉。 Mehr", "é\nè"):
        segmenter, tokens = Sentences(), text.encode()
        segment = FirstSegment(segmenter, BYTES)
        said = [segment.push(token) for token in tokens]
        first = [segmenter.first_end(Draft.of(BYTES, tokens[:n], False)) for n in range(1, len(tokens) + 1)]
        assert said.index(True) == next(i for i, end in enumerate(first) if end is not None)


@pytest.mark.parametrize("segmenter", [Lines(), Paragraphs(), Sentences(), CodeStatements(), EveryTokens(delta=10**9)])
def test_a_long_text_without_an_end_is_read_once(segmenter):
    """Four times as long a text takes four times as long; read anew at every token it would be sixteen."""

    def seconds(count):
        segment, start = FirstSegment(segmenter, SimpleNamespace(decode=lambda ids: " word" * len(ids))), process_time()
        assert not any(segment.push(i) for i in range(count))
        return process_time() - start

    long, short = zip(
        *((seconds(12_000), seconds(3_000)) for _ in range(7)), strict=True
    )  # in turn: a machine's pace drifts
    assert min(long) < 8 * min(short)


@pytest.mark.parametrize("segmenter", EVERY)
def test_empty_draft_has_no_cuts(segmenter):
    assert segmenter().cuts(Draft((), "", (), False)) == []


# --- minima, maxima, thinning ---


def test_short_segments_join_the_next_and_a_short_rest_the_last():
    assert EveryTokens(delta=2, min_tokens=5).cuts(characters("x" * 20)) == [6, 12, 20]
    assert pieces(Lines(min_tokens=4), "ab\ncd\nefghi\nj") == ["ab\ncd", "\nefghi\nj"]


def test_long_segments_are_split_evenly():
    assert EveryTokens(delta=100, max_tokens=4).cuts(characters("x" * 10)) == [3, 6, 10]
    assert pieces(Lines(max_tokens=6), "0123456789\nab") == ["01234", "56789", "\nab"]


def test_too_many_cuts_are_spread_evenly_over_the_draft():
    cuts = EveryTokens(delta=1, max_cuts=4).cuts(characters("x" * 10))
    gaps = [b - a for a, b in itertools.pairwise([0, *cuts])]
    assert len(cuts) == 4
    assert cuts[-1] == 10
    assert max(gaps) - min(gaps) <= 1
    assert Lines(max_cuts=1).cuts(characters("a\nb\nc")) == [5]


@pytest.mark.parametrize(
    "wrong", [{"min_tokens": 0}, {"max_cuts": 0}, {"min_tokens": 5, "max_tokens": 4}, {"max_tokens": 0}], ids=str
)
@pytest.mark.parametrize("segmenter", [Lines, EveryTokens])
def test_impossible_lengths_are_refused(segmenter, wrong):
    with pytest.raises(ConfigError, match=next(reversed(wrong))):
        segmenter(**wrong)


def test_grid_needs_a_step():
    with pytest.raises(ConfigError, match="delta=0"):
        EveryTokens(delta=0)


# --- any text, any settings ---

texts = st.text(st.sampled_from("ab1 .!?\n\n\t#'\"()[]{}:,\\@`/。é🎉"), max_size=80)


@st.composite
def segmenters(draw):
    low = draw(st.integers(1, 6))
    settings = dict(min_tokens=low, max_cuts=draw(st.integers(1, 9)))
    if draw(st.booleans()):
        settings["max_tokens"] = low + draw(st.integers(0, 12))
    kind = draw(st.sampled_from(EVERY))
    return kind(**settings, **({"delta": draw(st.integers(1, 9))} if kind is EveryTokens else {}))


@settings(deadline=None, max_examples=400)
@given(segmenters(), texts, st.sampled_from([CHARACTERS, BYTES]))
def test_cuts_are_usable_whatever_the_text(segmenter, text, model):
    tokens = [ord(c) for c in text] if model is CHARACTERS else list(text.encode())
    cuts = segmenter.cuts(Draft.of(model, tokens, ended=False))
    assert cuts == sorted(set(cuts))
    assert set(cuts) <= set(range(1, len(tokens) + 1))
    assert cuts[-1:] == ([len(tokens)] if tokens else [])
    assert len(cuts) <= segmenter.max_cuts


@settings(deadline=None, max_examples=300)
@given(segmenters(), texts)
def test_no_cut_splits_a_character(segmenter, text):
    """Neither of a draft nor where the target hands back: the other model may read text alone."""
    tokens = list(text.encode())
    drafts = [Draft.of(BYTES, tokens[:n], ended=False) for n in range(len(tokens) + 1)]
    ends = [end for draft in drafts if (end := segmenter.first_end(draft)) is not None]
    for cut in {*segmenter.cuts(drafts[-1]), *segmenter.sure_cuts(drafts[-1]), *ends}:
        assert text.startswith(bytes(tokens[:cut]).decode())  # an error for half a character


def test_a_cut_inside_a_character_stands_behind_it():
    draft = Draft.of(BYTES, list("aé🎉b".encode()), ended=False)  # 1, 2, 4 and 1 tokens
    assert sorted(draft.inside) == [2, 4, 5, 6]
    assert EveryTokens(delta=2).cuts(draft) == [3, 7, 8]
    assert EveryTokens(delta=2).first_end(draft) == Lines(max_tokens=2).first_end(draft) == 3
    assert EveryTokens(delta=2).first_end(draft.part(0, 2)) is None
    assert EveryTokens(delta=2).cuts(draft.part(0, 5)) == [3, 5], "the end of the draft is one, wherever it is"
    assert EveryTokens(delta=2).cuts(draft.part(3, 8)) == [4, 5]


@settings(deadline=None, max_examples=200)
@given(segmenters(), texts)
def test_lengths_are_kept_where_they_can_be(segmenter, text):
    """Without thinning: nothing longer than the maximum, nothing shorter than the minimum unless all of it is, or
    even splitting made it so."""
    wide = type(segmenter)(**{**vars(segmenter), "max_cuts": 1000})
    lengths = [b - a for a, b in itertools.pairwise([0, *wide.cuts(characters(text))])]
    if wide.max_tokens is not None:
        assert max(lengths, default=0) <= wide.max_tokens
    elif len(lengths) > 1:
        assert min(lengths) >= wide.min_tokens
