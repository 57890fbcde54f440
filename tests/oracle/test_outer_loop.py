"""After every boundary the target writes what it would write from prompt + kept text alone: nothing leaks from probes,
refused tokens or earlier rounds.

Oracle: one plain forward over the finished answer; every token the target wrote must be its argmax there.
"""

import copy
import dataclasses
import time

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from parsedec import LabelJudge, Parse, ParsedecError, PrefixVerification, StopReason, TargetOnly, load
from parsedec.boundary import FirstFailure, LongestValid
from parsedec.errors import JudgeError, LogitsError, PromptError
from parsedec.gate import Adaptive, Never
from parsedec.loop import Once, Rounds
from parsedec.models.language_model import LanguageModel
from parsedec.sampling import Sampler
from parsedec.segmenters import EveryTokens
from parsedec.sessions.session import Session
from parsedec.streamed import StreamedVerification
from parsedec.text.spelling import carried
from parsedec.types import Author, JudgePath, Limits, Sampling
from parsedec_adapters.draft_model import DraftModel

NEW = 40
GRID = EveryTokens(delta=4)
BOUNDARY = FirstFailure(threshold=0.4, full_threshold=0.8)
FAMILIES = ["llama", "qwen3", "mistral_window", "gemma3", "mixtral", "qwen3_next", "lfm2", "mamba2"]


def outer(seed=0, **options):
    options = {"boundary": BOUNDARY, "segmenter": GRID, **options}
    return PrefixVerification(judge=tiny.ScriptedJudge(seed=seed), **options)


def assert_target_wrote_its_own(model, prompt, result):
    """Every token of a target span is the argmax of a plain forward over what stands before it."""
    with torch.inference_mode():
        logits = model.hf(input_ids=torch.tensor([[*prompt, *result.tokens]]), use_cache=False).logits[0]
    checked = 0
    for span in result.spans:
        if span.author is Author.TARGET:
            rows = logits[len(prompt) + span.start - 1 : len(prompt) + span.stop - 1]
            best = rows.topk(2).values
            clear = best[:, 0] - best[:, 1] > 1e-4  # a near tie is decided by rounding in either computation
            written = torch.tensor(result.tokens[span.start : span.stop])
            assert torch.equal(rows.argmax(-1)[clear], written[clear])
            checked += int(clear.sum())
    return checked


def assert_spans_follow_the_rounds(result):
    """Who wrote what adds up in tokens and in text."""
    by = {author: sum(s.stop - s.start for s in result.spans if s.author is author) for author in Author}
    assert by[Author.DRAFT] == sum(r.kept_tokens for r in result.rounds) == result.counters.kept_draft_tokens
    assert by[Author.TARGET] == sum(r.target_tokens for r in result.rounds)
    assert "".join(span.text for span in result.spans) == result.text


# Every pair of family, kind of pass and loop, in half of their combinations: which pass goes with which loop takes
# turns from family to family, so each of the four meets families whose cache is packed and ones whose is forked.
TURNS = {
    family: [("fused", Once()), ("two_pass", Rounds(rounds=4))]
    if i % 2
    else [("two_pass", Once()), ("fused", Rounds(rounds=4))]
    for i, family in enumerate(FAMILIES)
}


@pytest.mark.parametrize(
    ("family", "passes", "loop"),
    [pytest.param(family, *turn, id=f"{family}-{turn[0]}") for family, turns in TURNS.items() for turn in turns],
)
def test_nothing_leaks_past_a_boundary(family, passes, loop):
    target, draft = tiny.model(family), tiny.model("llama", seed=5, layers=2)
    kept, checked = set(), 0
    for seed in range(4):
        prompt, _ = tiny.plain_answer(target)
        result = Parse(target, draft, outer=outer(seed, passes=passes, loop=loop)).generate(prompt, max_new_tokens=NEW)
        checked += assert_target_wrote_its_own(target, prompt, result)
        assert_spans_follow_the_rounds(result)
        kept |= {r.kept_tokens for r in result.rounds}
        assert result.judge_path is (JudgePath.FORKED if family in tiny.FORKED else JudgePath.PACKED)
    assert len(kept) >= 3, "the scripted scores should put boundaries in several places"
    assert checked > 30


@pytest.mark.parametrize("inner", ["none", "draft_model"])
@pytest.mark.parametrize("draft_inner", ["none", "draft_model"])
def test_inner_levels_change_nothing(inner, draft_inner):
    """PARSE with speculation for the target, the draft model or both writes the same tokens, in fewer calls."""
    target, draft, small = (tiny.model("llama", seed=s, layers=n) for s, n in ((0, 4), (5, 2), (6, 1)))
    prompt, _ = tiny.plain_answer(target)
    for seed in range(3):
        plain = Parse(target, draft, outer=outer(seed, loop=Rounds(rounds=3))).generate(prompt, max_new_tokens=NEW)
        fast = Parse(
            target, draft, outer=outer(seed, loop=Rounds(rounds=3)),
            inner=DraftModel(length=3, model=tiny.right_with_probability(target, 0.9)) if inner != "none" else None,
            draft_inner=DraftModel(length=3, model=small) if draft_inner != "none" else None,
        ).generate(prompt, max_new_tokens=NEW)  # fmt: skip
        assert fast.tokens == plain.tokens
        assert [r.kept_tokens for r in fast.rounds] == [r.kept_tokens for r in plain.rounds]
        assert_target_wrote_its_own(target, prompt, fast)
        if inner != "none":
            assert fast.counters.target_calls < plain.counters.target_calls


@pytest.mark.parametrize("loop", [Once(), Rounds(rounds=4)], ids=["once", "rounds"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba2"])
def test_pairs_with_different_tokenizers(family, loop):
    target = tiny.model(family)
    letters = tiny.model("llama", seed=9, layers=2)
    draft = LanguageModel.wrap(letters.hf, tiny.letters(), name="letters")
    assert not target.same_vocabulary(draft)
    kept = 0
    for seed in range(4):
        engine = Parse(target, draft, outer=outer(seed, loop=loop))
        result = engine.generate("w1w2w3?w4", max_new_tokens=NEW)
        prompt = target.encode("<|user|>w1w2w3?w4<|end|><|assistant|>")
        assert result.prompt_tokens == len(prompt)
        assert_target_wrote_its_own(target, prompt, result)
        assert_spans_follow_the_rounds(result)
        kept += result.counters.kept_draft_tokens
    assert kept > 0


def test_a_whole_draft_is_the_answer_without_a_single_decoded_token(tiny_target):
    draft = tiny.with_end_token(tiny_target, tiny.plain_answer(tiny_target)[1][20])
    target = tiny.with_end_token(tiny_target, draft.end_ids[0])
    prompt, tokens = tiny.plain_answer(tiny_target)
    accept = PrefixVerification(judge=tiny.ScriptedJudge(value=1.0), segmenter=GRID)
    result = Parse(target, draft, outer=accept).generate(prompt, max_new_tokens=NEW)
    end = tokens.index(target.end_ids[0])
    assert list(result.tokens) == tokens[: end + 1]
    assert result.stop is StopReason.END_TOKEN
    assert result.rounds[0].accepted_whole
    assert result.rounds[0].target_tokens == 0
    assert result.counters.target_calls == 2  # the prompt, and the judge's pass
    assert result.counters.judge_rows == end + len(GRID.cuts(draft_of(target, tokens[:end]))) * suffix_rows(target)


def test_a_draft_ends_where_the_targets_answers_do(tiny_target):
    """A draft model of the same vocabulary need not know the target's end token as its own."""
    prompt, tokens = tiny.plain_answer(tiny_target)
    target, draft = tiny.with_end_token(tiny_target, tokens[20]), tiny.with_end_token(tiny_target, 0)
    assert 0 not in tokens, "the draft model's own end token is never written"
    accept = PrefixVerification(judge=tiny.ScriptedJudge(value=1.0), segmenter=GRID)
    result = Parse(target, draft, outer=accept).generate(prompt, max_new_tokens=NEW)
    end = tokens.index(tokens[20])
    assert list(result.tokens) == tokens[: end + 1]
    assert (result.stop, result.rounds[0].accepted_whole) == (StopReason.END_TOKEN, True)
    assert result.counters.draft_tokens == end + 1


@pytest.mark.parametrize("streamed", [False, True])
def test_an_end_token_that_is_not_the_targets_closes_nothing(tiny_target, streamed):
    """The draft ends there; what stands is the text before, and the target goes on with its own."""
    prompt, tokens = tiny.plain_answer(tiny_target)
    target, draft = tiny.with_end_token(tiny_target, 0), tiny.with_end_token(tiny_target, tokens[20])
    kind = StreamedVerification if streamed else PrefixVerification
    accept = kind(judge=tiny.ScriptedJudge(value=1.0), segmenter=GRID)
    result = Parse(target, draft, outer=accept).generate(prompt, max_new_tokens=NEW)
    end = tokens.index(tokens[20])
    assert list(result.tokens) == tokens[:NEW], "as the target alone"
    assert result.stop is StopReason.TOKEN_LIMIT
    assert result.rounds[0].kept_tokens == end
    assert not result.rounds[0].draft_ended
    assert not result.rounds[0].accepted_whole


def test_a_refused_draft_leaves_the_target_alone(tiny_target, tiny_draft):
    prompt, tokens = tiny.plain_answer(tiny_target)
    refuse = PrefixVerification(judge=tiny.ScriptedJudge(value=0.0), segmenter=GRID)
    result = Parse(tiny_target, tiny_draft, outer=refuse).generate(prompt, max_new_tokens=len(tokens))
    assert list(result.tokens) == tokens
    assert result.counters.kept_draft_tokens == 0
    assert result.counters.draft_tokens > 0


def test_never_gate_is_the_inner_level_alone(tiny_target, tiny_draft):
    prompt, tokens = tiny.plain_answer(tiny_target)
    result = Parse(tiny_target, tiny_draft, outer=outer(gate=Never())).generate(prompt, max_new_tokens=len(tokens))
    assert list(result.tokens) == tokens
    assert result.counters.draft_calls == result.counters.judge_passes == 0


def test_adaptive_gate_stops_drafting_when_all_is_refused(tiny_target, tiny_draft):
    prompt, _ = tiny.plain_answer(tiny_target)
    refuse = PrefixVerification(
        judge=tiny.ScriptedJudge(value=0.0), segmenter=GRID, gate=Adaptive(bound=0.1, cost_per_token=0.5))  # fmt: skip
    engine = Parse(tiny_target, tiny_draft, outer=refuse)
    drafted = [engine.generate(prompt, max_new_tokens=NEW).rounds[0].drafted for _ in range(30)]
    assert drafted[0]
    # a draft of 40 tokens costs 20; the bound gives it 0.1 of the 40 tokens answered per request: one draft in five
    assert 4 <= sum(drafted) <= 7


def test_answers_that_their_readers_leave_count_for_the_gate(tiny_target, tiny_draft):
    """Else one refused draft would close it for good, or drafts would be made for ever as nothing was ever timed."""
    refuse = PrefixVerification(
        judge=tiny.ScriptedJudge(value=0.0), segmenter=GRID, gate=Adaptive(bound=0.1, reserve=0, cost_per_token=0.5)
    )
    engine = Parse(tiny_target, tiny_draft, outer=refuse)
    for _ in range(120):
        stream = engine.stream([9, 30, 12], max_new_tokens=NEW)
        for _ in range(5):
            next(stream)
        stream.close()
    events = engine.history.events
    assert [event for event in events if isinstance(event, int)] == [5] * 120
    assert engine.history.decoded_tokens == 120 * 4  # the judge pass gave the first
    assert engine.history.token_s
    drafted = [i for i, event in enumerate(events) if not isinstance(event, int)]
    assert drafted == [0, 81]  # a refused draft costs 20, the next has to be covered, and 0.1 of five tokens is earned


def test_longest_valid_keeps_past_a_failure(tiny_target, tiny_draft):
    prompt, _ = tiny.plain_answer(tiny_target)
    further = 0
    for seed in range(5):
        first, longest = (
            Parse(tiny_target, tiny_draft, outer=outer(seed, boundary=rule(threshold=0.5, full_threshold=1.0)))
            .generate(prompt, max_new_tokens=NEW).rounds[0] for rule in (FirstFailure, LongestValid))  # fmt: skip
        scores = [segment.score for segment in first.segments]
        assert scores == [segment.score for segment in longest.segments]
        leading = next(k for k, score in enumerate(scores) if score < 0.5)
        last = max(k + 1 for k, score in enumerate(scores) if score >= 0.5)
        assert [s.kept for s in first.segments] == [k < leading for k in range(len(scores))]
        assert [s.kept for s in longest.segments] == [k < last for k in range(len(scores))]
        further += last > leading
    assert further >= 2


def test_streamed_pieces_are_the_result(tiny_target, tiny_draft):
    engine = Parse(tiny_target, tiny_draft, outer=outer(loop=Rounds(rounds=3)))
    *deltas, last = engine.stream([9, 30, 12], max_new_tokens=NEW)
    assert "".join(d.text for d in deltas) + last.text == last.result.text
    assert tuple(t for d in deltas for t in d.tokens) == last.result.tokens
    assert {d.author for d in deltas} == {Author.DRAFT, Author.TARGET}


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_limits_cut_a_kept_draft(tiny_target, limit):
    accept = PrefixVerification(judge=tiny.ScriptedJudge(value=1.0), segmenter=GRID)
    prompt, tokens = tiny.plain_answer(tiny_target)
    result = Parse(tiny_target, tiny_target, outer=accept).generate(prompt, max_new_tokens=limit)
    assert list(result.tokens) == tokens[:limit]
    assert result.stop is StopReason.TOKEN_LIMIT


def test_context_too_short_for_a_probe_still_answers(tiny_draft):
    prompt, _ = tiny.plain_answer(tiny.model("llama"))
    for spare in (1, 4, 8, 12):
        target = tiny.model("llama", context_limit=len(prompt) + spare)
        result = Parse(target, tiny_draft, outer=outer()).generate(prompt, max_new_tokens=NEW)
        assert result.stop is StopReason.CONTEXT_LIMIT
        assert result.new_tokens == spare
        assert_target_wrote_its_own(target, prompt, result)


def test_a_draft_model_with_a_shorter_context_stops_drafting(tiny_target):
    prompt, _ = tiny.plain_answer(tiny_target)
    draft = tiny.model("llama", seed=5, layers=2, context_limit=len(prompt) + 10)
    result = Parse(tiny_target, draft, outer=outer(loop=Rounds(rounds=6))).generate(prompt, max_new_tokens=NEW)
    assert result.new_tokens == NEW
    assert result.rounds[-1].judged_tokens == 0
    assert_target_wrote_its_own(tiny_target, prompt, result)
    small = tiny.model("llama", seed=5, layers=2, context_limit=len(prompt) - 1)  # not even the prompt
    engine = Parse(tiny_target, small, outer=outer())
    assert (
        engine.generate(prompt, max_new_tokens=NEW).tokens
        == Parse(tiny_target).generate(prompt, max_new_tokens=NEW).tokens
    )
    with pytest.raises(PromptError, match="leaves no room in the context"):
        engine.write_draft(prompt, prompt, Sampler(Sampling()), Limits(max_new_tokens=NEW))


def test_outer_none_is_the_inner_level(tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target)
    result = Parse(tiny_target, outer=TargetOnly()).generate(prompt, max_new_tokens=len(tokens))
    assert list(result.tokens) == tokens


def draft_of(model, tokens):
    from parsedec.text.spelling import Draft

    return Draft.of(model, tokens, ended=True)


def suffix_rows(model):
    return dataclasses.replace(LabelJudge(), question="?").bind(model).suffix_rows


def spaced(space_in_front):
    """Two vocabularies with a word's space in front, as sentencepiece has it: words, and words in two halves."""
    words = [f"w{i}" for i in range(12)]
    halves = ["▁w", "▁", *(str(i) for i in range(12)), *(f"w{i}" for i in range(12))]
    vocabulary = ["▁" + word for word in words] if space_in_front else halves
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*tiny.SPECIAL, "<unk>", *vocabulary])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace()] if space_in_front else
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("▁w"), "isolated")])  # fmt: skip
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(tiny.SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=tiny.CHAT)


@pytest.mark.parametrize("into_words", [True, False])
def test_a_carried_draft_keeps_its_leading_space_and_gains_none(into_words):
    """Decoders of this kind drop the first space, encoders put one in front: text in the middle must not see either."""
    hf = tiny.model("llama").hf
    words, halves = (LanguageModel.wrap(hf, spaced(kind), name=str(kind)) for kind in (True, False))
    source, into = (halves, words) if into_words else (words, halves)
    before, after = source.encode("w3 w4"), into.encode("w3 w4")
    new = source.encode("w3 w4 w7 w2")[len(before) :]
    assert source.decode(new) == "w7 w2"
    tokens = carried(source, before, new, into, after)
    assert into.decode([*after, *tokens]) == "w3 w4 w7 w2"
    assert tokens == into.encode("w3 w4 w7 w2")[len(after) :]


def test_a_carried_draft_ends_in_a_whole_character_and_no_control_token():
    zoo = load("zoo:draft")
    euro = zoo.encode("a€")
    assert carried(zoo, [], euro[:-1], zoo, []) == zoo.encode("a")
    spelt = zoo.encode("so <|end|> it", plain=True)
    assert set(zoo.end_ids).isdisjoint(carried(zoo, [], spelt, zoo, []))
    assert zoo.decode(carried(zoo, [], spelt, zoo, [])) == "so <|end|> it"


def test_segments_after_the_end_of_the_answer_are_not_kept(tiny_target):
    """The target's end token inside a draft that was kept whole: what stands behind it is no part of the answer."""
    prompt, tokens = tiny.plain_answer(tiny_target)
    target = tiny.with_end_token(tiny_target, tokens[9])
    accept = PrefixVerification(judge=tiny.ScriptedJudge(value=1.0), segmenter=GRID)
    result = Parse(target, tiny_target, outer=accept).generate(prompt, max_new_tokens=NEW)
    end = tokens.index(tokens[9]) + 1
    assert list(result.tokens) == tokens[:end]
    assert [s.kept for s in result.rounds[0].segments] == [4 * k < end for k in range(len(result.rounds[0].segments))]
    assert result.rounds[0].kept_tokens == end


def test_scores_that_are_no_numbers_fail_the_request(tiny_target, tiny_draft, monkeypatch):
    engine = Parse(tiny_target, tiny_draft, outer=PrefixVerification(judge=LabelJudge(question="?"), segmenter=GRID))
    judged = Session.judge

    def overflowing(*arguments, **options):
        rows = judged(*arguments, **options)
        return dataclasses.replace(rows, probe_logits=torch.full_like(rows.probe_logits, torch.nan))

    monkeypatch.setattr(Session, "judge", overflowing)
    with pytest.raises(JudgeError, match="overflow"):
        engine.generate([9, 30, 12], max_new_tokens=NEW)


@pytest.mark.parametrize("outer_level", [TargetOnly(), outer()], ids=["none", "parse"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_the_request_before_a_draft_is_written(outer_level, temperature):
    """And only it: in a batch it has the error in its place."""
    hf = copy.deepcopy(tiny.model("llama").hf)
    with torch.no_grad():
        hf.get_input_embeddings().weight[40] = torch.nan
    broken = dataclasses.replace(tiny.model("llama"), hf=hf, name="broken")
    engine = Parse(broken, tiny.model("qwen2", layers=2), outer=outer_level)
    options = dict(max_new_tokens=4, sampling=Sampling(temperature=temperature, top_k=1))
    with pytest.raises(LogitsError, match=r"broken behind the prompt are not numbers.*dtype=bfloat16 or float32"):
        engine.generate([5, 40], generator=torch.Generator(), **options)
    generators = [torch.Generator() for _ in range(2)]
    batch = engine.generate_batch([[5, 40], [5, 6]], generators=generators, **options)
    assert isinstance(batch.errors[0], LogitsError)
    assert len(batch.answers[1].tokens) == 4


def test_a_wrong_request_is_refused_before_the_first_piece(tiny_target):
    engine = Parse(tiny_target, outer=TargetOnly())
    for wrong in ({"prompt": ""}, {"prompt": None}, {"prompt": [7], "stop": [5]}, {"prompt": [7], "max_new_tokens": 0}):
        with pytest.raises(ParsedecError):
            engine.stream(**wrong)


def test_the_reader_of_a_stream_does_not_count(tiny_target, monkeypatch):
    engine, clock, read_s, pieces = Parse(tiny_target, outer=TargetOnly()), time.perf_counter, [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(read_s))
    for piece in engine.stream([9, 30, 12], max_new_tokens=5):
        pieces.append(piece)
        read_s.append(1000.0)
    assert len(pieces) >= 5
    assert 0 < pieces[-1].result.times.wall_s < 1000
