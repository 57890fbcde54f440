"""Recipes: each composes, trains a few steps, exports what `load` reads, and finishes an interrupted run."""

import functools
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

import configs
from parsedec.errors import ConfigError, OutputExistsError, PromptError
from parsedec.models.language_model import load
from parsedec.tasks.jsonl import TaskDataError
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.training import run_recipe
from parsedec.training.heads import acceptance, problems_of
from parsedec.training.loop import Trainer
from parsedec_adapters.medusa import Medusa

RECIPES = sorted(path.stem for path in (configs.CONF / "recipe").glob("*.yaml"))
COMMON = [
    "preset.attention=sdpa", "preset.compile=false", "preset.report_steps=2", "preset.generation_batch=8",
    "recipe.task.n=12", "recipe.evaluation.task.n=2", "recipe.max_new_tokens=24", "recipe.optimisation.steps=4",
    "recipe.optimisation.warmup=0",
]  # fmt: skip
MODEL = [
    "preset.positions=1280", "recipe.init=null", "recipe.grow=0", "recipe.freeze=0", "recipe.shape.layers=2",
    "recipe.shape.hidden_size=64", "recipe.shape.heads=2", "recipe.shape.intermediate_size=64",
    "recipe.lengths=[640]", "recipe.optimisation.rate=5e-3",
]  # fmt: skip
JUDGING = [
    "recipe.drafts.problems=3", "recipe.optimisation.hints=[1]", "recipe.evaluation.thresholds=[0.5]",
    "recipe.evaluation.calibration.n=2",
]  # fmt: skip
HEAD = ["recipe.positions=300", "recipe.optimisation.steps=6", "recipe.max_new_tokens=16"]
ONE_STEP = "recipe.optimisation.steps=1"  # where it does not matter what is learnt
SETTINGS = {
    "zoo_base": MODEL,
    "zoo_target": [*MODEL, *JUDGING],
    "zoo_judge": [*MODEL, *JUDGING],
    "zoo_draft": MODEL,
    "zoo_eagle3": [*HEAD, "recipe.head.passes=2"],
    "zoo_medusa": HEAD,
    "zoo_pard": HEAD,
    "zoo_parallelspec": HEAD,
}
MODELS = [recipe for recipe, settings in SETTINGS.items() if settings[0] == MODEL[0]]
HEADS = [recipe for recipe in SETTINGS if recipe not in MODELS]


def composed(recipe, output, *more):
    settings = [*COMMON, *SETTINGS[recipe], f"output={output}", *more]
    return configs.composed("train", f"recipe={recipe}", *settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, record) of a recipe that nothing interrupted."""

    @functools.cache
    def run(recipe):
        folder = tmp_path_factory.mktemp(recipe)
        return folder, run_recipe(composed(recipe, folder))

    return run


def interrupted(cfg, at, monkeypatch):
    """A run that Ctrl-C ends in step `at`, which is ended first."""
    step = Trainer.train_step

    def interrupting(self, batch):
        if self.step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(cfg)


def test_every_recipe_is_tried_here():
    assert sorted(SETTINGS) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", ["cpu", "cuda"])
def test_every_recipe_composes_with_every_preset(recipe, preset):
    cfg = configs.composed("train", f"recipe={recipe}", f"preset={preset}", "output=x")
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert resolved["recipe"]["optimisation"]["steps"] == resolved["recipe"]["steps_for"][preset]
    assert resolved["recipe"]["task"]["n"] == resolved["recipe"]["problems_for"][preset]


@pytest.mark.parametrize("recipe", MODELS)
def test_a_few_steps_make_a_model_that_loads(recipe, finished):
    folder, record = finished(recipe)
    assert record == json.loads((folder / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["history"][-1]["solve_loss"] < record["history"][0]["solve_loss"]
    assert record["evaluation"]["problems"] == 2
    model = load(folder / "model")
    assert model.dtype is torch.bfloat16
    taken_over = load(composed(recipe, folder).recipe.shape.tokenizer).judge_card
    if recipe in ("zoo_target", "zoo_judge"):  # those that judge
        assert taken_over is not None
        taken_over = replace(taken_over, threshold=0.5, full_threshold=0.5)  # the only threshold tried
    assert model.judge_card == taken_over
    assert model.tokenizer.chat_template
    with pytest.raises(OutputExistsError, match="resume"):
        run_recipe(composed(recipe, folder))


@pytest.mark.parametrize("recipe", HEADS)
def test_a_few_steps_make_a_head_that_guesses(recipe, finished):
    folder, record = finished(recipe)
    assert record["status"] == "finished"
    first, last = record["history"][0], record["history"][-1]
    assert last["depth_2_loss"] < first["depth_2_loss"]
    measured = record["evaluation"]
    assert measured["problems"] == 2
    low, high = measured["tau_interval"]
    assert 1 <= low <= measured["tau"] <= high
    assert measured["offered_by_depth"][0] >= measured["accepted_by_depth"][0]
    # the exported head is what was measured: the same weights give the same figures again
    cfg = composed(recipe, folder)
    assert acceptance(cfg, folder / "model", problems_of(cfg.recipe)[1]) == measured


def test_a_head_for_ones_own_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    prompts = [problem.prompt for problem in ZooArithmetic(n=9, seed=7).problems()]
    file.write_text("".join(json.dumps({"prompt": prompt, "source": "mine"}) + "\n" for prompt in prompts))
    own = [f"recipe.prompts={file}", "recipe.evaluation.held_out=2", ONE_STEP]
    record = run_recipe(composed("zoo_medusa", tmp_path / "run", *own))
    assert record["evaluation"]["problems"] == 2
    assert len(json.loads((tmp_path / "run" / "answers.json").read_text())["answers"]) == 7
    target = load("zoo:target", dtype="float32", device="cpu")
    for given in (tmp_path / "run", tmp_path / "run" / "model"):  # the output is the head in it
        assert Medusa(heads=str(given), nodes=4).bind(target, None)
    with pytest.raises(ConfigError, match="held_out=9"):
        run_recipe(composed("zoo_medusa", tmp_path / "more", *own, "recipe.evaluation.held_out=9"))
    file.write_text('{"question": "?"}')
    with pytest.raises(TaskDataError, match="line 1"):
        run_recipe(composed("zoo_medusa", tmp_path / "wrong", *own))


@pytest.mark.parametrize("place", [0, 2], ids=["to learn from", "held out"])
@pytest.mark.parametrize(
    ("prompt", "says"), [("7 " * 2000, "context"), (" ", "empty"), ("half of a pair: \ud83d", "surrogate")],
    ids=["too long", "blank", "no Unicode"],
)  # fmt: skip
def test_a_prompt_that_cannot_be_asked_is_refused_before_anything_is_learnt(tmp_path, prompt, says, place):
    prompts = ["1 + 1?", "1 + 2?", "1 + 3?"]
    prompts[place] = prompt
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    own = [f"recipe.prompts={file}", "recipe.evaluation.held_out=1", ONE_STEP]
    with pytest.raises(PromptError, match=rf"prompts.jsonl/{place + 1}: .*{says}"):
        run_recipe(composed("zoo_medusa", tmp_path / "run", *own))
    assert not (tmp_path / "run" / "answers.json").exists()


def test_answers_of_one_token_leave_nothing_to_measure(tmp_path):
    record = run_recipe(composed("zoo_medusa", tmp_path, ONE_STEP, "recipe.max_new_tokens=1"))
    assert record["evaluation"]["target_calls"] == 0
    assert "tau" not in record["evaluation"]
    assert "NaN" not in (tmp_path / "record.json").read_text()


def test_a_mask_that_the_target_writes_is_refused(tmp_path):
    target = load("zoo:target", dtype="float32", device="cpu")
    [digit] = target.encode("7")
    with pytest.raises(ConfigError, match=rf"mask_token={digit}, '7'"):
        run_recipe(composed("zoo_pard", tmp_path, ONE_STEP, f"recipe.head.mask_token={digit}"))


# one loop trains them all: one head here, the others where there is time
@pytest.mark.parametrize(
    "recipe", [pytest.param(h, marks=() if h == "zoo_medusa" else pytest.mark.slow) for h in HEADS]
)
def test_heads_go_on_after_a_kill_as_if_nothing_had_happened(recipe, finished, tmp_path, monkeypatch):
    unbroken, _ = finished(recipe)
    interrupted(composed(recipe, tmp_path / "broken"), 3, monkeypatch)
    run_recipe(composed(recipe, tmp_path / "broken", "resume=true"))
    weights = next((unbroken / "model").glob("*.safetensors")).name
    for name in (f"model/{weights}", "answers.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (unbroken / name).read_bytes()


def test_answers_to_other_prompts_are_not_taken_over(tmp_path):
    run_recipe(composed("zoo_medusa", tmp_path, ONE_STEP))
    (tmp_path / "record.json").unlink()
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(OutputExistsError, match="other prompts"):
        run_recipe(composed("zoo_medusa", tmp_path, "recipe.task.seed=9"))


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="kind"):
        run_recipe(composed("zoo_draft", tmp_path, "recipe.kind=poem"))


def test_an_interrupted_recipe_ends_like_an_unbroken_one(finished, tmp_path, monkeypatch):
    unbroken, _ = finished("zoo_target")
    broken = composed("zoo_target", tmp_path / "broken")
    interrupted(broken, 2, monkeypatch)
    assert json.loads((tmp_path / "broken" / "record.json").read_text())["status"] == "interrupted"
    with pytest.raises(OutputExistsError, match="recipe"):
        run_recipe(composed("zoo_target", tmp_path / "broken", "resume=true", "recipe.optimisation.rate=1"))
    record = run_recipe(composed("zoo_target", tmp_path / "broken", "resume=true"))
    assert record["resumed_from"] is not None
    for name in ("model/model.safetensors", "drafts.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (unbroken / name).read_bytes()
