"""Model cards: every figure on one is a figure of the record or of the files, and none is made up."""

import hashlib
import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parsedec.errors import ParsedecError
from parsedec.experiment.record import SCHEMA_VERSION, write_record
from parsedec.training.card import write_card

TASK = {"_target_": "parsedec.tasks.zoo_lists.ZooLists", "n": 40, "split": "test", "seed": 3}
RIGHT = {"right": 30, "share": 0.75, "interval": [0.598, 0.858]}
SOLVING = {"problems": 40, "accuracy": RIGHT}
JUDGING = {
    "problems": 40,
    "target_accuracy": RIGHT,
    "draft_accuracy": {"right": 10, "share": 0.25, "interval": [0.142, 0.402]},
    "probes": 160,
    "auc": 0.87654,
    "draft_tokens": 400,
    "shared_prefix_tokens": 60,
    "localisation": [{"threshold": 0.5, "wrong_drafts": 30, "exact": 24, "never_later": 27}],
    "thresholds": [
        {"threshold": 0.5, "kept_tokens": 300, "drafted_tokens": 400, "accepted_whole": 7, "accepted_whole_wrong": 2,
         "accuracy": RIGHT},
    ],
}  # fmt: skip
CARD = {"question": "<|verify|>", "labels": ["Correct", "Incorrect"], "threshold": 0.97, "full_threshold": 0.98}


@pytest.fixture
def output(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    # the record is a fixture, the parameters are counted
    return tmp_path, sum(p.numel() for p in model.parameters())


def record(**changes):
    return {
        "schema_version": SCHEMA_VERSION,
        "title": "a small model",
        "config": {
            "seed": 5,
            "recipe": {
                "init": None,
                "task": TASK | {"split": "train", "n": 900},
                "optimisation": {"steps": 123},
                "evaluation": {"task": TASK},
            },
        },
        "provenance": {"git_sha": "abc", "git_dirty": True, "device": "a CPU",
                       "command": "train.py recipe=zoo_draft output=/some/where",
                       "packages": {"torch": "2.13.0", "hydra-core": None}},
        "resumed_from": None,
        "status": "finished",
        "evaluation": SOLVING,
    } | changes  # fmt: skip


def card(output, written):
    write_record(written, output / "record.json")
    return write_card(output).read_text()


def test_card_of_a_solver(output):
    folder, parameters = output
    text = card(folder, record())
    assert text.startswith("---\nlicense: apache-2.0\n")
    for part in (
        "# a small model", f"| parameters | {parameters:,} (BF16) |", "| architecture | LlamaForCausalLM |",
        "| layers | 2 |", "| width | 16 |",
        "`python experiments/train.py recipe=zoo_draft`", "| begun from | nothing |", "| updates | 123 |",
        "`ZooLists` (n=900, split=train, seed=3)", "40 problems of `ZooLists` (n=40, split=test, seed=3)",
        "| commit | abc with uncommitted changes |", "| versions | torch 2.13.0 |",
        "Accuracy: 75.0 % [59.8, 85.8].",
    ):  # fmt: skip
        assert part in text, part
    assert "judge" not in text
    assert "/some/where" not in text
    listed = dict(re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", text, re.M))
    for name in ("model.safetensors", "config.json"):
        assert listed[name] == hashlib.sha256((folder / "model" / name).read_bytes()).hexdigest()
    assert card(folder, record()) == text  # the card does not list itself


def test_card_of_a_judge(output):
    folder, _ = output
    text = card(folder, record(evaluation=JUDGING, judge_card=CARD, resumed_from={"started_at": "yesterday"}))
    for part in (
        "| 0.5 | 75% | 7 | 2 | 75.0 % [59.8, 85.8] | 80.0% | 90.0% |", "25.0 % [14.2, 40.2]", "on 160 prefixes: 0.877.",
        "asked `<|verify|>` and answers `Correct` or `Incorrect`", "0.97 for prefixes, 0.98 for complete drafts",
        "| resumed | yes; begun at yesterday |",
    ):  # fmt: skip
        assert part in text, part
    assert "not defined" in card(folder, record(evaluation=JUDGING | {"auc": None}, judge_card=CARD))


def test_card_of_a_head(output):
    folder, parameters = output
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({"medusa_num_heads": 3}))  # heads say less about themselves
    written = record(evaluation={"problems": 40, "target_calls": 500, "tau": 2.345, "tau_interval": [2.2, 2.5]})
    written["config"]["recipe"]["target"] = "zoo:target"
    text = card(folder, written)
    for part in (f"| parameters | {parameters:,} (BF16) |", "| target it drafts for | zoo:target |",
                 "2.35 [2.20, 2.50] over 500 calls."):  # fmt: skip
        assert part in text, part
    assert "begun from" not in text


def test_unfinished_runs_get_no_card(output, tmp_path):
    folder, _ = output
    with pytest.raises(ParsedecError, match=r"status 'interrupted'.*resume=true"):
        card(folder, record(status="interrupted"))
    (folder / "model" / "model.safetensors").unlink()
    with pytest.raises(ParsedecError, match="0 files of weights"):
        card(folder, record())
    assert json.loads((folder / "record.json").read_text())["status"] == "finished"
    with pytest.raises(ParsedecError, match="cannot read the record"):
        write_card(tmp_path / "nowhere")
