"""Requests answered together get what each gets by itself: same tokens, same rounds, same counts.

Oracle: `generate` for one request after another, itself checked against plain forwards elsewhere.
"""

import dataclasses
import gc
import threading
from functools import partial
from itertools import pairwise

import pytest
import torch

import tiny
from eagle3_heads import random_head
from parsedec import Parse, PrefixVerification, Result, Sampling, StopReason, TargetOnly
from parsedec.batching.batch import PATIENCE, in_company
from parsedec.batching.fibers import current
from parsedec.batching.joint import joint_obstacle
from parsedec.boundary import FirstFailure
from parsedec.errors import ConfigError, PromptError
from parsedec.experiment.runner import Arm, Settings, run_arms
from parsedec.gate import Never
from parsedec.loop import Rounds
from parsedec.models.language_model import LanguageModel
from parsedec.peers import HfGenerate
from parsedec.sampling import request_generator
from parsedec.segmenters import EveryTokens
from parsedec.sessions.backends import runs_static
from parsedec.static.session import machine_of
from parsedec.streamed import StreamedVerification
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.types import Limits
from parsedec_adapters.draft_model import DraftModel
from parsedec_adapters.eagle3 import Eagle3
from parsedec_adapters.early_exit import SelfEarlyExit
from parsedec_adapters.ngram import Ngram

NEW = 20
SHARED = {"segmenter": EveryTokens(delta=4), "boundary": FirstFailure(threshold=0.4, full_threshold=0.8)}


def parse(**options):
    return PrefixVerification(judge=tiny.ScriptedJudge(seed=3), **SHARED, **options)


def prompts(n=6, seed=0):
    """Token ids of very different lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (n,), generator=draw).tolist()
    return [torch.randint(5, tiny.VOCAB, (length,), generator=draw).tolist() for length in lengths]


def comparable(result):
    """All but the seconds, and the notes on how it was computed."""
    rounds = tuple(dataclasses.replace(r, draft_s=0, judge_s=0, decode_s=0) for r in result.rounds)
    rounds = tuple(dataclasses.replace(r, segments=rounded(r), mean_draft_logprob=None) for r in rounds)
    return dataclasses.replace(result, rounds=rounds, times=None, notes=())


def rounded(r):
    return tuple(dataclasses.replace(s, score=None if s.score is None else round(s.score, 3)) for s in r.segments)


def assert_as_alone(engine, given, size=4, **options):
    """The batch equals single runs; returns the batch and how many forwards each way took."""
    with Forwards(engine) as single:
        alone = [engine.generate(prompt, **options) for prompt in given]
    with Forwards(engine) as joint:
        batch = engine.generate_batch(given, size=size, **options)
    assert [comparable(r) for r in batch.results] == [comparable(r) for r in alone]
    assert sum(r.times.wall_s for r in batch.results) <= batch.wall_s
    assert all(r.times.wall_s <= r.times.elapsed_s + 1e-3 and r.times.elapsed_s <= batch.wall_s for r in batch.results)
    return batch, joint.count / single.count


class Forwards:
    """Counts forwards of the target, on either backend."""

    def __init__(self, engine):
        self.count = 0
        self.target = engine.target

    def __enter__(self):
        if runs_static(self.target):
            network = machine_of(self.target).network
            plain, network.forward = network.forward, lambda *args: self.counted() or plain(*args)
            self.end = lambda: vars(network).pop("forward")
        else:
            self.end = self.target.hf.get_input_embeddings().register_forward_pre_hook(self.counted).remove
        return self

    def counted(self, *_):
        self.count += 1

    def __exit__(self, *_):
        self.end()


OUTERS = {
    "none": lambda: TargetOnly(),
    "fused": lambda: parse(),
    "two_pass": lambda: parse(passes="two_pass"),
    "rounds": lambda: parse(loop=Rounds(rounds=4)),
    "never": lambda: parse(gate=Never()),
    "streamed": lambda: StreamedVerification(judge=tiny.ScriptedJudge(seed=3), overlap="never", **SHARED),
}


@pytest.mark.parametrize(
    ("family", "outer"),
    [
        *(("llama", outer) for outer in OUTERS),
        *((family, "rounds") for family in ("qwen3", "mistral_window", "gemma3")),
    ],
)
def test_every_request_gets_what_it_gets_alone(family, outer):
    target, draft = tiny.model(family), tiny.model("llama", seed=5, layers=2)
    assert joint_obstacle(target) is None
    engine = Parse(target, draft, outer=OUTERS[outer]())
    _, share = assert_as_alone(engine, prompts(), max_new_tokens=NEW)
    assert share < 0.7, "passes of four requests at a time should take few forwards"


@pytest.mark.parametrize("outer", ["none", "fused", "rounds"])
def test_the_static_backend_does_the_same(outer):
    static = [dataclasses.replace(m, backend="static") for m in (tiny.model("qwen3"), tiny.model(seed=5, layers=2))]
    _, share = assert_as_alone(Parse(*static, outer=OUTERS[outer]()), prompts(), max_new_tokens=NEW)
    assert share < 0.7


def test_streamed_judging_beside_drafting_becomes_judging_in_turn(tiny_target):
    """In a batch the passes of others fill the gaps; what is written does not depend on when it is judged."""
    beside = StreamedVerification(judge=tiny.ScriptedJudge(seed=3), overlap="always", **SHARED)
    engine = Parse(tiny_target, tiny.model(seed=5, layers=2), outer=beside)
    given = prompts(4)
    alone = [engine.generate(prompt, max_new_tokens=NEW).tokens for prompt in given]
    before = threading.active_count()
    assert [r.tokens for r in engine.generate_batch(given, max_new_tokens=NEW).results] == alone
    assert threading.active_count() == before


INNERS = {
    "draft_model": lambda: DraftModel(length=3, model=tiny.model(seed=6, layers=1)),
    "eagle3": lambda: Eagle3(head=random_head(), tokens=12, depth=4, top_k=3),
    "self_early_exit": lambda: SelfEarlyExit(layers=3),
    "ngram": lambda: Ngram(),
}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("backend", ["eager", "static"])
def test_with_an_inner_speculator(backend, inner):
    target = dataclasses.replace(tiny.model("llama", layers=8), backend=backend)
    engine = Parse(target, tiny.model(seed=5, layers=2), inner=INNERS[inner](), outer=parse(loop=Rounds(rounds=2)))
    batch, _ = assert_as_alone(engine, prompts(5), max_new_tokens=NEW)
    assert any("guesses for one request after another" in note for note in batch.results[0].notes)


def test_a_pair_with_different_tokenizers():
    letters = tiny.model("llama", seed=9, layers=2)
    draft = LanguageModel.wrap(letters.hf, tiny.letters(), name="letters")
    engine = Parse(tiny.model("llama"), draft, outer=parse(loop=Rounds(rounds=2)))
    assert_as_alone(engine, [f"w{i}w{i + 1}?w4" for i in range(5)], max_new_tokens=NEW)


@pytest.mark.parametrize("limit", [1, 2, 5, 64])
def test_limits_of_tokens_and_context(limit):
    engine = Parse(tiny.model("llama", context_limit=60), tiny.model(seed=5, layers=2), outer=parse())
    batch, _ = assert_as_alone(engine, prompts(), max_new_tokens=limit)
    stops = {r.stop for r in batch.results}
    assert stops <= {StopReason.TOKEN_LIMIT, StopReason.CONTEXT_LIMIT, StopReason.END_TOKEN}
    assert StopReason.CONTEXT_LIMIT in stops or limit < 20


def test_stop_strings(tiny_target):
    engine = Parse(tiny_target, tiny.model(seed=5, layers=2), outer=parse())
    batch, _ = assert_as_alone(engine, prompts(), max_new_tokens=NEW, stop=["w46"])
    assert StopReason.STOP_STRING in {r.stop for r in batch.results}
    assert all("w46" not in r.text for r in batch.results)


@pytest.mark.parametrize("outer", ["none", "rounds"])
def test_sampling_with_a_generator_a_request(tiny_target, outer):
    engine = Parse(tiny_target, tiny.model(seed=5, layers=2), outer=OUTERS[outer]())
    options = {"max_new_tokens": NEW, "sampling": Sampling(temperature=0.9, top_p=0.95)}
    given = [prompts()[0]] * 6  # the same prompt: only the generators differ

    def seeded():
        return [torch.Generator().manual_seed(i) for i in range(len(given))]

    alone = [engine.generate(p, generator=g, **options) for p, g in zip(given, seeded(), strict=True)]
    together = engine.generate_batch(given, size=4, generators=seeded(), **options).results
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len({r.tokens for r in together}) > 1


def test_a_bad_prompt_costs_the_others_nothing(tiny_target):
    engine = Parse(tiny_target)
    good = prompts(4)
    given = [good[0], "", good[1], [tiny.VOCAB], good[2], [5] * 600, good[3]]
    batch = engine.generate_batch(given, size=3, max_new_tokens=NEW)
    assert sorted(batch.errors) == [1, 3, 5]
    for place, words in (
        (1, "request 1: the prompt is empty"),
        (3, "request 3: .*vocabulary"),
        (5, "request 5: .*600"),
    ):
        with pytest.raises(PromptError, match=words):
            raise batch.errors[place]
    with pytest.raises(PromptError, match="request 1"):
        _ = batch.results
    kept = [batch.answers[i] for i in (0, 2, 4, 6)]
    assert [r.tokens for r in kept] == [engine.generate(p, max_new_tokens=NEW).tokens for p in good]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A pass that computes nothing."""

    group: str
    made: list
    rows: int = 1
    separable: bool = True

    @property
    def device(self):
        return torch.device("cpu")

    @classmethod
    def together(cls, passes):
        passes[0].made.append(passes[0].group)
        return [(None, None)] * len(passes)


@pytest.mark.parametrize("minorities", [1, 3])
def test_a_pass_waits_for_a_bounded_number_of_forwards(minorities):
    """However many wait for another one, again and again. Those that wait too long are served in turn."""
    made, rounds = [], 8 * PATIENCE

    def asking(group, times):
        for _ in range(times):
            current().ask(Asked(group, made))

    many = [partial(asking, "many", rounds)] * 4
    few = [partial(asking, f"few {i}", 6) for i in range(minorities)]
    list(in_company([*many, *few], size=len(many) + minorities))
    assert made.count("many") == rounds
    for i in range(minorities):
        places = [-1, *(place for place, group in enumerate(made) if group == f"few {i}")]
        assert len(places) == 7
        waits = [after - before - 1 for before, after in pairwise(places)]
        assert max(waits) <= PATIENCE + minorities - 1
        assert min(waits[:-1]) >= PATIENCE - minorities, "the larger group should be served meanwhile"


@pytest.mark.parametrize("family", ["mamba2", "lfm2"])
def test_recurrent_models_work_and_say_so(family):
    engine = Parse(tiny.model(family), tiny.model(seed=5, layers=2), outer=parse())
    batch, share = assert_as_alone(engine, prompts(4), max_new_tokens=12)
    assert share == 1
    assert any("recurrent" in note for note in batch.results[0].notes)


def test_a_loop_of_others_works_and_says_so(tiny_target):
    engine = Parse(tiny_target, outer=HfGenerate())
    batch, _ = assert_as_alone(engine, prompts(3), max_new_tokens=NEW)
    assert any("nothing of this request" in note for note in batch.results[0].notes)


def test_a_model_whose_requests_disturb_each_other_is_found(tiny_target):
    """A forward that mixes rows, e.g. by a hook: its requests are computed one after another."""
    other = tiny.right_with_probability(tiny_target, 1.0)
    mixing = other.hf.model.layers[0].register_forward_hook(lambda m, a, out: out + out.mean(1, keepdim=True))
    try:
        assert "disturb" in joint_obstacle(dataclasses.replace(other, hf=unpatched(other.hf)))
    finally:
        mixing.remove()


def unpatched(hf):
    """Without the stand-in's own forward, which takes no rows of several requests."""
    del hf.forward
    return hf


def test_wrong_arguments_of_a_batch(tiny_target):
    engine = Parse(tiny_target)
    one = torch.Generator()
    warm = Sampling(temperature=1.0)
    with pytest.raises(ConfigError, match="size=0"):
        engine.generate_batch(["w1"], size=0)
    with pytest.raises(ConfigError, match="list of prompts"):
        engine.generate_batch("w1")
    with pytest.raises(ConfigError, match="Generator for every request"):
        engine.generate_batch(["w1", "w2"], sampling=warm)
    with pytest.raises(ConfigError, match="2 generators, 1 different"):
        engine.generate_batch(["w1", "w2"], sampling=warm, generators=[one, one])
    with pytest.raises(PromptError, match="generate_batch"):
        engine.generate(["w1", "w2"])
    assert engine.generate_batch([]).answers == ()


def test_a_seed_is_what_a_run_makes_of_it(tiny_target, tiny_draft):
    """The i-th prompt of a batch draws as the i-th problem of a run with that seed; a request alone as the first."""
    engine = Parse(tiny_target, tiny_draft, judge=tiny.ScriptedJudge(value=0.4), inner=DraftModel(length=2))
    given, warm = [[5, 6], [9, 8, 7], [5, 6]], Sampling(temperature=1.5)
    options = dict(sampling=warm, max_new_tokens=12)
    by_hand = [engine.generate(p, generator=request_generator(3, i), **options).tokens for i, p in enumerate(given)]
    assert [answer.tokens for answer in engine.generate_batch(given, seed=3, **options).results] == by_hand
    assert engine.generate(given[0], seed=3, **options).tokens == by_hand[0]
    *_, last = engine.stream(given[0], seed=3, **options)
    assert last.result.tokens == by_hand[0]
    assert by_hand[0] != by_hand[2]
    assert engine.generate(given[0], seed=4, **options).tokens != by_hand[0]
    greedy = engine.generate(given[0], max_new_tokens=12).tokens
    assert engine.generate(given[0], max_new_tokens=12, seed=3).tokens == greedy


def test_a_seed_is_one_whole_number_in_place_of_a_generator(tiny_target):
    engine, one = Parse(tiny_target), torch.Generator()
    for wrong in (1.5, "3", True):
        for call in (engine.generate, engine.stream, lambda p, **o: engine.generate_batch([p], **o)):
            with pytest.raises(ConfigError, match=r"seed=.*expected a whole number"):
                call("w1", seed=wrong)
    with pytest.raises(ConfigError, match="both seed=3 and a generator"):
        engine.stream("w1", seed=3, generator=one)
    with pytest.raises(ConfigError, match="both seed=3 and a generator"):
        engine.generate("w1", seed=3, generator=one)
    with pytest.raises(ConfigError, match="both seed=3 and generators"):
        engine.generate_batch(["w1"], seed=3, generators=[one])
    with pytest.raises(ConfigError, match="seed="):
        engine.generate("w1", sampling=Sampling(temperature=1.0))


def test_requests_arrive_as_they_finish_and_a_left_stream_leaves_no_thread(tiny_target):
    before = threading.active_count()
    given = [[5, 6], [7] * 30, [8, 9, 10]]
    stream = Parse(tiny_target).stream_batch(given, size=2, max_new_tokens=NEW)
    place, first = next(stream)
    assert isinstance(first, Result)
    assert place in (0, 1)
    stream.close()
    gc.collect()
    assert threading.active_count() == before


def test_experiments_in_batches(tiny_target):
    """Same requests and answers as one by one, in the order of the problems; what is answered already stays."""
    task = ZooArithmetic(n=7)
    shared = {"limits": Limits(max_new_tokens=8), "sampling": Sampling(), "seed": 0, "warmup": 1}

    def run(batch, finished=()):
        arms = [Arm("a", Parse(tiny_target)), Arm("b", Parse(tiny_target, tiny.model(seed=5, layers=2), outer=parse()))]
        arms[0].requests = list(finished)
        seen = []
        run_arms(arms, task, task.problems(), Settings(**shared, batch=batch), seen.append)
        return [arm.requests for arm in arms], seen

    (one_a, one_b), _ = run(1)
    (a, b), seen = run(3)
    assert [r["id"] for r in a] == [r["id"] for r in b] == [r["id"] for r in one_a]
    assert [r["result"]["tokens"] for r in a + b] == [r["result"]["tokens"] for r in one_a + one_b]
    assert "".join(seen) == "aaabbb" + "bbbaaa" + "ab"
    (a, _), seen = run(3, finished=one_a[:4])
    assert [r["id"] for r in a] == [r["id"] for r in one_a]
    assert seen.count("a") == 3
    with pytest.raises(ConfigError, match="batch=0"):
        Settings(**shared, batch=0)


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_threads_that_run_the_same_models_do_not_meet(backend):
    """Batches and single requests side by side, an early-exit speculator's view of the target among them."""
    target, draft = (
        dataclasses.replace(m, backend=backend) for m in (tiny.model("llama"), tiny.model("llama", seed=7))
    )
    engine, early = (
        Parse(target, draft, outer=parse()),
        Parse(target, inner=SelfEarlyExit(layers=1), outer=TargetOnly()),
    )
    asked = prompts(6)
    alone = [engine.generate(prompt, max_new_tokens=NEW).tokens for prompt in asked]
    plain = early.generate(asked[0], max_new_tokens=NEW).tokens
    found, expected = [], []

    def batch():
        found.extend(a.tokens for a in engine.generate_batch(asked, size=3, max_new_tokens=NEW).answers)

    def single():
        found.extend(early.generate(asked[0], max_new_tokens=NEW).tokens for _ in range(3))

    for _ in range(2):
        threads = [threading.Thread(target=run) for run in (batch, batch, single)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected += [*alone, *alone, *[plain] * 3]
    assert sorted(found) == sorted(expected)
    assert {model.hf.config._attn_implementation for model in (target, draft)} == {"sdpa"}
