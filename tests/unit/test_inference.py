"""Inference mode that is entered once, and tensors of whole numbers."""

import pytest
import torch

from parsedec.sessions.inference import inference, whole_numbers


def test_a_call_runs_in_inference_mode_and_leaves_it_as_it_was():
    @inference
    def doubled(x, *, more=0):
        assert torch.is_inference_mode_enabled()
        return 2 * x + more

    weight = torch.ones(3, requires_grad=True)
    assert doubled(weight, more=1).is_inference()
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        assert doubled(weight).tolist() == [2.0] * 3
        assert torch.is_inference_mode_enabled()


def test_inference_mode_ends_with_an_error():
    @inference
    def broken():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("values", [[], [7], (3, -1, 1 << 40), list(range(300))], ids=len)
def test_whole_numbers_are_what_torch_makes_of_them(values):
    made = whole_numbers(values, torch.device("cpu"))
    assert torch.equal(made, torch.tensor(values, dtype=torch.int64))
    made += 1  # a tensor as any other
    assert made.tolist() == [value + 1 for value in values]
