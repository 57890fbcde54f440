"""The stand-in for CUDA graphs does what a graph does, also where that is not what was meant."""

import pytest
import torch

from cuda_graphs import Graph


class Body:
    """Adds a number of the host and one of the device to x."""

    def __init__(self):
        self.x, self.ours, self.step = torch.zeros(3), 1, torch.ones(1)
        self.between = None

    def __call__(self):
        self.between = self.x + self.step
        return self.between.view(3, 1) + self.ours


def test_tensors_are_read_anew_and_numbers_of_the_host_are_not():
    body = Body()
    graph = Graph(body)
    for step in (5.0, 7.0):
        body.step.fill_(step)
        body.ours = 100
        graph.replay()
        assert graph.outputs.flatten().tolist() == [1 + step] * 3
    body.step = torch.zeros(1)  # another tensor than the one that was there
    graph.replay()
    assert graph.outputs.flatten().tolist() == [8.0] * 3


def test_what_was_computed_on_the_way_is_gone():
    body = Body()
    graph = Graph(body)
    assert body.between.isnan().all()
    graph.replay()
    assert body.between.isnan().all()
    assert graph.outputs.isfinite().all()


def test_writes_are_repeated():
    total, step = torch.zeros(2), torch.ones(2)
    graph = Graph(lambda: total.add_(step).narrow(0, 0, 1))
    graph.replay()
    assert total.tolist() == [2.0, 2.0]
    assert graph.outputs.tolist() == [2.0]


@pytest.mark.parametrize("body", [lambda x: x.nonzero(), lambda x: x + torch.tensor([1.0]), lambda x: torch.rand(2)])
def test_what_a_capture_cannot_hold_is_named(body):
    with pytest.raises(AssertionError, match="cannot be captured"):
        Graph(lambda: body(torch.ones(2)))
