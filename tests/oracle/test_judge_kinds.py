"""Every kind of judge against separate plain forwards: what a pass shows, what is read off it, and at what price."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import oracle.test_judge_pass as judging
import oracle.test_streamed as streaming
import tiny
from medusa_heads import taught_heads
from parsedec import Parse, PrefixVerification, load
from parsedec.boundary import FirstFailure
from parsedec.drafter import Drafter
from parsedec.errors import ConfigError, IncompatibleStack, JudgeError
from parsedec.inner import Decoder, NoSpeculation
from parsedec.judge import (
    CombinedJudge,
    ConfidenceJudge,
    DigitJudge,
    LabelJudge,
    LogprobJudge,
    ProbeJudge,
    judging_session,
)
from parsedec.meter import Tally
from parsedec.peers import Cascade, SpecReason
from parsedec.sampling import Sampler
from parsedec.segmenters import EveryTokens
from parsedec.sessions.backends import open_session
from parsedec.sessions.session import Session
from parsedec.static.session import StaticSession
from parsedec.streamed import StreamedVerification
from parsedec.text.spelling import Draft
from parsedec.types import JudgePath, Sampling
from parsedec_adapters.medusa import Medusa
from parsedec_adapters.ngram import Ngram

PROMPT, DRAFT, CUTS, SUFFIX = judging.PROMPT, judging.DRAFT, judging.CUTS, judging.SUFFIX
LAYERS = (1, 3)
ATOL = 1e-4


def states(model, ids, layers=LAYERS):
    """Hidden states of one plain forward without a cache [T, L, H]."""
    with torch.inference_mode():
        out = model.hf(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return torch.stack([out.hidden_states[layer][0] for layer in layers], dim=1)


def close(ours, theirs):
    # hidden states of these models reach the hundreds: relative to their spread
    assert float((ours.float() - theirs.float()).abs().max()) <= ATOL * max(1.0, float(theirs.std()))


def path_of(family):
    return JudgePath.PACKED if family in tiny.PACKED else JudgePath.FORKED


def kinds():
    return list(_kinds())


def _kinds():
    for family in tiny.FAMILIES:
        yield pytest.param(family, Session, id=family)
    yield pytest.param("llama", StaticSession, id="llama, static")
    yield pytest.param("qwen3", StaticSession, id="qwen3, static")


def judged_draft(model, logprobs=None):
    draft = Draft.of(model, DRAFT, ended=False)
    return Draft(draft.tokens, draft.text, draft.ends, draft.ended, logprobs)


def scored(judge, model, draft=None, cuts=CUTS, probes=CUTS):
    session = judging_session(model, judge)
    session.feed(PROMPT)
    return session, judge.score(session, draft or judged_draft(model), cuts, probes)


@pytest.mark.parametrize(("family", "kind"), kinds())
def test_taps_at_probes_and_cuts_equal_separate_forwards(family, kind):
    model = tiny.model(family)
    session = kind(model, LAYERS)
    session.feed(PROMPT)
    rows = session.judge(DRAFT, CUTS, SUFFIX, probes=CUTS[1:], path=path_of(family))
    own = states(model, PROMPT + DRAFT)
    close(rows.cut_taps, torch.stack([own[len(PROMPT) + cut - 1] for cut in CUTS[1:]]))
    close(rows.probe_taps, torch.stack([states(model, [*PROMPT, *DRAFT[:cut], *SUFFIX])[-1] for cut in CUTS[1:]]))
    session.keep_draft(CUTS[1])
    close(session.seen(0).taps, own[: len(PROMPT) + CUTS[1]])


@pytest.mark.parametrize("pending", [0, 2])
@pytest.mark.parametrize(("family", "kind"), kinds())
def test_without_a_suffix_the_pass_is_a_plain_prefill(family, kind, pending):
    model = tiny.model(family)
    session = kind(model, LAYERS)
    session.feed(PROMPT[: len(PROMPT) - pending])
    for token in PROMPT[len(PROMPT) - pending :]:
        session.append(token)
    calls = session.calls
    first = session.judge(DRAFT[: CUTS[1]], CUTS[:2], ())
    rows = session.judge(DRAFT, CUTS, (), probes=CUTS[1:])
    plain, own = judging.forward(model, PROMPT + DRAFT), states(model, PROMPT + DRAFT)
    at = [len(PROMPT) + cut - 1 for cut in CUTS]
    assert (first.path, rows.path) == (JudgePath.CAUSAL, JudgePath.CAUSAL)
    assert first.rows + rows.rows == len(DRAFT) + pending  # each row once, and no other
    if not model.recurrent:
        assert session.calls == calls + 2
    close(rows.probe_logits, plain[at[1:]])
    close(rows.cut_taps, own[at[1:]])
    assert torch.equal(rows.probe_taps, rows.cut_taps)
    expected = plain[len(PROMPT) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(DRAFT)[:, None])[:, 0]
    close(rows.draft_logprobs, expected)
    session.keep_draft(CUTS[0])
    assert session.tokens == PROMPT + DRAFT[: CUTS[0]]
    close(session.next_logits, plain[at[0]])


def test_a_pass_without_probes_only_reads(tiny_target):
    session = Session(tiny_target)
    session.feed(PROMPT)
    rows = session.judge(DRAFT, CUTS, SUFFIX, probes=[])
    assert (rows.path, rows.rows, len(rows.probe_logits)) == (JudgePath.CAUSAL, len(DRAFT), 0)
    for path in (JudgePath.CAUSAL, JudgePath.REMOTE):
        with pytest.raises(JudgeError, match=f"path={path} with a suffix"):
            session.judge(DRAFT, CUTS, SUFFIX, path=path)


def test_digit_is_the_mean_mark_of_separate_forwards():
    target = load("zoo:target", dtype="float32", device="cpu")
    judge = DigitJudge(question="Rate it.", opening="Mark: ").bind(target)
    draft = Draft.of(target, target.encode("1 + 2 = 3\n3 + 4 = 8"), ended=True)
    cuts = [draft.position(9), len(draft.tokens)]
    prompt = target.encode("<|user|>hello")
    session = judging_session(target, judge)
    session.feed(prompt)
    scores = judge.score(session, draft, cuts, cuts)
    for mark, value in (("expected", scores.values), ("likeliest", None)):
        for k, cut in enumerate(cuts):
            logits = judging.forward(target, [*prompt, *draft.tokens[:cut], *judge.suffix])[-1].double()
            p = torch.tensor([logits[target.encode(str(d))[-1]] for d in range(10)]).softmax(0)
            if mark == "expected":
                assert value[k] == pytest.approx(sum(d * float(p[d]) for d in range(10)) / 9, abs=1e-4)
            else:
                other = DigitJudge(question="Rate it.", opening="Mark: ", mark=mark).bind(target)
                twin = judging_session(target, other)
                twin.feed(prompt)
                assert other.score(twin, draft, cuts, cuts).values[k] == pytest.approx(int(p.argmax()) / 9)
    assert target.decode(list(judge.suffix)).endswith("Mark: ")
    assert scores.rows == len(draft.tokens) + 2 * judge.suffix_rows


def test_digits_that_cannot_be_told_apart_are_refused(tiny_target):
    with pytest.raises(JudgeError, match="same token"):
        DigitJudge().bind(tiny_target)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba2"])
@pytest.mark.parametrize("over", ["prefix", "segment"])
@pytest.mark.parametrize("statistic", ["min", "mean"])
def test_logprob_is_a_statistic_of_a_plain_forward(family, over, statistic):
    model = tiny.model(family)
    judge = LogprobJudge(over=over, statistic=statistic).bind(model)
    session, scores = scored(judge, model, probes=CUTS[1:])
    logprobs = judging.forward(model, PROMPT + DRAFT).double().log_softmax(-1)
    each = [math.exp(logprobs[len(PROMPT) + i - 1, token]) for i, token in enumerate(DRAFT)]
    for k, value in enumerate(scores.values, start=1):
        tokens = each[CUTS[k - 1] if over == "segment" else 0 : CUTS[k]]
        expected = min(tokens) if statistic == "min" else math.prod(tokens) ** (1 / len(tokens))
        assert value == pytest.approx(expected, rel=1e-3)
    assert (scores.rows, judge.suffix_rows, session.rows) == (len(DRAFT), 0, len(PROMPT) + len(DRAFT))


CONFIDENCE = [0.99] * 3 + [0.5] * 5 + [0.98] * 4 + [0.999] * 5  # of the four segments of DRAFT


@pytest.mark.parametrize(("sure", "asked"), [(0.0, []), (0.9, [8]), (0.985, [8, 12]), (1.0, CUTS)])
def test_only_unsure_segments_are_asked(tiny_target, sure, asked):
    draft = judged_draft(tiny_target, tuple(map(math.log, CONFIDENCE)))
    label = LabelJudge(question="?").bind(tiny_target)
    answers = dict(zip(CUTS, scored(label, tiny_target)[1].values, strict=True))
    judge = ConfidenceJudge(sure=sure, judge=LabelJudge(question="?")).bind(tiny_target)
    session, scores = scored(judge, tiny_target, draft)
    latest, expected = 1.0, []
    for cut in CUTS:
        latest = answers[cut] if cut in asked else latest
        expected.append(latest)
    assert scores.values == pytest.approx(expected, abs=1e-5)
    assert scores.rows == len(DRAFT) + len(asked) * label.suffix_rows
    assert scores.path is (JudgePath.PACKED if asked else JudgePath.CAUSAL)
    session.keep_draft(CUTS[2])  # the draft is staged, whoever was asked
    assert session.tokens == PROMPT + DRAFT[: CUTS[2]]


def test_the_first_probe_of_a_pass_is_sure_only_if_all_before_it_is(tiny_target):
    draft = judged_draft(tiny_target, tuple(map(math.log, CONFIDENCE)))
    judge = ConfidenceJudge(sure=0.9, judge=LabelJudge(question="?")).bind(tiny_target)
    _, last = scored(judge, tiny_target, draft, probes=CUTS[-1:])  # as two passes ask first
    assert last.rows == len(DRAFT) + judge.suffix_rows


def test_confidence_alone_is_that_of_the_least_sure_segment(tiny_target):
    draft = judged_draft(tiny_target, tuple(map(math.log, CONFIDENCE)))
    _, scores = scored(ConfidenceJudge().bind(tiny_target), tiny_target, draft)
    assert scores.values == pytest.approx([0.99, 0.5, 0.5, 0.5])
    with pytest.raises(JudgeError, match="this draft has none"):
        scored(ConfidenceJudge().bind(tiny_target), tiny_target)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("inner", [NoSpeculation(), Ngram()], ids=["plain", "ngram"])
def test_drafts_hold_the_models_own_logprobs(inner, temperature):
    draft, target = tiny.model("llama", seed=5, layers=2), tiny.model("llama")
    sampler = Sampler(Sampling(temperature=temperature), torch.Generator().manual_seed(1))
    seen = []

    class Asking(LabelJudge):
        needs = ConfidenceJudge().needs

        def score(self, session, draft, cuts, probes):
            seen.append(draft)
            return super().score(session, draft, cuts, probes)

    for outer in (PrefixVerification, StreamedVerification):
        seen.clear()
        engine = Parse(target, draft, draft_inner=inner, outer=outer(judge=Asking(question="?"), segmenter=GRID))
        engine.generate(PROMPT, max_new_tokens=40, sampling=sampler.settings, generator=sampler.generator)
        written = seen[-1]
        plain = judging.forward(draft, [*PROMPT, *written.tokens]).log_softmax(-1)
        expected = [float(plain[len(PROMPT) + i - 1, token]) for i, token in enumerate(written.tokens)]
        assert written.logprobs == pytest.approx(expected, abs=1e-4)
    engine = Parse(target, draft, outer=PrefixVerification(judge=LabelJudge(question="?"), segmenter=GRID))
    assert not engine.judge_needs.draft_logprobs
    drafter = Drafter(draft, target, inner, Sampler(Sampling()), PROMPT, ())
    assert drafter.decoder.logprobs is None  # nobody asks, so nothing is noted


GRID = EveryTokens(delta=4)


def test_confidence_needs_one_vocabulary(tiny_target):
    with pytest.raises(IncompatibleStack, match="different vocabularies"):
        Parse(tiny_target, streaming.halves(), judge=ConfidenceJudge())


def probe_folder(folder, model, *, layer=3, **changes):
    """Random probes for a model, written by hand in the documented layout."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        f"{p}.{n}": torch.randn(model.hidden_size, generator=generator) / 500 for p in ("suffix", "cut") for n in (1, 3)
    }
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, folder / "probe.safetensors")
    fit = {"threshold": 0.4, "full_threshold": 0.45, "layer": layer, "bias": {"1": 0.25, "3": -0.25}}
    card = {"target": model.name, "hidden_size": model.hidden_size, "num_layers": model.num_layers, "question": "?"}
    mixture = {
        "threshold": 0.3,
        "full_threshold": 0.35,
        "bias": -0.5,
        "weights": {"label": 0.5, "logprob": 0.2, "probe": 2.0},
    }
    card |= {"probes": {"suffix": fit, "cut": fit}, "combined": mixture} | changes
    (folder / "config.json").write_text(json.dumps(card))
    return {name: weight.bfloat16().float() for name, weight in weights.items()}


@pytest.mark.parametrize("position", ["suffix", "cut"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "lfm2", "mamba2"])
def test_probe_is_linear_in_a_plain_forwards_state(family, position, tmp_path):
    model = tiny.model(family)
    weights = probe_folder(tmp_path, model)
    for layer, bias in ((None, -0.25), (1, 0.25)):
        judge = ProbeJudge(weights=str(tmp_path), position=position, layer=layer).bind(model)
        _, scores = scored(judge, model, probes=CUTS[1:])
        for cut, value in zip(CUTS[1:], scores.values, strict=True):
            tail = judge.suffix if position == "suffix" else ()
            state = states(model, [*PROMPT, *DRAFT[:cut], *tail], (layer or 3,))[-1, 0]
            odds = float(state @ weights[f"{position}.{layer or 3}"]) + bias
            assert value == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-3)
        assert scores.path is (path_of(family) if position == "suffix" else JudgePath.CAUSAL)
        assert scores.rows == len(DRAFT) + 3 * judge.suffix_rows
        assert (judge.suffix_rows > 0) == (position == "suffix")
        assert (judge.card is not None) == (layer is None)  # the thresholds are those of the card's own layer


def test_probes_that_do_not_fit_are_refused(tiny_target, tmp_path):
    probe_folder(tmp_path, tiny_target)
    for judge, said in (
        (ProbeJudge(weights=str(tmp_path), layer=2), r"no probe for position suffix, layer 2.*\['1', '3'\]"),
        (ProbeJudge(weights=str(tmp_path / "none")), "does not exist"),
    ):
        with pytest.raises(IncompatibleStack, match=said):
            judge.bind(tiny_target)
    with pytest.raises(IncompatibleStack, match=r"width 64 and 4 layers, but .* 2\s+layers"):
        ProbeJudge(weights=str(tmp_path)).bind(tiny.model("llama", layers=2))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(IncompatibleStack, match="not a card of trained probes"):
        ProbeJudge(weights=str(tmp_path)).bind(tiny_target)
    with pytest.raises(ConfigError, match="expected one of suffix, cut"):
        ProbeJudge(weights="x", position="end")


def test_a_session_without_the_layers_is_refused(tiny_target, tmp_path):
    probe_folder(tmp_path, tiny_target)
    judge = ProbeJudge(weights=str(tmp_path)).bind(tiny_target)
    session = open_session(tiny_target, (0,))
    session.feed(PROMPT)
    with pytest.raises(JudgeError, match=r"reads hidden layer 3.*\[0\].*judging_session"):
        judge.score(session, judged_draft(tiny_target), CUTS, CUTS)


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_combined_is_a_logistic_regression_off_one_pass(family, tmp_path):
    model = tiny.model(family)
    probe_folder(tmp_path, model)
    parts = {"label": LabelJudge(question="?"), "logprob": LogprobJudge(), "probe": ProbeJudge(weights=str(tmp_path))}
    judge = CombinedJudge(judges=parts, weights=str(tmp_path)).bind(model)
    session, scores = scored(judge, model)
    total = [-0.5] * len(CUTS)
    for name, weight in (("label", 0.5), ("logprob", 0.2), ("probe", 2.0)):
        for k, value in enumerate(scored(parts[name].bind(model), model)[1].values):
            value = min(max(value, 1e-6), 1 - 1e-6)
            total[k] += weight * math.log(value / (1 - value))
    assert scores.values == pytest.approx([1 / (1 + math.exp(-odds)) for odds in total], abs=2e-3)
    assert (
        scores.rows
        == len(DRAFT) + len(CUTS) * judge.suffix_rows
        == len(DRAFT) + len(CUTS) * len(judge.judges["label"].suffix)
    )
    if family == "llama":
        assert session.calls == 2  # the prompt, and one pass for all three
    assert (judge.card.threshold, judge.card.full_threshold) == (0.3, 0.35)


def test_combined_reads_the_draft_once_for_two_questions(tiny_target):
    parts = {"one": LabelJudge(question="?"), "two": LabelJudge(question="??"), "free": LogprobJudge()}
    judge = CombinedJudge(judges=parts, weights={"one": 1.0, "two": 0.0, "free": 0.0}).bind(tiny_target)
    _, scores = scored(judge, tiny_target)
    assert scores.values == pytest.approx(scored(parts["one"].bind(tiny_target), tiny_target)[1].values, abs=1e-4)
    assert scores.rows == len(DRAFT) + len(CUTS) * judge.suffix_rows
    assert judge.card is None


def test_combined_refuses_what_it_cannot_read(tiny_target, tmp_path):
    asking = ConfidenceJudge(judge=LabelJudge(question="?"))
    with pytest.raises(ConfigError, match=r"judges\.c is ConfidenceJudge.*judge=null"):
        CombinedJudge(judges={"c": asking}, weights={"c": 1.0})
    with pytest.raises(ConfigError, match="at least one"):
        CombinedJudge(judges={}, weights={})
    with pytest.raises(IncompatibleStack, match=r"for \['b'\].* are \['a'\]"):
        CombinedJudge(judges={"a": LogprobJudge()}, weights={"b": 1.0}).bind(tiny_target)
    probe_folder(tmp_path, tiny_target, combined=None)
    with pytest.raises(IncompatibleStack, match="no weights for judge=combined"):
        CombinedJudge(judges={"a": LogprobJudge()}, weights=str(tmp_path)).bind(tiny_target)


def test_the_speculator_sees_its_own_layers_only(tiny_target, tmp_path):
    """Medusa reads the last layer; a judge that reads others changes neither what is guessed nor what is written."""
    prompt, tokens = tiny.plain_answer(tiny_target)
    inner = Medusa(heads=taught_heads(tiny_target, prompt, tokens, share=0.6), tree="mc_sim_7b_63").bind(
        tiny_target, None
    )
    done = []
    for layers in ((), (1, 3)):
        tally = Tally()
        decoder = Decoder(tiny_target, inner, Sampler(Sampling()), tally, None, layers)
        decoder.session.feed(prompt)
        written = []
        while len(written) < 30:
            written += decoder.step(30 - len(written))
        done.append((written, tally.accepted_by_depth))
    assert done[0] == done[1]
    assert done[0][0] == tokens[:30]
    assert done[0][1][0] > 0


@pytest.mark.parametrize("family", ["llama", "mamba2"])
@pytest.mark.parametrize("name", ["logprob", "probe", "cut", "combined"])
def test_streamed_keeps_what_the_whole_draft_would(family, name, tmp_path):
    target, draft = tiny.model(family), tiny.model("llama", seed=5, layers=2)
    probe_folder(tmp_path, target)
    probe = ProbeJudge(weights=str(tmp_path))
    judge = {
        "logprob": LogprobJudge(over="segment", statistic="mean"),
        "probe": probe,
        "cut": ProbeJudge(weights=str(tmp_path), position="cut"),
        "combined": CombinedJudge(
            judges={"label": LabelJudge(question="?"), "logprob": LogprobJudge(), "probe": probe},
            weights=str(tmp_path),
        ),
    }[name]
    kept = set()
    for threshold in (0.0, 0.005, 0.4, 0.5):  # random models find each other unlikely
        settings = dict(judge=judge, segmenter=GRID, boundary=FirstFailure(threshold=threshold, full_threshold=1.0))
        fused, streamed = (
            Parse(target, draft, outer=outer(**settings)).generate(PROMPT, max_new_tokens=32)
            for outer in (PrefixVerification, StreamedVerification)
        )
        assert fused.tokens == streamed.tokens
        assert fused.counters.kept_draft_tokens == streamed.counters.kept_draft_tokens
        kept.add(fused.counters.kept_draft_tokens)
    assert len(kept) > 1, "the thresholds should tell the drafts apart"


@pytest.mark.parametrize("outer", [Cascade, SpecReason])
@pytest.mark.parametrize("kind", ["probe", "confidence"])
def test_peers_ask_judges_that_need_more_than_a_pass(outer, kind, tmp_path):
    target, draft = tiny.model("llama"), tiny.model(seed=5, layers=2)
    probe_folder(tmp_path, target)
    judge = ProbeJudge(weights=tmp_path) if kind == "probe" else ConfidenceJudge()
    result = Parse(target, draft, outer=outer(judge=judge)).generate(PROMPT, max_new_tokens=24)
    scores = [segment.score for round_ in result.rounds for segment in round_.segments]
    assert scores
    assert all(0 <= score <= 1 for score in scores)
