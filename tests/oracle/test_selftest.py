"""Models that take a cache or a mask and do not honour it are found out when the stack is built."""

import copy
import dataclasses
import functools

import pytest
import torch

import tiny
from parsedec import LabelJudge, Parse, TargetOnly
from parsedec.batching.joint import joint_obstacle
from parsedec.errors import IncompatibleStack
from parsedec.models.findings import short_of_memory
from parsedec.sessions.backends import runs_static
from parsedec.sessions.selftest import check_decoding
from parsedec.static.session import StaticSession
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


SHORT = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": lambda: torch.empty(1 << 50, dtype=torch.uint8),
    "Python": lambda: bytearray(1 << 60),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


def shortage(where):
    """An error that says so, as torch and Python raise it."""
    try:
        error = SHORT[where]()
    except (RuntimeError, MemoryError) as raised:
        return raised
    assert isinstance(error, RuntimeError)
    return error


def fails_once(error, wanted=lambda arguments: True):
    """A change of a forward that raises at the first call that is `wanted`, and a list that is empty afterwards."""
    left = [error]

    def change(plain, arguments):
        if left and wanted(arguments):
            raise left.pop()
        return plain(**arguments)

    return change, left


@pytest.mark.parametrize("where", list(SHORT))
def test_a_want_of_memory_is_raised_and_not_remembered(tiny_target, where):
    error = shortage(where)
    model = altered(tiny_target, fails_once(error)[0])
    with pytest.raises(type(error)) as raised:
        Parse(model, outer=TargetOnly())
    assert raised.value is error
    assert Parse(model, outer=TargetOnly()).generate([5, 6], max_new_tokens=4).new_tokens == 4


def test_a_want_of_memory_does_not_choose_the_path_of_a_judge(tiny_target):
    def masked(arguments):
        return getattr(arguments.get("attention_mask"), "ndim", 0) == 4

    change, left = fails_once(torch.OutOfMemoryError("no room for the mask"), masked)
    model = altered(tiny_target, change)
    with pytest.raises(torch.OutOfMemoryError):
        LabelJudge(question="?").bind(model)
    assert not left
    assert LabelJudge(question="?").bind(model).chosen is JudgePath.PACKED


def test_a_want_of_memory_does_not_part_the_requests_of_a_batch(tiny_target):
    change, left = fails_once(torch.OutOfMemoryError("no room"), lambda arguments: "joint_rows" in arguments)
    model = altered(tiny_target, change)
    with pytest.raises(torch.OutOfMemoryError):
        joint_obstacle(model)
    assert not left
    assert joint_obstacle(model) is None


def test_a_want_of_memory_does_not_choose_the_backend(monkeypatch):
    model = dataclasses.replace(tiny.model("llama", seed=23), backend="auto")

    def run(*_, **__):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as short:
        short.setattr(StaticSession, "run", run)
        with pytest.raises(torch.OutOfMemoryError):
            runs_static(model)
    assert runs_static(model)


def test_what_a_model_cannot_do_is_tried_once(tiny_target):
    calls = []

    def refuses(plain, arguments):
        calls.append(arguments)
        raise TypeError("no such thing")

    model = altered(tiny_target, refuses)
    for _ in range(2):
        with pytest.raises(IncompatibleStack, match="raises TypeError: no such thing"):
            check_decoding(model)
        assert joint_obstacle(model) == "a forward that raises TypeError: no such thing"
    assert len(calls) == 2


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), RuntimeError("shape '[2, 3]' is invalid for input of size 5"), KeyError()]
)
def test_other_errors_are_no_want_of_memory(error):
    assert not short_of_memory(error)
