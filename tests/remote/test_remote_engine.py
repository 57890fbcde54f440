"""The remote engine writes and judges what the local engine does with the same weights.

Oracle: the local engine. The server is a real HTTP server over the same tiny model, so all logits are the model's own.
"""

import dataclasses

import pytest
import torch

import tiny
from fake_server import FLAVOURS, FakeServer
from parsedec import LabelJudge, Parse, PrefixVerification, Sampling, TargetOnly
from parsedec.boundary import FirstFailure
from parsedec.errors import ConfigError, IncompatibleStack, ModelLoadError, ServerError
from parsedec.gate import Adaptive
from parsedec.loop import Rounds
from parsedec.models.language_model import LanguageModel
from parsedec.remote import RemoteModel, connect
from parsedec.remote.capabilities import Labels, TokensBack
from parsedec.segmenters import EveryTokens
from parsedec.streamed import StreamedVerification
from parsedec.types import Author, JudgePath, StopReason
from parsedec_adapters.ngram import Ngram

NEW = 32
GRID = EveryTokens(delta=4)
RULE = FirstFailure(threshold=0.3, full_threshold=0.7)
IDS = [flavour for flavour in FLAVOURS if flavour != "plain"]


def scores(result):
    return [segment.score for round_ in result.rounds for segment in round_.segments]


def same(result, expected, tolerance=1e-4):
    assert result.tokens == expected.tokens
    assert (result.text, result.stop) == (expected.text, expected.stop)
    assert result.spans == expected.spans
    assert [r.kept_tokens for r in result.rounds] == [r.kept_tokens for r in expected.rounds]
    assert [r.accepted_whole for r in result.rounds] == [r.accepted_whole for r in expected.rounds]
    for ours, theirs in zip(scores(result), scores(expected), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or abs(ours - theirs) < tolerance


# Writing


@pytest.mark.parametrize("flavour", IDS)
def test_greedy_text_is_the_local_one(serve, pair, flavour):
    target, _ = pair
    prompt, expected = tiny.plain_answer(target)
    remote, server = serve(target, flavour)
    result = Parse(remote).generate(prompt, max_new_tokens=NEW)
    assert list(result.tokens) == expected[:NEW]
    assert (result.stop, result.counters.target_calls) == (StopReason.TOKEN_LIMIT, 1)
    assert result.text == Parse(target).generate(prompt, max_new_tokens=NEW).text
    path, body = server.seen[-1]
    assert path == ("/generate" if flavour == "sglang" else "/v1/completions")
    assert prompt in (body.get("prompt"), body.get("input_ids"))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_messages_stop_strings_and_end_tokens(serve, pair, flavour):
    """Everything by which an answer ends, from a user message on; and no token after it."""
    target = pair[0]
    words = tiny.plain_answer(target)[1]
    ends = Parse(target).generate("w1w2", max_new_tokens=NEW).tokens[5]
    assert ends > 4, "an ordinary word"
    closing = tiny.with_end_token(target, ends)
    remote, _ = serve(closing, flavour)
    remote.__dict__["end_ids"] = (ends,)
    for prompt, options in (("w1w2", {}), ("w3?", {}), ("w1w2", {"stop": ["w7"]}), ("w4w9", {"max_new_tokens": 3})):
        expected = Parse(closing).generate(prompt, **{"max_new_tokens": NEW, **options})
        if flavour == "plain" and set(expected.tokens) & {0, 1, 2, 3, 4} - {ends}:
            continue  # text does not show control tokens
        result = Parse(remote).generate(prompt, **{"max_new_tokens": NEW, **options})
        assert (result.tokens, result.text, result.stop) == (expected.tokens, expected.text, expected.stop)
    assert words


def test_sampled_text_repeats_with_its_seed(serve, pair):
    remote, server = serve(pair[0])
    engine, warm = Parse(remote), Sampling(temperature=1.5, top_p=0.9, top_k=7)

    def sampled(seed):
        generator = torch.Generator().manual_seed(seed)
        return engine.generate("w1w2", max_new_tokens=NEW, sampling=warm, generator=generator).tokens

    assert sampled(1) == sampled(1) != sampled(2)
    body = server.seen[-1][1]
    assert (body["temperature"], body["top_p"], body["top_k"]) == (1.5, 0.9, 7)
    assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)


def test_stream_hands_out_what_generate_returns_and_hangs_up_when_left(serve, pair):
    remote, server = serve(pair[0], pace_s=0.02)
    engine = Parse(remote)
    prompt, _ = tiny.plain_answer(pair[0])
    pieces = list(engine.stream(prompt, max_new_tokens=8))
    assert "".join(piece.text for piece in pieces) == pieces[-1].result.text
    assert len(pieces) == 9
    stream = engine.stream(prompt, max_new_tokens=400)
    next(stream)
    stream.close()
    assert server.hung_up.wait(5), "the server should notice that its client has gone"


def test_context_limit_of_the_server(serve, pair):
    small = dataclasses.replace(pair[0], context_limit=24)
    remote, _ = serve(small)
    assert remote.context_limit == 24
    prompt, _ = tiny.plain_answer(pair[0])
    expected = Parse(small).generate(prompt, max_new_tokens=NEW)
    result = Parse(remote).generate(prompt, max_new_tokens=NEW)
    assert (result.tokens, result.stop) == (expected.tokens, StopReason.CONTEXT_LIMIT)


# Judging


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_scores_and_boundaries_are_the_local_ones(serve, pair, flavour):
    """With the real judge, under several rules; for "plain" only bounds of scores are known."""
    target, draft = pair
    (remote, _), (drafting, _) = serve(target, flavour), serve(draft, flavour)
    seen = set()
    for threshold in (0.3, 0.5, 0.7):
        outer = PrefixVerification(judge=LabelJudge(question="?"), segmenter=GRID,
                                   boundary=FirstFailure(threshold=threshold, full_threshold=0.9))  # fmt: skip
        for prompt in ("w1w2", "w5?w6"):
            expected = Parse(target, draft, outer=outer).generate(prompt, max_new_tokens=NEW)
            result = Parse(remote, drafting, outer=outer).generate(prompt, max_new_tokens=NEW)
            if flavour == "plain":
                assert "".join(span.text for span in result.spans) == result.text
                assert result.counters.target_calls >= len(scores(result))
                continue
            same(result, expected)
            assert result.judge_path is JudgePath.REMOTE
            assert len(scores(result)) > 4
            seen |= {r.kept_tokens for r in result.rounds}
    assert flavour == "plain" or len(seen) > 1


@pytest.mark.parametrize("kind", ["fused", "two_pass", "rounds", "streamed", "beside"])
def test_every_outer_level_decides_as_locally(serve, pair, kind):
    target, draft = pair
    (remote, server), (drafting, _) = serve(target), serve(draft)
    options = {"boundary": RULE, "segmenter": GRID, "loop": Rounds(rounds=3)} if kind == "rounds" else {
        "boundary": RULE, "segmenter": GRID}  # fmt: skip
    for seed in range(3):
        judge = tiny.ScriptedJudge(seed=seed)
        if kind in ("streamed", "beside"):
            overlap = "always" if kind == "beside" else "never"
            outer = StreamedVerification(judge=judge, chunk=2, overlap=overlap, **options)
        else:
            outer = PrefixVerification(judge=judge, passes="two_pass" if kind == "two_pass" else "fused", **options)
        expected = Parse(
            target, draft, outer=dataclasses.replace(outer, **({"overlap": "never"} if kind == "beside" else {}))
        )
        theirs = expected.generate("w1w2", max_new_tokens=NEW)
        ours = Parse(remote, drafting, outer=outer).generate("w1w2", max_new_tokens=NEW)
        assert ours.tokens == theirs.tokens
        if kind != "beside":  # how far a draft gets before it is stopped depends on timing there
            same(ours, theirs)
    judged = [body for _, body in server.seen if isinstance(body["prompt"][0], list) and body.get("logprob_token_ids")]
    assert any(len(body["prompt"]) > 1 for body in judged), "the probes of a pass go as one request"
    assert all(body["max_tokens"] == 1 for body in judged)


def test_probes_one_by_one_and_by_scoring_agree(serve, pair):
    target, draft = pair
    outer = PrefixVerification(judge=LabelJudge(question="?"), segmenter=GRID, boundary=RULE)
    expected = Parse(target, draft, outer=outer).generate("w1w2", max_new_tokens=NEW)
    for settings in ({"probes": "one_by_one"}, {"probes": "together"}, {"labels": "generative_scoring"}):
        remote, server = serve(target, settings=settings)
        same(Parse(remote, draft, outer=outer).generate("w1w2", max_new_tokens=NEW), expected)
        paths = [path for path, _ in server.seen]
        assert ("/generative_scoring" in paths) == ("labels" in settings)


def test_missing_labels_never_raise_a_score(serve, pair):
    """Where only the five most probable tokens are shown, a score is at most the true one."""
    target, draft = pair
    remote, _ = serve(target, "llamacpp", settings={"top_logprobs": 3})
    assert (remote.can.labels, remote.can.top) == (Labels.TOP, 3)
    outer = PrefixVerification(
        judge=LabelJudge(question="?"), segmenter=GRID, boundary=FirstFailure(threshold=1.0, full_threshold=1.0)
    )
    expected = Parse(target, draft, outer=outer).generate("w1w2", max_new_tokens=NEW)
    result = Parse(remote, draft, outer=outer).generate("w1w2", max_new_tokens=NEW)
    pairs = list(zip(scores(result), scores(expected), strict=True))
    assert all(ours <= theirs + 1e-4 for ours, theirs in pairs)
    assert any(ours < theirs - 1e-4 for ours, theirs in pairs), "some label should have been missing"
    assert any("lower bounds" in note for note in result.notes)


# Pairs


def test_one_model_here_and_one_there(serve, pair):
    target, draft = pair
    (remote, _), (drafting, _) = serve(target), serve(draft)
    outer = PrefixVerification(judge=tiny.ScriptedJudge(seed=1), segmenter=GRID, boundary=RULE, loop=Rounds(rounds=3))
    expected = Parse(target, draft, outer=outer).generate("w1w2", max_new_tokens=NEW)
    for models in ((remote, draft), (target, drafting)):
        same(Parse(*models, outer=outer).generate("w1w2", max_new_tokens=NEW), expected)


def test_pairs_with_different_tokenizers(serve, pair):
    target = pair[0]
    letters = LanguageModel.wrap(tiny.model("llama", seed=9, layers=2).hf, tiny.letters(), name="letters")
    (remote, _), (drafting, _) = serve(target), serve(letters, tokenizer="letters")
    for seed in range(3):
        outer = PrefixVerification(judge=tiny.ScriptedJudge(seed=seed), segmenter=GRID, boundary=RULE)
        expected = Parse(target, letters, outer=outer).generate("w1w2w3?w4", max_new_tokens=NEW)
        result = Parse(remote, drafting, outer=outer).generate("w1w2w3?w4", max_new_tokens=NEW)
        assert result.tokens == expected.tokens


def test_gate_learns_from_remote_drafts(serve, pair):
    target, draft = pair
    (remote, _), (drafting, _) = serve(target), serve(draft)
    outer = PrefixVerification(
        judge=tiny.ScriptedJudge(value=0.0), segmenter=GRID, gate=Adaptive(cost_per_token=1.0, reserve=1.0)
    )
    engine = Parse(remote, drafting, outer=outer)
    drafted = [engine.generate("w1w2", max_new_tokens=NEW).rounds[0].drafted for _ in range(3)]
    assert drafted == [True, False, False]


# What a server can do


def test_capabilities_are_found_out(serve, pair):
    found = {flavour: serve(pair[0], flavour)[0].can for flavour in FLAVOURS}
    assert {f: (c.kind, c.version) for f, c in found.items()} == {
        "vllm": ("vllm", "9.9.9"), "sglang": ("sglang", "9.9.9"), "llamacpp": ("llamacpp", "9.9.9"),
        "plain": ("unknown", None)}  # fmt: skip
    assert {f: c.tokens_back for f, c in found.items()} == {
        "vllm": TokensBack.FIELD, "sglang": TokensBack.FIELD, "llamacpp": TokensBack.LOGPROBS,
        "plain": TokensBack.TEXT}  # fmt: skip
    assert {f: c.labels for f, c in found.items()} == {
        "vllm": Labels.BY_ID, "sglang": Labels.BY_ID, "llamacpp": Labels.TOP, "plain": Labels.TOP}  # fmt: skip
    assert (
        [c.token_prompts for c in found.values()] == [c.extensions for c in found.values()] == [True, True, True, False]
    )
    assert found["plain"].top == 5
    assert len(found["plain"].workarounds) == 5
    assert found["vllm"].workarounds == ()


def test_what_cannot_work_is_refused_by_name(serve, pair, spoken):
    target, draft = pair
    blind, server = serve(target, logprobs=False)
    assert Parse(blind, draft, outer=TargetOnly()).generate("w1w2", max_new_tokens=4).new_tokens == 4
    with pytest.raises(IncompatibleStack, match=f"{server.url}.*no log-probabilities.*outer=none"):
        Parse(blind, draft)
    remote, _ = serve(target)
    with pytest.raises(IncompatibleStack, match="Ngram cannot speculate for tiny at http"):
        Parse(remote, inner=Ngram())
    with pytest.raises(ModelLoadError, match="serves \\['tiny'\\], not 'other'"):
        connect(server.url, tokenizer=spoken["words"], model="other")
    with pytest.raises(ModelLoadError, match="does not speak the tokenizer"):
        connect(server.url, tokenizer=spoken["letters"])
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        connect("127.0.0.1:1", tokenizer=spoken["words"])
    with pytest.raises(ServerError, match="generative_scoring"):
        serve(target, "llamacpp", settings={"labels": "generative_scoring"})
    with pytest.raises(IncompatibleStack, match=r"weights of tiny at http.* are at"):
        remote.forward([[1]], None, keep=1)


def test_wrong_key_is_refused_at_once(pair, spoken, monkeypatch):
    monkeypatch.setenv("RIGHT", "right")
    monkeypatch.setenv("WRONG", "wrong")
    with FakeServer(pair[0], api_key="right") as server:
        remote = connect(server.url, tokenizer=spoken["words"], api_key_env="RIGHT")
        assert isinstance(remote, RemoteModel)
        assert "right" not in repr(remote.server.connection)
        with pytest.raises(ServerError, match=r"401.*api_key_env"):
            connect(server.url, tokenizer=spoken["words"], api_key_env="WRONG")
        with pytest.raises(ConfigError, match="no such environment variable"):
            connect(server.url, tokenizer=spoken["words"], api_key_env="NONE_SUCH")


def test_a_tokenizer_alone_is_enough(serve, pair, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    prompt, expected = tiny.plain_answer(pair[0])
    remote, _ = serve(pair[0], settings={"tokenizer": str(tmp_path)})
    assert list(Parse(remote).generate(prompt, max_new_tokens=8).tokens) == expected[:8]
    assert all(parameter.is_meta for parameter in remote.hf.parameters())


def test_who_wrote_what_is_known(serve, pair):
    (remote, _), (drafting, _) = serve(pair[0]), serve(pair[1])
    outer = PrefixVerification(
        judge=tiny.ScriptedJudge(value=0.9), segmenter=GRID, boundary=FirstFailure(threshold=0.5, full_threshold=1.0)
    )
    result = Parse(remote, drafting, outer=outer).generate("w1w2", max_new_tokens=NEW)
    assert {span.author for span in result.spans} <= {Author.DRAFT, Author.TARGET}
    assert result.counters.target_rows == result.counters.judge_rows == 0
    assert any("requests to servers" in note for note in result.notes)
