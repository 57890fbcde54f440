"""Peers write what a plain retelling of their papers writes with separate forwards, whatever runs inside them.

Oracle: the loops below, every token of theirs from a forward over the whole text so far, no cache; judges are scripted,
so that steps are kept and refused everywhere.
"""

import dataclasses
import itertools
import random

import pytest
import torch

import tiny
from parsedec import Parse, StopReason
from parsedec.errors import ConfigError
from parsedec.loop import Rounds
from parsedec.models.language_model import JudgeCard, LanguageModel
from parsedec.peers import Cascade, EqualText, LabelEquivalence, LookaheadReasoning, SameNumber, SpecReason
from parsedec.peers.equivalence import Sameness
from parsedec.segmenters import EveryTokens, Lines, Segmenter
from parsedec.static.memory import Lease
from parsedec.static.session import machine_of
from parsedec.types import Author
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.ngram import Ngram

CARD = JudgeCard(question="?", labels=("Correct", "Incorrect"), threshold=0.6, full_threshold=0.7)
NEW, STEP = 22, 4
GRID = EveryTokens(delta=STEP)
FAMILIES = ["llama", "gemma3", "qwen3_next"]
BACKENDS = [*((family, "eager") for family in FAMILIES), ("llama", "static"), ("qwen3", "static")]


def pair(family="llama", backend="eager"):
    """Two models that never close their answers, and a prompt."""
    models = tiny.model(family), tiny.model("llama", seed=5, layers=2)
    target, draft = (dataclasses.replace(model, backend=backend) for model in models)
    prompt = torch.randint(5, tiny.VOCAB, (7,), generator=torch.Generator().manual_seed(4)).tolist()
    return tiny.with_end_token(target, tiny.VOCAB), tiny.with_end_token(draft, tiny.VOCAB), prompt


def continued(model, tokens, new):
    """Greedy tokens, each from a forward over everything before it."""
    written = list(tokens)
    with torch.inference_mode():
        for _ in range(new):
            written.append(int(model.hf(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1].argmax()))
    return written[len(tokens) :]


def specreason(target, draft, prompt, judge, threshold, first):
    """Steps of STEP tokens, one after the other: the draft model's if the scripted judge says so, else the target's."""
    answer, kept, steps = [], 0, 0
    while len(answer) < NEW:
        left = min(STEP, NEW - len(answer))
        step = continued(draft, prompt + answer, left)
        start = len(prompt) + len(answer)
        score = random.Random(f"{judge.seed}:{start}:{left}").random() if judge.value is None else judge.value
        if steps >= first and score >= threshold:
            kept += left
        else:
            step = continued(target, prompt + answer, left)
        answer += step
        steps += 1
    return answer, kept


@pytest.mark.parametrize("family", FAMILIES)
def test_specreason_is_the_loop_of_its_paper(family):
    target, draft, prompt = pair(family)
    judge = tiny.ScriptedJudge(seed=2)
    result = Parse(target, draft, outer=SpecReason(judge=judge, segmenter=GRID, threshold=0.4)).generate(
        prompt, max_new_tokens=NEW)  # fmt: skip
    expected, kept = specreason(target, draft, prompt, judge, 0.4, 0)
    assert list(result.tokens) == expected
    assert result.counters.kept_draft_tokens == kept
    assert 0 < kept < NEW
    assert result.counters.judge_passes == len(result.rounds) == -(-NEW // STEP)
    assert all(r.kept_tokens == 0 or r.target_tokens == 0 for r in result.rounds)


@pytest.mark.parametrize("inner", [DraftModel(length=3), Ngram()], ids=["draft_model", "ngram"])
def test_inner_levels_change_nothing_in_specreason(inner):
    target, draft, prompt = pair()
    judge = tiny.ScriptedJudge(seed=1)
    outer = SpecReason(judge=judge, segmenter=GRID, threshold=0.5, first_steps_by_target=2)
    engine = Parse(target, draft, outer=outer, inner=inner, draft_inner=DraftModel(length=3, model=target))
    result = engine.generate(prompt, max_new_tokens=NEW)
    assert list(result.tokens) == specreason(target, draft, prompt, judge, 0.5, 2)[0]
    assert [r.drafted for r in result.rounds[:3]] == [False, False, True]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_specreason_with_all_steps_refused_or_kept(tiny_target, tiny_draft, value):
    """Refused: the target's own text. Kept: the draft model's."""
    prompt, _ = tiny.plain_answer(tiny_target)
    judge = tiny.ScriptedJudge(value=value)
    engine = Parse(tiny_target, tiny_draft, outer=SpecReason(judge=judge, segmenter=GRID, threshold=0.5))
    result = engine.generate(prompt, max_new_tokens=NEW)
    assert list(result.tokens) == continued(tiny_draft if value else tiny_target, prompt, NEW)
    decoded = result.counters.target_calls - result.counters.judge_passes - 1  # the prompt
    # of each refused step the first token comes from the judge's pass, the others from a call each
    assert decoded == (0 if value else NEW - len(result.rounds))


def test_a_judge_pass_of_specreason_reads_its_step_and_the_question_alone(tiny_target, tiny_draft):
    judge = tiny.ScriptedJudge(value=1.0)
    engine = Parse(tiny_target, tiny_draft, outer=SpecReason(judge=judge, segmenter=GRID, threshold=0.5))
    result = engine.generate([9, 30, 12], max_new_tokens=12)
    suffix = judge.bind(tiny_target).suffix_rows
    assert [r.judge_rows for r in result.rounds] == [STEP + suffix] * 3
    assert result.counters.draft_rows <= 3 + 12 + 1  # the prompt, and every token once: nothing is written again


def test_the_threshold_of_specreason():
    judge = tiny.ScriptedJudge()
    target = tiny.model("llama")
    asked = dataclasses.replace(target, judge_card=CARD)
    assert SpecReason(judge=judge).bind(target).threshold == pytest.approx(7 / 9)
    assert SpecReason(judge=judge).bind(asked).threshold == 0.6
    assert SpecReason(judge=judge, threshold=0.2).bind(asked).threshold == 0.2
    with pytest.raises(ConfigError, match=r"threshold=1\.5"):
        SpecReason(threshold=1.5)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Equal texts are the same; of others some are, by chance that depends on the texts."""

    asks = None
    seed: int = 0
    rate: float = 0.7

    def bind(self, target):
        return self

    def compare(self, own, proposed):
        return Sameness(float(random.Random(f"{self.seed}:{own}:{proposed}").random() < self.rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uneven(Segmenter):
    """Steps of one token to many: a step ends with a token whose id divides by five."""

    def ends(self, draft):
        return [i for i, token in enumerate(draft.tokens, 1) if token % 5 == 0]


def uneven_step(model, tokens, limit):
    step = []
    while len(step) < limit and not (step and step[-1] % 5 == 0):
        step += continued(model, tokens + step, 1)
    return step


def lookahead(target, draft, prompt, same, ahead):
    """Rounds of `ahead` proposals, each held against the target's own version behind the proposals before it."""
    answer, kept = [], 0
    while len(answer) < NEW:
        proposals = []
        while len(proposals) < ahead and (left := NEW - len(answer) - sum(map(len, proposals))):
            proposals.append(uneven_step(draft, [*prompt, *answer, *itertools.chain(*proposals)], left))
        for proposal in [*proposals, None]:
            own = uneven_step(target, prompt + answer, NEW - len(answer))
            if proposal is None or not own or not same.compare(target.decode(own), target.decode(proposal)).score:
                answer += own
                break
            answer += proposal
            kept += len(proposal)
    return answer, kept


@pytest.mark.parametrize("together", ["auto", "never"])
@pytest.mark.parametrize(("family", "backend"), BACKENDS)
def test_lookahead_is_the_loop_of_its_paper(family, backend, together):
    target, draft, prompt = pair(family, backend)
    for seed in range(3):
        same = Scripted(seed=seed)
        outer = LookaheadReasoning(equivalence=same, segmenter=Uneven(), steps=3, together=together)
        result = Parse(target, draft, outer=outer).generate(prompt, max_new_tokens=NEW)
        expected, kept = lookahead(target, draft, prompt, same, 3)
        assert list(result.tokens) == expected
        assert result.counters.kept_draft_tokens == kept == sum(r.kept_tokens for r in result.rounds)
        assert 0 < kept < NEW
        assert not result.notes
        assert "".join(span.text for span in result.spans) == result.text


@pytest.mark.parametrize("inner", [DraftModel(length=3), Ngram()], ids=["draft_model", "ngram"])
def test_inner_levels_change_nothing_in_lookahead(inner):
    target, draft, prompt = pair()
    same = Scripted(seed=2)
    outer = LookaheadReasoning(equivalence=same, segmenter=Uneven(), steps=3)
    result = Parse(target, draft, outer=outer, inner=inner).generate(prompt, max_new_tokens=NEW)
    assert list(result.tokens) == lookahead(target, draft, prompt, same, 3)[0]
    assert any("inner speculator" in note for note in result.notes)


@pytest.mark.parametrize("together", ["auto", "never"])
def test_lookahead_of_a_model_with_itself_keeps_all_proposals(tiny_target, together):
    prompt, tokens = tiny.plain_answer(tiny_target)
    target = tiny.with_end_token(tiny_target, tokens[25])
    end = tokens.index(tokens[25]) + 1
    outer = LookaheadReasoning(equivalence=EqualText(), segmenter=GRID, steps=3, together=together)
    result = Parse(target, target, outer=outer).generate(prompt, max_new_tokens=NEW)
    assert list(result.tokens) == tokens[:end]
    assert result.stop is StopReason.END_TOKEN
    assert all(segment.kept for r in result.rounds for segment in r.segments)
    # a round is three proposals and the target's own step behind them, unless the answer ends before
    assert [r.kept_tokens for r in result.rounds] == [min(12, end - start) for start in range(0, end, 16)]


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_a_batch_saves_calls_and_not_rows(backend):
    target, _, prompt = pair(backend=backend)
    calls, rows = [], []
    for together in ("auto", "never"):
        outer = LookaheadReasoning(equivalence=EqualText(), segmenter=GRID, steps=3, together=together)
        counters = Parse(target, target, outer=outer).generate(prompt, max_new_tokens=NEW).counters
        calls.append(counters.target_calls)
        rows.append(counters.target_rows)
    assert calls[0] < 0.5 * calls[1]
    assert rows[0] >= rows[1]


def test_a_batch_does_not_move_the_target_out_of_its_buffers(monkeypatch):
    target, draft, prompt = pair(backend="static")
    engine = Parse(target, draft, outer=LookaheadReasoning(equivalence=Scripted(rate=1.1), segmenter=GRID, steps=3))
    engine.generate(prompt, max_new_tokens=1)  # the models' self-tests have sessions, too
    moved, move = [], Lease._move
    monkeypatch.setattr(Lease, "_move", lambda lease, count: moved.append(lease) or move(lease, count))
    result = engine.generate(prompt, max_new_tokens=NEW)
    assert len(result.rounds) > 1
    ours = [lease for lease in moved if lease.pool is machine_of(target).pool]
    assert len(ours) > 3, "branches have buffers of their own"
    assert sum(lease is ours[0] for lease in ours) == 1, "the target's own, when it reads the prompt"


def test_a_step_that_closes_the_answer_stands_only_if_both_close_it(tiny_target):
    """The target's own ending is the answer's; a drafted one that the target does not write is refused."""
    prompt, tokens = tiny.plain_answer(tiny_target)
    ends = tiny.with_end_token(tiny_target, tokens[9])
    never = tiny.with_end_token(tiny_target, next(t for t in range(5, tiny.VOCAB) if t not in tokens))
    outer = LookaheadReasoning(equivalence=Scripted(rate=1.1), segmenter=GRID, steps=4)
    cut = tokens.index(tokens[9]) + 1
    closed = Parse(ends, never, outer=outer).generate(prompt, max_new_tokens=NEW)
    assert list(closed.tokens) == tokens[:cut]
    assert closed.stop is StopReason.END_TOKEN
    open_ = Parse(never, ends, outer=outer).generate(prompt, max_new_tokens=NEW)
    assert list(open_.tokens) == tokens[:NEW]


@pytest.mark.parametrize("outer", [
    SpecReason(judge=tiny.ScriptedJudge(seed=3), segmenter=GRID, threshold=0.4),
    LookaheadReasoning(equivalence=Scripted(), segmenter=GRID),
    Cascade(judge=tiny.ScriptedJudge(value=0.0), threshold=0.5),
], ids=["specreason", "lookahead", "cascade"])  # fmt: skip
def test_peers_fill_a_short_context(outer, tiny_draft):
    prompt, _ = tiny.plain_answer(tiny.model("llama"))
    for spare in (1, 6, 13):
        target = tiny.model("llama", context_limit=len(prompt) + spare)
        result = Parse(target, tiny_draft, outer=outer).generate(prompt, max_new_tokens=NEW)
        assert (result.new_tokens, result.stop) == (spare, StopReason.CONTEXT_LIMIT)


@pytest.mark.parametrize("peer", ["specreason", "lookahead"])
def test_peers_with_different_tokenizers(peer):
    target, letters = pair()[0], tiny.model("llama", seed=9, layers=2)
    draft = LanguageModel.wrap(letters.hf, tiny.letters(), name="letters")
    kept = checked = 0
    for seed in range(3):
        outer = (
            SpecReason(judge=tiny.ScriptedJudge(seed=seed), segmenter=GRID, threshold=0.4)
            if peer == "specreason" else LookaheadReasoning(equivalence=Scripted(seed), segmenter=GRID)
        )  # fmt: skip
        result = Parse(target, draft, outer=outer).generate("w1w2w3?w4", max_new_tokens=NEW)
        prompt = target.encode("<|user|>w1w2w3?w4<|end|><|assistant|>")
        with torch.inference_mode():
            logits = target.hf(input_ids=torch.tensor([[*prompt, *result.tokens]]), use_cache=False).logits[0]
        for span in result.spans:
            if span.author is Author.TARGET:
                own = logits[len(prompt) + span.start - 1 : len(prompt) + span.stop - 1].argmax(-1)
                assert own.tolist() == list(result.tokens[span.start : span.stop])
                checked += len(own)
        kept += result.counters.kept_draft_tokens
    assert kept > 0
    assert checked > 0


def test_steps_that_are_lines():
    """Line ends are tokens of the text: nothing is lost or doubled where authors change."""
    target, draft, _ = pair()
    lines = Lines(max_tokens=6)
    prompt = [9, 30, 12, 9]
    judge = tiny.ScriptedJudge(value=1.0)
    kept = Parse(target, draft, outer=SpecReason(judge=judge, segmenter=lines, threshold=0.5))
    assert list(kept.generate(prompt, max_new_tokens=NEW).tokens) == continued(draft, prompt, NEW)
    refused = Parse(target, draft, outer=SpecReason(judge=tiny.ScriptedJudge(value=0.0), segmenter=lines))
    assert list(refused.generate(prompt, max_new_tokens=NEW).tokens) == continued(target, prompt, NEW)
    differ = Parse(target, draft, outer=LookaheadReasoning(equivalence=Scripted(rate=-1), segmenter=lines))
    assert list(differ.generate(prompt, max_new_tokens=NEW).tokens) == continued(target, prompt, NEW)


# --- the cascade ---


@pytest.mark.parametrize(("score", "threshold", "whole"), [(0.7, 0.6, True), (0.7, 0.8, False), (0.7, None, False)])
def test_a_cascade_keeps_all_or_nothing(tiny_target, tiny_draft, score, threshold, whole):
    prompt, tokens = tiny.plain_answer(tiny_target)
    written = continued(tiny_draft, prompt, NEW)
    end = written.index(written[20]) + 1
    draft, target = (tiny.with_end_token(model, written[20]) for model in (tiny_draft, tiny_target))
    outer = Cascade(judge=tiny.ScriptedJudge(value=score), threshold=threshold)
    result = Parse(target, draft, outer=outer).generate(prompt, max_new_tokens=NEW)
    own = tokens[: tokens.index(written[20]) + 1] if written[20] in tokens[:NEW] else tokens[:NEW]
    assert list(result.tokens) == (written[:end] if whole else own)
    assert result.rounds[0].accepted_whole is whole
    assert len(result.rounds[0].segments) == 1
    assert result.counters.kept_draft_tokens == (end if whole else 0)


def test_a_cascade_asks_once_where_parse_asks_at_every_cut(tiny_target, tiny_draft):
    judge = tiny.ScriptedJudge(value=0.3)
    result = Parse(tiny_target, tiny_draft, outer=Cascade(judge=judge)).generate([9, 30, 12], max_new_tokens=12)
    assert result.counters.judge_passes == 1
    assert result.counters.judge_rows == 12 + judge.bind(tiny_target).suffix_rows
    assert not hasattr(Cascade(), "loop")
    assert Rounds().rounds > 1


# --- do two texts mean the same? ---


def test_equal_texts_and_equal_numbers():
    assert EqualText().compare("So 3 + 4 = 7.\n", "\nso 3+4=7.").score == 1
    assert EqualText().compare("7", "8").score == 0
    number = SameNumber()
    assert number.compare("Tom has 3 + 1,004 = 1,007 coins.", "1004 and 3 make 1007").score == 1
    assert number.compare("so -3.5", "that is 3.5").score == 0
    assert number.compare("none", "another").score == 0
    assert number.compare("none", "No ne").score == 1
    for own, proposed in (("42.0", "The answer is 42."), ("1e-05", "It is 0.00001"), ("5", "see pages 3-5"),
                          ("-5", "x=-5"), ("1e+16", "10,000,000,000,000,000 in all"), ("007", "agent 7"),
                          ("-5", "It is \u22125."), ("5", "see pages 3\u22125")):  # fmt: skip
        assert number.compare(own, proposed).score == 1
    for own, proposed in (("1e+16", "The answer is 16."), ("5", "it is -5"), ("5", "it is \u22125"), ("42.0", "42.01")):
        assert number.compare(own, proposed).score == 0
    assert SameNumber(pattern=r"#(\w+)").compare("#a7, 3", "4 #a7").score == 1, "of a group, what is in it"
    assert SameNumber(pattern=r"(\d)/(\d)").compare("so 1/2", "or 1/2").score == 1
    with pytest.raises(ConfigError, match="regular expression"):
        SameNumber(pattern="(")


def test_the_label_judge_reads_what_a_plain_forward_says(tiny_target, tiny_draft):
    """Asked of the target or of another model, whose forward over the rendered question gives the same score."""
    for model in (None, tiny_draft):
        judge = LabelEquivalence(model=model, question="w1{own}w2{proposed}?", labels=["w7", "w8"]).bind(tiny_target)
        said = judge.compare("w3{proposed}", "\nw4")
        asked = model or tiny_target
        ids = asked.encode("<|user|>w1w3{proposed}w2w4?<|end|><|assistant|>")
        with torch.inference_mode():
            logits = asked.hf(input_ids=torch.tensor([ids])).logits[0, -1]
        pair = torch.stack([logits[tiny.VOCABULARY["w7"]], logits[tiny.VOCABULARY["w8"]]])
        assert said.score == pytest.approx(float(pair.softmax(0)[0]), abs=1e-5)
        assert (said.calls, said.rows) == (1, len(ids))
        assert judge.compare("w3 w4", "W3w4") == Sameness(1.0)
    with pytest.raises(ConfigError, match="once each"):
        LabelEquivalence(question="the same? {own}")


def test_the_passes_of_the_target_as_equivalence_judge_are_counted(tiny_target, tiny_draft):
    label = LabelEquivalence(question="w1{own}w2{proposed}?", labels=["w7", "w8"])
    asked = {}
    for model in (None, tiny_draft):
        outer = LookaheadReasoning(equivalence=dataclasses.replace(label, model=model), segmenter=GRID, threshold=1.0)
        result = Parse(tiny_target, tiny_draft, outer=outer).generate([9, 30, 12], max_new_tokens=8)
        asked[model] = result
        assert result.counters.judge_passes == sum(r.judge_passes for r in result.rounds) > 0
    assert asked[None].counters.target_calls - asked[None].counters.judge_passes == (
        asked[tiny_draft].counters.target_calls
    )
    assert not asked[None].notes
    assert tiny_draft.name in asked[tiny_draft].notes[0]
