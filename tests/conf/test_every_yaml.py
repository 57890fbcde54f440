"""Every YAML under conf/, found by glob, composes and builds; a name it does not list is refused."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

import configs
import tiny
from eagle3_heads import tiny_head
from medusa_heads import random_heads
from oracle.test_judge_kinds import probe_folder
from parallel_heads import new_head
from parsedec.engine import Parse
from parsedec.errors import ConfigError
from parsedec.experiment.build import build_draft_alone, build_engine, build_sampling, plain
from parsedec.experiment.kinds import require_kinds
from parsedec.experiment.nodes import draft_node, target_node
from parsedec.gate import GateHistory
from parsedec.models.language_model import LanguageModel, load
from parsedec.sampling import Sampler
from parsedec.tasks import OpenEnded
from parsedec.text.spelling import Draft
from parsedec.types import Sampling, Tree
from parsedec_adapters.eagle3 import save_head
from parsedec_adapters.medusa import save_heads
from parsedec_adapters.parallel_head import save_head as save_parallel_head

CONF = configs.CONF
MEMBERS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
EXPERIMENTS = [member for member in MEMBERS if member.startswith("experiment/")]
BUILT = [member for member in MEMBERS if member not in EXPERIMENTS]
NEEDS = {  # settings without a default
    "target/any": ["target.source=zoo:draft"],
    "draft/any": ["draft.model.source=zoo:draft"],
    "engine/openai": ["engine.target.url=http://127.0.0.1:1", "engine.target.tokenizer=zoo:target"],
    "inner/eagle3": ["inner.head={problems.parent}/eagle3"],
    "inner/medusa": ["inner.heads={problems.parent}/medusa"],
    "inner/parallelspec": ["inner.head={problems.parent}/parallel"],
    "outer/lookahead": ["equivalence=equal"],  # the tiny vocabulary has no Same and Different
    "inner/pard": ["inner.model=null", "inner.mask_token=4"],
    "judge/probe": ["judge.weights={problems.parent}/probe"],
    "judge/combined": ["judge.weights={problems.parent}/probe"],
    "labels/checker": ["labels.fit.n=2", "labels.check.n=2"],
    "labels/answers": ["labels.fit.n=20"],
    "labels/steps": ["labels.path={problems.parent}/steps.jsonl"],
}
# benchmarks come from the hub where no file is given
NEEDS |= {
    f"task/{path.stem}": ["task.path={problems}", "task.n=1"]
    for path in CONF.glob("task/*.yaml")
    if "hub" in OmegaConf.load(path)
}
CLASSES = [member for member in BUILT if "_target_" in OmegaConf.load(CONF / f"{member}.yaml")]
# groups and members of another command than run.py
PRIMARY = {"arms": "compare", "recipe": "train", "preset": "train", "arms/replay": "replay", "arms/gpu": "gpu",
           "labels": "calibrate"}  # fmt: skip
BOUND = {"suffix", "chosen", "reason", "card"}  # of every judge that reads a pass
OURS = {  # parameters that are not for users: filled in by bind, or what makes the class the one it is
    "load": {"name"},
    "LabelJudge": {*BOUND, "label_ids"},
    "DigitJudge": {*BOUND, "digit_ids"},
    "LogprobJudge": BOUND,
    "ConfidenceJudge": BOUND,
    "ProbeJudge": {*BOUND, "weight", "bias"},
    "CombinedJudge": {"mixture"},
    "DraftModel": {"vocab"},
    "HfAssisted": {"target"},
    "ScriptedJudge": {"suffix", "label_ids", "chosen", "reason", "card"},
    "ParallelSpec": {"target"},
    "Pard": {"vocab"},
    "Scripted": {"vocab", "oracle"},
    "SelfEarlyExit": {"drafter"},
    "Medusa": {"stack"},
    "PrefixVerification": {"end_token"},
    "Cascade": {"verification"},
    "SpecReason": {"end_token"},
    "LookaheadReasoning": {"end_token"},
    "LabelEquivalence": {"label_ids"},
    "StreamedVerification": {"end_token"},
    "Lines": {"pattern"},
    "Paragraphs": {"pattern"},
    "Sentences": {"pattern"},
}
ROW = {  # a problem of every benchmark at once
    "id": "1",
    "prompt": "def f():\n\nA. one\nB. two",
    "reference": "3",
    "meta": {"entry_point": "f", "test": "def check(f): f()", "accept": ["A"]},
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("needed")
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    solved = ({"problem": f"w{i}", "steps": ["w1", "w2"], "label": -1} for i in range(20))
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, solved)))
    save_head(tiny_head(), tmp_path / "eagle3")
    save_heads(random_heads(), tmp_path / "medusa")
    (tmp_path / "probe").mkdir()
    probe_folder(tmp_path / "probe", tiny.model("llama"))
    save_parallel_head(new_head(tiny.model("llama")), tmp_path / "parallel")
    return path


def composed(*overrides, config="config"):
    return configs.composed(config, *overrides, "output=unused")


def chosen(member, problems):
    """The configuration with one member of a group chosen and given what it has no default for."""
    group, name = member.split("/")
    needs = [setting.format(problems=problems) for setting in NEEDS.get(member, [])]
    config = PRIMARY.get(member, PRIMARY.get(group, "config"))
    device = [] if config == "train" else ["runtime.device=cpu"]
    return composed(*device, f"{group}={name}", *needs, config=config)


def is_model(cfg):
    model = instantiate(cfg)
    return isinstance(model, LanguageModel) and model.device.type == "cpu" and model.end_ids


def is_draft(cfg):
    return cfg.draft.model is None or is_model(cfg.draft.model)


def is_inner(cfg):
    target, draft = tiny.model("llama"), tiny.model("llama", seed=7, layers=1)
    inner = instantiate(cfg.inner)
    bound = inner.bind(target, draft)
    assert type(bound) is type(inner)
    assert isinstance(bound.lossless, bool)
    return all(0 <= layer <= target.num_layers for layer in bound.needs.hidden_layers)


def is_judge(cfg):
    digits = cfg.judge._target_.endswith("DigitJudge")  # which the tiny vocabulary lacks
    judge = instantiate(cfg.judge)
    bound = judge.bind(instantiate(cfg.target) if digits else tiny.model("llama"))
    return type(bound) is type(judge) and (bound.suffix_rows > 0) is not cfg.judge._target_.endswith("LogprobJudge")


def is_outer(cfg):
    bound = instantiate(cfg.outer).bind(tiny.model("llama"))
    return isinstance(bound.needs_draft, bool)


def is_equivalence(cfg):
    bound = instantiate(cfg.equivalence).bind(load("zoo:draft", device="cpu"))
    return bound.compare("So 3 + 4 = 7.", "so 3+4=7.").score == 1 and bound.compare("3", "4").score < 1


def is_segmenter(cfg):
    draft = Draft.of(tiny.model("llama"), [10, 11, 8, 9, 12, 13], ended=True)
    return instantiate(cfg.segmenter).cuts(draft)[-1] == 6


def is_acceptance(cfg):
    tree, logits = Tree.chain([3, 1]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    sampler = Sampler(Sampling(), torch.Generator().manual_seed(0))
    return instantiate(cfg.acceptance).accept(tree, logits, sampler) == ([0, 1], 0)


def is_engine(cfg):
    """Every setting of a server is listed, and a draft model without one runs here."""
    if cfg.engine.target is None:
        return cfg.engine.draft is None and (target_node(cfg), draft_node(cfg)) == (cfg.target, cfg.draft.model)
    for node in (cfg.engine.target, cfg.engine.draft):
        assert set(node) - {"_target_"} == set(inspect.signature(get_object(node._target_)).parameters)
    assert draft_node(cfg) == cfg.draft.model
    cfg.engine.draft.url = "http://127.0.0.1:2"
    assert draft_node(cfg).tokenizer == "zoo:target"
    with pytest.raises(InstantiationException, match="could not be read"):
        instantiate(target_node(cfg), retries=0)
    return True


def is_runtime(cfg):
    runs = cfg.runtime.device == "cpu" and (cfg.runtime.threads in (None, "auto") or cfg.runtime.threads >= 1)
    built = [instantiate(node) for node in (cfg.target, cfg.draft.model)]
    names = ("backend", "compiled", "judge_kernel")
    return runs and all(getattr(m, name) == cfg.runtime[name] for m in built for name in names)


def is_task(cfg):
    task = instantiate(cfg.task)
    problem = task.problems()[0]
    scored = None if isinstance(task, OpenEnded) else False
    return task.score(problem, "").correct is scored and bool(problem.prompt)


def are_arms(cfg):
    assert cfg.baseline in cfg.arms
    replayed = cfg.target.source.startswith("replay:")  # on tiny shapes; a share of its own may be a small one
    config, more = ("replay", ["judge.whole=0"]) if replayed else ("config", [])
    return all(is_arm(arm, config, *more) for arm in cfg.arms.values())


def is_arm(arm, config, *more):
    build = build_draft_alone if arm.get("model") == "draft" else build_engine
    return isinstance(build(composed("runtime.device=cpu", *more, *arm.overrides, config=config)), Parse)


def is_recipe(cfg):
    recipe = cfg.recipe
    task, unseen, schedule = (instantiate(node) for node in (recipe.task, recipe.evaluation.task, recipe.optimisation))
    if recipe.kind == "head":
        speculator = instantiate(recipe.evaluation.speculator)
        assert {recipe.evaluation.weights, *speculator.keywords} <= set(inspect.signature(speculator.func).parameters)
        assert callable(get_object(recipe.head._target_))
    else:
        assert recipe.lengths == sorted(recipe.lengths)
    return task.split == "train" and unseen.split == "test" and schedule.steps >= 1


def is_preset(cfg):
    threads, device = cfg.preset.threads, cfg.preset.device
    return torch.device(device).type in ("cpu", "cuda") and (threads is None or threads >= 1)


def are_labels(cfg):
    assert instantiate(cfg.goal).least > 1
    return {question.part for question in instantiate(cfg.labels).questions(seed=0)} == {"fit", "check"}


BUILDS = {
    "labels": are_labels,
    "acceptance": is_acceptance,
    "arms": are_arms,
    "target": lambda cfg: is_model(cfg.target),
    "draft": is_draft,
    "inner": is_inner,
    "recipe": is_recipe,
    "preset": is_preset,
    "judge": is_judge,
    "outer": is_outer,
    "equivalence": is_equivalence,
    "segmenter": is_segmenter,
    "engine": is_engine,
    "runtime": is_runtime,
    "task": is_task,
    "boundary": lambda cfg: [instantiate(cfg.boundary).keep([score] * 3) for score in (0.0, 1.0)] == [0, 3],
    "gate": lambda cfg: instantiate(cfg.gate).allows(GateHistory()) is not ("Never" in cfg.gate._target_),
    "loop": lambda cfg: instantiate(cfg.loop).rounds >= 1,
}


def test_the_glob_finds_the_groups():
    assert {"target", "draft", "inner", "judge", "outer", "task"} <= {member.split("/")[0] for member in BUILT}
    assert len(BUILT) > 20


@pytest.mark.parametrize("member", BUILT)
def test_member_composes_and_builds(member, problems):
    assert BUILDS[member.split("/")[0]](chosen(member, problems))


@pytest.mark.parametrize("member", BUILT)
def test_unknown_setting_is_refused(member, problems):
    """Once all members are composed, the configuration is closed; as a command: the next but one test."""
    with pytest.raises(ConfigAttributeError, match="not_a_setting"):
        OmegaConf.update(chosen(member, problems), f"{member.split('/')[0]}.not_a_setting", 1)


@pytest.mark.parametrize("member", CLASSES)
def test_yaml_lists_every_setting_of_its_class(member):
    """Hydra refuses what a YAML does not list, so a setting left out could not be set."""
    listed = OmegaConf.load(CONF / f"{member}.yaml")
    built = get_object(listed._target_)
    entries = [key for entry in listed.get("defaults", []) if not isinstance(entry, str) for key in entry]
    nested = {key.partition("@")[2].partition(".")[0] for key in entries}  # filled in by members of other groups
    ours = OURS.get(built.__name__, set())
    named = set(listed) - {"_target_", "_convert_", "defaults"} | nested
    assert named == set(inspect.signature(built).parameters) - ours


@pytest.mark.parametrize("member", [member for member in CLASSES if not member.startswith("labels/")])
def test_text_for_a_number_or_a_switch_is_refused(member, problems):
    """Which settings those are is taken from what the YAML holds, not from annotations."""
    group = member.split("/")[0]
    held = OmegaConf.to_container(OmegaConf.load(CONF / f"{member}.yaml"))
    cfg = chosen(member, problems)
    require_kinds(cfg)
    for name, value in held.items():
        if isinstance(value, bool | int | float):
            OmegaConf.update(cfg, f"{group}.{name}", "abc")
            kind = "true or false" if isinstance(value, bool) else "a (whole )?number"
            with pytest.raises(ConfigError, match=rf"{group}\.{name}='abc'; expected {kind}"):
                require_kinds(cfg)
            OmegaConf.update(cfg, f"{group}.{name}", value)


@pytest.mark.parametrize("setting", ["not_a_setting=1", "sampling.not_a_setting=1", "not_a_group=zoo", "seedd=3"])
@pytest.mark.parametrize("config", ["config", "compare", "calibrate", "serve", "advise", "gpu"])
def test_unknown_setting_of_a_run_is_refused(config, setting):
    with pytest.raises(ConfigCompositionException, match=setting.split("=")[0]):
        composed(setting, config=config)


@pytest.mark.parametrize("member", EXPERIMENTS)
def test_experiment_composes_for_the_command_in_its_header(member):
    header = (CONF / f"{member}.yaml").read_text()
    command = re.search(rf"experiments/(run|compare|judges|replay|floors)\.py experiment={Path(member).stem}\b", header)
    assert command, "no command in its header"
    config = {"run": "config", "compare": "compare", "judges": "judges", "replay": "replay", "floors": "floors"}[
        command[1]
    ]
    cfg, default = (composed(*overrides, config=config) for overrides in ([member.replace("/", "=")], []))
    assert set(cfg) == set(default)  # it sets what is there and adds nothing
    wanted = OmegaConf.to_container(OmegaConf.load(CONF / f"{member}.yaml"))
    for entry in wanted.pop("defaults", ()):
        ((group, name),) = entry.items()
        group = group.removeprefix("override /")
        assert cfg[group] == composed(member.replace("/", "="), f"{group}={name}", config=config)[group]
    for key, value in leaves(wanted):
        assert OmegaConf.select(cfg, key) == value, f"{config}.yaml, or a group, has the last word on {key}"


def leaves(node, prefix=""):
    """(dotted key, value) of everything a YAML sets."""
    for key, value in node.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def test_defaults_are_a_whole_run(problems):
    cfg = composed("runtime.device=cpu")
    engine = build_engine(cfg)
    assert isinstance(engine, Parse)
    assert (engine.target.name, engine.draft.name) == ("zoo:target", "zoo:draft")
    assert build_sampling(cfg).greedy
    assert json.loads(json.dumps(plain(cfg))) == plain(cfg)
    assert plain(cfg)["outer"]["judge"] == plain(cfg)["judge"]


def test_equal_models_are_loaded_once():
    first, second = (build_engine(composed("runtime.device=cpu", f"outer={outer}")) for outer in ("parse", "none"))
    assert first.target is second.target
