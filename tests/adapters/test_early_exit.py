"""Early exit: the first layers of the target draft. Nothing is copied, and the target stays as it was."""

import dataclasses
import types

import pytest
import torch

import tiny
from every_draw import largest_error
from parsedec import Parse, Sampling, TargetOnly
from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.sampling import Sampler
from parsedec.types import Seen
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.early_exit import SelfEarlyExit, truncated

PROMPT = [9, 30, 12, 44, 17]
FAMILIES = ["llama", "qwen3", "gemma3", "lfm2", "mamba2"]


def head_on_layer(model, text, layers):
    """The target's norm and output matrix on its own hidden state behind `layers` layers, [V]."""
    with torch.inference_mode():
        hidden = model.hf(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[layers]
        return model.hf.lm_head(model.hf.base_model.norm(hidden))[0, -1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("layers", [2, 3])
def test_guesses_are_those_of_the_hidden_states(family, layers):
    model = tiny.model(family)
    inner = SelfEarlyExit(layers=layers, length=3).bind(model, None)
    text = list(PROMPT)
    for _ in range(3):
        text.append(int(head_on_layer(model, text, layers).argmax()))
    tree = inner.propose(inner.start(PROMPT, Seen(), Sampler(Sampling())), 9)
    assert list(tree.tokens) == text[len(PROMPT) - 1 :]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_never_changes_tokens(family):
    model = tiny.model(family)
    prompt, tokens = tiny.plain_answer(model)
    result = Parse(model, inner=SelfEarlyExit(layers=3), outer=TargetOnly()).generate(
        prompt, max_new_tokens=len(tokens)
    )
    assert list(result.tokens) == tokens
    assert result.counters.accepted_by_depth[0] > 0


def test_sampled_text_is_exactly_the_targets(tiny_target):
    inner = SelfEarlyExit(layers=3, length=2).bind(tiny_target, None)
    settings = Sampling(temperature=2.5, top_k=3)
    assert largest_error(tiny_target, inner, PROMPT, 2, settings) < 1e-5


def test_weights_are_shared_and_the_target_is_untouched():
    model = tiny.model("llama")
    before = model.hf(input_ids=torch.tensor([PROMPT])).logits
    short = truncated(model, 1)
    own, whole = dict(short.hf.named_parameters()), dict(model.hf.named_parameters())
    assert len(own) < len(whole)
    assert all(own[name] is whole[name] for name in own)
    assert (short.num_layers, model.num_layers) == (1, 4)
    assert len(model.hf.model.layers) == 4
    assert torch.equal(model.hf(input_ids=torch.tensor([PROMPT])).logits, before)


def test_a_quarter_of_the_layers_by_default(tiny_target):
    assert SelfEarlyExit().bind(tiny_target, None).layers == 1
    assert SelfEarlyExit().bind(tiny.model("llama", layers=9), None).layers == 2


@pytest.mark.parametrize("layers", [4, 5])
def test_as_many_layers_as_the_target_has_are_refused(tiny_target, layers):
    with pytest.raises(IncompatibleStack, match=r"has 4; expected inner\.layers from 1 to 3"):
        SelfEarlyExit(layers=layers).bind(tiny_target, None)


def test_settings_are_checked():
    for wrong in (0, -1, 1.5):
        with pytest.raises(ConfigError, match=r"inner\.layers"):
            SelfEarlyExit(layers=wrong)
    with pytest.raises(ConfigError, match=r"inner\.length"):
        SelfEarlyExit(length=0)
    with pytest.raises(ConfigError, match=r"inner\.confidence"):
        SelfEarlyExit(confidence=2)


def test_a_model_that_cannot_be_cut_is_refused_by_name(tiny_target):
    with pytest.raises(IncompatibleStack, match="first 1 of 4 layers cannot be decoded"):
        SelfEarlyExit(layers=1).bind(tiny.model("qwen3_next"), None)  # its first layer counts no positions
    with pytest.raises(IncompatibleStack, match=r"forward of .* was replaced"):
        SelfEarlyExit(layers=1).bind(tiny.right_with_probability(tiny_target, 0.5), None)
    strange = types.SimpleNamespace(config=tiny_target.hf.config, base_model=types.SimpleNamespace(h=[1, 2, 3, 4]))
    with pytest.raises(IncompatibleStack, match="keeps them elsewhere"):
        truncated(dataclasses.replace(tiny_target, hf=strange), 1)


def test_it_composes_with_a_draft_model_of_its_own(tiny_target, tiny_draft):
    """The draft model of PARSE may draft for itself, too: the two levels do not get into each other's way."""
    prompt, tokens = tiny.plain_answer(tiny_target)
    engine = Parse(
        tiny_target, tiny.model("llama", seed=7), inner=SelfEarlyExit(layers=2), draft_inner=SelfEarlyExit(layers=1),
        judge=tiny.ScriptedJudge(value=0.0),
    )  # fmt: skip
    assert list(engine.generate(prompt, max_new_tokens=len(tokens)).tokens) == tokens
    assert isinstance(engine.inner.drafter, DraftModel)
