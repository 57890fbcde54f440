"""Replays: the script is followed, everything is computed all the same, and the ceiling is what its formula says."""

import itertools
import math

import pytest
import torch

from parsedec import Parse, TargetOnly
from parsedec.boundary import FirstFailure
from parsedec.errors import ConfigError
from parsedec.hardware import replay
from parsedec.hardware.scripted import ScriptedAcceptance, ScriptedHfGenerate, ScriptedJudge, rate_for
from parsedec.hardware.shapes import SHAPES, RandomPrompts, random_model, word_tokenizer
from parsedec.outer import PrefixVerification
from parsedec.sampling import Sampler
from parsedec.segmenters import EveryTokens
from parsedec.streamed import StreamedVerification
from parsedec.types import Sampling, Tree
from parsedec_adapters.eagle3.random import RandomEagle3

LENGTH = 40


@pytest.fixture(scope="module")
def pair():
    return [
        random_model(f"replay:{name}", dtype="float32", device="cpu", backend="static", seed=seed)
        for seed, name in enumerate(("tiny_draft", "tiny_draft"))
    ]


def prompts(n):
    return [problem.prompt for problem in RandomPrompts(n=n, words=6).problems()]


def judge(**settings):
    return ScriptedJudge(**{"length": LENGTH, "spread": 0.2, "whole": 0.35, "kept": 0.6, **settings})


def outer(kind, scripted, **more):
    boundary = FirstFailure(threshold=0.5, full_threshold=0.5)
    return kind(judge=scripted, segmenter=EveryTokens(delta=4), boundary=boundary, **more)


@pytest.mark.parametrize(("tau", "depth"), [(1, 3), (2.5, 3), (4, 8), (9, 8)])
def test_the_rate_gives_tau(tau, depth):
    rate = rate_for(tau, depth)
    assert sum(rate**i for i in range(depth + 1)) == pytest.approx(tau)


def test_steps_commit_tau_tokens_on_average():
    tree = Tree(tuple(range(12)), (-1, 0, 0, 2, 3, 4, 2, 1, 5, 8, 9, 10))  # its longest path is 8 levels deep
    logits = torch.eye(12)
    rule, sampler = ScriptedAcceptance(tau=4, depth=8), Sampler(Sampling(), torch.Generator().manual_seed(0))
    longest = [0, 2, 3, 4, 5, 8, 9, 10, 11]
    counts = []
    for _ in range(3000):
        path, token = rule.accept(tree, logits, sampler)
        assert path == longest[: len(path)]
        assert all(below in tree.children()[above] for above, below in itertools.pairwise(path))
        assert token == path[-1], "the target's own token after the last node"
        counts.append(len(path))
    spread = math.sqrt(sum((c - 4) ** 2 for c in counts) / len(counts))
    assert sum(counts) / len(counts) == pytest.approx(4, abs=4 * spread / math.sqrt(len(counts)))


def test_shares_follow_the_trace():
    scripted = judge()
    shares = [scripted.share([i, 7]) for i in range(4000)]
    assert sum(share == 1 for share in shares) / 4000 == pytest.approx(0.35, abs=0.03)
    assert sum(shares) / 4000 == pytest.approx(0.6, abs=0.02)  # the cut at 0 and 1 moves it by less
    assert shares[:9] == [judge().share([i, 7]) for i in range(9)]
    assert {judge(kept=0.25, spread=0, whole=0).share([i]) for i in range(9)} == {0.25}


@pytest.mark.parametrize("kind", [PrefixVerification, StreamedVerification])
def test_the_judge_keeps_what_the_script_says_and_computes_everything(pair, kind):
    scripted = judge(kept=0.5, whole=0.25)
    engine = Parse(*pair, outer=outer(kind, scripted))
    for prompt in prompts(6):
        result = engine.generate(prompt, max_new_tokens=LENGTH)
        assert result.new_tokens == LENGTH
        read = engine.target_ids(prompt)
        stands = scripted.share(read) * LENGTH
        assert abs(result.counters.kept_draft_tokens - stands) <= 2, "half a segment of four"
        assert result.judge_path == "packed"
        passes, probes = result.counters.judge_passes, sum(s.score is not None for s in result.rounds[0].segments)
        assert passes == 1 or kind is StreamedVerification
        assert result.counters.judge_rows == result.rounds[0].judged_tokens + 24 * probes


def test_an_eagle_head_of_the_right_size_drafts(pair):
    inner = RandomEagle3(tokens=12, depth=3, top_k=2)
    engine = Parse(pair[0], inner=inner, acceptance=ScriptedAcceptance(tau=3, depth=4), outer=TargetOnly())
    assert not engine.lossless
    with pytest.raises(ConfigError, match=r"torch\.Generator"):
        engine.generate(prompts(1)[0], max_new_tokens=8)
    counters = [
        engine.generate(prompt, max_new_tokens=LENGTH, generator=torch.Generator().manual_seed(i)).counters
        for i, prompt in enumerate(prompts(6))
    ]
    steps = sum(c.inner_steps for c in counters)
    assert (steps + sum(sum(c.accepted_by_depth) for c in counters)) / steps == pytest.approx(3, abs=0.5)
    assert sum(c.offered_by_depth[3] for c in counters) > steps / 2, "trees four levels deep"


def test_trees_of_the_usual_size_reach_as_deep_as_they_may(pair):
    """So that a call commits the four tokens that are stated: a tree of two levels has no more than three."""
    engine = Parse(pair[0], inner=RandomEagle3(), acceptance=ScriptedAcceptance(), outer=TargetOnly())
    results = [
        engine.generate(prompt, max_new_tokens=120, generator=torch.Generator().manual_seed(i))
        for i, prompt in enumerate(prompts(3))
    ]
    assert {result.new_tokens for result in results} == {120}, "none ends"
    offered = [sum(levels) for levels in zip(*(r.counters.offered_by_depth for r in results), strict=True)]
    assert len(offered) == 8
    assert offered[7] > 0.85 * offered[0], "but for the last tokens of an answer"
    steps = sum(r.counters.inner_steps for r in results)
    assert (steps + sum(sum(r.counters.accepted_by_depth) for r in results)) / steps == pytest.approx(4, abs=0.5)


def test_peers_write_the_known_text_and_leave_no_trace(pair):
    target, draft = pair
    prompt, texts = prompts(1)[0], []
    for settings, calls in (({}, 12), (dict(assisted=True, length=3, tau=4), 3), (dict(assisted=True, tau=1), 12)):
        result = Parse(target, draft, outer=ScriptedHfGenerate(**settings)).generate(prompt, max_new_tokens=12)
        texts.append(result.tokens)
        assert result.counters.target_calls == calls
    assert len(texts[0]) == 12
    assert len(set(texts[0])) > 6
    assert set(texts) == {texts[0]}
    assert "forward" not in vars(target.hf)
    assert "forward" not in vars(draft.hf)


def test_models_are_of_their_shape_and_never_end():
    model = random_model("replay:tiny", dtype="bfloat16", device="cpu")
    assert (model.num_layers, model.hidden_size, model.dtype) == (8, 128, torch.bfloat16)
    parameters = sum(p.numel() for p in model.hf.parameters())
    h, i, v = 128, 384, 512
    assert parameters == 2 * v * h + h + 8 * (2 * h * h + 2 * h * 64 + 3 * h * i + 2 * h + 2 * 32)
    assert model.hf.get_output_embeddings().weight[model.end_ids[0]].abs().sum() == 0
    for source in ("replay:huge", "zoo:target"):
        with pytest.raises(ConfigError, match=r"tiny_draft"):
            random_model(source)
    assert {shape["num_hidden_layers"] for shape in SHAPES.values()} >= {28, 36, 64}


def test_one_word_is_one_token():
    tokenizer = word_tokenizer(512)
    ids = tokenizer.encode("w0 w17 w504", add_special_tokens=False)
    assert len(ids) == 3
    assert tokenizer.decode([*ids, 1], skip_special_tokens=True) == "w0 w17 w504"
    with pytest.raises(ConfigError, match=r"task\.words=0"):
        RandomPrompts(words=0)


@pytest.mark.parametrize(
    "settings", [dict(kept=0.2, whole=0.3), dict(kept=1.1), dict(spread=-1), dict(kept=0.9, whole=1.0)], ids=str
)
def test_impossible_traces_are_refused(settings):
    with pytest.raises(ConfigError, match="whole"):
        judge(**settings)
    with pytest.raises(ConfigError, match=r"tau=9.*1 to 5"):
        ScriptedAcceptance(tau=9, depth=4)


def test_too_few_rows_for_a_suffix(pair):
    with pytest.raises(ConfigError, match=r"judge\.rows=2"):
        judge(rows=2).bind(pair[0])


def arm(name, description="", **summary):
    empty = dict(
        requests=0, errors=0, draft_tokens=0, kept_draft_tokens=0, new_tokens=100, judge_s=0.0, decode_s=0.0, tau=None
    )
    return {"name": name, "description": description, "summary": empty | summary}


def test_the_ceiling_is_its_formula():
    wrote = dict(new_tokens=110, requests=10)  # the first token of each answer comes with its prompt
    record = {
        "arms": [
            arm("target", decode_s=10.0, **wrote),
            arm("draft", decode_s=1.0, **wrote),
            arm("eagle3", replay.INNER, decode_s=4.0, tau=3.5, **wrote),
            arm("draft_eagle3", decode_s=0.5, **wrote),
        ]
    }
    costs = replay.paces(record)
    assert costs == pytest.approx({"target": 0.1, "draft": 0.01, "eagle3": 0.04, "draft_eagle3": 0.005})
    drafted = dict(draft_tokens=100, kept_draft_tokens=60, judge_s=0.8)
    plain, inner, drafter = "outer=parse", f"outer=parse {replay.INNER}", f"outer=parse {replay.DRAFT_INNER}"
    assert replay.ceiling(arm("p", plain, **drafted), costs) == pytest.approx(10 / (1.0 + 0.8 + 40 * 0.1))
    assert replay.ceiling(arm("p", inner, **drafted), costs) == pytest.approx(10 / (1.0 + 0.8 + 40 * 0.04))
    assert replay.ceiling(arm("p", drafter, **drafted), costs) == pytest.approx(10 / (0.5 + 0.8 + 40 * 0.1))
    assert replay.ceiling(record["arms"][2], costs) == 3.5
    assert replay.ceiling(record["arms"][0], costs) is None
    assert replay.ceiling(arm("p", inner, **drafted), {"target": 0.1}) is None
