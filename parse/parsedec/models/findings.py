"""What was found out about a model by trying, so that it is tried once.

Numbers that differ and whatever a model raises say what it cannot do. That memory was short says nothing of it: it is
raised as it is, and tried again the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch

from parsedec.errors import first_line
from parsedec.models.language_model import LanguageModel

LONGEST_WINDOW = 512  # sliding windows beyond this are not crossed by a trial: it would take too long on a CPU
# Of the RuntimeErrors by which torch says it where it has no kind of its own: those of its allocators on the CPU, of
# CUDA's runtime and driver, of cuBLAS and cuDNN
SHORT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "alloc_failed")

_found: WeakKeyDictionary[object, dict[Hashable, str | None]] = WeakKeyDictionary()


def found_out(model: object, what: Hashable, trial: Callable[[], str | None]) -> str | None:
    """What keeps a model from `what`, or None where nothing does: the result of the first trial that had memory."""
    known = _found.setdefault(model, {})
    if what not in known:
        try:
            known[what] = trial()
        except Exception as error:
            if short_of_memory(error):
                raise
            known[what] = f"a forward that raises {type(error).__name__}: {first_line(error)}"
    return known[what]


def short_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is short, on whatever device."""
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORT_OF_MEMORY):
        return True
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def crossed_window(model: LanguageModel) -> int:
    """The longest sliding window that a trial crosses; 0: there is none."""
    return max((window for window in model.windows.values() if window and window <= LONGEST_WINDOW), default=0)
