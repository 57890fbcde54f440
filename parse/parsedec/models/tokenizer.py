"""A tokenizer for threads: how control tokens are read is a state of it, which requests share."""

from __future__ import annotations

import copy
from threading import Lock
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

_plain_readers: WeakKeyDictionary[PreTrainedTokenizerBase, PreTrainedTokenizerBase] = WeakKeyDictionary()
_copying = Lock()


def plain_reader(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that reads control tokens as text, made once. With a lock around the tokenizer instead, all requests would
    wait for one that reads a long prompt."""
    with _copying:
        if tokenizer not in _plain_readers:
            _plain_readers[tokenizer] = copy.deepcopy(tokenizer)
        return _plain_readers[tokenizer]
