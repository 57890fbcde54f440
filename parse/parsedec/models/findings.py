"""What was found out about a model by trying it, remembered so that each thing is tried once.

Wrong numbers, and whatever a model raises, say what it cannot do. A lack of memory says nothing about the model: it is
raised as it is, and the trial is made again next time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch

from parsedec.errors import first_line
from parsedec.models.language_model import LanguageModel

LONGEST_WINDOW = 512  # trials do not cross longer sliding windows: that would take too long on a CPU
# How plain RuntimeErrors of torch say it: those of its CPU allocators, of CUDA's runtime and driver, cuBLAS and cuDNN
SHORT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "alloc_failed")

_found: WeakKeyDictionary[object, dict[Hashable, str | None]] = WeakKeyDictionary()


def found_out(model: object, what: Hashable, trial: Callable[[], str | None]) -> str | None:
    """What keeps a model from `what`, or None: the result of the first trial that did not run out of memory."""
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
    """Whether an error says that memory is short, on any device."""
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORT_OF_MEMORY):
        return True
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def crossed_window(model: LanguageModel) -> int:
    """The longest of the model's sliding windows that a trial can cross; 0 if there is none."""
    return max((window for window in model.windows.values() if window and window <= LONGEST_WINDOW), default=0)
