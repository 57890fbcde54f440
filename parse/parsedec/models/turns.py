"""Who may run a Hugging Face model when, among threads: many plain forwards at a time, or one that changes the model.

A forward for several requests has the model attend in another way for a while (`joint`), and to the model that is a
setting: whatever else ran it meanwhile would attend so, too, and would get wrong numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock
from weakref import WeakKeyDictionary

from torch import nn


class Turns:
    """Those of one model. Plain forwards may be made within plain ones."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._plain = 0
        self._alone = False

    @contextmanager
    def plain(self) -> Iterator[None]:
        """While others may run the model as it is."""
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
        """While nobody else runs the model."""
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
    """Made at the first forward, and found at all others."""
    found = _turns.get(hf)
    if found is None:
        with _making:
            found = _turns.setdefault(hf, Turns())
    return found


def share_turns(view: nn.Module, hf: nn.Module) -> None:
    """For a module that has layers of another: they take turns together."""
    _turns[view] = turns_of(hf)
