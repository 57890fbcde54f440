"""Tensor parallelism: several processes share one target, each with a part of every layer. What they must agree on.

Every rank runs the whole engine. Only the target's matrix products are divided, and their sums have the same bits on
all ranks. So all ranks make the same decisions, as long as they are given the same request and draw the same random
numbers. If they did not, their next passes would differ, and they would wait for each other forever or mix two texts:

    requests and passes    are compared: prompt, limits and settings, then the tokens of every pass (`check_same`)
    random numbers         every rank's generator starts from the first rank's state (`share_generator`)
    clocks                 differ, so no decision may depend on them (`check_gate`)
"""

from __future__ import annotations

import hashlib
import os

import torch
import torch.distributed as dist

from parsedec.errors import IncompatibleStack, PromptError
from parsedec.gate import Adaptive


def leading() -> bool:
    """Whether this process writes the files of a run: the first of those that `torchrun` started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def check_gate(gate: object) -> None:
    """Raise IncompatibleStack for a gate that decides by this process' clock. For targets that several share."""
    if isinstance(gate, Adaptive) and gate.cost_per_token is None:
        raise IncompatibleStack(
            "the target is shared by several processes (tp_plan), and gate=adaptive measures what a drafted token "
            "costs: each process would decide by its own clock, and they would part. Set gate.cost_per_token (a run of "
            "one process shows the value: seconds per drafted token over seconds per decoded one), or use gate=always."
        )


def check_same(model: str, device: torch.device, what: object) -> None:
    """Raise PromptError, on every rank, unless all ranks are at the same request, or at the same pass of it.

    model   the name of the target they share, for the message
    device  where its forwards run. Each rank sends one number, next to the two vectors per layer that a pass sends
    what    the request or pass: anything whose `repr` tells it from others
    """
    told = hashlib.sha256(repr(what).encode()).digest()[:7]
    mine = int.from_bytes(told, "big")
    both = torch.tensor([mine, -mine], device=device)  # [2]: the least, and the most with its sign turned
    dist.all_reduce(both, dist.ReduceOp.MIN)
    if both.tolist() != [mine, -mine]:
        raise PromptError(
            f"{model} is shared by {dist.get_world_size()} processes (tp_plan), and they are not at the same "
            "request. Give every rank the same prompts, limits and sampling settings in the same order, and the same "
            "draft model on the same kind of device."
        )


def share_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Set `generator` to the state of the first rank's, which is sent by way of `device`."""
    if generator is None:
        return
    state = generator.get_state().to(device)
    dist.broadcast(state, src=0)
    generator.set_state(state.cpu())
