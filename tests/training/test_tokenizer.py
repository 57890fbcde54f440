"""The tokenizer recipe: any text survives, digits stay single, the special tokens and template are the shipped ones."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import commands
import parsedec.training.tokenizer as recipe
from parsedec.errors import ConfigError, OutputExistsError
from parsedec.models.language_model import LanguageModel, load
from parsedec.tasks import ZooArithmetic, ZooLists, zoo_arithmetic, zoo_lists
from parsedec.text.chat import closing_token, label_tokens, prompt_ids, suffix_text
from parsedec.training.tokenizer import CARD, SPECIAL, learn, tokenizer_of, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["corpus.arithmetic.task.n=200", "corpus.lists.task.n=200", "corpus.lists.held_out=5",
         "corpus.arithmetic.held_out=5"]  # fmt: skip


def composed(output, *more):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("tokenizer", [*SMALL, f"output={output}", *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train_tokenizer(composed(folder))


@pytest.fixture(scope="module")
def learnt(run):
    return AutoTokenizer.from_pretrained(run[0] / "tokenizer")


@pytest.fixture(scope="module")
def shipped():
    return load("zoo:target", device="cpu")


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@settings(deadline=None, max_examples=150)
@given(text=st.text())
def test_any_text_survives(learnt, text):
    assert learnt.decode(encode(learnt, text), clean_up_tokenization_spaces=False) == text


def test_task_texts_survive_and_are_shorter_than_their_bytes(learnt, run):
    _, record = run
    for task in (ZooArithmetic(n=20), ZooLists(n=20)):
        for problem in task.problems():
            ids = encode(learnt, problem.prompt)
            assert learnt.decode(ids) == problem.prompt
            assert len(ids) < 0.6 * len(problem.prompt.encode())
    for figures in record["evaluation"].values():
        assert figures["changed_by_round_trip"] == 0
        assert figures["problems"] == 5
        assert figures["tokens_per_answer"] > 10


def test_digits_are_single(learnt):
    with_digit = {token for token in learnt.get_vocab() if any(char.isdigit() and char.isascii() for char in token)}
    assert with_digit == set("0123456789")
    assert [learnt.decode([i]) for i in encode(learnt, "12 + 305")] == ["1", "2", " ", "+", " ", "3", "0", "5"]


def test_special_tokens_and_size_are_those_of_the_zoo(learnt, shipped):
    assert len(learnt) == shipped.vocab_size == 448
    for tokenizer in (learnt, shipped.tokenizer):
        assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert (learnt.pad_token, learnt.eos_token) == (shipped.tokenizer.pad_token, shipped.tokenizer.eos_token)
    for part in ("pre_tokenizer", "decoder", "added_tokens", "normalizer"):
        ours, theirs = (json.loads(t.backend_tokenizer.to_str())[part] for t in (learnt, shipped.tokenizer))
        assert ours == theirs
    # no merge wasted on the spelling of a special token, which never occurs as plain text
    assert not [token for token in learnt.get_vocab() if "<|" in token and token not in SPECIAL]


def test_template_renders_as_the_shipped_one(learnt, shipped):
    assert learnt.chat_template == shipped.tokenizer.chat_template
    dialogue = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "<|verify|>"},
    ]
    rendered = learnt.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>2 + 2?<|assistant|>4<|end|><|user|><|verify|><|assistant|>"


def test_a_model_with_it_can_be_asked_and_judged(run, shipped):
    """The engine's own way from a dialogue to ids, on a model that has this tokenizer."""
    tokenizer, card = tokenizer_of(str(run[0] / "tokenizer"))
    assert card == CARD
    model = LanguageModel.wrap(shipped.hf, tokenizer, judge_card=card)
    suffix = suffix_text(model, card.question)
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    assert [ids["<|user|>"], *model.encode("Hi"), ids["<|assistant|>"]] == prompt_ids(
        model, [{"role": "user", "content": "Hi"}]
    )
    assert model.encode(suffix) == [ids[t] for t in ("<|end|>", "<|user|>", "<|verify|>", "<|assistant|>")]
    assert label_tokens(model, suffix, card.labels) == [ids["Correct"], ids["Incorrect"]]
    assert closing_token(model) == ids["<|end|>"]


def test_tokenizer_of_a_model_is_the_models(shipped):
    tokenizer, card = tokenizer_of("zoo:target")
    assert tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    assert card == shipped.judge_card


def test_same_settings_same_tokenizer_and_nothing_is_overwritten(run, tmp_path):
    folder, record = run
    assert record == json.loads((folder / "record.json").read_text())
    assert record["status"] == "finished"
    with pytest.raises(OutputExistsError, match="output=DIR"):
        train_tokenizer(composed(folder))
    train_tokenizer(composed(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json", "judge.json"):
        assert (tmp_path / "tokenizer" / name).read_bytes() == (folder / "tokenizer" / name).read_bytes()


def test_command_leaves_the_record(tmp_path):
    overrides = [*SMALL, "~corpus.lists", "vocabulary=300", f"output={tmp_path / 'out'}"]
    done = commands.run("tokenizer.py", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(Path(done.stdout.strip().splitlines()[-1]).read_text())
    assert record["vocabulary"] == 300
    assert list(record["evaluation"]) == ["arithmetic"]


def test_what_cannot_be_learnt_is_said():
    with pytest.raises(ConfigError, match="at least 263"):
        learn(["a"], 262)
    with pytest.raises(ConfigError, match="repeats too little"):
        learn(["a"], 300)
    with pytest.raises(ConfigError, match="corpus is empty"):
        list(recipe.texts({}, 0))
    with pytest.raises(ConfigError, match="answers=0"):
        recipe.Corpus(task=ZooLists(), solution=zoo_lists.solution, answers=0)


def test_a_corpus_is_read_the_same_beside_another():
    words = recipe.Corpus(task=ZooArithmetic(n=3, split="train"), solution=zoo_arithmetic.solution)
    lists = recipe.Corpus(task=ZooLists(n=3, split="train"), solution=zoo_lists.solution)
    both = list(recipe.texts({"words": words, "lists": lists}, 0))
    assert both[9:] == list(recipe.texts({"lists": lists}, 0))
    assert len(both) == 18
