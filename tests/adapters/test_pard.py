"""PARD: several guesses by one pass over masks, none of which stays in the draft model's cache."""

import copy
import dataclasses

import pytest
import torch

import tiny
from every_draw import largest_error, relative
from parsedec import Parse, Sampling, TargetOnly
from parsedec.errors import IncompatibleStack
from parsedec.sampling import Sampler
from parsedec.types import Outcome, Seen
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.pard import MOST_NEW, Pard

MASK = 4
TEXT = torch.randint(5, tiny.VOCAB, (80,), generator=torch.Generator().manual_seed(3)).tolist()


def greedy():
    return Sampler(Sampling())


def with_pard_token(model, token):
    hf = copy.deepcopy(model.hf)
    hf.config.pard_token = token
    return dataclasses.replace(model, hf=hf)


def separate_guesses(model, text, count):
    """Guess i + 1 by a forward of its own: the text and i masks."""
    with torch.inference_mode():
        return [
            int(model.hf(input_ids=torch.tensor([[*text, *[MASK] * i]])).logits[0, -1].argmax()) for i in range(count)
        ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen3_next", "mamba2"])
def test_guesses_equal_separate_forwards_over_masks(family):
    model = tiny.model(family, seed=7)
    inner = Pard(length=4, mask_token=MASK).bind(tiny.model(family), model)
    state = inner.start(TEXT[:9], Seen(), greedy())
    at = 9
    for stop in (10, 14, 15):  # new tokens that were not guessed: masks must not have stayed behind
        assert list(inner.propose(state, 9).tokens[1:]) == separate_guesses(model, TEXT[:at], 4)
        state = inner.commit(state, Outcome(tuple(TEXT[at:stop]), Seen()))
        at = stop
    assert list(inner.propose(state, 2).tokens[1:]) == separate_guesses(model, TEXT[:15], 2)


def test_one_pass_a_proposal_and_nothing_is_read_twice(tiny_target, tiny_draft):
    inner = Pard(length=4, mask_token=MASK).bind(tiny_target, tiny_draft)
    state = inner.start(TEXT[:9], Seen(), greedy())
    inner.propose(state, 9)
    assert (state.ahead.rows, state.ahead.cached) == (9 + 3, 9)
    state = inner.commit(state, Outcome(tuple(TEXT[9:12]), Seen()))
    inner.propose(state, 9)
    assert (state.ahead.calls, state.ahead.rows, state.ahead.cached) == (1, 3 + 3, 12)


def test_many_new_tokens_are_read_in_a_pass_of_their_own(tiny_target, tiny_draft):
    inner = Pard(length=3, mask_token=MASK).bind(tiny_target, tiny_draft)
    state = inner.start(TEXT[:5], Seen(), greedy())
    inner.propose(state, 3)
    new = tuple(TEXT[5 : 5 + MOST_NEW + 4])
    state = inner.commit(state, Outcome(new, Seen()))
    guesses = inner.propose(state, 3).tokens[1:]
    assert (state.ahead.calls, state.ahead.rows) == (2, len(new) + 2)
    assert list(guesses) == separate_guesses(tiny_draft, [*TEXT[:5], *new], 3)


def test_with_one_guess_it_is_the_draft_model(tiny_target, tiny_draft):
    pard = Pard(length=1, mask_token=MASK).bind(tiny_target, tiny_draft)
    plain = DraftModel(length=1).bind(tiny_target, tiny_draft)
    for n in (1, 5, 12):
        trees = [inner.propose(inner.start(TEXT[:n], Seen(), greedy()), 5) for inner in (pard, plain)]
        assert trees[0].tokens == trees[1].tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_next"])
def test_it_never_changes_tokens(family):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    engine = Parse(model, model, inner=Pard(length=4, mask_token=MASK), outer=TargetOnly())
    counters = (result := engine.generate(prompt, max_new_tokens=len(tokens))).counters
    assert list(result.tokens) == tokens
    assert counters.accepted_by_depth[0] == counters.offered_by_depth[0]  # no mask before the first guess


def test_sampled_text_is_exactly_the_targets(tiny_target):
    inner = Pard(length=2, mask_token=MASK).bind(tiny_target, relative(tiny_target))
    prompt = [13, 48, 45, 36, 38]  # a text on which the second guess, behind a mask, is accepted at times
    assert largest_error(tiny_target, inner, prompt, 3, Sampling(temperature=2.5, top_k=2)) < 1e-5


def test_sampled_guesses_carry_their_distributions(tiny_target, tiny_draft):
    sampler = Sampler(Sampling(temperature=0.9), torch.Generator().manual_seed(0))
    inner = Pard(length=3, mask_token=MASK).bind(tiny_target, tiny_draft)
    tree = inner.propose(inner.start(TEXT[:8], Seen(), sampler), 9)
    with torch.inference_mode():
        logits = tiny_draft.hf(input_ids=torch.tensor([[*TEXT[:8], MASK, MASK]])).logits[0, -3:]
    torch.testing.assert_close(tree.logq[1:], sampler.log_distribution(logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 9])
def test_guesses_stop_at_the_draft_models_context(tiny_target, room):
    model = tiny.model("llama", seed=7, layers=1, context_limit=8 + room)
    inner = Pard(length=4, mask_token=MASK).bind(tiny_target, model)
    state = inner.start(TEXT[:8], Seen(), greedy())
    assert inner.propose(state, 9).size - 1 == min(4, room + 1)
    beyond = inner.commit(state, Outcome(tuple(TEXT[8 : 10 + room]), Seen()))
    assert inner.propose(beyond, 9).size == 1


def test_the_mask_token_comes_from_the_checkpoint(tiny_target, tiny_draft):
    pard = with_pard_token(tiny_draft, 3)
    assert Pard().bind(tiny_target, pard).mask_token == 3
    assert Pard(mask_token=MASK).bind(tiny_target, pard).mask_token == MASK


def test_refusals(tiny_target, tiny_draft):
    with pytest.raises(IncompatibleStack, match="'pard_token'"):
        Pard().bind(tiny_target, tiny_draft)
    with pytest.raises(IncompatibleStack, match="mask token 64"):
        Pard(mask_token=tiny.VOCAB).bind(tiny_target, tiny_draft)
    with pytest.raises(IncompatibleStack, match="mask token 'x'"):
        Pard().bind(tiny_target, with_pard_token(tiny_draft, "x"))
    with pytest.raises(IncompatibleStack, match="vocabulary"):
        Pard(mask_token=MASK).bind(tiny_target, dataclasses.replace(tiny_draft, tokenizer=tiny.letters()))
    with pytest.raises(IncompatibleStack, match=r"inner=pard has no model"):
        Pard(mask_token=MASK).bind(tiny_target, None)
    with pytest.raises(IncompatibleStack, match="bind"):
        Pard(mask_token=MASK).start(TEXT[:4], Seen(), greedy())
