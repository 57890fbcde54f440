"""Mistakes that are easily made, in Python and in commands: none is silent, and none costs what is finished."""

import json
import math
import re
import runpy
import shutil
from contextlib import nullcontext

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

import tiny
from parsedec import Parse, PrefixVerification, load, write_trace
from parsedec.advice.job import divided
from parsedec.boundary import Smoothed
from parsedec.errors import (
    ConfigError,
    IncompatibleStack,
    JudgeError,
    ModelLoadError,
    OutputExistsError,
    PromptError,
    require_number,
)
from parsedec.experiment import calibrated
from parsedec.experiment.build import apply_runtime, build_engine
from parsedec.experiment.cli import expand_shorthand, explain, known_settings
from parsedec.experiment.job import refuse_nothing_answered, run_comparison, run_job
from parsedec.experiment.nodes import conf_folder
from parsedec.experiment.runner import Arm
from parsedec.gate import Adaptive
from parsedec.inner import NoSpeculation
from parsedec.judge import ConfidenceJudge, LabelJudge, Scores
from parsedec.loop import Rounds
from parsedec.models.checkpoints import in_zoo
from parsedec.peers import Cascade, HfGenerate, LabelEquivalence, LookaheadReasoning, SpecReason
from parsedec.segmenters import EveryTokens, Lines
from parsedec.serve import command
from parsedec.serve.asked import ChatAsked
from parsedec.streamed import StreamedVerification
from parsedec.tasks import OpenEnded
from parsedec.text.prompt import messages_of
from parsedec.training.probe_job import train_probes
from parsedec.types import JudgePath, Limits, Sampling, Tree
from parsedec_adapters.draft_model import DraftModel

CONF = conf_folder()
QUESTION = "Tom has 12 coins. Ana gives Tom 30 coins. How many coins does Tom have now?"


def composed(*overrides, config="config", given=None):
    """A configuration; `given` are settings in their own form."""
    small = ["runtime=cpu", "max_new_tokens=8"] + (["warmup=0"] if config in ("config", "serve") else [])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.merge(compose(config, overrides=[*small, *overrides]), given or {})


@pytest.fixture(scope="module")
def zoo():
    return [load(f"zoo:{name}", dtype="float32", device="cpu", backend="static") for name in ("target", "draft")]


# Python


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"outer": "parse"}, r"outer='parse'; expected an object.*outer=parse"),
        ({"judge": "label"}, "judge='label'; expected an object"),
        ({"judge": LabelJudge}, r"judge is the class LabelJudge; expected an object of it: LabelJudge\(…\)"),
        ({"inner": DraftModel}, r"inner is the class DraftModel; expected an object of it: DraftModel\(…\)"),
        ({"acceptance": "siblings"}, "acceptance='siblings'"),
    ],
)
def test_parts_are_objects(parts, said, tiny_target, tiny_draft):
    with pytest.raises(ConfigError, match=said):
        Parse(tiny_target, tiny_draft, **parts)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: PrefixVerification(segmenter=Lines), "segmenter is the class Lines"),
        (lambda: StreamedVerification(judge="label"), "judge='label'"),
        (lambda: PrefixVerification(max_draft_tokens=2.5), r"max_draft_tokens=2\.5; expected a whole number"),
        (lambda: Rounds(rounds=2.5), r"loop\.rounds=2\.5; expected a whole number"),
    ],
)
def test_parts_of_an_outer_level_are_looked_at_too(wrong, said):
    with pytest.raises(ConfigError, match=said):
        wrong()


@pytest.mark.parametrize("given", ["judge", "draft_inner"])
def test_what_only_a_draft_model_could_need_is_not_ignored(given, tiny_target):
    part = LabelJudge() if given == "judge" else NoSpeculation()
    with pytest.raises(IncompatibleStack, match=f"{given} is given, but no draft model"):
        Parse(tiny_target, **{given: part})


class Counts:
    """A judge that gives as many scores as it likes."""

    suffix_rows, card = 0, None

    def __init__(self, count):
        self.count = count

    def bind(self, target):
        return self

    @property
    def needs(self):
        return LabelJudge().needs

    def score(self, session, draft, cuts, probes):
        session.judge(draft.tokens, cuts, [])
        return Scores((1.0,) * self.count(len(probes)), (), 1, JudgePath.CAUSAL)


@pytest.mark.parametrize("count", [lambda probes: probes - 1, lambda probes: probes + 1, lambda probes: 0])
@pytest.mark.parametrize("outer", [PrefixVerification, StreamedVerification])
def test_a_judge_gives_a_score_for_every_cut(outer, count, zoo):
    engine = Parse(*zoo, outer=outer(judge=Counts(count)))
    with pytest.raises(JudgeError, match=r"Counts gave \d scores for \d cuts; expected one for each"):
        engine.generate(QUESTION)
    right = Parse(*zoo, outer=outer(judge=Counts(lambda probes: probes))).generate(QUESTION)
    assert right.counters.kept_draft_tokens > 0


def test_a_speculator_proposes_tokens_of_the_model(tiny_target):
    class Beyond(NoSpeculation):
        def propose(self, state, budget):
            return Tree.chain([state[-1], 10**6]) if budget else Tree.chain(state[-1:])

    with pytest.raises(ValueError, match=r"Beyond proposed tokens from \d+ to 1000000; expected ids of tiny llama"):
        Parse(tiny_target, inner=Beyond()).generate([5, 6, 7], max_new_tokens=6)


@pytest.mark.parametrize(
    ("content", "text"),
    [("Hi", "Hi"), ([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}], "Hi"), (["H", "i"], "Hi")],
)
def test_parts_of_text_are_text(content, text):
    assert messages_of([{"role": "user", "content": content}]) == [{"role": "user", "content": text}]


def test_parts_of_a_clients_message_are_joined_by_the_engine(tiny_target):
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    turns = [{"role": "developer", "content": parts[:1]}, {"role": "user", "content": parts}]
    (prompt,) = ChatAsked(model="m", messages=turns).prompts()
    joined = [{"role": "system", "content": "w1 "}, {"role": "user", "content": "w1 w2"}]
    assert messages_of(prompt) == joined
    engine = Parse(tiny_target)
    assert engine.target_ids(prompt) == engine.target_ids(joined)
    (nothing,) = ChatAsked(model="m", messages=[{"role": "user", "content": []}]).prompts()
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.generate(nothing)


@pytest.mark.parametrize(
    "content", [None, 7, b"Hi", {"type": "text"}, [{"type": "image_url", "image_url": "x"}], [None], "a \ud800 b"]
)
def test_other_content_is_refused_in_its_place(content, tiny_target):
    with pytest.raises(PromptError, match=r"content is .*expected text, or a list"):
        messages_of([{"role": "user", "content": content}])
    prompts = ["w1 w2", [{"role": "user", "content": content}], "w1 w2"]
    results = Parse(tiny_target).generate_batch(prompts, max_new_tokens=4).answers
    assert isinstance(results[1], PromptError)
    assert results[0].tokens == results[2].tokens


@pytest.mark.parametrize(("source", "said"), [("", "no place of a model"), (__file__, "a file of another kind")])
def test_what_is_no_model(source, said):
    with pytest.raises(ModelLoadError, match=f"{said}; expected a directory"):
        load(source)


PARTS = {
    "eagle3": r"an EAGLE-3 head.*inner=eagle3 inner\.head={0}, in Python .*Eagle3\(head='{0}'\)",
    "medusa": r"a set of Medusa heads.*inner=medusa inner\.heads={0}, in Python .*Medusa\(heads='{0}'\)",
    "parallelspec": r"a ParallelSpec head.*inner=parallelspec inner\.head={0}, in Python .*Spec\(head='{0}'\)",
    "probe": r"a set of judge probes.*judge=probe judge\.weights={0}, in Python .*ProbeJudge\(weights='{0}'\)",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_stack_is_no_model(part, tmp_path):
    """Wherever it is; with a tokenizer beside it, it could pass for one."""
    folder = tmp_path / part
    shutil.copytree(in_zoo(f"zoo:{part}"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(in_zoo("zoo:target") / name, folder)
    for source in (f"zoo:{part}", str(folder)):
        with pytest.raises(ModelLoadError, match=f"'{re.escape(source)}' is {PARTS[part].format(re.escape(source))}"):
            load(source)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "draft_vocab_size": 32000}, "EAGLE-3"),
        ({"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}, "EAGLE-3"),
        ({"medusa_num_heads": 2, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}, "Medusa"),
        (None, "Medusa"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "medusa_num_heads": 5}, None),
        ({"architectures": ["Eagle2_5_VLForConditionalGeneration"], "model_type": "eagle_2_5_vl"}, None),
        ({}, None),
        ([], None),
    ],
)
def test_public_heads_are_known_by_their_configuration(config, part, tmp_path):
    """A Medusa-2 checkpoint is a model with heads inside; version 0.1 may be the heads' file alone."""
    if config is None:
        (tmp_path / "medusa_lm_head.pt").touch()
    else:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=part or "cannot load the model") as refused:
        load(tmp_path)
    assert ("no model itself" in str(refused.value)) == bool(part)


def test_a_result_has_a_page(tiny_target, tmp_path):
    result = Parse(tiny_target).generate([5, 6, 7], max_new_tokens=4)
    page = write_trace(result, tmp_path / "trace.html").read_text()
    assert re.findall(r"w\d+", result.text)[0] in page


@pytest.mark.parametrize("outer", [PrefixVerification, StreamedVerification, SpecReason, Cascade])
def test_it_is_said_where_a_question_leaves_no_room_to_draft(outer):
    prompt = [5, 6, 7]
    rows = LabelJudge(question="?").bind(tiny.model()).suffix_rows
    notes = {}
    for room in (rows, rows + 8):
        target = tiny.model("llama", context_limit=len(prompt) + room)
        engine = Parse(target, tiny.model("llama", seed=5, layers=2), outer=outer(judge=LabelJudge(question="?")))
        result = engine.generate(prompt, max_new_tokens=4)
        assert (result.counters.draft_tokens > 0) == (room > rows)
        notes[room] = result.notes
    limit = len(prompt) + rows
    said = f"prompt, answer and the judge's question of {rows} tokens fill the context of tiny llama, {limit} tokens"
    assert any(said in note for note in notes[rows])
    assert notes[rows + 8] == ()


def test_a_question_that_no_context_holds_is_refused_when_the_stack_is_built(tiny_draft):
    rows = LabelJudge(question="?").bind(tiny.model()).suffix_rows
    for room, fits in ((1, False), (2, True)):
        target = tiny.model("llama", context_limit=rows + room)
        with (
            nullcontext() if fits else pytest.raises(IncompatibleStack, match=f"takes {rows} tokens.*holds {rows + 1}")
        ):
            Parse(target, tiny_draft, judge=LabelJudge(question="?"))


def test_steps_too_long_to_be_compared_are_the_targets_own(tiny_target, tiny_draft):
    asked = tiny.model("llama", seed=3, context_limit=12)
    outer = LookaheadReasoning(
        equivalence=LabelEquivalence(model=asked, question="{own} {proposed}?", labels=("w1", "w2")),
        segmenter=EveryTokens(delta=8),
    )
    result = Parse(tiny_target, tiny_draft, outer=outer).generate([5, 6, 7], max_new_tokens=12)
    assert list(result.tokens) == tiny.greedy(tiny_target, [5, 6, 7], 12)[0]
    assert any("could not be compared: the target's own stand" in note for note in result.notes)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("judge.labels", lambda given: LabelJudge(labels=given)),
        ("equivalence.labels", lambda given: LabelEquivalence(labels=given)),
        ("stop", lambda given: Limits(stop=given)),
        ("categories", lambda given: OpenEnded(name="chat", path=__file__, categories=given)),
        ("segmenters", lambda given: divided(composed(config="advise", given={"segmenters": given}), [])),
        ("positions", lambda given: train_probes(composed(config="train_probe", given={"positions": given}))),
    ],
)
def test_a_string_is_no_list_of_its_letters(name, make):
    with pytest.raises(
        ConfigError, match=rf"{name}='YN' is one string.*letter by letter; expected a list.*{name}=\[…\]"
    ):
        make("YN")
    with pytest.raises(ConfigError, match=rf"{name}=\[1, 0\]; expected a list"):
        make([1, 0])
    with pytest.raises(ConfigError, match=rf"{name}=\['Y', ''\] holds an empty string.*Remove it"):
        make(["Y", ""])


def test_labels_are_two():
    assert LabelJudge(labels=["Y", "N"]).labels == ["Y", "N"]
    with pytest.raises(ConfigError, match=r"judge\.labels=\['Y'\]; expected a list of two words, right and wrong"):
        LabelJudge(labels=["Y"])


@pytest.mark.parametrize(
    ("value", "settings", "said"),
    [
        (0, {"low": 1}, "at least 1"),
        (9, {"low": 1, "high": 4}, "from 1 to 4"),
        (2.5, {"whole": True}, "expected a whole number"),
        (True, {}, "n=True; expected a number"),
        (float("nan"), {"low": 0}, "n=nan; expected a number, at least 0"),
        ("3", {"low": 1}, "n='3'; expected a number, at least 1"),
    ],
)
def test_numbers(value, settings, said):
    with pytest.raises(ConfigError, match=said):
        require_number("n", value, **settings)
    require_number("n", 3, whole=True, low=1, high=4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Lines(min_tokens="3"), r"segmenter\.min_tokens='3'; expected a whole number, at least 1"),
        (lambda: EveryTokens(delta=2.5), r"segmenter\.delta=2\.5; expected a whole number"),
        (lambda: Lines(pattern="("), r"segmenter\.pattern='\(' is not a regular expression"),
        (lambda: Smoothed(window=2.5), r"boundary\.window=2\.5; expected a whole number, at least 1"),
        (lambda: Adaptive(bound=math.nan), r"gate\.bound=nan; expected a number, at least 0"),
        (lambda: Adaptive(bound=0), r"gate\.bound=0; expected more than 0"),
        (lambda: Adaptive(reserve=None), r"gate\.reserve=None; expected a number"),
        (lambda: Adaptive(window=2.5), r"gate\.window=2\.5; expected a whole number"),
        (lambda: Adaptive(cost_per_token="low"), r"gate\.cost_per_token='low'; expected a number"),
        (lambda: ConfidenceJudge(sure=None), r"judge\.sure=None; expected a number from 0 to 1"),
        (lambda: Cascade(threshold=2), r"outer\.threshold=2; expected a number from 0 to 1"),
        (lambda: SpecReason(first_steps_by_target=1.5), r"first_steps_by_target=1\.5; expected a whole number"),
        (lambda: SpecReason(threshold="7"), r"outer\.threshold='7'; expected a number from 0 to 1"),
        (lambda: LookaheadReasoning(steps=2.5), r"outer\.steps=2\.5; expected a whole number, at least 1"),
        (lambda: LookaheadReasoning(threshold=None), r"outer\.threshold=None; expected a number from 0 to 1"),
        (lambda: HfGenerate(length=2.5), r"outer\.length=2\.5; expected a whole number, at least 1"),
        (lambda: HfGenerate(confidence="high"), r"outer\.confidence='high'; expected a number from 0 to 1"),
    ],
)
def test_a_part_is_refused_before_it_meets_a_draft(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sampling": 0.7}, r"sampling=0\.7; expected a Sampling: Sampling\(temperature=…\)"),
        ({"sampling": {"temperature": 1}}, r"sampling=\{'temperature': 1\}; expected a Sampling"),
        ({"sampling": Sampling(temperature=1.0)}, r"temperature=1\.0 needs .*torch\.Generator"),
        ({"sampling": Sampling(temperature=1.0), "generator": 3}, r"generator=3; expected a Generator: torch\.Gen"),
    ],
)
def test_sampling_is_given_as_objects(given, said, tiny_target):
    engine = Parse(tiny_target)
    with pytest.raises(ConfigError, match=said):
        engine.generate([5, 6, 7], max_new_tokens=2, **given)
    each = {"generators": [given["generator"]]} if "generator" in given else {}
    with pytest.raises(ConfigError, match=said):
        engine.generate_batch([[5, 6, 7]], max_new_tokens=2, sampling=given["sampling"], **each)
    with pytest.raises(ConfigError, match=r"generators=<torch.*; expected a list of them, one .* a prompt"):
        engine.generate_batch([[5]], sampling=Sampling(temperature=1.0), generators=torch.Generator())


# Commands


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("target=zoo:target,zoo:draft", ["target=any", "target.source='zoo:target','zoo:draft'"]),
        ("draft=a/b,./c.gguf", ["draft=any", "draft.model.source='a/b','./c.gguf'"]),
        ("target=zoo,any", ["target=zoo,any"]),
        ("target=zoo,a/b", ["target=zoo,a/b"]),
    ],
)
def test_several_models_of_a_sweep(argument, expanded):
    assert expand_shorthand(argument, CONF) == expanded


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("inner.head=x", r"inner\.head is a setting of another member of inner than the one chosen"),
        ("inner.head=x", r"Did you mean inner\.heads\?"),
        ("loop.rounds=3", r"loop\.rounds is a setting of another member of loop than the one chosen: of loop=rounds\."),
        ("inner.hed=x", r"no setting is called 'inner\.hed'. Did you mean inner\.head"),
        ("path=x", r"no setting is called 'path'. Did you mean .*\.path"),
    ],
)
def test_a_setting_of_something_else(override, said):
    with pytest.raises(Exception, match="override") as refused:
        composed("inner=medusa", override)
    assert re.search(said, explain(refused.value, CONF)), explain(refused.value, CONF)
    assert "inner.head" in known_settings(CONF)


@pytest.mark.parametrize("value", ["null", "3", "true", "0.5"])
def test_a_member_of_a_group_has_a_name(value):
    with pytest.raises(ConfigError, match=rf"inner={value} does not exist; inner is one of \['draft_model'"):
        expand_shorthand(f"inner={value}", CONF)
    with pytest.raises(ConfigError, match=r"the argument =3 has no name; expected NAME=VALUE"):
        expand_shorthand("=3", CONF)
    assert expand_shorthand(f"seed={value}", CONF) == [f"seed={value}"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task", r"cannot read the argument task; expected NAME=VALUE"),
        ("title=it's", r"cannot read the argument title=it's; expected NAME=VALUE. Text with quotes.* is quoted, too"),
        (
            "batch=1,2",
            r"batch has several values, 1,2; expected one. A list is batch=\[1,2\], and -m makes a run for each",
        ),
    ],
)
def test_an_argument_that_cannot_be_read(override, said):
    with pytest.raises(Exception, match=r".") as refused:
        composed(override)
    assert re.search(said, explain(refused.value, CONF)), explain(refused.value, CONF)


@pytest.mark.parametrize(
    ("override", "said"),
    [("sampling.temperature=hot", r"sampling\.temperature='hot'; expected a number"),
     ("sampling.top_k=2.5", r"sampling\.top_k=2\.5; expected a whole number"),
     ("seeds=3", r"seeds=3; expected a list: seeds=\[3\]"),
     ("boundary.threshold=high", r"boundary\.threshold='high'; expected a number"),
     ("draft=none", "needs a draft model, and draft is none")],
)  # fmt: skip
def test_wrong_values_are_named(override, said, tmp_path, monkeypatch):
    from parsedec.experiment import build

    monkeypatch.setattr(build, "build_model", lambda node: pytest.fail("found only after a model was loaded"))
    cfg = composed(override, "task.n=1")
    with pytest.raises(Exception, match=r".") as refused:
        run_job(cfg, tmp_path, lambda: [Arm("run", build.build_engine(cfg))])
    assert re.search(said, explain(refused.value, CONF)), explain(refused.value, CONF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", [0, "many"])
def test_threads(threads):
    with pytest.raises(ConfigError, match=rf"runtime\.threads='?{threads}"):
        apply_runtime(composed(f"runtime.threads={threads}"))


def test_a_server_does_not_stop_at_each_letter_of_a_stop_string(monkeypatch):
    monkeypatch.setattr("parsedec.experiment.build.build_engine", lambda cfg: None)
    with pytest.raises(ConfigError, match=r"one string, which would stop at each of its letters|expected a list"):
        command.serve(composed("stop=abc", config="serve"))
    with pytest.raises(Exception, match="port") as refused:
        command.serve(composed("serve.port=abc", config="serve"))
    assert "serve.port='abc'; expected a whole number" in explain(refused.value, CONF)


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputExistsError, match="is a file; expected a folder"):
        run_job(composed("task.n=1"), tmp_path / "out", list)
    assert (tmp_path / "out").read_text() == "mine"


def test_resuming_with_fewer_problems_loses_no_answer(tmp_path):
    def run(*overrides):
        cfg = composed("outer=none", "target.source=zoo:draft", *overrides)
        return run_job(cfg, tmp_path / "out", lambda: [Arm("run", build_engine(cfg))])

    whole = run("task.n=3")
    stored = (tmp_path / "out" / "record.json").read_text()
    with pytest.raises(OutputExistsError, match=r"answers to 2 problems that are not asked now.*task\.n"):
        run("task.n=1", "resume=true")
    assert (tmp_path / "out" / "record.json").read_text() == stored
    longer = run("task.n=4", "resume=true")
    assert longer["arms"][0]["requests"][:3] == whole["arms"][0]["requests"]


def test_a_baseline_is_one_of_the_arms_and_can_be_changed_afterwards(tmp_path):
    def compared(*more):
        overrides = ["task.n=2", "target.source=zoo:draft", "runtime=cpu", "warmup=0", "max_new_tokens=8", *more]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("compare", overrides=overrides)
            with open_dict(cfg):
                cfg.arms = {name: {"overrides": ["outer=none"]} for name in ("one", "two")}
            return run_comparison(cfg, tmp_path / "out", "compare", overrides)

    with pytest.raises(ConfigError, match=r"baseline=nope; expected one of the arms, one, two"):
        compared("baseline=nope")
    assert not (tmp_path / "out").exists()
    first = compared("baseline=one")
    assert [row["arm"] for row in first["comparison"]] == ["two"]
    again = compared("baseline=two", "resume=true")
    assert [row["arm"] for row in again["comparison"]] == ["one"]
    assert [arm["requests"] for arm in again["arms"]] == [arm["requests"] for arm in first["arms"]]


def test_a_run_that_answered_nothing_has_failed():
    def record(*errors):
        requests = [{"error": "ValueError: the prompt is too long.\nIt has 9 tokens."}, {"error": None}]
        return {"arms": [{"summary": {"errors": n, "requests": 2}, "requests": requests} for n in errors]}

    refuse_nothing_answered(record(2, 1))
    said = r"no request could be answered; the first one's error is ValueError: the prompt is too long\. The record"
    with pytest.raises(Exception, match=said):
        refuse_nothing_answered(record(2, 2))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], None),
        (["boundary.threshold=0.1"], r"overridden: boundary\.threshold is 0\.1, not 0\.9[0-9]*"),
        (["boundary=longest_valid"], "overridden: the rule is LongestValid, not boundary=first_failure"),
    ],
)
def test_thresholds_that_promise_something_are_not_replaced_in_silence(overrides, said, tmp_path, caplog):
    path = tmp_path / "calibration.yaml"
    path.write_text(
        "overrides: [boundary=first_failure, boundary.threshold=0.93, boundary.full_threshold=0.8]\nholds_for: {}\n"
    )
    cfg = composed(*expand_shorthand(f"calibration={path}", CONF), *overrides)
    calibrated.warn_of_other_calibration(cfg)
    assert re.search(said, caplog.text) if said else not caplog.records


def test_half_a_record_is_said_to_be_one(tmp_path, capsys):
    report = runpy.run_path(str(CONF.parent / "experiments" / "report.py"))
    (tmp_path / "record.json").write_text(json.dumps({"schema_version": 1, "status": "finished", "arms": []}))
    assert report["read_all"]([tmp_path]) == []
    assert "no whole record: it has no config and no provenance" in capsys.readouterr().err
