"""Text that grows token by token, and answers that end: characters of several bytes, stop strings, authors."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import parsedec
from parsedec.answer import Answer
from parsedec.text.spelling import Draft, StopText, TextStream, common_prefix, token_ends
from parsedec.types import Author, Limits, StopReason

MODEL = parsedec.load("zoo:draft", device="cpu")  # its vocabulary spells any byte
END = MODEL.end_ids[0]
TEXTS = [
    "12 + 30 = 42.\nThe answer is 42.",
    "Grüße 🎉 aus Köln!",
    "naïve 👨‍👩‍👧 café",
    "日本語。テスト",
    "a\n\n  b\t",
    "🎉",
    "",
]

quick = settings(deadline=None, max_examples=150)
texts = st.text(st.sampled_from("ab1 .\nüß🎉語"), max_size=20)
ordinary = st.integers(7, MODEL.vocab_size - 1)  # special tokens have no text
any_tokens = st.lists(ordinary, max_size=20)


def answer_of(tokens, author=Author.TARGET, **limits):
    answer = Answer(MODEL, Limits(**limits))
    answer.extend(tokens, author)
    return answer


# --- where tokens end in the text ---


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_end_where_their_last_whole_character_does(text):
    tokens = MODEL.encode(text)
    spelled, ends = token_ends(MODEL, tokens)
    assert spelled == text
    assert ends == [len(MODEL.decode(tokens[: i + 1]).rstrip("\ufffd")) for i in range(len(tokens))]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_holds_back_half_a_character(text):
    stream = TextStream(MODEL)
    pushed = [stream.push(token) for token in MODEL.encode(text)]
    assert "".join(pushed) == text
    assert not any("\ufffd" in piece for piece in pushed)


def test_emoji_takes_four_tokens_and_appears_with_the_last():
    assert token_ends(MODEL, MODEL.encode("🎉")) == ("🎉", [0, 0, 0, 1])


@quick
@given(any_tokens)
def test_stream_of_any_tokens_spells_what_they_decode_to(tokens):
    """Bytes that form no character included: only an unfinished character at the very end may be missing."""
    text, ends = token_ends(MODEL, tokens)
    whole = MODEL.decode(tokens)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}
    assert ends == sorted(ends)


def test_special_tokens_add_no_text():
    tokens = [*MODEL.encode("a"), END, *MODEL.encode("b")]
    assert token_ends(MODEL, tokens) == ("ab", [1, 1, 2])


@quick
@given(st.lists(st.sampled_from(["<s>", "<x>", "▁", "▁a", "▁▁", "b", "\n"]), max_size=12))
def test_no_space_is_lost_behind_tokens_without_text(pieces):
    """As of SentencePiece vocabularies: their decoders drop a space at the beginning of what they are given."""
    vocabulary = ["<s>", "<x>", *"▁ab\n", "▁a", "▁▁"]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=[]))
    core.add_special_tokens(["<s>", "<x>"])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model = SimpleNamespace(decode=lambda ids: core.decode(list(ids), skip_special_tokens=True))
    tokens = [core.token_to_id(piece) for piece in pieces]
    assert token_ends(model, tokens)[0] == model.decode(tokens)


def test_draft_offsets_and_pieces():
    draft = Draft.of(MODEL, MODEL.encode("aü🎉b"), ended=True)
    assert (draft.text, draft.ends) == ("aü🎉b", (1, 1, 2, 2, 2, 2, 3, 4))
    assert [draft.position(offset) for offset in range(5)] == [1, 1, 3, 7, 8]
    assert (draft.piece(0, 3), draft.piece(3, 7), draft.piece(7, 8)) == ("aü", "🎉", "b")


@pytest.mark.parametrize(
    ("a", "b", "shared"), [([], [], 0), ([1], [], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)]
)
def test_common_prefix(a, b, shared):
    assert common_prefix(a, b) == common_prefix(b, a) == shared


# --- answers ---


def test_answer_ends_with_its_end_token():
    tokens = MODEL.encode("42.")
    answer = answer_of([*tokens, END, *tokens])
    assert answer.stop is StopReason.END_TOKEN
    assert answer.tokens == [*tokens, END]
    assert answer.text == "42."


def test_nothing_is_added_to_an_ended_answer():
    answer = answer_of([END])
    assert answer.extend(MODEL.encode("more"), Author.TARGET) == []
    assert answer.tokens == [END]


def test_extend_returns_what_it_took():
    answer = Answer(MODEL, Limits(max_new_tokens=4))
    tokens = MODEL.encode("abcdef")
    assert answer.extend(tokens[:3], Author.DRAFT) == tokens[:3]
    assert (answer.stop, answer.remaining) == (None, 1)
    assert answer.extend(tokens[3:], Author.TARGET) == tokens[3:4]
    assert (answer.stop, answer.remaining) == (StopReason.TOKEN_LIMIT, 0)


@pytest.mark.parametrize(
    ("last", "reason"), [(END, StopReason.END_TOKEN), (MODEL.encode("x")[0], StopReason.STOP_STRING)]
)
def test_end_within_the_last_token_allowed_is_no_limit(last, reason):
    answer = answer_of([*MODEL.encode("ab"), last], max_new_tokens=3, stop=("bx",))
    assert answer.stop is reason


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("x = 1\n\ny = 2\n", ("\n\n",), "x = 1"),
        ("The answer is 42. Question:", ("Question:",), "The answer is 42. "),
        ("one STOP two", ("nothing", "TOP"), "one S"),
        ("ab cd ef", ("cd", "b c"), "a"),
        ("x = 1 2 3", (" 2", "1 2", "2"), "x = "),  # the same token completes all three
        ("Grüße aus Köln", ("üße",), "Gr"),
        ("done 🎉 more", ("🎉",), "done "),
        ("done 🎉🎉🎉 more", ("🎉🎉🎉",), "done "),
        ("計算。答えは三です。次", ("答えは三です。",), "計算。"),
    ],
)
def test_stop_string_over_several_tokens(text, stop, kept):
    tokens = MODEL.encode(text)
    answer = answer_of(tokens, stop=stop)
    assert answer.stop is StopReason.STOP_STRING
    assert answer.text == kept
    so_far = [MODEL.decode(tokens[:n]) for n in range(len(tokens) + 1)]
    complete = next(n for n, text in enumerate(so_far) if any(s in text for s in stop))
    assert len(answer.tokens) == complete
    assert "".join(streamed(tokens, stop)[0]) == kept


def test_special_tokens_within_a_stop_string_do_not_hide_it():
    special = MODEL.tokenizer.convert_tokens_to_ids("<|verify|>")
    tokens = [token for c in "stop" for token in (*MODEL.encode(c), special, special)]
    assert answer_of(tokens, stop=("stop",)).stop is StopReason.STOP_STRING


@quick
@given(any_tokens, st.data())
def test_spans_spell_the_text_whoever_wrote_when(tokens, data):
    stop = data.draw(st.lists(texts.filter(bool), max_size=2))
    answer = Answer(MODEL, Limits(max_new_tokens=50, stop=tuple(stop)))
    expected = []  # (author, round) of every token
    for turn in range(data.draw(st.integers(0, 4))):
        answer.begin_round()
        for author in (Author.DRAFT, Author.TARGET):
            size = data.draw(st.integers(0, 6))
            taken = answer.extend(tokens[:size], author)
            tokens = tokens[size:]
            expected += [(author, turn)] * len(taken)
    spans = answer.spans()
    assert "".join(span.text for span in spans) == answer.text
    runs = [(author, len(list(run))) for (author, _), run in itertools.groupby(expected)]
    assert [(span.author, span.stop - span.start) for span in spans] == runs
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(len(answer.tokens)))


def test_span_texts():
    answer = Answer(MODEL, Limits(stop=("END",)))
    answer.begin_round()
    answer.extend(MODEL.encode("Hallo "), Author.DRAFT)
    answer.extend(MODEL.encode("Köln"), Author.TARGET)
    answer.begin_round()
    answer.extend(MODEL.encode(", wie"), Author.TARGET)
    answer.extend(MODEL.encode(" so? END"), Author.DRAFT)
    assert [(span.author, span.text) for span in answer.spans()] == [
        (Author.DRAFT, "Hallo "),
        (Author.TARGET, "Köln"),
        (Author.TARGET, ", wie"),
        (Author.DRAFT, " so? "),
    ]


# --- streaming with stop strings ---


def streamed(tokens, stop):
    """(pieces, answer): what a reader gets while the answer is written, and at its end."""
    answer, text = Answer(MODEL, Limits(max_new_tokens=1000, stop=stop)), StopText(TextStream(MODEL), stop)
    pieces = [text.push(token) for t in tokens for token in answer.extend([t], Author.TARGET)]
    return [*pieces, text.rest(answer.text)], answer


@quick
@given(st.one_of(texts.map(MODEL.encode), any_tokens), st.lists(texts.filter(bool), max_size=3))
def test_streamed_pieces_and_rest_are_the_answer(tokens, stop):
    pieces, answer = streamed(tokens, tuple(stop))
    assert "".join(pieces) == answer.text
    assert not any(s in "".join(pieces) for s in stop)


@quick
@given(texts, st.data())
def test_stream_never_passes_a_stop_string_that_comes(text, data):
    assume(text)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    pieces, answer = streamed(MODEL.encode(text), (stop,))
    assert answer.stop is StopReason.STOP_STRING
    assert "".join(pieces) == text[: text.find(stop)]


def test_only_what_may_begin_a_stop_string_is_held():
    stream = StopText(TextStream(MODEL), ("\nQ:", "STOP"))
    tokens = [MODEL.encode(c)[0] for c in "a\nQ b STO c\n"]
    assert [stream.push(token) for token in tokens] == ["a", "", "", "\nQ ", "b", " ", "", "", "", "STO ", "c", ""]
    assert stream.rest("a\nQ b STO c\n") == "\n"


def test_without_stop_strings_nothing_is_held():
    stream = StopText(TextStream(MODEL), ())
    assert [stream.push(token) for token in map(lambda c: MODEL.encode(c)[0], "ab\n")] == ["a", "b", "\n"]
