"""What a right computation may differ by, and what a wrong one does."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import tiny
from parsedec.models.language_model import LanguageModel
from parsedec.sessions.reference import excess, plain_logits, random_tokens
from parsedec.static.session import StaticSession

FULL = 5120  # hidden size of the model whose depth this one has


@pytest.mark.parametrize("seed", range(2))
def test_a_deep_model_in_half_precision_is_told_from_one_that_has_lost_a_token(seed):
    """64 layers, each as loud as one of full width with the usual initialisation."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=20_000, hidden_size=128, intermediate_size=384, num_hidden_layers=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.02 * (FULL / 128) ** 0.5, tie_word_embeddings=False,
    )  # fmt: skip
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model = LanguageModel.wrap(hf, tiny.tokenizer(), name="deep")
    ids = random_tokens(model, 9, 0)
    session = StaticSession(model)
    session.feed(ids[:6])
    ours = torch.stack([session.feed(ids[6:8]), session.feed(ids[8:])])
    plain, lost = plain_logits(model, ids, last=2), plain_logits(model, ids[1:], last=2)
    assert float((ours - plain).abs().max()) > 0.1 * float(plain.std()), "rounding that is not looked at"
    assert excess(model, ours, plain) is None
    assert excess(model, lost, plain) > float(plain.std())
    assert excess(model, torch.stack([plain[0], lost[1]]), plain) > float(plain.std()), "one row is enough"
    # a third of what is allowed at most, so that other kernels' rounding has room, too
    assert excess(model, plain + 3 * (ours - plain), plain) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_computations_may_differ_nowhere(dtype):
    model = SimpleNamespace(dtype=dtype)
    plain = torch.randn(2, 1000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert excess(model, plain + 1e-4, plain) is None
    one = plain.clone()
    one[1, 7] += 0.1
    assert excess(model, one, plain) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_is_an_error(dtype):
    model, plain = SimpleNamespace(dtype=dtype), torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert excess(model, plain.clone().fill_(torch.nan), plain) is not None
