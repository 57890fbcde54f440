"""Growing a model: nothing changes at first, the new layer looks back, and frozen layers stay as they are."""

import copy
import dataclasses

import pytest
import torch

import tiny
from parsedec.errors import ConfigError
from parsedec.models.language_model import load
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.training.generation import prompts
from parsedec.training.growth import freeze, grown, renew
from parsedec.training.loop import Trainer
from parsedec.training.packing import Answer, Packer, Row
from parsedec.training.solve_judge import Optimisation, SolveAndJudge


@pytest.fixture(scope="module")
def draft():
    return load("zoo:draft", dtype="float32", device="cpu", attention="eager")


@pytest.fixture(scope="module")
def texts(draft):
    return prompts(draft, ZooArithmetic(n=24).problems())


def test_a_grown_model_says_the_same(draft, texts):
    taller = grown(draft, 2, 0, texts)
    assert taller.num_layers == draft.num_layers + 2
    with torch.inference_mode():
        for text in texts[:3]:
            ids = torch.tensor([text])
            torch.testing.assert_close(taller.hf(ids).logits, draft.hf(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families_grow_as_well(family):
    model = tiny.model(family)
    taller = grown(model, 2, 0, [[2, 20 + i, 30, 40, 3, 9, 12 + i] for i in range(12)])
    assert taller.num_layers == model.num_layers + 2
    with torch.inference_mode():
        ids = torch.tensor([[2, 15, 16, 17, 3, 30]])
        torch.testing.assert_close(taller.hf(ids).logits, model.hf(ids).logits, rtol=0, atol=0)


def test_the_first_new_layer_looks_one_position_back(draft, texts):
    """On texts it was not set up with, most of the attention goes there; random attention would give it 1/n."""
    taller = grown(draft, 1, 0, texts[:16])
    taller.hf.set_attn_implementation("eager")
    shares = []
    with torch.inference_mode():
        for text in texts[16:]:
            attention = taller.hf(torch.tensor([text]), output_attentions=True).attentions[draft.num_layers][0]
            shares.append(attention.diagonal(-1, 1, 2).mean())
    assert sum(shares) / len(shares) > 0.6


def test_frozen_layers_stay(draft):
    model = dataclasses.replace(tiny.model("llama"), hf=copy.deepcopy(tiny.model("llama", layers=3).hf))
    freeze(model, 2)
    before = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    optimisation = Optimisation(steps=2, rate=1e-2, warmup=0)
    trainer = Trainer(SolveAndJudge(model, optimisation, autocast=False), optimisation)
    row = Row((2, 9, 3), (Answer(tuple(range(10, 18)), (4, 8), (True, True), 9, 8),))
    trainer.train([Packer.of(model).pack([row])] * 2)
    changed = {name for name, weight in model.hf.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("layers.2." in name or name in ("model.norm.weight", "lm_head.weight") for name in changed)


def test_control_tokens_begin_anew(draft):
    model = dataclasses.replace(draft, hf=copy.deepcopy(draft.hf))
    before = draft.hf.get_input_embeddings().weight
    renew(model, ["Correct", "Incorrect"], seed=1)
    after = model.hf.get_output_embeddings().weight
    ids = model.tokenizer.convert_tokens_to_ids(["Correct", "Incorrect"])
    assert sorted((before != after).any(1).nonzero()[:, 0].tolist()) == sorted(ids)
    assert abs(torch.cosine_similarity(after[ids[0]], after[ids[1]], dim=0)) < 0.3
    torch.testing.assert_close(after[ids].norm(dim=1), (before.norm(dim=1).median() / 2).expand(2))
    with pytest.raises(ConfigError, match="nowhere"):
        renew(model, ["nowhere"], seed=1)


def test_what_cannot_grow_or_freeze_is_refused(texts):
    with pytest.raises(ConfigError, match="freeze"):
        freeze(tiny.model("llama"), 4)
    with pytest.raises(ConfigError, match="grow"):
        grown(tiny.model("mamba2"), 1, 0, [[5, 6, 7]])
