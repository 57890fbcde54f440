"""Logits to a distribution, against plain numpy and against transformers; and tokens that repeat with the seed."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from parsedec.errors import ConfigError, LogitsError
from parsedec.sampling import Sampler, check_numbers, checked_token, request_generator, token_at
from parsedec.types import Sampling

SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.3),
    dict(temperature=2.5),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.0, top_k=5),
    dict(temperature=0.7, top_k=1000),
    dict(temperature=1.0, top_p=0.9),
    dict(temperature=1.0, top_p=1e-6),
    dict(temperature=0.8, top_p=0.5, top_k=7),
    dict(temperature=1.5, top_p=0.95, top_k=3),
]
EVERY = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def logits(rows=8, vocabulary=50, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def seeded(settings, seed=0):
    return Sampler(Sampling(**settings), torch.Generator().manual_seed(seed))


def expected(row, temperature, top_p=1.0, top_k=0):
    """The distribution of one row, token by token from the likeliest down."""
    row = row.double().numpy() / temperature
    order = np.argsort(-row)
    if top_k:
        order = order[:top_k]
    weights = np.exp(row[order] - row[order].max())
    weights /= weights.sum()
    kept = 1 + int(np.searchsorted(np.cumsum(weights), top_p)) if top_p < 1 else len(order)
    p = np.zeros_like(row)
    p[order[:kept]] = weights[:kept] / weights[:kept].sum()
    return p


@EVERY
def test_distribution_equals_a_plain_computation(settings):
    rows = logits()
    p = seeded(settings).log_distribution(rows).exp().double().numpy()
    np.testing.assert_allclose(p, [expected(row, **settings) for row in rows], rtol=1e-4, atol=1e-7)


@EVERY
def test_distribution_equals_transformers(settings):
    rows = logits(seed=1)
    warped = TemperatureLogitsWarper(settings["temperature"])(None, rows)
    if settings.get("top_k"):
        warped = TopKLogitsWarper(settings["top_k"])(None, warped)
    if settings.get("top_p", 1.0) < 1:
        warped = TopPLogitsWarper(settings["top_p"])(None, warped)
    torch.testing.assert_close(seeded(settings).log_distribution(rows), warped.log_softmax(-1), rtol=1e-5, atol=1e-5)


@EVERY
def test_rows_do_not_touch_each_other(settings):
    rows = logits(seed=2)
    together = seeded(settings).log_distribution(rows)
    for row, alone in zip(together, rows, strict=True):
        torch.testing.assert_close(row, seeded(settings).log_distribution(alone))


def test_half_precision_is_computed_in_float32():
    rows = logits().bfloat16()
    got = seeded(dict(temperature=0.7)).log_distribution(rows)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, seeded(dict(temperature=0.7)).log_distribution(rows.float()))


def test_logits_are_not_changed():
    rows = logits()
    before = rows.clone()
    seeded(dict(temperature=0.8, top_p=0.5, top_k=3)).log_distribution(rows)
    assert torch.equal(rows, before)


@EVERY
def test_same_seed_same_tokens(settings):
    rows = logits(rows=30)
    first, second, other = (
        [sampler.pick(row) for row in rows] for sampler in (seeded(settings), seeded(settings), seeded(settings, 1))
    )
    assert first == second
    single = settings.get("top_k") == 1 or settings.get("top_p") == 1e-6
    assert (first == other) == single
    assert not single or first == rows.argmax(-1).tolist()


def test_the_first_token_stays_however_small_top_p_is():
    """1e-46 is 0 in float32."""
    sampler = seeded({"temperature": 1.0, "top_p": 1e-46})
    assert sampler.log_distribution(logits()).exp().argmax(-1).tolist() == logits().argmax(-1).tolist()
    assert sampler.pick(logits()[0]) == int(logits()[0].argmax())


def test_tokens_that_are_filtered_out_are_never_drawn():
    row = logits(rows=1)[0]
    sampler = seeded(dict(temperature=3.0, top_k=4))
    drawn = {sampler.pick(row) for _ in range(300)}
    assert drawn == set(row.topk(4).indices.tolist())


@pytest.mark.parametrize("beside", [True, False], ids=["generator_there", "generator_elsewhere"])
def test_draws_follow_the_distribution(beside, monkeypatch):
    """Chi-square over 6 tokens, 6,000 draws, fixed seed. A right sampler would exceed 40 once in 10^6 seeds."""
    monkeypatch.setattr(Sampler, "_is_beside", lambda *_: beside)
    p = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    sampler = seeded(dict(temperature=1.0))
    counts = np.bincount([sampler.draw(p) for _ in range(6000)], minlength=6)
    wanted = 6000 * p.numpy()
    assert ((counts - wanted) ** 2 / wanted).sum() < 40


def test_a_share_of_the_mass_is_a_token():
    """Ranges add up to the distribution, scaled or not; what has no mass is never hit."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for scale in (1.0, 3.0):
        found = [int(token_at(scale * p, share)) for share in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24)]
        assert found == [1, 1, 3, 3, 4, 4]
    assert int(token_at(p * torch.nan, 0.5)) == len(p)
    rare = torch.tensor([1.0, 2**-30, 2**-30])  # two tokens within less than a step of single precision
    shares = torch.linspace(1 - 2**-29, 1 - 2**-53, 40, dtype=torch.float64).tolist()
    assert {int(token_at(rare, share)) for share in shares} == {1, 2}
    with pytest.raises(LogitsError, match="not numbers"):
        checked_token(len(p), len(p))


@pytest.mark.parametrize("beside", [True, False], ids=["generator_there", "generator_elsewhere"])
def test_what_is_no_number_cannot_be_drawn_from(beside, monkeypatch):
    monkeypatch.setattr(Sampler, "_is_beside", lambda *_: beside)
    sampler = seeded(dict(temperature=1.0))
    for wrong in (torch.nan, torch.inf):
        row = torch.tensor([0.5, wrong, 1.0])
        assert int(sampler.chosen(row)) == len(row)
        with pytest.raises(LogitsError, match="dtype=bfloat16 or float32"):
            sampler.pick(row)


def test_other_errors_of_a_draw_stay_what_they_are():
    with pytest.raises(RuntimeError, match="prob_dist"):
        seeded(dict(temperature=1.0)).draw(torch.tensor([]))


def test_logits_behind_the_prompt_have_to_be_numbers():
    check_numbers(torch.tensor([0.5, -torch.inf]), "m")  # what cannot be chosen is no mistake
    check_numbers(torch.empty(0), "a model on a server")
    for wrong in ([0.5, torch.nan], [0.5, torch.inf], [-torch.inf] * 2):
        with pytest.raises(LogitsError, match="logits of m behind the prompt are not numbers"):
            check_numbers(torch.tensor(wrong), "m")


def test_a_token_that_stays_on_the_device_is_the_one_that_is_picked(monkeypatch):
    for beside in (True, False):
        monkeypatch.setattr(Sampler, "_is_beside", lambda *_, beside=beside: beside)
        for settings in (dict(), dict(temperature=1.0, top_k=5), dict(temperature=0.7, top_p=0.9)):
            one, other = seeded(settings), seeded(settings)
            for row in logits(rows=20):
                token = one.chosen(row)
                assert (token.shape, int(token)) == ((), other.pick(row))


def test_uniform_numbers_come_from_the_generator():
    numbers = [seeded(dict(temperature=1.0), seed).uniform() for seed in (0, 0, 1)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert all(0 <= number < 1 for number in numbers)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seeded(dict(temperature=1.0)).pick(logits()[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_takes_the_best_token_and_needs_no_generator():
    sampler = Sampler(Sampling())
    assert sampler.greedy
    assert [sampler.pick(row) for row in logits()] == logits().argmax(-1).tolist()


def test_sampling_needs_a_generator():
    with pytest.raises(ConfigError, match="Generator"):
        Sampler(Sampling(temperature=1.0))


def test_every_request_of_every_seed_has_its_own_generator():
    seeds = [request_generator(seed, index).initial_seed() for seed in (0, 1, 2, -1, 2**62) for index in range(200)]
    assert len(set(seeds)) == len(seeds)
    again = [torch.rand(2, generator=request_generator(3, 5)).tolist() for _ in range(2)]
    assert again[0] == again[1]
