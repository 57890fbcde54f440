"""Settings of another kind than a command's own YAML holds are named, whatever the command."""

import re

import pytest
from omegaconf import OmegaConf

import commands
from configs import CONF, composed
from parsedec.errors import ConfigError
from parsedec.experiment.job import run_comparison
from parsedec.experiment.kinds import EITHER, require_kinds, require_kinds_of_defaults
from parsedec.hardware.floors import JudgeSize
from parsedec.training.probes import grid_of_layers
from parsedec_adapters.eagle3 import Eagle3

COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))
NEEDS = {"golden": ["root=unused"], "calibrate": ["labels.fit.n=2", "labels.check.n=2"]}


def of(command):
    return composed(command, *NEEDS.get(command, []), *([] if command == "golden" else ["output=unused"]))


def held(node, prefix=""):
    """(dotted key, value) of what a command's own YAML sets, but for what names a class."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from held(value, f"{prefix}{key}.") if "_target_" not in value else ()
        elif key not in ("defaults", "hydra"):
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_of_another_kind_than_its_default_is_refused(command):
    cfg = of(command)
    require_kinds_of_defaults(cfg, command, [CONF])
    own = OmegaConf.to_container(OmegaConf.load(CONF / f"{command}.yaml"))
    own.pop("hydra", None)
    for name, value in held(own):
        if not isinstance(value, bool | int | float | list) or name in EITHER:
            continue
        kind = "true or false" if isinstance(value, bool) else "a list" if isinstance(value, list) else "a .*number"
        right = OmegaConf.select(cfg, name)
        for wrong in ("abc", {"a": 1}):
            OmegaConf.update(cfg, name, wrong, merge=False)
            with pytest.raises(ConfigError, match=rf"{re.escape(name)}=('abc'|.*a.*) ?.*expected {kind}"):
                require_kinds_of_defaults(cfg, command, [CONF])
        OmegaConf.update(cfg, name, right, merge=False)


@pytest.mark.parametrize(
    ("command", "setting", "said"),
    [("advise", "thresholds=[null,a]", r"thresholds\[1\]='a'; expected a number"),
     ("advise", "inners=[none,3]", r"inners=\['none', 3\]; expected a list of strings"),
     ("floors", "judge_passes=[3]", r"judge_passes\[0\]=3; expected settings by name, such as draft, probes, suffix"),
     ("floors", "judge_passes=[{draft: a}]", r"judge_passes\[0\]\.draft='a'; expected a whole number"),
     ("floors", "repeats=2.5", r"repeats=2\.5; expected a whole number"),
     ("compare", "resume=3", r"resume=3; expected true or false"),
     ("config", "sampling=null", r"sampling=None; expected settings by name, such as temperature"),
     ("judges", "judges=abc", r"judges='abc'; expected settings by name, such as label, digit")],
)  # fmt: skip
def test_what_is_in_lists_and_groups(command, setting, said):
    with pytest.raises(ConfigError, match=said):
        require_kinds_of_defaults(composed(command, "output=unused", setting), command, [CONF])


def test_what_is_of_the_right_kind_passes():
    for command, setting in (
        ("floors", "nodes=null"), ("floors", "judge_passes=[]"), ("train_probe", "layers=[1,2]"), ("gpu", "minutes=4"),
        ("advise", "thresholds=[0.5]"), ("calibrate", "goal.risk=1"), ("config", "title=3"),
    ):  # fmt: skip
        require_kinds_of_defaults(composed(command, "output=unused", *NEEDS.get(command, []), setting), command, [CONF])


@pytest.mark.parametrize("wrong", ["abc", 3, ["a"], [-1], [1.5], [True]])
def test_lists_of_whole_numbers(wrong, tiny_target):
    with pytest.raises(ConfigError, match=r"inner\.taps.*expected a"):
        Eagle3(head="unused", taps=wrong)
    if wrong != 3:  # so many of them
        with pytest.raises(ConfigError, match=r"layers.*expected a"):
            grid_of_layers(tiny_target, wrong)


def test_sizes_and_arms_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"judge_passes\[0\] has draft; expected draft, probes, suffix"):
        JudgeSize.of("judge_passes[0]", {"draft": 1})
    for wrong, said in ((3, "arms.target=3; expected overrides"), ({"overrides": "abc"}, "read letter by letter"),
                        ({"overrides": 3}, "expected a list of strings")):  # fmt: skip
        cfg = composed("compare", "output=unused", "runtime=cpu")
        OmegaConf.update(cfg, "arms.target", wrong, merge=False)
        with pytest.raises(ConfigError, match=said):
            run_comparison(cfg, tmp_path, "compare", [])


def test_where_a_setting_was_set_is_what_is_named():
    cfg = composed("config", "output=unused", "runtime.compiled=1")
    with pytest.raises(ConfigError, match=r"^runtime\.compiled=1; expected true or false"):
        require_kinds(cfg)
    passes = [{"_target_": "parsedec.training.drafts.DraftPass", "temperature": "warm", "noise": 0.0}]
    with pytest.raises(ConfigError, match=r"^passes\[1\]\.temperature='warm'; expected a number"):
        require_kinds(OmegaConf.create({"passes": ["???", *passes]}))


def test_what_makes_a_value_may_make_any():
    made = {"_target_": "statistics.mean", "data": [0.5, 0.7]}
    require_kinds(OmegaConf.create({"boundary": {"_target_": "parsedec.boundary.FirstFailure", "threshold": made}}))
    for target in ("builtins.dict", "torch.tensor", "builtins.int"):  # which do not tell what they take
        require_kinds(OmegaConf.create({"one": {"_target_": target, "data": "abc"}}))


def test_a_configuration_of_the_users_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nseed: 3\n")
    for name in ("mine", "config.yaml"):
        own = commands.run("run.py", "--config-dir", tmp_path, "--config-name", name, "seed=abc", cwd=tmp_path)
        assert own.returncode == 2
        assert "error: seed='abc'; expected a whole number" in own.stderr


def test_a_class_that_does_not_exist_is_left_to_whoever_makes_it():
    cfg = OmegaConf.create({"gate": {"_target_": "parsedec.gate.Missing", "bound": "abc"}})
    require_kinds(cfg)


def test_a_command_refuses_before_it_begins(tmp_path):
    done = commands.run("scale_out.py", "kept=abc", "output=out", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: kept='abc'; expected a list: kept=[…]." in done.stderr
    done = commands.run("scale_out.py", "target.layers=many", "output=out", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: target.layers='many'; expected a whole number." in done.stderr
    assert not list(tmp_path.glob("out/*"))
