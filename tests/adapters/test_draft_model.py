"""The draft model's dynamic length: where chains end, what they cost, and that the output stays the target's."""

from dataclasses import dataclass

import pytest
import torch

import tiny
from every_draw import largest_error, relative
from parsedec import Parse, Sampling, TargetOnly
from parsedec.errors import ConfigError
from parsedec.sampling import Sampler
from parsedec.types import Outcome, Seen, Tree
from parsedec_adapters.draft_model import DraftModel

PROMPT = [6, 25, 30, 29, 62]
SETTINGS = Sampling(temperature=2.5, top_k=2)
THRESHOLD = 0.5  # with top_k=2, the likelier of two tokens always reaches it


def greedy():
    return Sampler(Sampling())


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_the_chain_ends_behind_the_first_unsure_guess(tiny_target, tiny_draft, threshold):
    inner = DraftModel(length=6, confidence=threshold).bind(tiny_target, tiny_draft)
    text, sure = list(PROMPT), []
    with torch.inference_mode():
        for _ in range(6):
            p = tiny_draft.hf(input_ids=torch.tensor([text])).logits[0, -1].softmax(-1)
            text.append(int(p.argmax()))
            sure.append(float(p.max()) >= threshold)
    length = sure.index(False) + 1 if False in sure else 6
    tree = inner.propose(inner.start(PROMPT, Seen(), greedy()), 6)
    assert list(tree.tokens) == text[len(PROMPT) - 1 : len(PROMPT) + length]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("threshold", [0.05, 0.5, 1.0])
def test_stopping_early_never_changes_tokens(family, threshold):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    drafter = tiny.right_with_probability(model, 0.7)
    inner = DraftModel(length=5, confidence=threshold)
    result = Parse(model, drafter, inner=inner, outer=TargetOnly()).generate(prompt, max_new_tokens=len(tokens))
    assert list(result.tokens) == tokens
    assert sum(result.counters.accepted_by_depth) > 0


def test_sampled_text_with_stopping_is_exactly_the_targets(tiny_target):
    inner = DraftModel(length=2, confidence=THRESHOLD).bind(tiny_target, relative(tiny_target))
    assert largest_error(tiny_target, inner, PROMPT, 3, SETTINGS) < 1e-5


def test_leaving_the_unsure_guess_out_would_be_seen(tiny_target):
    """The check can fail: which draws are offered must not depend on the draw."""

    @dataclass(frozen=True, kw_only=True)
    class Withholding(DraftModel):
        def propose(self, state, budget):
            tree = super().propose(state, budget)
            logq = tree.logq
            if tree.size > 1 and float(logq[-1, tree.tokens[-1]].exp()) < self.confidence:
                return Tree.chain(tree.tokens[:-1], logq[:-1] if tree.size > 2 else None)
            return tree

    inner = Withholding(length=2, confidence=THRESHOLD).bind(tiny_target, relative(tiny_target))
    assert largest_error(tiny_target, inner, PROMPT, 3, SETTINGS) > 0.05


def test_accepted_guesses_are_not_read_again(tiny_target, tiny_draft):
    inner = DraftModel(length=3).bind(tiny_target, tiny_draft)
    state = inner.start(PROMPT, Seen(), greedy())
    guesses = inner.propose(state, 3).tokens[1:]
    state = inner.commit(state, Outcome((*guesses, 20), Seen()))
    inner.propose(state, 3)
    # the last guess, the token the target added, and two of the three new guesses
    assert (state.ahead.calls, state.ahead.rows) == (3, 4)


@pytest.mark.parametrize("confidence", [0, -0.1, 1.5])
def test_a_threshold_that_is_no_probability_is_refused(confidence):
    with pytest.raises(ConfigError, match=r"inner\.confidence"):
        DraftModel(confidence=confidence)
