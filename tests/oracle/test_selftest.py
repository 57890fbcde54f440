"""Models that take a cache or a mask and do not honour it are found out when the stack is built."""

import copy
import dataclasses
import functools

import pytest

import tiny
from parsedec import LabelJudge, Parse, TargetOnly
from parsedec.errors import IncompatibleStack
from parsedec.selftest import check_decoding
from parsedec.types import JudgePath


def altered(model, change):
    """A copy of `model` whose forward is `change(plain forward, arguments)`."""
    hf = copy.deepcopy(model.hf)
    plain = hf.forward

    @functools.wraps(plain)
    def forward(**arguments):
        return change(plain, arguments)

    hf.forward = forward
    return dataclasses.replace(model, hf=hf)


def forgets_the_cache(plain, arguments):
    return plain(**{**arguments, "past_key_values": None})


def refuses_masks(plain, arguments):
    if getattr(arguments.get("attention_mask"), "ndim", 0) == 4:
        raise TypeError("a mask of four dimensions")
    return plain(**arguments)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_family_passes(family):
    assert check_decoding(tiny.model(family)) is None


def test_a_cache_that_is_ignored_is_found(tiny_target):
    with pytest.raises(IncompatibleStack, match=r"cannot be decoded behind a cache.*plain forwards"):
        Parse(altered(tiny_target, forgets_the_cache), outer=TargetOnly())


def test_state_on_the_module_is_found(tiny_target):
    """Two requests in turn share what the module remembers."""
    memory = {}

    def one_cache_for_all(plain, arguments):
        if arguments.get("use_cache"):
            arguments["past_key_values"] = memory.setdefault("cache", arguments["past_key_values"])
        return plain(**arguments)

    with pytest.raises(IncompatibleStack, match="cannot be decoded behind a cache"):
        check_decoding(altered(tiny_target, one_cache_for_all))


def test_a_model_that_refuses_masks_is_judged_as_a_batch(tiny_target):
    bound = LabelJudge(question="?").bind(altered(tiny_target, refuses_masks))
    assert bound.chosen is JudgePath.FORKED
    assert "a mask of four dimensions" in bound.reason
    with pytest.raises(IncompatibleStack, match="four dimensions"):
        LabelJudge(question="?", path="packed").bind(altered(tiny_target, refuses_masks))
