"""The evaluation harness: the same answers and accuracy as our own runner; likelihoods equal separate forwards."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra.errors import HydraException

import tiny
from parsedec.engine import Parse
from parsedec.errors import ConfigError, PromptError
from parsedec.experiment.runner import Arm, Settings, run_arms
from parsedec.experiment.summary import summarise
from parsedec.harness import command
from parsedec.harness.settings import composed
from parsedec.tasks import Maths, ZooArithmetic
from parsedec.types import Limits, Sampling

pytest.importorskip("lm_eval", reason="the evaluation harness is in the extra `eval`")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from parsedec.harness.model import ParsedecLM

N = 4
ZOO = {"target": "zoo:target", "draft": "zoo:draft", "inner": "draft_model", "inner.length": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task of the harness over a local file of our form, as a user would write it."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"id": p.id, "prompt": p.prompt, "reference": p.reference, "meta": {}} for p in ZooArithmetic(n=N).problems()
    ]
    rows[0]["reference"] = "100000"  # nobody's answer: an accuracy that is neither 0 nor 1
    (folder / "zoo.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "zoo_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "zoo.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{reference}}",
        "generation_kwargs": {"until": ["</s>"], "do_sample": False, "max_gen_toks": 120},
        "filter_list": [
            {
                "name": "final",
                "filter": [
                    {"function": "regex", "regex_pattern": "The answer is ([0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "zoo_local.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))


def test_accuracy_and_answers_are_those_of_our_own_runner(folder, tmp_path):
    pytest.importorskip("math_verify", reason="math-verify is in the extra `eval`")
    record = tmp_path / "parsedec.json"
    results = simple_evaluate(
        model="parsedec",
        model_args=ZOO | {"record": str(record), "runtime.device": "cpu"},
        tasks=["zoo_local"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    lm = ParsedecLM.create_from_arg_obj(ZOO, {"device": "cpu"})
    task = Maths(name="zoo", path=folder / "zoo.jsonl", numbers=True, instruction="")
    arm = Arm("parse", lm.engine)
    settings = Settings(limits=Limits(max_new_tokens=120, stop=["</s>"]), sampling=Sampling(), seed=0, warmup=0)
    run_arms([arm], task, task.problems(), settings, lambda name: None)
    ours = summarise(arm.requests)
    assert results["results"]["zoo_local"]["exact_match,final"] == ours["accuracy"] == (N - 1) / N
    texts = {sample["doc"]["id"]: sample["resps"][0][0] for sample in results["samples"]["zoo_local"]}
    assert texts == {request["id"]: request["result"]["text"] for request in arm.requests}
    counted = ("new_tokens", "target_calls", "judge_passes", "draft_tokens", "kept_draft_tokens")
    assert {key: results["config"]["parsedec"][key] for key in counted} == {key: ours[key] for key in counted}
    stored = json.loads(record.read_text())
    assert stored["status"] == "finished"
    assert stored["config"]["inner"]["length"] == 4
    assert [request["id"] for request in stored["arms"][0]["requests"]] == [f"zoo_local/{i}" for i in range(N)]


def test_command_line_of_the_harness(folder, tmp_path, monkeypatch, capsys):
    """The console script's function; its task index without the thousands of tasks the harness ships."""
    index = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *_, **__: index)
    settings = tmp_path / "pair.yaml"
    settings.write_text("target: zoo:target\ndraft: zoo:draft\nouter: none\n")
    model = ["--model_args", f"config={settings},outer=parse,runtime.device=cpu"]
    task = ["--tasks", "zoo_local", "--include_path", str(folder), "--apply_chat_template", "--limit", "2"]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["parsedec-eval", *model, *task, "--output_path", str(out)])
    command.main()
    assert "|zoo_local|" in capsys.readouterr().out.replace(" ", "")
    (results,) = (out / "pair").glob("results_*.json")
    (record,) = out.glob("parsedec_*.json")
    assert json.loads(results.read_text())["results"]["zoo_local"]["exact_match,final"] == 0.5
    assert json.loads(record.read_text())["summary"]["judge_passes"] > 0  # what is given beside the file wins


def test_command_line_names_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parsedec-eval", "--model_args", "x=1"])
    monkeypatch.setattr(command, "_run", lambda: composed({"innner": "pard"}))
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert "no setting is called 'innner'" in capsys.readouterr().err


# --- arguments ---


@pytest.mark.parametrize(
    ("given", "run"),
    [
        (["--tasks", "x"], ["run", "--model", "parsedec", "--tasks", "x"]),
        (["run", "--tasks", "x"], ["run", "--model", "parsedec", "--tasks", "x"]),
        (["--model", "hf", "--tasks", "x"], ["run", "--model", "hf", "--tasks", "x"]),
        (["--model=hf"], ["run", "--model=hf"]),
        (["--config", "x.yaml"], ["run", "--config", "x.yaml"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["--help"], ["--help"]),
        (["run", "--help"], ["run", "--help"]),
        ([], []),
    ],
)
def test_our_model_is_the_default(given, run):
    assert command.with_model(given) == run


def test_settings_from_arguments_and_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "inner: {}\nouter: parse\nboundary: {threshold: 0.7}\nstop: ['A, b', C]\ntarget.chat_template: null\n"
    )
    path.write_text(path.read_text().replace("inner: {}", "inner: draft_model"))
    cfg = composed({"config": str(path), "draft": "org/some-model", "inner.length": 6, "outer": "none", "record": "x"})
    assert (cfg.inner.length, cfg.draft.model.source, cfg.boundary.threshold) == (6, "org/some-model", 0.7)
    assert cfg.outer._target_.endswith("TargetOnly")
    assert list(cfg.stop) == ["A, b", "C"]
    with pytest.raises(HydraException):
        composed({"pretrained": "x"})
    path.write_text("- a list")
    with pytest.raises(ConfigError, match="holds list; expected settings"):
        composed({"config": str(path)})
    with pytest.raises(ConfigError, match=r"nowhere\.yaml' cannot be read"):
        composed({"config": "nowhere.yaml"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sampling.temperature": 0.7}, r"temperature=0\.7.*--gen_kwargs"),
        ({"sampling.top_k": 5}, r"top_k=5.*--gen_kwargs"),
        ({"batch": 8}, "batch=8.*one at a time"),
        ({"seeds": [0, 1]}, r"seeds=\[0, 1\].*seed=N"),
    ],
)
def test_settings_that_the_harness_decides_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        composed(given)
    assert composed({"sampling.temperature": 0.0, "batch": 1, "seeds": None}).batch == 1  # what holds anyway


# --- one model, tiny and random ---


@pytest.fixture(scope="module")
def lm():
    return ParsedecLM(Parse(tiny.model("llama"), tiny.model("llama", seed=7, layers=1)))


def instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1))


@torch.inference_mode()
def logprobs(model, ids):
    """[T, V] of one plain forward."""
    return model.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_likelihoods_equal_separate_forwards(lm):
    pairs = [("w1 w2 w3", " w4"), ("w1 w2 w3", " w5 w6 w7"), ("w8", " w9 w1"), ("", "w3 w4"), ("w1 w2 w3", " w4")]
    answers = lm.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, answers, strict=True):
        before = lm.tok_encode(context) if context else [lm.prefix_token_id]
        after = lm.tok_encode(context + continuation)[len(before) if context else 0 :]
        rows = logprobs(lm.model, before + after)[len(before) - 1 : -1]
        assert value == pytest.approx(float(sum(row[token] for row, token in zip(rows, after, strict=True))), abs=1e-4)
        assert greedy is (rows.argmax(-1).tolist() == after)


def test_greedy_continuation_is_recognised(lm):
    context = "w1 w2 w3"
    ids = lm.tok_encode(context)
    token = int(logprobs(lm.model, ids)[-1].argmax())
    assert lm._loglikelihood_tokens([(None, ids, [token])])[0][1] is True
    assert lm._loglikelihood_tokens([(None, ids, [token ^ 1])])[0][1] is False


def test_rolling_likelihood_predicts_every_token_once(lm):
    text = " ".join(f"w{i % 50}" for i in range(350))
    ids, limit = lm.tok_encode(text), lm.model.context_limit
    assert limit < len(ids) < 2 * limit
    (value,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    first = logprobs(lm.model, [lm.prefix_token_id, *ids[: limit - 1]])
    expected = sum(float(first[i][ids[i]]) for i in range(limit))
    last = logprobs(lm.model, ids[-limit - 1 : -1])  # a full window, of which the tokens not yet predicted count
    expected += sum(float(last[i - len(ids)][ids[i]]) for i in range(limit, len(ids)))
    assert value == pytest.approx(expected, abs=1e-2)


def test_generation_settings_of_a_task(lm):
    prompt = lm.apply_chat_template([{"role": "user", "content": "w1 w2"}])

    def answer(**settings):
        return lm.generate_until([instance("generate_until", prompt, settings)])[0]

    plain = lm.engine.generate("w1 w2", max_new_tokens=12)
    assert answer(until=[], max_gen_toks=12) == plain.text
    assert answer(until="", max_gen_toks=12, temperature=0.0, num_beams=1) == plain.text
    word = plain.text[6:9]
    assert answer(until=[word], max_gen_toks=12) == plain.text[: plain.text.index(word)]
    drawn = {answer(until=[], max_gen_toks=12, do_sample=True, temperature=2.0) for _ in range(2)}
    assert len(drawn) == 1  # the same seed
    assert drawn != {plain.text}
    with pytest.raises(ConfigError, match=r"asks for \['num_beams'\] = \[10\]"):
        answer(until=[], num_beams=10)


def test_given_beginning_of_an_answer_is_gone_on_with(lm):
    dialogue = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    text = lm.apply_chat_template(dialogue, add_generation_prompt=False)
    assert text.endswith("w3")
    (answer,) = lm.generate_until([instance("generate_until", text, {"until": [], "max_gen_toks": 8})])
    assert answer == lm.engine.generate(lm.model.encode(text), max_new_tokens=8).text


def test_request_that_cannot_be_run_costs_no_other(lm):
    long, short = ("w1 " * 600).strip(), "w1 w2"
    before = len(lm.requests)
    answers = lm.generate_until(
        [instance("generate_until", text, {"until": [], "max_gen_toks": 4}) for text in (long, short)]
    )
    assert answers[0] == "" != answers[1]
    assert [bool(row["error"]) for row in lm.requests[before:]] == [True, False]
    with pytest.raises(PromptError, match="leaves no room in the context"):
        lm.generate_until([instance("generate_until", long, {"until": []})])


def test_draft_model_with_another_vocabulary_reads_prompts_for_itself():
    """A prompt as rendered is in the target's tokens; the draft model has the messages, or the bare text."""
    from parsedec.models.language_model import LanguageModel, load

    lm = ParsedecLM(Parse(tiny.model("llama"), load("zoo:draft", device="cpu")))
    assert isinstance(lm.model, LanguageModel)
    assert not lm.model.same_vocabulary(lm.engine.draft)
    asked = [{"role": "user", "content": "w1 w2"}]
    begun = [*asked, {"role": "assistant", "content": "w3"}]
    prompts = [lm.apply_chat_template(asked), lm.apply_chat_template(begun, add_generation_prompt=False), "w1 w2"]
    lm.generate_until(
        [
            SimpleNamespace(args=(prompt, {"until": [], "max_gen_toks": 6}), task_name="t", doc_id=i, idx=0)
            for i, prompt in enumerate(prompts)
        ]
    )
    assert [row["error"] for row in lm.requests] == [None] * 3
    assert all(row["result"]["counters"]["draft_tokens"] > 0 for row in lm.requests)
