"""What a request may be given as, and what is said of anything else."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import tiny
from parsedec import Parse
from parsedec.errors import ConfigError, PromptError, shown
from parsedec.text.prompt import messages_of, token_ids

MADE = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.tensor,
    "list of numpy's": lambda ids: list(np.array(ids)),
    "tensor of one row": lambda ids: torch.tensor([ids]),
    "array of one row": lambda ids: np.array([ids]),
    "encoding": lambda ids: BatchEncoding({"input_ids": list(ids)}),
    "encoding of one row": lambda ids: BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}),
    "encoding as a tensor": lambda ids: BatchEncoding({"input_ids": [ids]}, tensor_type="pt"),
    "padded": lambda ids: {"input_ids": torch.tensor([[0, 0, *ids]]), "attention_mask": [[0, 0, *[1] * len(ids)]]},
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_ids_are_taken_as_they_are(made, tiny_target):
    prompt, tokens = tiny.plain_answer(tiny_target)
    assert token_ids(made(prompt)) == prompt
    assert all(type(i) is int for i in token_ids(made(prompt)))
    assert list(Parse(tiny_target).generate(made(prompt), max_new_tokens=8).tokens) == tokens[:8]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"abc", "the prompt is b'abc'"),
        (b"abc" * 99, r"\.\.\. \(bytes\)"),
        (7, "the prompt is 7"),
        (torch.ones(2, 3, dtype=torch.long), "the token ids of one prompt.*generate_batch"),
        (torch.ones(1, 2, 3, dtype=torch.long), "the token ids of one prompt"),
        (torch.tensor(7), "the token ids of one prompt"),
        (BatchEncoding({"input_ids": [[5, 6], [7, 8]]}), "the token ids of one prompt.*generate_batch"),
        (BatchEncoding({"text": "w1"}), "the token ids of one prompt"),
        ([[5, 6]], "is not of the form .*generate_batch"),
        ([True, False], "message True is not of the form"),
        ([1, 2.5], "message 1 is not of the form"),
        ([{"role": "user"}], "is not of the form"),
        ([], "the prompt is empty"),
        ("  ", "the prompt is empty"),
    ],
)
def test_anything_else_is_named(prompt, said, tiny_target):
    assert token_ids(prompt) == []
    with pytest.raises(PromptError, match=said):
        messages_of(prompt)
    with pytest.raises(PromptError, match=said):
        Parse(tiny_target).generate(prompt)


def test_what_a_tokenizer_returns_is_a_prompt(tiny_target, tiny_draft):
    engine = Parse(tiny_target, tiny_draft, judge=tiny.ScriptedJudge())
    plain = engine.generate([10, 11, 12], max_new_tokens=8).tokens
    encoded = tiny_target.tokenizer("w0w1w2", return_tensors="pt")
    assert encoded.input_ids.tolist() == [[10, 11, 12]]
    for prompt in (encoded, encoded.input_ids, tiny_target.tokenizer("w0w1w2")):
        assert engine.generate(prompt, max_new_tokens=8).tokens == plain
    assert engine.generate_batch([encoded], max_new_tokens=8).results[0].tokens == plain


def test_long_values_are_cut():
    assert shown("a" * 500) == "'" + "a" * 76 + "... (str)"
    assert shown("short") == "'short'"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("zoo:target",), r"target is 'zoo:target'; expected a loaded model\. Use load"),
        ((None,), "target is None"),
        ((tiny.model("llama"), "zoo:draft"), r"draft is 'zoo:draft'; expected a loaded model\. Use load"),
    ],
)
def test_names_of_models_are_not_models(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Parse(*arguments)


def test_names_of_speculators_are_not_speculators(tiny_target):
    with pytest.raises(ConfigError, match=r"inner='pard'; expected an object.*command line: inner=pard"):
        Parse(tiny_target, inner="pard")
