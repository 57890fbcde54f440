"""Judging a draft while it is written decides what judging it when it is complete decides.

Oracle: `outer=parse`, request by request. Where the two may differ - outer=parse keeps a complete draft one of whose
prefixes had failed - a rule written down here (`Completed`) says what is to happen instead.
"""

import copy
import dataclasses
import functools
import random
import re
import string
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from parsedec import LabelJudge, Parse, PrefixVerification, StopReason, drafter, load, streamed
from parsedec.boundary import FirstFailure, LongestValid, Smoothed
from parsedec.errors import ConfigError, JudgeError
from parsedec.gate import Adaptive, Never
from parsedec.inner import Decoder
from parsedec.lanes import Beside
from parsedec.loop import Once, Rounds
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import request_generator
from parsedec.segmenters import EveryTokens, Lines
from parsedec.sessions.session import Session
from parsedec.streamed import ONE_MODEL, RECODED, StreamedVerification
from parsedec.types import Author, JudgePath, Sampling
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.ngram import Ngram
from parsedec_adapters.pard import Pard

NEW = 40
GRID = EveryTokens(delta=4)
RULE = FirstFailure(threshold=0.25, full_threshold=0.5)
NEVER_WHOLE = FirstFailure(threshold=0.25, full_threshold=1.0)
SEEDS = range(3)


# The outer level


@pytest.mark.parametrize(
    ("rule", "loop"),
    [
        (RULE, Once()),
        (RULE, Rounds(rounds=3)),
        (NEVER_WHOLE, Rounds(rounds=3)),
        (Smoothed(threshold=0.4, full_threshold=0.5), Once()),
    ],
    ids=str,
)
def test_streamed_is_fused(tiny_target, tiny_draft, rule, loop):
    """Under the rule of `Completed`; and that is outer=parse, word for word, unless it keeps what had failed."""
    differs, stopped = 0, 0
    for seed in SEEDS:
        plain = answer(tiny_target, tiny_draft, PrefixVerification, seed, boundary=rule, loop=loop)
        kept_a_failure = any(rule.keep(scores) < len(scores) for scores in kept_scores(plain))
        for chunk in (1, 32):
            fused = answer(tiny_target, tiny_draft, Completed, seed, chunk=chunk, boundary=rule, loop=loop)
            result = answer(tiny_target, tiny_draft, Streamed, seed, chunk=chunk, boundary=rule, loop=loop)
            assert_same(result, fused)
            assert result.tokens == plain.tokens or (kept_a_failure and chunk < 32)  # one pass is the fused pass
            differs += result.tokens != plain.tokens
            stopped += result.counters.draft_tokens < fused.counters.draft_tokens
    assert stopped >= 2
    assert (differs > 0) == (rule.full_threshold < 1), "the seeds should show where the two differ, and where not"


@pytest.mark.parametrize("family", ["gemma3", "lfm2", "mamba2"])
def test_every_family_reads_each_row_once(family):
    target, draft = tiny.model(family), tiny.model("llama", seed=5, layers=2)
    suffix = LabelJudge(question="?").bind(target).suffix_rows
    for seed in SEEDS:
        fused = answer(target, draft, Completed, seed, chunk=2)
        result = answer(target, draft, Streamed, seed, chunk=2)
        assert_same(result, fused)
        (done,) = result.rounds
        judged = sum(segment.score is not None for segment in done.segments)
        assert done.judge_rows == result.counters.judge_rows == done.judged_tokens + judged * suffix
        assert done.judge_path is (JudgePath.FORKED if family in tiny.FORKED else JudgePath.PACKED)
        own = max(0, done.target_tokens - 1)  # the first one comes from the judge's pass
        reread = sum(s.tokens for s in done.segments if s.kept) if target.recurrent else 0
        expected = result.prompt_tokens + done.judge_rows + own
        assert expected <= result.counters.target_rows <= expected + reread


@pytest.mark.parametrize(
    ("inner", "draft_inner"),
    [("draft_model", "none"), ("ngram", "none"), ("pard", "none"), ("none", "ngram"), ("draft_model", "draft_model")],
)
def test_every_inner_speculator_writes_the_same(inner, draft_inner):
    target, draft, small = (tiny.model("llama", seed=s, layers=n) for s, n in ((0, 4), (5, 2), (6, 1)))
    options = {
        name: {
            "none": None,
            "draft_model": DraftModel(length=3, model=small),
            "ngram": Ngram(),
            "pard": Pard(model=small, length=3, mask_token=4),
        }[chosen]
        for name, chosen in (("inner", inner), ("draft_inner", draft_inner))
    }
    for seed in SEEDS:
        fused = answer(target, draft, Completed, seed, loop=Rounds(rounds=2), engine=options)
        assert_same(answer(target, draft, Streamed, seed, loop=Rounds(rounds=2), engine=options), fused)


@pytest.mark.parametrize(("family", "loop"), [("llama", Once()), ("llama", Rounds(rounds=3)), ("mamba2", Once())])
def test_pairs_with_different_tokenizers(family, loop):
    target, draft = tiny.model(family), halves()
    assert not target.same_vocabulary(draft)
    kept = stopped = 0
    for seed in SEEDS:
        fused = answer(target, draft, Completed, seed, chunk=1, loop=loop, prompt="w1w2w3?w4")
        result = answer(target, draft, Streamed, seed, chunk=1, loop=loop, prompt="w1w2w3?w4")
        assert_same(result, fused)
        assert RECODED not in result.notes
        kept += result.counters.kept_draft_tokens
        stopped += result.counters.draft_tokens < fused.counters.draft_tokens
    assert kept > 8
    assert stopped > 0


def test_judged_text_is_never_encoded_anew(monkeypatch):
    """If text to come changes tokens that were judged, and handed out, the draft ends with them."""
    target = tiny.model("llama")
    encode = drafter.carried

    def changing(*arguments):
        tokens = encode(*arguments)
        return tokens if len(tokens) < 20 else [tokens[0] ^ 1, *tokens[1:]]

    monkeypatch.setattr(drafter, "carried", changing)
    options = {"chunk": 1, "boundary": NEVER_WHOLE, "prompt": "w1w2?"}
    result = answer(target, halves(), Streamed, value=0.9, **options)
    (done,) = result.rounds
    assert result.notes == (RECODED,)
    # 8 of 19 tokens are held back, and a cut is sure once a token stands behind it: 4 and 8
    assert [(segment.tokens, segment.kept) for segment in done.segments] == [(4, True), (4, True)]
    assert done.kept_tokens == done.judged_tokens == result.counters.draft_tokens == 8
    assert_target_wrote_its_own(target, "w1w2?", result)


def test_refused_drafts_are_stopped_at_the_first_chunk(tiny_target, tiny_draft):
    prompt, tokens = tiny.plain_answer(tiny_target)
    for chunk in (1, 2, 4):
        result = answer(tiny_target, tiny_draft, Streamed, value=0.0, chunk=chunk, prompt=prompt)
        assert list(result.tokens) == tokens[:NEW]
        (done,) = result.rounds
        # one pass; the last cut is known to be one as soon as a token stands behind it
        assert (done.judge_passes, done.judged_tokens) == (1, 4 * chunk)
        assert result.counters.draft_tokens == 4 * chunk + 1
        assert [segment.score for segment in done.segments] == [0.0] * chunk + [None]
        assert sum(segment.tokens for segment in done.segments) == 4 * chunk + 1


def test_a_whole_draft_is_the_answer(tiny_target):
    draft = tiny.with_end_token(tiny_target, tiny.plain_answer(tiny_target)[1][20])
    target = tiny.with_end_token(tiny_target, draft.end_ids[0])
    prompt, tokens = tiny.plain_answer(tiny_target)
    end = tokens.index(target.end_ids[0])
    result = answer(target, draft, Streamed, value=1.0, prompt=prompt)
    assert list(result.tokens) == tokens[: end + 1]
    assert result.stop is StopReason.END_TOKEN
    (done,) = result.rounds
    assert (done.accepted_whole, done.draft_ended, done.target_tokens) == (True, True, 0)
    assert done.kept_tokens == end + 1
    passes = -(-len(done.segments) // 2)
    assert result.counters.target_calls == 1 + passes == 1 + result.counters.judge_passes


def test_text_is_handed_out_as_soon_as_its_prefixes_have_passed(tiny_target, tiny_draft, monkeypatch):
    prompt, _ = tiny.plain_answer(tiny_target)
    outer = Streamed(judge=tiny.ScriptedJudge(value=1.0), segmenter=GRID, chunk=2, boundary=RULE)
    steps, step, written, pieces = [], drafter.Writing.step, [], []
    monkeypatch.setattr(drafter.Writing, "step", lambda self: (steps.append(1), step(self))[1])
    for piece in Parse(tiny_target, tiny_draft, outer=outer).stream(prompt, max_new_tokens=NEW):
        written.append(len(steps))
        pieces.append(piece)
    *deltas, last = pieces
    assert tuple(t for d in deltas for t in d.tokens) == last.result.tokens
    assert "".join(d.text for d in pieces) == last.result.text
    kept = [len(d.tokens) for d in deltas if d.author is Author.DRAFT]
    assert kept[:4] == [8, 8, 8, 8]
    assert written[:4] == [9, 17, 25, 33], "each as soon as its last cut was known to be one"


@pytest.mark.parametrize("limit", [1, 3, 7, 9])
def test_limits_and_stop_strings_end_a_kept_draft(tiny_target, tiny_draft, limit):
    prompt, tokens = tiny.plain_answer(tiny_target)
    result = answer(tiny_target, tiny_target, Streamed, value=1.0, prompt=prompt, new=limit)
    assert list(result.tokens) == tokens[:limit]
    stop = tiny_target.decode(tokens[limit : limit + 1])
    for seed in SEEDS:
        arguments = {"new": NEW, "stop": [stop], "loop": Rounds(rounds=3), "prompt": prompt}
        fused = answer(tiny_target, tiny_draft, Completed, seed, **arguments)
        result = answer(tiny_target, tiny_draft, Streamed, seed, **arguments)
        assert (result.tokens, result.text, result.stop) == (fused.tokens, fused.text, fused.stop)


def test_short_contexts_still_answer(tiny_target, tiny_draft):
    prompt, _ = tiny.plain_answer(tiny_target)
    for spare in (1, 8, 12, 20):
        target = tiny.model("llama", context_limit=len(prompt) + spare)
        result = answer(target, tiny_draft, Streamed, chunk=1, prompt=prompt)
        assert result.stop is StopReason.CONTEXT_LIMIT
        assert result.new_tokens == spare
    draft = tiny.model("llama", seed=5, layers=2, context_limit=len(prompt) + 10)
    result = answer(tiny_target, draft, Streamed, loop=Rounds(rounds=6), prompt=prompt)
    assert result.rounds[-1].drafted
    assert result.rounds[-1].judged_tokens == 0
    assert result.new_tokens == NEW


def test_gates(tiny_target, tiny_draft):
    prompt, tokens = tiny.plain_answer(tiny_target)
    result = answer(tiny_target, tiny_draft, Streamed, gate=Never(), prompt=prompt)
    assert list(result.tokens) == tokens[:NEW]
    assert result.counters.draft_calls == result.counters.judge_passes == 0
    gate = Adaptive(bound=0.1, cost_per_token=0.5, reserve=0.0)
    refuse = tiny.ScriptedJudge(value=0.0)
    drafted = {}
    for kind, more in ((PrefixVerification, {}), (StreamedVerification, {"chunk": 1})):
        outer = kind(judge=refuse, segmenter=GRID, boundary=RULE, gate=gate, **more)
        engine = Parse(tiny_target, tiny_draft, outer=outer)
        drafted[kind] = sum(engine.generate(prompt, max_new_tokens=NEW).rounds[0].drafted for _ in range(10))
    # A refused draft costs 0.5 * 40 tokens if completed and 0.5 * 5 if stopped. An answer earns 4, and a draft has to
    # be earned twice: the first one was made on credit.
    assert drafted == {PrefixVerification: 1, StreamedVerification: 9}


def test_more_cuts_than_max_cuts_are_all_judged(tiny_target, tiny_draft):
    """What the fused pass would thin evenly is judged as it comes, and never in larger passes than it may have."""
    prompt, _ = tiny.plain_answer(tiny_target)
    outer = Streamed(
        judge=tiny.ScriptedJudge(value=0.5), boundary=RULE, segmenter=EveryTokens(delta=2, max_cuts=4), chunk=4
    )
    (done,) = Parse(tiny_target, tiny_draft, outer=outer).generate(prompt, max_new_tokens=NEW).rounds
    assert [segment.tokens for segment in done.segments] == [2] * 20
    assert done.judge_passes == 5


# Size of passes


@pytest.mark.parametrize(("rows", "most"), [(0, 32), (17, 32), (30, 32), (30, 3)])
def test_passes_have_the_segments_and_rows_they_should(rows, most, monkeypatch):
    """As soon as they have both, and never more segments than `max_cuts`; the last pass takes what is left."""
    monkeypatch.setattr(Streamed, "_least", lambda self, work, lane: (2, rows))
    target, draft = tiny.model("llama"), tiny.model("llama", seed=5, layers=2)
    judge = tiny.ScriptedJudge(value=0.5)
    suffix = judge.bind(target).suffix_rows
    made, score = [], tiny.ScriptedJudge.score
    monkeypatch.setattr(
        tiny.ScriptedJudge,
        "score",
        lambda self, session, draft, cuts, probes: (
            made.append(list(probes)) or score(self, session, draft, cuts, probes)
        ),
    )
    segmenter = EveryTokens(delta=4, max_cuts=most)
    answer(target, draft, Streamed, judge=judge, segmenter=segmenter, boundary=NEVER_WHOLE)
    assert [cut for probes in made for cut in probes] == list(range(4, NEW + 1, 4))
    segments = next(n for n in range(2, 12) if n * (4 + suffix) >= rows)
    assert {len(probes) for probes in made[:-1]} == {min(segments, most)}
    assert len(made[-1]) <= min(segments, most)


@pytest.mark.parametrize(
    ("devices", "in_turn", "chunk", "least"),
    [
        (("cpu", "cpu"), True, "auto", (2, 0)),
        (("cuda:0", "cuda:0"), False, "auto", (2, 256)),
        (("cuda:0", "cuda:0"), True, "auto", (2, 256)),
        (("cuda:0", "cuda:1"), False, "auto", (2, 0)),
        (("cuda:0", "cuda:1"), True, "auto", (2, 256)),
        (("cuda:0", "cuda:0"), False, 3, (3, 0)),
    ],
)
def test_passes_are_larger_where_small_ones_cost_as_much(devices, in_turn, chunk, least):
    """A GPU reads all weights for few rows, too, and the draft model waits for that unless it has one of its own."""
    target, draft = (SimpleNamespace(device=torch.device(name)) for name in devices)
    work = SimpleNamespace(
        target=SimpleNamespace(session=SimpleNamespace(model=target)), drafter=SimpleNamespace(model=draft)
    )
    assert Streamed(chunk=chunk)._least(work, SimpleNamespace(in_turn=in_turn)) == least
    one = Streamed(segmenter=Lines(max_cuts=1))
    assert one._least(work, SimpleNamespace(in_turn=in_turn))[0] == 1


# Overlap


class Late:
    """A lane whose passes are done when a random draw says so, without a thread: every timing that can happen."""

    def __init__(self, seed):
        self.random, self.passes = random.Random(seed), []

    in_turn = False

    def submit(self, judge_pass):
        self.passes.append(judge_pass)

    def waits(self):
        if self.passes and self.random.random() < 0.15:
            self.passes.pop(0)()
        return False

    def wait(self):
        while self.passes:
            self.passes.pop(0)()

    def drafting(self):
        return nullcontext()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.passes.clear()


@pytest.mark.parametrize("chunk", [1, 2])
def test_decisions_do_not_depend_on_when_the_judge_is_done(tiny_target, tiny_draft, chunk, monkeypatch):
    for seed in SEEDS:
        options = {"chunk": chunk, "loop": Rounds(rounds=3)}
        in_turn = answer(tiny_target, tiny_draft, Streamed, seed, **options)
        written = set()
        for timing in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(Streamed, "_lane", lambda self, work, timing=timing: Late(timing))
                late = answer(tiny_target, tiny_draft, Streamed, seed, **options)
            assert_same(late, in_turn)
            assert_same_passes(late, in_turn)
            written.add(late.counters.draft_tokens)
        assert min(written) >= in_turn.counters.draft_tokens


WARM = {"temperature": 0.9, "top_p": 0.95}


@pytest.mark.parametrize("inner", ["none", "ngram", "draft_model"])
def test_sampled_text_does_not_depend_on_when_the_judge_is_done(tiny_target, tiny_draft, inner, monkeypatch):
    """Threads, and delays that differ from run to run on both sides; and it is the text of drafts judged when complete.
    What a speculator is told of refused text does not depend on the delays either."""
    speculators = {"none": None, "ngram": Ngram(), "draft_model": DraftModel(length=3, model=tiny_draft)}
    options = {"loop": Rounds(rounds=3), "chunk": 1, "sampling": WARM, "engine": {"inner": speculators[inner]}}
    lengths = set()
    for seed in SEEDS:
        texts, told = set(), set()
        for delays in ((0, 0), (0.004, 0), (0, 0.002), (0.002, 0.001)):
            with monkeypatch.context() as patch:
                slow(patch, tiny.ScriptedJudge, "score", delays[0])
                slow(patch, drafter.Writing, "step", delays[1])
                refused = noted(patch)
                result = answer(tiny_target, tiny_draft, Streamed, seed, overlap="always", **options)
            texts.add(result.tokens)
            told.add(tuple(refused))
            lengths.add((seed, result.counters.draft_tokens))
        assert len(texts) == len(told) == 1
        if inner != "ngram":  # it learns less of a draft that is stopped
            assert texts == {answer(tiny_target, tiny_draft, Completed, seed, **options).tokens}
    assert len(lengths) > len(SEEDS), "no draft was stopped earlier in one run than in another"


def noted(patch):
    """What decoders are told of refused text from now on."""
    plain, seen = Decoder.note_refused, []
    patch.setattr(Decoder, "note_refused", lambda self, tokens: seen.append(tuple(tokens)) or plain(self, tokens))
    return seen


def slow(patch, owner, name, seconds):
    """Let a method take up to so much longer, a random time each call."""
    plain, draw = getattr(owner, name), random.Random()

    def delayed(*arguments):
        time.sleep(seconds * draw.random())
        return plain(*arguments)

    patch.setattr(owner, name, delayed)


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_a_thread_for_the_judge_changes_nothing(family):
    target, draft = tiny.model(family), tiny.model("llama", seed=5, layers=2)
    for seed in SEEDS:
        options = {"loop": Rounds(rounds=3), "chunk": 1}
        in_turn = answer(target, draft, Streamed, seed, overlap="never", **options)
        beside = answer(target, draft, Streamed, seed, overlap="always", **options)
        assert_same(beside, in_turn)
        assert_same_passes(beside, in_turn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_two_streams_change_nothing(family):
    """On CUDA the draft model has a stream of its own; neither it nor the judge may see the other's memory."""
    pair = (tiny.model(family), tiny.model("llama", seed=5, layers=2))
    target, draft = (dataclasses.replace(model, hf=copy.deepcopy(model.hf).cuda()) for model in pair)
    prompt, _ = tiny.plain_answer(pair[0])
    for seed in range(20):
        options = {"loop": Rounds(rounds=3), "chunk": 1, "prompt": prompt}
        in_turn = answer(target, draft, Streamed, seed, overlap="never", **options)
        assert_same(answer(target, draft, Streamed, seed, **options), in_turn)


def test_the_draft_goes_on_until_the_verdict_and_not_a_step_longer(tiny_target, tiny_draft, monkeypatch):
    """In a thread. The judge gives its verdict during the draft model's tenth step."""
    steps, tenth, told = [], threading.Event(), threading.Event()
    judged, run, step = tiny.ScriptedJudge.score, streamed.Judging._run, drafter.Writing.step

    def waiting(self, *arguments):
        assert tenth.wait(20), "the draft model has stopped for the judge"
        return judged(self, *arguments)

    def telling(self, *arguments):
        run(self, *arguments)
        told.set()

    def watched(self):
        more = step(self)
        steps.append(told.is_set())
        if len(steps) == 10:
            tenth.set()
            assert told.wait(20)
        return more

    monkeypatch.setattr(tiny.ScriptedJudge, "score", waiting)
    monkeypatch.setattr(streamed.Judging, "_run", telling)
    monkeypatch.setattr(drafter.Writing, "step", watched)
    result = answer(tiny_target, tiny_draft, Streamed, value=0.0, chunk=1, overlap="always")
    assert steps == [False] * 10
    assert result.counters.judge_passes == 1


def test_times_add_up_and_overlap_is_counted_once(tiny_target, tiny_draft, monkeypatch):
    """judge_s is what drafting and answering waited for the judge: all of it in turn, only the tail beside."""
    judged, step = tiny.ScriptedJudge.score, drafter.Writing.step

    def slow(self, *arguments):
        time.sleep(0.05)
        return judged(self, *arguments)

    def slow_step(self):
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(tiny.ScriptedJudge, "score", slow)
    monkeypatch.setattr(drafter.Writing, "step", slow_step)
    options = {"value": 1.0, "chunk": 1, "new": 24}
    in_turn, beside = (
        answer(tiny_target, tiny_draft, Streamed, overlap=overlap, **options) for overlap in ("never", "always")
    )
    for result in (in_turn, beside):
        (done,) = result.rounds
        assert done.draft_s >= 24 * 0.02
        assert done.draft_s == pytest.approx(result.times.draft_s)
        assert done.judge_s == pytest.approx(result.times.judge_s)
        assert result.times.wall_s >= done.draft_s + done.judge_s
    assert in_turn.times.judge_s >= 6 * 0.05
    assert beside.times.judge_s < 0.5 * in_turn.times.judge_s
    assert beside.times.wall_s < in_turn.times.wall_s


@pytest.mark.parametrize("overlap", ["never", "always"])
def test_what_a_pass_raises_ends_the_request_and_the_engine_stays_usable(tiny_target, tiny_draft, overlap, monkeypatch):
    outer = Streamed(judge=tiny.ScriptedJudge(), segmenter=GRID, chunk=1, boundary=RULE, overlap=overlap)
    engine = Parse(tiny_target, tiny_draft, outer=outer)
    expected = engine.generate([9, 30, 12], max_new_tokens=NEW).tokens
    with monkeypatch.context() as patch:
        patch.setattr(tiny.ScriptedJudge, "score", lambda *_: (_ for _ in ()).throw(JudgeError("overflow")))
        with pytest.raises(JudgeError, match="overflow"):
            engine.generate([9, 30, 12], max_new_tokens=NEW)
    assert engine.generate([9, 30, 12], max_new_tokens=NEW).tokens == expected
    stream = engine.stream([9, 30, 12], max_new_tokens=NEW)  # a reader that leaves early leaves no thread behind
    next(stream)
    stream.close()
    assert engine.generate([9, 30, 12], max_new_tokens=NEW).tokens == expected


def test_where_the_judge_runs(tiny_target, tiny_draft):
    """Beside the draft model on CUDA or when asked for, but never both in one module."""
    work = SimpleNamespace(
        target=SimpleNamespace(session=Session(tiny_target)), drafter=SimpleNamespace(model=tiny_draft), notes=set()
    )
    lanes = {kind: type(Streamed(overlap=kind)._lane(work)).__name__ for kind in ("auto", "always", "never")}
    assert lanes == {"auto": "InTurn", "always": "Beside", "never": "InTurn"}
    work.drafter.model = tiny_target
    assert not isinstance(Streamed(overlap="always")._lane(work), Beside)
    assert work.notes == {ONE_MODEL}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boundary": LongestValid()}, "boundary rule LongestValid.*first_failure"),
        ({"chunk": 0}, "chunk=0; expected auto, or 1 to 32"),
        ({"chunk": "some"}, "chunk='some'; expected auto, or 1"),
        ({"chunk": True}, "chunk=True; expected auto, or 1"),
        ({"chunk": 2.0}, "chunk=2.0; expected auto, or 1"),
        ({"chunk": 5, "segmenter": Lines(max_cuts=4)}, "expected auto, or 1 to 4"),
        ({"overlap": "sometimes"}, "auto, always or never"),
        ({"max_draft_tokens": 0}, "max_draft_tokens=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        StreamedVerification(**settings)


def test_the_embedded_pair_answers_as_outer_parse_does():
    target, draft = (load(f"zoo:{name}", dtype="float32") for name in ("target", "draft"))
    prompt = "Tom has 12 coins. Ana gives Tom 30 coins. Tom loses 5 coins. How many coins does Tom have now?"
    for threshold in (0.5, 0.9):
        boundary = FirstFailure(threshold=threshold, full_threshold=1.0)
        fused, streamed = (
            Parse(target, draft, outer=kind(boundary=boundary)).generate(prompt)
            for kind in (PrefixVerification, StreamedVerification)
        )
        assert streamed.tokens == fused.tokens
        scores = [[s.score for s in r.rounds[0].segments if s.score is not None] for r in (streamed, fused)]
        assert scores[0] == pytest.approx(scores[1][: len(scores[0])], abs=1e-5)


# Helpers


@functools.cache
def halves():
    """A draft model with another vocabulary for the same texts: w and digits are tokens of their own, too."""
    words = ["Correct", "Incorrect", "?", ".", "\n", "w", *string.digits, *(f"w{i}" for i in range(43))]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*tiny.SPECIAL, *words])}, unk_token="?"))
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len)[::-1])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.add_special_tokens(tiny.SPECIAL)
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=tiny.CHAT)
    return LanguageModel.wrap(tiny.model("llama", seed=9, layers=2).hf, tokenizer, name="halves")


Streamed = StreamedVerification


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completed(PrefixVerification):
    """outer=parse, but a draft one of whose prefixes fails in a pass before the last is not completed."""

    chunk: int = 2

    def _decide(self, scores, draft):
        earlier = scores[: (len(scores) - 1) // self.chunk * self.chunk]
        if self.boundary.keep(earlier) < len(earlier):
            return self.boundary.keep(earlier), False
        return super()._decide(scores, draft)


def answer(
    target, draft, kind, seed=0, *, value=None, prompt=None, new=NEW, stop=(), engine=None, sampling=None, **settings
):
    settings = {"boundary": RULE, "segmenter": GRID, "judge": tiny.ScriptedJudge(seed=seed, value=value), **settings}
    if prompt is None:
        prompt, _ = tiny.plain_answer(target)
    return Parse(target, draft, outer=kind(**settings), **(engine or {})).generate(
        prompt,
        max_new_tokens=new,
        stop=stop,
        sampling=Sampling(**(sampling or {})),
        generator=request_generator(seed, 0) if sampling else None,
    )


def kept_scores(result):
    """Scores of the kept segments of each round."""
    return [[segment.score for segment in done.segments if segment.kept] for done in result.rounds]


def assert_same(result, expected):
    """Same answer, boundaries and scores; a streamed draft may lack what was written after its failure."""
    assert result.tokens == expected.tokens
    assert (result.text, result.stop) == (expected.text, expected.stop)
    assert len(result.rounds) == len(expected.rounds)
    for ours, theirs in zip(result.rounds, expected.rounds, strict=True):
        assert (ours.kept_tokens, ours.accepted_whole) == (theirs.kept_tokens, theirs.accepted_whole)
        assert ours.target_tokens == theirs.target_tokens
        judged = [s for s in ours.segments if s.score is not None]
        assert [(s.text, s.score, s.kept) for s in judged] == [
            (s.text, s.score, s.kept) for s in theirs.segments[: len(judged)]
        ]
        assert all(not segment.kept for segment in theirs.segments[len(judged) :])


def assert_same_passes(result, expected):
    """All that does not depend on how far the draft model had come when it was stopped."""
    for ours, theirs in zip(result.rounds, expected.rounds, strict=True):
        for name in ("judged_tokens", "judge_passes", "judge_rows"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.mean_draft_logprob == pytest.approx(theirs.mean_draft_logprob, abs=1e-5)


def assert_target_wrote_its_own(model, message, result):
    prompt = model.encode(f"<|user|>{message}<|end|><|assistant|>")
    logits = forward(model, [*prompt, *result.tokens])
    for span in (span for span in result.spans if span.author is Author.TARGET):
        rows = logits[len(prompt) + span.start - 1 : len(prompt) + span.stop - 1]
        best = rows.topk(2).values
        clear = best[:, 0] - best[:, 1] > 1e-4  # a near tie is decided by rounding in either computation
        assert torch.equal(rows.argmax(-1)[clear], torch.tensor(result.tokens[span.start : span.stop])[clear])


def forward(model, ids):
    with torch.inference_mode():
        return model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
