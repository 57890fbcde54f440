"""Sampled speculative decoding keeps the target's distribution: by adding up, and once by drawing."""

import dataclasses
import itertools

import pytest
import torch

import tiny
from parsedec import Parse, Sampling, TargetOnly
from parsedec.acceptance import Siblings, Traversal, accept_probability, residual
from parsedec.sampling import Sampler
from parsedec_adapters.draft_model import DraftModel

VOCAB = 5


def distribution(generator, peaked=1.0):
    return (torch.randn(VOCAB, generator=generator, dtype=torch.float64) * peaked).softmax(-1)


def pairs():
    generator = torch.Generator().manual_seed(0)
    yield from (
        (distribution(generator, s), distribution(generator, s)) for s in (0.3, 1.0, 3.0, 8.0) for _ in range(40)
    )
    p = distribution(generator)
    one_hot = torch.eye(VOCAB, dtype=torch.float64)
    yield from ((p, one_hot[i]) for i in range(VOCAB))
    yield from ((one_hot[i], p) for i in range(VOCAB))
    yield from ((one_hot[i], one_hot[j]) for i in range(2) for j in range(2))
    yield p, p
    holes = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=torch.float64)  # top-k leaves such a distribution
    yield from ((p, holes), (holes, p), (holes, holes.flip(0)))


def emitted(p, q, siblings):
    """Distribution of the token the rule emits at one position with `siblings` guesses drawn from q, by enumeration."""
    if siblings == 0:
        return p
    out = torch.zeros(VOCAB, dtype=torch.float64)
    for x in range(VOCAB):
        if q[x] == 0:
            continue
        keep = accept_probability(p, q, x)
        out[x] += q[x] * keep
        if keep < 1:
            out += q[x] * (1 - keep) * emitted(residual(p, q, x), q, siblings - 1)
    return out


@pytest.mark.parametrize("siblings", [1, 2, 3])
def test_drawn_guesses_keep_the_target_distribution(siblings):
    for p, q in pairs() if siblings < 3 else itertools.islice(pairs(), 0, None, 12):
        torch.testing.assert_close(emitted(p, q, siblings), p, rtol=0, atol=1e-12)


def test_certain_guesses_keep_the_target_distribution():
    """A guess without a distribution (top-k trees, n-grams): accepted with p, else taken out of p."""
    for p, _ in pairs():
        for guesses in itertools.permutations(range(VOCAB), 2):
            out, left, reach = torch.zeros(VOCAB, dtype=torch.float64), p, 1.0
            for x in guesses:
                keep = accept_probability(left, None, x)
                out[x] += reach * keep
                reach *= 1 - keep
                left = residual(left, None, x)
            torch.testing.assert_close(out + reach * left, p, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "wrong", [("accept_probability", lambda p, q, x: 1.0), ("residual", lambda p, q, x: p)], ids=lambda wrong: wrong[0]
)
def test_a_wrong_rule_is_seen(wrong, monkeypatch):
    """Accepting every guess, or drawing what replaces one from p instead of the residual, fails the test above."""
    monkeypatch.setitem(globals(), *wrong)
    with pytest.raises(AssertionError):
        test_drawn_guesses_keep_the_target_distribution(1)


@pytest.mark.parametrize("rule", [Siblings(), Traversal()], ids=["siblings", "traversal"])
def test_sampled_text_follows_the_target(rule, tiny_draft):
    """Chi-square of the first two sampled tokens through the whole engine, 1,500 draws, top_k=4: 16 outcomes.

    A correct sampler fails this once in 10^6 seeds; the seed is fixed.
    """
    target, draft = (dataclasses.replace(model, backend="static") for model in (tiny.model("llama"), tiny_draft))
    settings, draws = Sampling(temperature=1.0, top_k=4), 1500
    prompt = [9, 30, 12]
    engine = Parse(target, draft, inner=DraftModel(length=2), acceptance=rule, outer=TargetOnly())
    generator = torch.Generator().manual_seed(5)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        tokens = engine.generate(prompt, max_new_tokens=3, sampling=settings, generator=generator).tokens[1:3]
        counts[tokens] = counts.get(tokens, 0) + 1
    expected = two_token_distribution(target, settings, prompt)
    assert set(counts) <= set(expected)
    likely = {pair: probability for pair, probability in expected.items() if probability * draws >= 5}
    rest = draws - sum(counts.get(pair, 0) for pair in likely), 1 - sum(likely.values())
    cells = [(counts.get(pair, 0), probability) for pair, probability in likely.items()] + (
        [rest] if rest[1] > 0 else []
    )
    statistic = sum((n - draws * p) ** 2 / (draws * p) for n, p in cells)
    freedom = len(cells) - 1
    # Wilson-Hilferty: the cube root of chi-square over its freedom is nearly normal; 4.75 sigma is one in a million
    score = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert freedom >= 8
    assert score < 4.75


def two_token_distribution(target, settings, prompt):
    """Exact probability of (second, third) token, summed over the first."""
    sampler = Sampler(settings, torch.Generator())

    def following(ids):
        with torch.inference_mode():
            p = sampler.log_distribution(target.hf(input_ids=torch.tensor([ids])).logits[0, -1]).exp()
        return {int(i): float(p[i]) for i in p.nonzero().flatten()}

    out: dict[tuple[int, ...], float] = {}
    for a, pa in following(prompt).items():
        if a in target.end_ids:
            continue
        for b, pb in following([*prompt, a]).items():
            if b in target.end_ids:
                out[(b,)] = out.get((b,), 0.0) + pa * pb
                continue
            for c, pc in following([*prompt, a, b]).items():
                out[(b, c)] = out.get((b, c), 0.0) + pa * pb * pc
    return out
