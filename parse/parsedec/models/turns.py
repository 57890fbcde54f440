"""Which threads may run a Hugging Face model when: any number of plain forwards, or a single one that changes it.

A forward for several requests (`joint`) replaces the model's attention for a while. That is a setting of the model: any
other forward made meanwhile would use that attention, too, and give wrong numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock
from weakref import WeakKeyDictionary

from torch import nn


class Turns:
    """The turns of one model: a lock with many readers (`plain`) or one writer (`alone`). `plain` may be nested."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._plain = 0
        self._alone = False

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run the model as it is; others may do so at the same time."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._plain += 1
        try:
            yield
        finally:
            with self._changed:
                self._plain -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Change the model for a while; nobody else runs it meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._plain)
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


_turns: WeakKeyDictionary[nn.Module, Turns] = WeakKeyDictionary()
_making = Lock()


def turns_of(hf: nn.Module) -> Turns:
    """The turns of a model, made when it is first run."""
    found = _turns.get(hf)
    if found is None:
        with _making:
            found = _turns.setdefault(hf, Turns())
    return found


def share_turns(view: nn.Module, hf: nn.Module) -> None:
    """Have `view`, a module made of layers of `hf`, take turns with it."""
    _turns[view] = turns_of(hf)
