"""A tokenizer for threads: how a tokenizer reads control tokens is part of its state, which all requests share."""

from __future__ import annotations

import copy
from threading import Lock
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

_plain_readers: WeakKeyDictionary[PreTrainedTokenizerBase, PreTrainedTokenizerBase] = WeakKeyDictionary()
_copying = Lock()


def plain_reader(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that reads control tokens as text, made once. With a lock on the tokenizer instead, every request would
    wait while another one encodes a long prompt."""
    with _copying:
        if tokenizer not in _plain_readers:
            _plain_readers[tokenizer] = copy.deepcopy(tokenizer)
        return _plain_readers[tokenizer]
