"""What a user can get wrong is refused before work begins, in words that say what to do about it."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

import parsedec
import tiny
from parsedec.engine import Parse
from parsedec.errors import ConfigError, IncompatibleStack, ModelLoadError, ParsedecError, PromptError
from parsedec.experiment import cli
from parsedec.experiment.cli import expand_shorthand, explain, known_settings
from parsedec.experiment.job import run_job
from parsedec.experiment.runner import Arm
from parsedec.inner import NoSpeculation
from parsedec.judge import LabelJudge
from parsedec.loop import Rounds
from parsedec.models.language_model import LanguageModel
from parsedec.outer import PrefixVerification, TargetOnly
from parsedec.types import Needs
from parsedec_adapters.draft_model import DraftModel

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
ZOO = ROOT / "parse" / "parsedec" / "zoo" / "draft"
TARGET = tiny.model("llama", layers=1)
DRAFT = tiny.model("llama", layers=1, seed=7)

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*overrides, "output=unused"])


# --- the command line's own words ---


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("inner=draft_modle", "inner=draft_modle does not exist.*'draft_model'.*'none'.*Did you mean draft_model?"),
        ("inner@draft.inner=noen", "inner=noen does not exist.*Did you mean none?"),
        ("gate=xyz", r"gate=xyz does not exist; gate is one of \['adaptive', 'always', 'never'\]\.$"),
        ("draft=gpt2", "draft=gpt2 does not exist.*without a slash is given as draft=any draft.model.source=gpt2"),
        ("gte=adaptive", "'gte'.*Did you mean gate"),
        ("judge.pth=packed", "'judge.pth'.*Did you mean judge.path.*--help"),
        ("sampling.temprature=1", "'sampling.temprature'.*Did you mean sampling.temperature"),
        ("max_new_token=9", "'max_new_token'.*Did you mean max_new_tokens"),
        ("task.xyz=9", "'task.xyz'.*Did you mean.*task.n"),
        ("foo=1", "no setting is called 'foo'. --help"),
    ],
)
def test_misspelt_override_is_named_with_what_comes_close(override, words):
    with pytest.raises((HydraException, OmegaConfBaseException)) as refused:
        composed(override)
    message = explain(refused.value, CONF)
    assert re.search(words, message), message
    assert "\n" not in message


def test_setting_without_a_default_is_asked_for():
    with pytest.raises((HydraException, OmegaConfBaseException)) as refused:
        instantiate(composed("target=any").target)
    assert "target.source has no default; set it: target.source=" in explain(refused.value, CONF)


def test_missing_value_of_a_node_that_stands_for_another_is_named_where_it_is_set():
    with pytest.raises((HydraException, OmegaConfBaseException)) as refused:
        instantiate(composed("judge=probe").outer)
    assert explain(refused.value, CONF).startswith("judge.weights has no default; set it: judge.weights=")


@pytest.mark.parametrize(
    ("group", "override", "words"),
    [
        ("gate", ["gate=adaptive", "gate.bound=-1"], "bound=-1; expected a number, at least 0"),
        ("boundary", ["boundary.threshold=2"], "threshold=2.*0 to 1"),
        ("loop", ["loop=rounds", "loop.rounds=0"], "rounds=0.*at least 1"),
        ("segmenter", ["segmenter.min_tokens=0"], "min_tokens=0.*expected"),
        ("judge", ["judge.labels=[a,b,c]"], "'a', 'b', 'c'.*two words"),
        ("judge", ["judge.path=fast"], "path='fast'.*auto, packed or forked"),
        ("outer", ["outer.passes=three"], "passes='three'.*fused or two_pass"),
        ("inner", ["inner=draft_model", "inner.length=0"], "length=0.*at least 1"),
        ("task", ["task.n=0"], "n=0.*at least 1"),
        ("task", ["task=gsm8k", "task.path=/nowhere/x.jsonl"], "/nowhere/x.jsonl.*not a file"),
        ("target", ["target=any", "target.source=/nowhere/x"], "'/nowhere/x' does not exist.*Check the path"),
        pytest.param("target", ["runtime.device=cuda"], "device='cuda'.*Use device=cpu", marks=WITHOUT_CUDA),
    ],
)
def test_wrong_value_in_a_yaml_is_explained_in_the_class_own_words(group, override, words):
    with pytest.raises(HydraException) as refused:
        instantiate(composed(*override)[group])
    assert isinstance(refused.value.__cause__, ParsedecError)
    message = explain(refused.value, CONF)
    assert re.search(words, message), message
    assert message == str(refused.value.__cause__)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=abc", "seed='abc'.*whole number"),
        ("max_new_tokens=16.5", "max_new_tokens=16.5.*whole number"),
        ("max_new_tokens=0", "max_new_tokens=0"),
        ("warmup=-1", "warmup=-1"),
        ("sampling.temperature=-1", "temperature=-1.*expected"),
        ("stop=abc", "stop.*abc"),
    ],
)
def test_wrong_run_setting_is_refused_and_leaves_the_folder_free(override, words, tmp_path):
    """A record of nothing would stand in the way of the corrected command."""
    cfg = composed("task.n=1", "warmup=0", "max_new_tokens=4", override)
    with pytest.raises(ConfigError, match=words):
        run_job(cfg, tmp_path, lambda: [Arm("run", Parse(TARGET))])
    assert not (tmp_path / "record.json").exists()


def test_errors_of_ours_are_passed_on_as_they_are():
    assert explain(ConfigError("all of it\nand more"), CONF) == "all of it\nand more"


def test_known_settings_are_those_of_the_yamls():
    known = known_settings(CONF)
    assert {"seed", "judge.path", "sampling.temperature", "draft.model.source", "gate", "task.n"} <= set(known)
    assert not any(name.startswith("experiment.") for name in known)


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("target=zoo", ["target=zoo"]),
        ("draft=none", ["draft=none"]),
        ("target=zoo:draft", ["target=any", "target.source='zoo:draft'"]),
        ("draft=Qwen/Qwen3-0.6B", ["draft=any", "draft.model.source='Qwen/Qwen3-0.6B'"]),
        ("target=./m.gguf", ["target=any", "target.source='./m.gguf'"]),
        ("draft.inner=draft_model", ["inner@draft.inner=draft_model"]),
        ("target.source=x/y", ["target.source=x/y"]),
        ("targte=x/y", ["targte=x/y"]),
        ("labels.fit={n: 20, seed: 3}", ["++labels.fit={n: 20, seed: 3}"]),
        ("labels.check.n=4", ["++labels.check.n=4"]),
        ("labels.fitted=4", ["labels.fitted=4"]),
        ("--help", ["--help"]),
        ("task.path=/a/b=c.jsonl", ["task.path=/a/b=c.jsonl"]),
    ],
)
def test_shorthand(argument, expanded):
    assert expand_shorthand(argument, CONF) == expanded


@pytest.mark.parametrize(
    "name", ["plain", "two words", "it's", "a=b", "x,y", "[1]", "{a}", "back\\slash", "end\\", "é🎉", "a:b"]
)
@pytest.mark.parametrize("group", ["target", "draft"])
def test_any_path_survives_the_shorthand(group, name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    cfg = composed(*expand_shorthand(f"{group}={folder}", CONF))
    node = cfg.target if group == "target" else cfg.draft.model
    assert node.source == str(folder)


# --- models ---


def load(source, **options):
    return parsedec.load(source, device="cpu", **options)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("zoo:nothing", r"'zoo:nothing'.*expected one of.*'zoo:draft'"),
        ("/nowhere/model", "'/nowhere/model' does not exist.*Check the path"),
        ("./nowhere", "'./nowhere' does not exist"),
        ("/nowhere/m.gguf", "GGUF file '/nowhere/m.gguf' does not exist"),
    ],
)
def test_missing_checkpoint(source, words):
    with pytest.raises(ModelLoadError, match=words):
        load(source)


def damage(folder, name, change):
    shutil.copytree(ZOO, folder)
    path = folder / name
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    return folder


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda data: data[: len(data) // 2]),
        ("model.safetensors", lambda data: b""),
        ("model.safetensors", lambda data: b"<html>404 not found</html>"),
        ("config.json", lambda data: data[:40]),
        ("config.json", lambda data: data.replace(b'"llama"', b'"lama"')),
        ("tokenizer.json", lambda data: data[: len(data) // 2]),
    ],
    ids=["half the weights", "no weights", "a web page", "half a config", "unknown architecture", "half a tokenizer"],
)
def test_damaged_checkpoint(name, change, tmp_path):
    folder = damage(tmp_path / "model", name, change)
    with pytest.raises(
        ModelLoadError, match=r"cannot load the model.*Check the path, and that the download"
    ) as refused:
        load(folder)
    assert str(folder) in str(refused.value)
    assert refused.value.__cause__ is not None


def test_empty_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelLoadError, match=r"cannot load the model.*config\.json"):
        load(tmp_path)


CARD = {"question": "Right?", "labels": ["yes", "no"], "threshold": 0.8, "full_threshold": 0.7}


@pytest.mark.parametrize(
    "content",
    ['{"question": ', "[1]", "{}", json.dumps(CARD | {"treshold": 0.5}), json.dumps(CARD | {"threshold": "high"})],
    ids=["cut off", "a list", "empty", "misspelt key", "threshold in words"],
)
def test_judge_card_that_cannot_be_used_names_its_file(content, tmp_path):
    folder = damage(tmp_path / "model", "config.json", lambda data: data)
    (folder / "judge.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"judge\.json is not a judge card.*Expected JSON with question"):
        load(folder)


def test_judge_card_is_read(tmp_path):
    folder = damage(tmp_path / "model", "judge.json", lambda data: json.dumps(CARD).encode())
    card = load(folder).judge_card
    assert (card.question, list(card.labels)) == ("Right?", ["yes", "no"])
    assert (card.threshold, card.full_threshold) == (0.8, 0.7)
    (folder / "judge.json").unlink()
    assert load(folder).judge_card is None


@WITHOUT_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_where_there_is_none(device):
    with pytest.raises(ModelLoadError, match=rf"device='{device}'.*no usable CUDA device.*device=cpu"):
        parsedec.load("zoo:draft", device=device)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, r"dtype='float8' is unknown; expected one of.*'bfloat16'"),
        ({"context_limit": 0}, r"context_limit=0.*expected 2 to 1024.*Lower it"),
        ({"context_limit": 5000}, r"context_limit=5000.*expected 2 to 1024"),
    ],
    ids=str,
)
def test_wrong_load_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load("zoo:draft", **options)


def test_unknown_device():
    with pytest.raises(ConfigError, match=r"device='gpu0' is not a device; expected auto, cpu, cuda"):
        parsedec.load("zoo:draft", device="gpu0")


def test_chat_template_file(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0]['content'] }}!")
    assert load("zoo:draft", chat_template=str(path)).chat_template == "{{ messages[0]['content'] }}!"
    with pytest.raises(ModelLoadError, match=r"missing.jinja.*neither Jinja text nor an existing file"):
        load("zoo:draft", chat_template="missing.jinja")


# --- stacks ---


class TapsTooHigh(NoSpeculation):
    needs = Needs(hidden_layers=(0, 9))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Parse(TARGET, outer=PrefixVerification()), IncompatibleStack, "draft model.*set draft, or use outer"),
        (lambda: Parse(TARGET, inner=DraftModel()), IncompatibleStack, "no model to draft with; set inner.model"),
        (
            lambda: Parse(TARGET, load("zoo:draft"), inner=DraftModel(), outer=TargetOnly()),
            IncompatibleStack,
            r"zoo:draft \(448 tokens\) and tiny llama \(64 tokens\) differ.*outer draft",
        ),
        (
            lambda: Parse(TARGET, DRAFT, draft_inner=DraftModel(model=load("zoo:draft"))),
            IncompatibleStack,
            "zoo:draft .*tiny llama",
        ),
        (lambda: Parse(TARGET, inner=TapsTooHigh()), IncompatibleStack, r"TapsTooHigh.*\[9\].*0 to 1.*another model"),
        (
            lambda: Parse(TARGET, DRAFT, outer=TargetOnly(), judge=LabelJudge()),
            ConfigError,
            "both outer and judge.*put the judge into the outer",
        ),
        (
            lambda: Parse(tiny.model("mamba2", layers=1), DRAFT, judge=LabelJudge(path="packed")),
            IncompatibleStack,
            "path=packed.*tiny mamba2.*recurrent.*auto",
        ),
    ],
    ids=["outer alone", "drafter alone", "vocabularies", "draft's own drafter", "taps", "two judges", "packed mamba"],
)
def test_stack_that_cannot_work_is_refused_when_it_is_built(build, error, words):
    with pytest.raises(error, match=words):
        build()


# --- prompts ---

SMALL = tiny.model("llama", layers=1, context_limit=12)
ENGINES = {
    "target alone": Parse(TARGET),
    "parse": Parse(TARGET, DRAFT, outer=PrefixVerification(loop=Rounds(rounds=2))),
}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty; expected"),
        ("  \n ", "prompt is empty"),
        ([], "prompt is empty"),
        ([{"role": "user", "content": ""}], "prompt is empty"),
        ([{"role": "user"}], r"{'role': 'user'} is not of the form"),
        (["w1 w2"], "'w1 w2' is not of the form"),
        ([5, 64], r"\[64\] are outside the vocabulary of tiny llama \(0 to 63\)"),
        ([-1, 5, 99], r"\[-1, 99\] are outside"),
        ("w1" * 600, r"the prompt has 603 tokens.*tiny llama, 512 tokens. Shorten it"),
        ([7] * 512, "the prompt has 512 tokens"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:30],
)
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_prompt_that_cannot_be_run(engine, prompt, words):
    with pytest.raises(PromptError, match=words):
        engine.generate(prompt, max_new_tokens=4)
    assert engine.generate([7, 8, 9], max_new_tokens=4).new_tokens == 4  # still usable


def test_prompt_that_is_too_long_for_the_draft_model_only_is_the_targets():
    result = Parse(TARGET, SMALL).generate([7] * 20, max_new_tokens=4)
    assert result.tokens == Parse(TARGET).generate([7] * 20, max_new_tokens=4).tokens
    assert any(re.search(r"tiny llama drafted no more: .* 12 tokens", note) for note in result.notes)


def test_prompt_that_leaves_room_for_one_token_gets_one():
    result = Parse(SMALL).generate([7] * 11, max_new_tokens=4)
    assert (result.new_tokens, result.stop) == (1, parsedec.StopReason.CONTEXT_LIMIT)


def test_token_ids_mean_nothing_to_a_draft_model_of_another_vocabulary():
    engine = Parse(TARGET, load("zoo:draft"))
    with pytest.raises(PromptError, match=r"token ids of tiny llama, but zoo:draft has another vocabulary. Give text"):
        engine.generate([7, 8, 9], max_new_tokens=4)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"stop": [""]}, {"sampling": None, "max_new_tokens": -1}], ids=str
)
def test_wrong_request_settings(wrong):
    with pytest.raises(ConfigError, match=r"expected a whole number, at least 1|empty string"):
        ENGINES["parse"].generate("w1", **wrong)


def test_a_lone_stop_string_is_not_taken_for_its_letters():
    with pytest.raises(ConfigError, match=r"stop='w7'"):
        ENGINES["parse"].generate("w1", stop="w7")


def test_every_error_of_ours_can_be_caught_as_one():
    subclasses = [ConfigError, IncompatibleStack, ModelLoadError, PromptError]
    assert all(issubclass(error, ParsedecError) for error in subclasses)
    assert not issubclass(ParsedecError, (ValueError, RuntimeError))


def test_context_limit_of_a_model_in_memory():
    with pytest.raises(ConfigError, match=r"context_limit=513 for tiny llama; expected 2 to 512"):
        LanguageModel.wrap(TARGET.hf, TARGET.tokenizer, name="tiny llama", context_limit=513)
    with pytest.raises(ConfigError, match="tiny llama, which is wrapped already; expected a transformers model"):
        LanguageModel.wrap(TARGET, TARGET.tokenizer)


@pytest.mark.parametrize(
    ("every", "told"), [(0.0, ["1 of 3, a; about 0 min left", "2 of 3, b; about 0 min left"]), (99.0, [])]
)
def test_long_work_is_told_of_where_there_is_no_terminal(every, told, monkeypatch, caplog):
    monkeypatch.setattr(cli, "stderr", Console(file=io.StringIO()))
    monkeypatch.setattr(cli, "TOLD_EVERY_S", every)
    with caplog.at_level("INFO"), cli.progress(3) as step:
        step("a")
        step("b")
    assert caplog.messages == told
