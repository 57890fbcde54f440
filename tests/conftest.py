"""Tiny random models of every family the engine claims, a word-level tokenizer with a chat template, and helpers.

Models are float32 on the CPU; seeds are fixed. `OMP_WAIT_POLICY` and one thread keep small machines steady.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

import tiny

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # its kernels run on the CPU then; Triton looks when it is imported
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny_target():
    return tiny.model("llama")


@pytest.fixture(scope="session")
def tiny_draft():
    return tiny.model("llama", seed=7, layers=1)
