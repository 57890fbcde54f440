"""Prompt lookup: matches as a plain search finds them, and refused drafts as a source."""

import random

import pytest

import tiny
from parsedec import Parse, Sampling
from parsedec.inner import Decoder, NotesRefused
from parsedec.meter import Tally
from parsedec.sampling import Sampler
from parsedec.types import Outcome, Seen
from parsedec_adapters.ngram import Ngram, _latest, _packed


def plainly(sources, end, length, longest, shortest):
    """What followed the latest earlier occurrence of the end of `end`, by looking at every place."""
    for n in range(min(longest, len(end) - 1), shortest - 1, -1):
        for source in sources:
            for at in range(len(source) - 1, n - 1, -1):
                if source[at - n : at] == end[-n:]:
                    return source[at : at + length]
    return []


@pytest.mark.parametrize("seed", range(5))
def test_matches_equal_a_plain_search(seed):
    rng = random.Random(seed)
    for _ in range(60):
        inner = Ngram(
            length=rng.randint(1, 5), longest=(longest := rng.randint(1, 4)), shortest=rng.randint(1, longest)
        )
        text = [rng.choice([3, 5, 3 << 8, 5 << 16, 70000]) for _ in range(rng.randint(2, 40))]
        state = inner.start(text[:1], Seen(), None)
        state = inner.commit(state, Outcome(tuple(text[1:]), Seen()))
        sources = [text]
        for _ in range(rng.randint(0, 2)):
            at, refused = rng.randint(1, len(text)), [rng.choice([3, 5, 3 << 8]) for _ in range(rng.randint(1, 9))]
            state = inner.note_refused(state, at, refused)
            sources.insert(0, text[:at][-inner.longest :] + refused)
        expected = plainly(sources, text, inner.length, inner.longest, inner.shortest)
        assert list(inner.propose(state, 9).tokens) == [text[-1], *expected]


def test_bytes_of_two_tokens_are_not_a_third():
    # 00 00 01 00 | 00 00 01 00: behind two bytes stands 01 00 00 00
    text = _packed([1 << 16, 1 << 16, 7])
    assert text.find(_packed([1])) == 2
    assert _latest(text, _packed([1])) is None


def test_a_refused_text_stays_noted_and_old_states_do_not_know_it():
    inner = Ngram(length=3, longest=3, shortest=1)
    old = inner.start([9, 8, 7], Seen(), None)
    new = inner.note_refused(old, 3, [20, 21, 22])
    assert inner.propose(old, 9).tokens == (7,)
    assert inner.propose(new, 9).tokens == (7, 20, 21, 22)
    gone_on = inner.commit(new, Outcome((30, 20), Seen()))
    assert inner.propose(gone_on, 9).tokens == (20, 21, 22)
    assert inner.propose(inner.rewind(gone_on, 2), 9).tokens == (8, 7, 20, 21)
    assert inner.propose(inner.note_refused(new, 3, [40]), 9).tokens == (7, 40)  # the latest first


def test_it_can_be_switched_off():
    inner = Ngram(shortest=1, refused=False)
    state = inner.start([9, 8, 7], Seen(), None)
    assert inner.note_refused(state, 3, [20, 21]) == state


def test_the_decoder_hands_refused_text_on(tiny_target):
    """Once, with its place - also before the speculator has a state - and not if that place was rewound away."""
    told = []

    class Listening(Ngram):
        def note_refused(self, state, at, tokens):
            told.append((at, tuple(tokens)))
            return state

    decoder = Decoder(tiny_target, Listening(), Sampler(Sampling()), Tally())
    assert isinstance(decoder.inner, NotesRefused)
    decoder.session.feed([9, 30, 12])
    decoder.note_refused([40, 41])
    decoder.note_refused([])
    for _ in range(3):
        decoder.step(9)
    assert told == [(3, (40, 41))]
    decoder.note_refused([50])
    decoder.rewind(2)
    decoder.step(9)
    assert told == [(3, (40, 41))]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_the_outer_level_refused_speeds_up_what_the_target_writes(family):
    """Every draft is refused although it is what the target writes: then looking it up gets nearly everything right."""
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)

    def result(refused):
        inner = Ngram(length=6, refused=refused)
        engine = Parse(model, tiny.model(family), inner=inner, judge=tiny.ScriptedJudge(value=0.0))
        return engine.generate(prompt, max_new_tokens=len(tokens))

    without, with_it = result(refused=False), result(refused=True)
    assert list(without.tokens) == list(with_it.tokens) == tokens
    assert with_it.rounds[0].kept_tokens == 0
    assert with_it.counters.inner_steps < 0.6 * without.counters.inner_steps
