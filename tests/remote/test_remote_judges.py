"""Judges, outer levels and batches over servers: what the local engine does with the same weights, or a refusal.

Oracles: the local engine; for what a missing label counts as, all the ways it could be.
"""

import itertools
import math
import random

import pytest
import torch

import tiny
from oracle.test_judge_kinds import probe_folder
from parsedec import LabelJudge, Parse, PrefixVerification, load
from parsedec.boundary import FirstFailure
from parsedec.drafter import Drafter
from parsedec.errors import IncompatibleStack, PromptError, ServerRefused, TargetLost
from parsedec.inner import NoSpeculation
from parsedec.judge import (
    CombinedJudge,
    ConfidenceJudge,
    DigitJudge,
    LogprobJudge,
    PassJudge,
    ProbeJudge,
    judging_session,
)
from parsedec.peers.cascade import Cascade
from parsedec.peers.equivalence import EqualText, LabelEquivalence
from parsedec.peers.hf_generate import HfGenerate
from parsedec.peers.lookahead import LookaheadReasoning
from parsedec.peers.specreason import SpecReason
from parsedec.remote import connect
from parsedec.remote.session import NOTHING, RemoteSession, least
from parsedec.sampling import Sampler
from parsedec.segmenters import EveryTokens
from parsedec.text.spelling import Draft
from parsedec.types import JudgePath, Sampling, StopReason

NEW = 24
GRID = EveryTokens(delta=4)
LABEL = LabelJudge(question="?")


def same(ours, theirs):
    assert (ours.tokens, ours.spans, ours.stop) == (theirs.tokens, theirs.spans, theirs.stop)
    scores = [[s.score for round_ in result.rounds for s in round_.segments] for result in (ours, theirs)]
    assert [s is None for s in scores[0]] == [s is None for s in scores[1]]
    assert [s for s in scores[0] if s is not None] == pytest.approx([s for s in scores[1] if s is not None], abs=1e-4)


# What a missing label counts as


def test_a_missing_mark_makes_the_mean_as_low_as_it_can_be():
    """Against every way in which the missing marks have nothing or all they can: the least mean is at one of them."""
    rng = random.Random(0)
    for count in (2, 3, 10):
        for _ in range(60):
            found = [math.log(rng.uniform(0.01, 0.5)) if rng.random() < 0.6 else None for _ in range(count)]
            floor = min([f for f in found if f is not None], default=math.log(0.3))

            def mean(logprobs):
                weights = torch.tensor(logprobs, dtype=torch.float64).softmax(-1)
                return float(weights @ torch.arange(len(logprobs) - 1, -1, -1, dtype=torch.float64))

            missing = [i for i, f in enumerate(found) if f is None]
            ways = []
            for chosen in itertools.product((NOTHING, floor), repeat=len(missing)):
                filled = list(found)
                for i, value in zip(missing, chosen, strict=True):
                    filled[i] = value
                if max(filled) > NOTHING:
                    ways.append(mean(filled))
            assert mean(least(found, floor)) == pytest.approx(min(ways), abs=1e-9)


# Judges


@pytest.mark.parametrize("flavour", ["vllm", "llamacpp"])
def test_digits_are_the_local_ones(flavour):
    """On the zoo's target, whose vocabulary has digits; where few tokens are shown, no score is above the local one."""
    from fake_server import FakeServer

    target = load("zoo:target", dtype="float32", device="cpu")
    prompt, tokens = target.encode("Tom has 3 apples."), target.encode(" He buys 4 more.\nSo he has 7.")
    draft = Draft.of(target, tokens, ended=True)
    cuts, seen = [len(tokens) // 2, len(tokens)], {}
    with FakeServer(target, flavour) as server:
        for shown in (100, 4):
            remote = connect(server.url, tokenizer="zoo:target", top_logprobs=shown)
            for model in (target, remote):
                judge = DigitJudge(opening="Score: ").bind(model)
                session = RemoteSession(model) if model is remote else judging_session(model, judge)
                session.feed(prompt)
                seen[model is remote] = judge.score(session, draft, cuts, cuts)
            ours, theirs = seen[True].values, seen[False].values
            assert (seen[True].path, seen[True].draft_logprobs) == (JudgePath.REMOTE, ())
            if flavour == "vllm":
                assert ours == pytest.approx(theirs, abs=1e-4)
            else:
                assert all(a <= b + 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("asked", [None, LABEL])
def test_confidence_of_a_draft_model_that_is_here(serve, pair, asked):
    target, draft = pair
    remote, server = serve(target)
    for sure in (0.0, 0.2, 1.0):
        judge = ConfidenceJudge(judge=asked, sure=sure)
        outer = PrefixVerification(judge=judge, segmenter=GRID, boundary=FirstFailure(threshold=0.3, full_threshold=1))
        before = len(server.seen)
        ours = Parse(remote, draft, outer=outer).generate("w1w2", max_new_tokens=NEW)
        same(ours, Parse(target, draft, outer=outer).generate("w1w2", max_new_tokens=NEW))
        probing = [body for _, body in server.seen[before:] if not body.get("stream")]
        if sure in (0.0, 1.0):
            assert bool(probing) == (asked is not None and sure > 0), "a sure draft is asked about nowhere"


def test_a_judge_that_reads_text_needs_no_logits_of_a_server(serve, pair):
    class Reads(PassJudge):
        def read(self, reading):
            return [float(len(text) < 30) for text in reading.texts]

    class ReadsText(Reads):
        wanted = ()

    target, draft = pair
    remote, server = serve(target)
    with pytest.raises(IncompatibleStack, match=r"Reads may read any logits, but tiny at .* property `wanted`"):
        Parse(remote, draft, judge=Reads())
    before = len(server.seen)
    outer = PrefixVerification(judge=ReadsText(), segmenter=GRID)
    ours = Parse(remote, draft, outer=outer).generate("w1w2", max_new_tokens=NEW)
    same(ours, Parse(target, draft, outer=outer).generate("w1w2", max_new_tokens=NEW))
    assert 0 < ours.counters.kept_draft_tokens < ours.counters.draft_tokens
    assert all(body.get("stream") for _, body in server.seen[before:]), "nothing is asked about a prefix"


def test_combined_scores_are_the_local_ones_where_labels_are_exact(serve, pair):
    target, draft = pair
    judge = CombinedJudge(
        judges={"one": LABEL, "two": LabelJudge(question="?", labels=("w3", "w4")), "three": LabelJudge(question="w5")},
        weights={"one": 1.0, "two": -0.5, "three": 0.7, "bias": 0.1},
    )
    outer = PrefixVerification(judge=judge, segmenter=GRID, boundary=FirstFailure(threshold=0.5, full_threshold=0.9))
    remote, _ = serve(target)
    ours = Parse(remote, draft, outer=outer).generate("w1w2", max_new_tokens=NEW)
    same(ours, Parse(target, draft, outer=outer).generate("w1w2", max_new_tokens=NEW))
    vague, _ = serve(target, "llamacpp")
    with pytest.raises(IncompatibleStack, match=r"judge=combined .*only bounds"):
        judge.bind(vague)


def test_more_labels_than_generative_scoring_compares_are_refused_by_name(serve, pair):
    """Two of them pass; ten digits, or two pairs behind one question, would fail at the first request."""
    from fake_server import FakeServer

    zoo = load("zoo:target", dtype="float32", device="cpu")
    with FakeServer(zoo) as server:
        remote = connect(server.url, tokenizer="zoo:target", labels="generative_scoring")
        for judge in (DigitJudge(), ConfidenceJudge(judge=DigitJudge())):
            with pytest.raises(IncompatibleStack, match=r"judge=digit compares 10 labels .*labels=auto"):
                Parse(remote, load("zoo:draft", dtype="float32", device="cpu"), judge=judge)
        assert DigitJudge().bind(connect(server.url, tokenizer="zoo:target")).digit_ids
    scoring, _ = serve(pair[0], settings={"labels": "generative_scoring"})
    other = LabelJudge(question="?", labels=("w3", "w4"))
    weights = {"one": 1.0, "two": -0.5, "bias": 0.1}
    with pytest.raises(IncompatibleStack, match=r"judge=combined compares 4 labels"):
        CombinedJudge(judges={"one": LABEL, "two": other}, weights=weights).bind(scoring)
    apart = CombinedJudge(judges={"one": LABEL, "two": LabelJudge(question="w5")}, weights=weights)
    outer = PrefixVerification(judge=apart, segmenter=GRID, boundary=FirstFailure(threshold=0.5, full_threshold=0.9))
    ours, theirs = (Parse(m, pair[1], outer=outer).generate("w1w2", max_new_tokens=NEW) for m in (scoring, pair[0]))
    same(ours, theirs)


def test_judges_that_read_what_a_server_keeps_are_refused_by_name(serve, pair, tmp_path):
    target, draft = pair
    (remote, _), (drafting, _) = serve(target), serve(draft)
    probe_folder(tmp_path, target)
    for judge, reads in (
        (LogprobJudge(), r"judge=logprob reads .*log-probabilities of the draft's tokens"),
        (ProbeJudge(weights=str(tmp_path)), "judge=probe reads hidden states"),
        (ConfidenceJudge(judge=LogprobJudge()), "judge=logprob"),
        (LabelJudge(question="?", path="packed"), "judge.path=packed"),
    ):
        with pytest.raises(IncompatibleStack, match=reads):
            judge.bind(remote)
    for model in (target, remote):
        with pytest.raises(IncompatibleStack, match=r"probabilities of its own tokens, and those of tiny at http"):
            Parse(model, drafting, outer=PrefixVerification(judge=ConfidenceJudge(judge=LABEL)))
    sampler = Sampler(Sampling())
    assert not Drafter(drafting, target, NoSpeculation(), sampler, [5, 6], (), logprobs=True).logprobs
    session, suffix = RemoteSession(remote), LABEL.bind(remote).suffix
    session.feed([5, 6])
    with pytest.raises(IncompatibleStack, match="reads all logits"):
        session.judge([7, 8], [2], suffix)


# Outer levels


@pytest.mark.parametrize("kind", ["cascade", "specreason", "lookahead"])
def test_peers_decide_as_locally(serve, pair, kind):
    target, draft = pair
    (remote, _), (drafting, _) = serve(target), serve(draft)
    for seed in range(3):
        judge = tiny.ScriptedJudge(seed=seed)
        outer = {
            "cascade": Cascade(judge=judge, threshold=0.5),
            "specreason": SpecReason(judge=judge, segmenter=GRID, threshold=0.5),
            "lookahead": LookaheadReasoning(equivalence=EqualText(), segmenter=GRID, steps=2),
        }[kind]
        for drafts in (draft, target) if kind == "lookahead" else (draft,):  # its own text is always the same
            there = remote if drafts is target else drafting
            theirs = Parse(target, drafts, outer=outer).generate("w1w2", max_new_tokens=NEW)
            ours = Parse(remote, there, outer=outer).generate("w1w2", max_new_tokens=NEW)
            same(ours, theirs)
    if kind == "specreason":
        assert ours.rounds[0].mean_draft_logprob is None
        assert theirs.rounds[0].mean_draft_logprob < 0
    if kind == "lookahead":
        assert any("a model on a server cannot decode a batch" in note for note in ours.notes)
        assert ours.counters.kept_draft_tokens > 0


def test_what_runs_the_model_itself_is_refused(serve, pair):
    target, draft = pair
    remote, _ = serve(target)
    with pytest.raises(IncompatibleStack, match=r"outer=hf_generate runs .*tiny at http"):
        Parse(remote, outer=HfGenerate())
    drafting, _ = serve(draft)
    with pytest.raises(IncompatibleStack, match=r"outer=hf_generate runs .*tiny at http"):
        Parse(target, drafting, outer=HfGenerate(assisted=True))
    with pytest.raises(IncompatibleStack, match="equivalence=label reads the logits"):
        LabelEquivalence(labels=("w3", "w4")).bind(remote)


# Batches


def test_batches_are_answered_one_request_after_another(serve, pair):
    target, draft = pair
    (remote, server), (drafting, _) = serve(target), serve(draft)
    outer = PrefixVerification(
        judge=tiny.ScriptedJudge(seed=1), segmenter=GRID, boundary=FirstFailure(threshold=0.3, full_threshold=0.9)
    )
    prompts = ["w1w2", "w5?w6", "w3"]
    engine = Parse(remote, drafting, outer=outer)
    alone = [engine.generate(prompt, max_new_tokens=NEW) for prompt in prompts]
    for models in ((remote, drafting), (remote, draft), (target, drafting)):
        done = Parse(*models, outer=outer).generate_batch(prompts, size=2, max_new_tokens=NEW)
        for ours, theirs in zip(done.results, alone, strict=True):
            same(ours, theirs)
            assert any("weights on a server" in note for note in ours.notes)
    server.faults.extend(["500"] * 3)  # as often as the first request's judge pass is tried
    first, *others = engine.generate_batch(prompts, size=1, max_new_tokens=NEW).answers
    assert isinstance(first, TargetLost)
    assert str(first).startswith("request 0: ")
    assert (first.partial.stop, first.partial.tokens) == (StopReason.SERVER_LOST, ())
    assert [answer.tokens for answer in others] == [answer.tokens for answer in alone[1:]]


def test_errors_of_a_batch_keep_what_they_hold():
    from parsedec.batching.batch import _named

    named = _named(ServerRefused("no such thing", 404), 3)
    assert (type(named), str(named), named.status) == (ServerRefused, "request 3: no such thing", 404)
    assert str(_named(PromptError("too long"), 0)) == "request 0: too long"
