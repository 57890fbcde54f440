"""Tiny random models of every family the engine claims, a word-level tokenizer with a chat template, and helpers.

Models are float32 on the CPU; seeds are fixed. `OMP_WAIT_POLICY` and one thread keep small machines steady.
"""

import ctypes
import os
import signal

try:
    ctypes.CDLL("libcuda.so.1")
except OSError:  # no GPU: Triton's kernels run on the CPU, if Triton is told before torch imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells leave it to what runs behind them; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
import transformers

import tiny

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny_target():
    return tiny.model("llama")


@pytest.fixture(scope="session")
def tiny_draft():
    return tiny.model("llama", seed=7, layers=1)
