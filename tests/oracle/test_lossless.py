"""The inner level changes speed, never tokens: greedy output equals Hugging Face's own `generate`, token for token.

Drafters are right with a stated probability; the number of target calls is asserted too, since a decoder that never
accepts is lossless as well.
"""

import pytest
import torch

import tiny
from eagle3_heads import taught_head
from every_draw import relative
from medusa_heads import taught_heads
from parallel_heads import new_head, teach
from parsedec import Parse, Sampling, StopReason, TargetOnly
from parsedec.types import Seen
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.early_exit import SelfEarlyExit
from parsedec_adapters.hf_assisted import HfAssisted
from parsedec_adapters.medusa import Medusa
from parsedec_adapters.ngram import Ngram
from parsedec_adapters.parallelspec import ParallelSpec
from parsedec_adapters.pard import Pard
from parsedec_adapters.scripted import Scripted

NEW = 48


def generated(model, prompt, inner=None, draft=None, new=NEW, **options):
    return Parse(model, draft, inner=inner, outer=TargetOnly()).generate(prompt, max_new_tokens=new, **options)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_decoding_equals_generate(family):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    result = generated(model, prompt)
    assert list(result.tokens) == tokens
    # the prefill gives the first token, and every other token costs one call
    assert result.counters.target_calls == len(tokens)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_scripted_guesses_never_change_tokens(tiny_target, rate, depth):
    prompt, tokens = tiny.plain_answer(tiny_target)
    result = generated(tiny_target, prompt, Scripted(answer=(*prompt, *tokens), rate=rate, depth=depth))
    assert list(result.tokens) == tokens
    steps = result.counters.inner_steps
    assert result.counters.target_calls == 1 + steps
    if rate == 1.0:
        assert steps == -(-(len(tokens) - 1) // (depth + 1))
    if rate == 0.0:
        assert steps == len(tokens) - 1
    assert sum(result.counters.accepted_by_depth) == len(tokens) - 1 - steps


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mixtral", "qwen3_next", "mamba2"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
def test_draft_model_never_changes_tokens(family, rate):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    drafter = tiny.right_with_probability(model, rate)
    result = generated(model, prompt, DraftModel(length=4), draft=drafter)
    assert list(result.tokens) == tokens
    offered, accepted = result.counters.offered_by_depth, result.counters.accepted_by_depth
    share = accepted[0] / offered[0]
    if rate in (0.0, 1.0):
        assert share == rate
    else:
        assert abs(share - rate) < 0.35  # some ten steps only; the point is that it is neither 0 nor 1
    steps = result.counters.inner_steps
    assert steps == len(tokens) - 1 if rate == 0 else steps < len(tokens) - 1
    # recurrent states cannot be cut back: a refusal costs a second call there
    assert 1 + steps <= result.counters.target_calls <= 1 + steps * (2 if model.recurrent else 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_next"])
def test_prompt_lookup_never_changes_tokens(family):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    repeated = [*prompt, *tokens, *prompt]  # so that there is something to look up
    expected, margin = tiny.greedy(model, repeated, NEW)
    assert margin > 1e-5
    result = generated(model, repeated, Ngram(length=4, longest=3, shortest=1))
    assert list(result.tokens) == expected
    assert sum(result.counters.offered_by_depth) > 0


@pytest.mark.parametrize(
    ("family", "tree"),
    [("llama", "mc_sim_7b_63"), ("qwen3", "mc_sim_7b_63"), ("gemma3", "vicuna_7b_stage2"), ("qwen3_next", "chain")],
)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_medusa_never_changes_tokens(family, tree, share):
    """Heads that know the answer at a share of its places."""
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    result = generated(model, prompt, Medusa(heads=taught_heads(model, prompt, tokens, share=share), tree=tree))
    assert list(result.tokens) == tokens
    steps = result.counters.inner_steps
    if share == 1.0:
        assert steps <= 2 + len(tokens) // 4  # three heads: four tokens a step
    assert share == 0.0 or steps < len(tokens) - 1
    assert sum(result.counters.accepted_by_depth) == len(tokens) - 1 - steps


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("shape", [dict(tokens=24, depth=4, top_k=4), dict(depth=4, top_k=1), {}], ids=str)
@pytest.mark.parametrize("steps", [0, 25], ids=["untaught", "taught"])
def test_eagle3_never_changes_tokens(family, shape, steps):
    """A head that was taught the answer guesses most of it; an untaught one next to nothing."""
    model = tiny.model(family, layers=8)
    prompt, tokens = tiny.plain_answer(model, new=32)
    head = taught_head(model, (*prompt, *tokens), steps)
    result = generated(model, prompt, Eagle3(head=head, **shape), new=32)
    assert list(result.tokens) == tokens
    steps_taken = result.counters.inner_steps
    assert result.counters.target_calls == 1 + steps_taken
    assert sum(result.counters.accepted_by_depth) == len(tokens) - 1 - steps_taken
    if steps:
        assert steps_taken <= len(tokens) // 2


OTHERS = {  # each made for (model, prompt, tokens), with the draft model it uses
    "draft_model until unsure": lambda model, *_: (DraftModel(length=5, confidence=0.1), relative(model, noise=0.1)),
    "hf_assisted": lambda model, *_: (HfAssisted(length=4, confidence=0.1), relative(model, noise=0.1)),
    "pard": lambda model, *_: (Pard(length=4, mask_token=4), model),
    "parallelspec": lambda model, *text: (ParallelSpec(head=teach(new_head(model), model, *text), tokens=12), None),
    "self_early_exit": lambda model, *_: (SelfEarlyExit(layers=3), None),
    "scripted, asking the target": lambda *_: (Scripted(rate=0.8), None),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", OTHERS)
def test_no_speculator_changes_tokens(family, name):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    inner, draft = OTHERS[name](model, prompt, tokens)
    result = generated(model, prompt, inner, draft=draft)
    assert list(result.tokens) == tokens
    steps = result.counters.inner_steps
    assert result.counters.target_calls == 1 + steps
    assert steps < len(tokens) - 1
    assert sum(result.counters.accepted_by_depth) == len(tokens) - 1 - steps


def test_prompt_lookup_finds_the_latest_occurrence():
    inner = Ngram(length=3, longest=2, shortest=1)

    def guesses(*tokens, budget=9):
        return inner.propose(inner.start(tokens, Seen(), None), budget).tokens

    assert guesses(1, 2, 9, 1, 2, 7, 8, 5, 1, 2) == (2, 7, 8, 5)  # both tokens, the later place
    assert guesses(4, 2, 6, 1, 2) == (2, 6, 1, 2)  # the longer end never stood before
    assert guesses(4, 2, 6, 1, 2, budget=1) == (2, 6)
    assert guesses(5, 6, 7) == (7,)
    assert guesses(5) == (5,)
    assert guesses(5, 5, 5) == (5, 5)  # it may overlap itself


def test_end_token_inside_an_accepted_block(tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target)
    end = tokens[9]
    model = tiny.with_end_token(tiny_target, end)
    first = tokens.index(end)
    result = generated(model, prompt, Scripted(answer=(*prompt, *tokens), rate=1.0, depth=7))
    assert list(result.tokens) == tokens[: first + 1]
    assert result.stop is StopReason.END_TOKEN


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
def test_token_limit_inside_a_block(tiny_target, limit):
    prompt, tokens = tiny.plain_answer(tiny_target)
    result = generated(tiny_target, prompt, Scripted(answer=(*prompt, *tokens), rate=1.0, depth=7), new=limit)
    assert list(result.tokens) == tokens[:limit]
    assert result.stop is StopReason.TOKEN_LIMIT


@pytest.mark.parametrize("inner", [None, "scripted"])
def test_context_exactly_full(inner):
    prompt, tokens = tiny.plain_answer(tiny.model("llama"))
    model = tiny.model("llama", context_limit=len(prompt) + 6)
    speculator = Scripted(answer=(*prompt, *tokens), rate=1.0, depth=4) if inner else None
    result = generated(model, prompt, speculator)
    assert list(result.tokens) == tokens[:6]
    assert result.stop is StopReason.CONTEXT_LIMIT


def test_one_token_prompt(tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target, length=1)
    assert list(generated(tiny_target, prompt).tokens) == tokens
    inner = Scripted(answer=(*prompt, *tokens), rate=0.9, depth=3)
    assert list(generated(tiny_target, prompt, inner).tokens) == tokens


def test_stop_string_across_tokens(tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target)
    text = tiny_target.decode(tokens)
    stop = text[10:15]  # spans the border of two words
    inner = Scripted(answer=(*prompt, *tokens), rate=1.0, depth=7)
    result = generated(tiny_target, prompt, inner, stop=[stop])
    assert result.stop is StopReason.STOP_STRING
    assert result.text == text[: text.index(stop)]
    assert list(result.tokens) == tokens[: result.new_tokens]
    assert stop in tiny_target.decode(result.tokens)
    assert stop not in tiny_target.decode(result.tokens[:-1])


def test_sampling_repeats_with_its_seed(tiny_target, tiny_draft):
    settings = Sampling(temperature=0.8, top_p=0.9)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        engine = Parse(tiny_target, tiny_draft, inner=DraftModel(length=3), outer=TargetOnly())
        return engine.generate([9, 30, 12], max_new_tokens=NEW, sampling=settings, generator=generator).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_streamed_text_is_the_answer(tiny_target, tiny_draft):
    engine = Parse(tiny_target, tiny_draft, inner=DraftModel(length=3), outer=TargetOnly())
    deltas = list(engine.stream([9, 30, 12], max_new_tokens=NEW))
    assert "".join(d.text for d in deltas) == deltas[-1].result.text
    assert sum((d.tokens for d in deltas), ()) == deltas[-1].result.tokens
