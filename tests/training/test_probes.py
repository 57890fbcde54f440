"""Probes learn from what the judge will read, thresholds keep their promise, and bad step-labelled files are named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from parsedec import Parse, PrefixVerification, load
from parsedec.calibration.sources import Answers, Checker, Question, Steps, prompt_digests, refuse_known
from parsedec.errors import ConfigError, IncompatibleStack, OutputExistsError
from parsedec.experiment.record import read_record
from parsedec.experiment.summary import auc
from parsedec.judge import ProbeJudge, judging_session
from parsedec.judge.probe import read_card
from parsedec.segmenters import Lines
from parsedec.tasks.base import Problem, Score
from parsedec.tasks.jsonl import TaskDataError
from parsedec.tasks.steps import read_steps
from parsedec.text.chat import prompt_ids
from parsedec.training.prefixes import from_steps, from_task, with_logprobs
from parsedec.training.probe_job import labelled, train_probes
from parsedec.training.probes import (
    Linear,
    States,
    collect,
    elsewhere,
    first_half,
    fit_probe,
    grid_of_layers,
    lowest,
    rights,
)

CONF = Path(__file__).resolve().parents[2] / "conf"
ZOO = ("target", "draft")

pytest.importorskip("sklearn", reason="probes are fitted with scikit-learn; pip install -e '.[eval]'")


def test_a_separating_direction_is_found_on_any_scale():
    """Standardised states, but the probe is applied to them as they come, and as it is stored."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    scale, shift = torch.logspace(-2, 3, 16), torch.linspace(-500, 500, 16)
    x = torch.randn(600, 16, generator=generator)
    right = (x @ direction > 0.3).numpy()
    states = x * scale + shift
    fit = fit_probe((states[:400], right[:400]), (states[400:], right[400:]), [0.01, 1.0, 100.0])
    assert fit.auc > 0.99
    assert fit.weight.dtype == torch.bfloat16
    odds = states[400:] @ fit.weight.float() + fit.bias
    assert float(((odds > 0).numpy() == right[400:]).mean()) > 0.9
    noise = fit_probe((states[:400], right[:400][::-1].copy()), (states[400:], right[400:]), [0.01])
    assert 0.3 < noise.auc < 0.7


def test_the_best_of_many_probes_on_noise_is_no_better_than_guessing_elsewhere():
    """What chose a layer and a strength says that they are good; problems that did not choose them say the truth."""
    chosen, others = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        first = np.arange(60) < 30
        unseen = States(by={}, right=rng.random(60) < 0.5, complete=np.ones(60, bool), first=first)
        found = {
            ("cut", layer): Linear(weight=torch.zeros(1), bias=0.0, strength=1.0, auc=0.0, tried=rng.random((4, 60)))
            for layer in range(6)
        }
        chosen.append(max(auc(row, unseen.right) for fit in found.values() for row in fit.tried))
        others.append(elsewhere(found, unseen)["cut"])
    assert np.mean(chosen) > 0.6
    # an area on 30 prefixes has a standard deviation of about 0.11, the mean of 24 of them one of 0.022
    assert abs(np.mean(others) - 0.5) < 3 * 0.022
    alike = replace(unseen, right=first)
    assert elsewhere(found, alike) == {"cut": None}


def test_halves_hold_whole_problems(tmp_path, tiny_target):
    rows = [{"problem": f"w{i % 5}", "steps": ["w1", "w2"], "label": -1} for i in range(20)]
    marked = from_steps(tiny_target, None, written(tmp_path, rows))
    by_prompt = {}
    prompts = [one.prompt for one in marked for _ in one.cuts]
    for prompt, first in zip(prompts, first_half(marked), strict=True):
        by_prompt.setdefault(prompt, set()).add(bool(first))
    assert sorted(map(tuple, by_prompt.values())) == [(False,)] * 2 + [(True,)] * 3


@pytest.mark.parametrize("allowed", [0.0, 0.05, 0.5, 1.0])
def test_the_lowest_threshold_lets_no_more_pass(allowed):
    scores = np.random.default_rng(1).random(61).round(2)
    threshold = lowest(scores, allowed)
    assert (scores >= threshold).mean() <= allowed
    lower = scores[scores < threshold]
    assert not len(lower) or (scores >= lower.max()).mean() > allowed
    assert lowest(np.array([]), allowed) == 0.0


def test_layers_are_spread_up_to_the_last(tiny_target):
    assert grid_of_layers(tiny_target, 2) == (2, 4)
    assert grid_of_layers(tiny_target, 99) == (1, 2, 3, 4)
    assert grid_of_layers(tiny_target, [3, 0]) == (0, 3)
    for wrong in (0, [5], []):
        with pytest.raises(ConfigError, match="indices from 0 to 4"):
            grid_of_layers(tiny_target, wrong)


STEPS = [
    {"problem": "?", "steps": ["w1w2.", "w3w4w5", "w6"], "label": 1},
    {"prompt": "w9", "meta": {"steps": ["w1", "w2"], "first_wrong_step": -1}},
    {"id": "ours", "prompt": "w9", "reference": 1, "meta": {"steps": ["w1", "w2"]}},
]


def written(folder, rows):
    path = folder / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labelled_steps_end_at_their_cuts(tmp_path, tiny_target):
    first, second, third = from_steps(tiny_target, None, written(tmp_path, STEPS))
    assert [first.draft.text[: first.draft.ends[cut - 1]].strip() for cut in first.cuts] == [
        "w1w2.", "w1w2.\n\nw3w4w5", "w1w2.\n\nw3w4w5\n\nw6"]  # fmt: skip
    assert (first.right, first.first_wrong) == ((True, False, False), 1)
    assert (second.right, second.first_wrong) == ((True, True), 2)
    assert (third.right, third.problem, third.cuts) == ((True, False), "ours", second.cuts)
    assert list(first.prompt) == prompt_ids(tiny_target, [{"role": "user", "content": "?"}])
    assert list(rights([first, second])) == [True, False, False, True, True]
    assert len(from_steps(tiny_target, None, written(tmp_path, STEPS), n=1)) == 1
    mixed = [one.problem for one in from_steps(tiny_target, None, written(tmp_path, STEPS), shuffle=1)]
    assert sorted(mixed) == sorted(one.problem for one in (first, second, third))
    assert mixed[0] != first.problem
    long = {"problem": "?", "steps": ["w1" * 600], "label": -1}
    assert len(from_steps(tiny_target, None, written(tmp_path, [long, STEPS[0]]))) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"steps": ["a"], "label": 0}, "line 2 has no problem"),
        ({"problem": "a", "steps": [], "label": 0}, "line 2 has no problem with steps"),
        ({"problem": "a", "steps": ["b"], "label": 1}, r"line 2 has label=1 for 1 steps"),
        ({"problem": "a", "steps": ["b"], "label": True}, "line 2 has label=True"),
        ([1], r"line 2 holds \[1\]; expected an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tiny_target, row, said):
    with pytest.raises(TaskDataError, match=said):
        from_steps(tiny_target, None, written(tmp_path, [STEPS[0], row]))


@pytest.mark.parametrize(
    ("correct", "said"), [(False, "is wrong but not in which line"), (None, "is neither right nor")]
)
def test_a_task_of_final_answers_labels_no_prefixes(tiny_target, tiny_draft, correct, said):
    class Final:
        def score(self, problem, text):
            return Score(correct, "")

    problem, tokens = Problem(id="p7", prompt="?", reference="4"), tuple(tiny_draft.encode("w1w2.", plain=True))
    source, question = Checker(task=Final(), fit={}), Question("fit", problem, Final())
    with pytest.raises(ConfigError, match=f"Final says that an answer to p7 {said}"):
        from_task(tiny_target, tiny_draft, source, [question], [[(tokens, True)]])


def test_final_answers_give_every_prefix_the_verdict_on_its_draft(tiny_target, tiny_draft):
    class Ends:
        def score(self, problem, text):
            return Score(text.endswith(problem.reference), "")

    class Open:
        def score(self, problem, text):
            return Score(None, "")

    problem = Problem(id="p7", prompt="?", reference="w3")
    written = [(tuple(tiny_draft.encode(text, plain=True)), True) for text in ("w1\nw2\nw3", "w1\nw2\nw4")]
    question = Question("fit", problem, Ends())
    right, wrong = from_task(tiny_target, tiny_draft, Answers(task=Ends(), fit={}), [question], [written])
    assert [one.draft.tokens for one in (right, wrong)] == [tokens for tokens, _ in written]
    assert right.cuts == tuple(Lines().cuts(right.draft))
    assert len(right.cuts) > 1
    assert (right.right, wrong.right) == ((True,) * len(right.cuts), (False,) * len(wrong.cuts))
    (coarse,) = from_task(
        tiny_target, tiny_draft, Answers(task=Ends(), fit={}), [question], [written[:1]], Lines(max_cuts=1)
    )
    assert coarse.cuts == (len(written[0][0]),)
    with pytest.raises(ConfigError, match="open-ended"):
        from_task(tiny_target, tiny_draft, Answers(task=Open(), fit={}), [Question("fit", problem, Open())], [written])


def test_calibration_cuts_the_same_file_at_the_same_places(tmp_path, tiny_target):
    source = Steps(path=written(tmp_path, STEPS))
    for one, problem in zip(from_steps(tiny_target, None, source.path), read_steps(source.path), strict=True):
        draft, cuts, right = source.draft(tiny_target, problem)
        assert (one.problem, one.draft, one.cuts, one.right) == (problem.id, draft, tuple(cuts), tuple(right))


def test_solutions_of_one_problem_are_not_parted(tmp_path, tiny_target):
    rows = [{"problem": f"w{i % 4}", "steps": ["w1", "w2"], "label": 1 - i % 3} for i in range(12)]
    cfg = settings(tmp_path, "labels=steps", f"labels.path={written(tmp_path, rows)}", "~judge@combined")
    first, others = labelled(cfg, tiny_target, None, tmp_path)
    assert (len(first), len(others)) == (6, 6)
    assert not {one.prompt for one in first} & {one.prompt for one in others}
    assert len({one.problem for one in (*first, *others)}) == 12


def test_a_missing_file_is_named(tmp_path, tiny_target):
    with pytest.raises(TaskDataError, match="is not a file"):
        from_steps(tiny_target, None, tmp_path / "no.jsonl")


def test_probabilities_of_stored_drafts_are_those_of_a_plain_forward(tmp_path, tiny_target, tiny_draft):
    (one,) = with_logprobs(from_steps(tiny_target, tiny_draft, written(tmp_path, STEPS[:1])), tiny_draft)
    with torch.inference_mode():
        logits = tiny_draft.hf(torch.tensor([[*one.prompt, *one.draft.tokens]]), use_cache=False).logits[0]
    plain = logits.log_softmax(-1)[len(one.prompt) - 1 : -1]
    expected = [float(row[token]) for row, token in zip(plain, one.draft.tokens, strict=True)]
    assert one.draft.logprobs == pytest.approx(expected, abs=1e-4)


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=[*overrides])


def settings(folder, *overrides):
    cfg = composed("train_probe", "layers=1", "strengths=[0.1]", f"output={folder}", *overrides)
    if "labels=steps" not in overrides:
        cfg.labels.fit.n, cfg.labels.check.n = 30, 24
    cfg.passes = cfg.passes[:1]
    return cfg


@pytest.mark.slow
def test_the_zoo_from_drafts_to_a_judge_that_runs(tmp_path):
    """Train on a few drafts; the thresholds hold for the calibration drafts when they are judged anew, one by one."""
    cfg = settings(tmp_path)
    record = train_probes(cfg)
    assert record["data"]["train"]["wrong_prefixes"] > 0
    by = {row["position"]: row["auc"] for row in record["probes"]}
    assert by["suffix"] > 0.8  # the zoo's target was trained to say so at this very row
    assert by["cut"] > 0.5
    assert read_record(tmp_path / "record.json") == json.loads(json.dumps(record))
    section_of_the_report(record, tmp_path)
    weights = tmp_path / "probe"
    target, draft = (load(f"zoo:{name}", dtype="float32", device="cpu", backend="static") for name in ZOO)
    source = instantiate(cfg.labels)
    unseen = [question for question in source.questions(cfg.seed) if question.part == "check"]
    stored = json.loads((tmp_path / "drafts_calibration.json").read_text())["answers"]
    pool = [[(tuple(tokens), ended) for tokens, ended in answers] for answers in stored]
    judge = ProbeJudge(weights=str(weights)).bind(target)
    wrong = []
    for one in from_task(target, draft, source, unseen, pool):
        session = judging_session(target, judge)
        session.feed(one.prompt)
        values = judge.score(session, one.draft, one.cuts, one.cuts).values
        wrong += [value for value, right in zip(values, one.right, strict=True) if not right]
    passed = sum(value >= judge.card.threshold for value in wrong)
    assert passed <= cfg.false_accepts * len(wrong) + 1  # a score that rounds to the threshold
    for chosen in (["judge=probe"], ["judge=probe", "judge.position=cut"], ["judge=combined"]):
        run = composed("config", *chosen, f"judge.weights={weights}")
        engine = Parse(target, draft, outer=PrefixVerification(judge=instantiate(run.judge)))
        assert engine.generate(unseen[0].problem.prompt, max_new_tokens=48).counters.judge_passes == 1
        assert engine.outer.boundary.threshold == engine.outer.judge.card.threshold
    assert train_probes(settings(tmp_path, "resume=true")) == json.loads(json.dumps(record))
    with pytest.raises(OutputExistsError):
        train_probes(cfg)


def test_final_answers_are_enough(tmp_path):
    """A probe at the cuts from nothing but whether drafts end right; the one that was not trained is named."""
    cfg = composed(
        "train_probe", "labels=answers", "labels.held_out=0.4", "layers=1", "strengths=[0.1]", "positions=[cut]",
        "~judge@combined", "max_new_tokens=100", f"output={tmp_path}")  # fmt: skip
    cfg.labels.fit, cfg.passes = {"n": 24}, cfg.passes[:1]
    record = train_probes(cfg)
    assert sum(part["drafts"] for part in record["data"].values()) == 24
    assert set(record["card"]["probes"]) == {"cut"}
    asked = instantiate(cfg.labels).questions(cfg.seed)
    assert read_card(tmp_path / "probe")[0].problems == tuple(prompt_digests(one.problem for one in asked))
    with pytest.raises(ConfigError, match="24 of 24 problems"):  # those that chose the layer are among them
        refuse_known(ProbeJudge(weights=str(tmp_path / "probe")), asked)
    target = load("zoo:target", dtype="float32", device="cpu")
    weights = str(tmp_path / "probe")
    assert ProbeJudge(weights=weights, position="cut").bind(target).suffix_rows == 0
    with pytest.raises(IncompatibleStack, match=r"holds probes only for judge\.position=cut, but position is suffix"):
        ProbeJudge(weights=weights).bind(target)


def section_of_the_report(record, folder):
    """It shows the probes that the card names, and draws all of them."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from parsedec.reporting import page, sections

    made = sections.section(sections.sources([(folder / "record.json", record)], folder)[0])
    shown = {row[0]: row[1:] for row in made.tables[0].cells}
    assert set(shown) == {"probe, position=suffix", "probe, position=cut", "combined"}
    for at, fit in record["card"]["probes"].items():
        (auc,) = (row["auc"] for row in record["probes"] if (row["position"], row["layer"]) == (at, fit["layer"]))
        layer, area, elsewhere, threshold, _ = shown[f"probe, position={at}"]
        assert (int(layer), float(area)) == (fit["layer"], pytest.approx(auc, abs=1e-4))
        assert float(elsewhere) == pytest.approx(record["elsewhere"][at], abs=1e-4)
        assert float(threshold) == pytest.approx(fit["threshold"], rel=1e-3)
    assert all(f"{name} " in shown["combined"][0] for name in record["card"]["combined"]["weights"])
    assert f"n = {record['data']['calibration']['prefixes']} prefixes" in made.tables[0].note
    assert [row[3] for row in made.figures[0].rows] == [row["auc"] for row in sorted(
        record["probes"], key=lambda row: (row["position"], row["layer"]))]  # fmt: skip
    assert "position=suffix" in page.write_report([(folder / "record.json", record)], folder / "report").read_text()


def test_nothing_to_learn_from_is_refused(tmp_path):
    rows = [dict(STEPS[0], label=-1, problem=f"w{i}") for i in range(4)]
    with pytest.raises(ConfigError, match="all right or all wrong"):
        train_probes(settings(tmp_path, "labels=steps", f"labels.path={written(tmp_path, rows)}", "~judge@combined"))


def test_probes_at_cuts_alone_are_those_beside_others(tmp_path, tiny_target):
    """Without the question the pass is a plain one; the states at the cuts are the same."""
    marked = from_steps(tiny_target, None, written(tmp_path, STEPS))
    both, alone = (
        collect(tiny_target, "Right?", positions, (2, 4), marked, lambda _: None)
        for positions in (("suffix", "cut"), ("cut",))
    )
    assert set(alone.by) == {("cut", 2), ("cut", 4)}
    for key, states in alone.by.items():
        torch.testing.assert_close(states, both.by[key], rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="expected some of suffix, cut"):
        collect(tiny_target, "Right?", ("cuts",), (2,), marked, lambda _: None)
