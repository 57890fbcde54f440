"""Models, heads and data from a hub: runs from ids alone, at commits that records name, over a hub on this machine.

Oracle: the same checkpoints from disk.
"""

import json
from pathlib import Path

import pytest
import torch

import commands
import tiny
from fake_hub import FakeHub
from parsedec import Parse, TargetOnly, load
from parsedec.errors import ModelLoadError
from parsedec.models.checkpoints import Checkpoint, find_checkpoint, in_zoo

ROOT = Path(__file__).resolve().parents[2]
COINS = "Tom has {} coins. Ana gives Tom 30 coins. Tom loses 5 coins. How many coins does Tom have now?"
CARD = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test.jsonl\n---\n"
HEAD_FROM_HUB = [
    "target=org/target", "target.dtype=float32", "draft=org/draft", "outer=none", "inner=eagle3", "inner.head=org/head",
    "task=gsm8k", "task.instruction=null", "task.hub.dataset=org/coins", "max_new_tokens=40", "warmup=0",
    "runtime=cpu"]  # fmt: skip


def coins(owned):
    rows = [{"question": COINS.format(n), "answer": f"It adds up.\n#### {n + 25}"} for n in owned]
    return {"README.md": CARD.encode(), "main/test.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with FakeHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


def run(hub, folder, *overrides):
    done = commands.run("run.py", *HEAD_FROM_HUB, f"output={folder}", *overrides, cwd=folder.parent, **hub.environment)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "record.json").read_text())


def texts(record):
    return [request["result"]["text"] for request in record["arms"][0]["requests"]]


def test_a_run_goes_on_at_the_commits_it_began_with(hub, tmp_path):
    """All of a run comes from the hub; when its branches move, a resumed run stays where it was."""
    places = {"org/target": "target", "org/draft": "draft", "org/head": "eagle3"}
    first = {name: hub.push(name, in_zoo(f"zoo:{folder}")) for name, folder in places.items()}
    first["datasets/org/coins"] = hub.push("org/coins", coins([3, 12, 20]), kind="datasets")
    begun = run(hub, tmp_path / "run", "task.n=2")
    read = {name: first[name] for name in ("org/target", "org/head", "datasets/org/coins")}  # no draft is needed
    assert begun["provenance"]["hub"] == read
    plain = Parse(load("zoo:target", dtype="float32"), outer=TargetOnly())
    assert texts(begun) == [plain.generate(COINS.format(n), max_new_tokens=40).text for n in (3, 12)]

    broken = {p.name: p.read_bytes() for p in in_zoo("zoo:target").iterdir()} | {"model.safetensors": b"damaged"}
    hub.push("org/target", broken)
    hub.push("org/coins", coins([3, 40, 50]), kind="datasets")
    longer = run(hub, tmp_path / "run", "task.n=3", "resume=true")
    assert longer["provenance"]["hub"] == read
    assert texts(longer) == [*texts(begun), plain.generate(COINS.format(20), max_new_tokens=40).text]


LOADED = """
import parsedec
from parsedec.errors import IncompatibleStack
from parsedec_adapters.eagle3 import Eagle3
from transformers import DynamicCache

for source in {sources}:
    try:
        model = parsedec.load(source, device="cpu")
        logits, _ = model.forward([[7, 8, 9]], DynamicCache(), keep=1)
        print(source, "->", model.name, round(float(logits.double().sum()), 4), model.judge_card is not None)
    except parsedec.ParsedecError as error:
        print(source, "->", error)
for head in ("org/none", "org/gated", "org/tiny"):
    try:
        parsedec.Parse(model, inner=Eagle3(head=head), outer=parsedec.TargetOnly())
    except IncompatibleStack as error:
        print("head", head, "->", error)
"""


def test_what_load_takes_and_says(hub, tmp_path):
    model = tiny.model("llama")
    for part in (model.hf, model.tokenizer):
        part.save_pretrained(tmp_path)
    hub.push("org/tiny", tmp_path)
    other = tiny.model("llama", seed=5)
    other.hf.save_pretrained(tmp_path)
    (tmp_path / "judge.json").write_text(
        json.dumps({"question": "w1?", "labels": ["Correct", "Incorrect"], "threshold": 0.5, "full_threshold": 0.5})
    )
    hub.push("org/tiny", tmp_path)
    hub.gated.add("org/gated")
    old = next(iter(hub.repositories["models", "org/tiny"]))
    sources = ["org/tiny", f"org/tiny@{old}", "org/tiny@nowhere", "org/none", "org/gated", "org/tiny/q4/x.gguf"]
    script = tmp_path / "loaded.py"
    script.write_text(LOADED.format(sources=sources))
    done = commands.run(str(script), cwd=tmp_path, **hub.environment)
    said = dict(line.split(" -> ", 1) for line in done.stdout.splitlines())
    assert list(said) == [*sources, *(f"head {name}" for name in ("org/none", "org/gated", "org/tiny"))], done.stderr

    def total(of):
        return round(float(of.hf(torch.tensor([[7, 8, 9]])).logits[:, -1].detach().double().sum()), 4)

    assert said["org/tiny"] == f"org/tiny {total(other)} True"
    assert said[f"org/tiny@{old}"] == f"org/tiny@{old} {total(model)} False"
    for source, words in {
        "org/tiny@nowhere": "nowhere is not a valid git identifier",
        "org/none": "org/none is not a local folder and is not a valid model identifier",
        "org/gated": "gated",
        "org/tiny/q4/x.gguf": "org/tiny does not appear to have a file named q4/x.gguf",
    }.items():
        assert said[source].startswith(f"cannot load the model '{source}'")
        assert words in said[source]
        assert said[source].endswith("needs your login (hf auth login).")
    assert said["head org/none"].startswith("'org/none' cannot be had from the hub: org/none is not")
    assert said["head org/gated"].startswith("'org/gated' cannot be had from the hub: You are trying to access a gated")
    assert said["head org/tiny"].endswith("is this an EAGLE-3 head?")


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("org/name", Checkpoint("org/name")),
        ("org/name@v1.0", Checkpoint("org/name", revision="v1.0")),
        ("gpt2", Checkpoint("gpt2")),
        ("org/name/q4.gguf", Checkpoint("org/name", "q4.gguf")),
        ("org/name/q4/q4.gguf@main", Checkpoint("org/name", "q4/q4.gguf", "main")),
    ],
)
def test_names_on_the_hub(source, place):
    assert find_checkpoint(source) == place


def test_a_folder_with_an_at_sign(tmp_path):
    folder = tmp_path / "model@home"
    folder.mkdir()
    assert find_checkpoint(folder) == Checkpoint(str(folder))


@pytest.mark.parametrize("source", ["models/q4.gguf", "./a/b/c.gguf", "q4.gguf@main"])
def test_files_that_are_not_there(source):
    with pytest.raises(ModelLoadError, match=f"the GGUF file '{source}' does not exist. Check the path"):
        find_checkpoint(source)
