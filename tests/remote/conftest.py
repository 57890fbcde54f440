"""Models behind servers of the test process."""

import pytest

import tiny
from fake_server import FakeServer
from parsedec.remote import connect


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """Folders with tokenizer and configuration, without weights: of the tiny models, and of another vocabulary."""
    folders = {}
    for name, tokenizer in (("words", tiny.tokenizer()), ("letters", tiny.letters())):
        folders[name] = str(tmp_path_factory.mktemp(name))
        tokenizer.save_pretrained(folders[name])
        tiny.model("llama").hf.config.save_pretrained(folders[name])
    return folders


@pytest.fixture
def serve(spoken):
    """`serve(model, flavour, …)`: a model behind a server of its own."""
    servers = []

    def start(model, flavour="vllm", *, tokenizer="words", settings=None, **options):
        server = FakeServer(model, flavour, **options).__enter__()
        servers.append(server)
        fast = {"retries": 2, "backoff_s": 0.01, "read_timeout_s": 5.0, "tokenizer": spoken[tokenizer]}
        remote = connect(server.url, **{**fast, **(settings or {})})
        return remote, server

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture(scope="session")
def pair():
    return tiny.model("llama"), tiny.model("llama", seed=5, layers=2)
