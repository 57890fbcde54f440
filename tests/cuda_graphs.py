"""CUDA graphs without CUDA: what a body computes is recorded once, and a replay runs the recorded operations again.

As in a graph, numbers that came from the host are those of the capture, tensors are those that were there, nothing may
wait for the device, and between two replays the memory of the graph's intermediate results belongs to others.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parsedec.static.graphs import Graphs

# what would wait for the device, or copy from memory of the host that a capture cannot read
OF_THE_HOST = {
    "_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "lift_fresh_copy", "equal", "is_nonzero",
    "_unique2", "unique_dim", "rand", "randn", "bernoulli", "multinomial",
}  # fmt: skip


class Recording(TorchDispatchMode):
    """The operations of a body, in turn: (function, arguments, keywords, tensors it made)."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in OF_THE_HOST, f"{name} cannot be captured in a CUDA graph"
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given = {place(tensor) for tensor in tensors(args, kwargs)}
        made = [tensor for tensor in tensors(out) if place(tensor) not in given]
        writes = any(alias.is_write for alias in (arg.alias_info for arg in function._schema.arguments) if alias)
        if made or writes:  # else views, which stay what they are
            self.operations.append((function, args, kwargs, out, made))
        return out


class Graph:
    """A recorded body; `replay` is that of a CUDA graph."""

    def __init__(self, body):
        with Recording() as recording:
            self.outputs = body()
        self._operations = recording.operations
        kept = {place(tensor) for tensor in leaves(self.outputs)}
        made = [tensor for *_, made in self._operations for tensor in made]
        self._own = [tensor for tensor in made if place(tensor) not in kept]
        self._given_out = [tensor for tensor in made if place(tensor) in kept]
        self.forget()

    @torch.inference_mode()
    def replay(self):
        for function, args, kwargs, before, made in self._operations:
            after = function(*args, **kwargs)
            if made:
                places = {place(tensor) for tensor in made}
                for old, new in zip(tensors(before), tensors(after), strict=True):
                    if place(old) in places:
                        old.copy_(new)
        self.forget()

    @torch.inference_mode()
    def forget(self):
        """Whatever is computed on the way belongs to others until the next replay."""
        for tensor in self._own:
            tensor.fill_(nonsense(tensor))

    @torch.inference_mode()
    def spoil(self):
        """Its outputs belong to others from now on."""
        for tensor in self._given_out:
            tensor.fill_(nonsense(tensor))


def captured(graphs, body):
    """In place of `Graphs.captured`. What a graph computes on the way lies where the outputs of later ones may be."""
    recorded = graphs.__dict__.setdefault("recorded", [])
    recorded.append(graph := Graph(body))
    number = len(recorded)

    def replay():
        for later in recorded[number:]:
            later.spoil()
        graph.replay()

    graphs.captures += 1
    Graphs.total += 1
    return replay, graph.outputs


def replay(monkeypatch):
    """Capture and replay whatever has graphs on CUDA."""
    monkeypatch.setattr(Graphs, "possible", True)
    monkeypatch.setattr(Graphs, "captured", captured)


def nonsense(tensor):
    return True if tensor.dtype is torch.bool else -(1 << 40) if not tensor.is_floating_point() else torch.nan


def tensors(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def leaves(outputs):
    """Tensors of a body's outputs, which may be an object that holds them."""
    slots = getattr(type(outputs), "__slots__", None)
    return tensors([getattr(outputs, name) for name in slots] if slots else outputs)


def place(tensor):
    return tensor.untyped_storage()._cdata
