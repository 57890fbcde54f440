"""Whatever a server does, a request ends: with the answer, without the draft, or with an error that has what was done.

Every test has a time limit of its own: nothing may hang.
"""

import dataclasses
import time
from email.utils import formatdate

import pytest

import tiny
from fake_server import FakeServer
from parsedec import Parse, PrefixVerification
from parsedec.boundary import FirstFailure
from parsedec.errors import ServerError, TargetLost, TargetRefused
from parsedec.remote import connect, wire
from parsedec.remote.capabilities import TokensBack
from parsedec.remote.client import _seconds
from parsedec.segmenters import EveryTokens
from parsedec.types import Author, StopReason

NEW = 24
LIMIT_S = 60.0  # for what takes less than a second where nothing else runs
ONCE = ("500", "busy", "malformed", "reset", "reset_stream", "broken_stream", "empty")
FAST = {"retries": 2, "backoff_s": 0.01, "read_timeout_s": 1.5, "connect_timeout_s": 1.0, "cooldown_s": 60.0}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    return tiny.saved(tiny.model("llama"), tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="module")
def local():
    """(target, draft model, outer level, prompt, what the local engine answers)."""
    target, draft = tiny.model("llama"), tiny.model("llama", seed=5, layers=2)
    prompt, _ = tiny.plain_answer(target)
    outer = PrefixVerification(
        judge=Half(), segmenter=EveryTokens(delta=4), boundary=FirstFailure(threshold=0.5, full_threshold=1.0)
    )
    expected = Parse(target, draft, outer=outer).generate(prompt, max_new_tokens=NEW)
    assert 0 < expected.counters.kept_draft_tokens < expected.new_tokens
    return target, draft, outer, prompt, expected


@pytest.fixture
def pair(spoken, local):
    """(target server, draft server, engine of both, what the local engine answers): half of each draft is kept."""
    target, draft, outer, prompt, expected = local
    with FakeServer(target) as first, FakeServer(draft) as second:
        models = [connect(server.url, tokenizer=spoken, **FAST) for server in (first, second)]
        engine = Parse(*models, outer=outer)
        started = time.monotonic()
        yield first, second, lambda: engine.generate(prompt, max_new_tokens=NEW), expected
        assert time.monotonic() - started < LIMIT_S


@dataclasses.dataclass(frozen=True)
class Half(tiny.ScriptedJudge):
    """The real pass; cuts up to 8 tokens pass, the others fail."""

    def score(self, session, draft, cuts, probes):
        scores = super().score(session, draft, cuts, probes)
        return dataclasses.replace(scores, values=tuple(0.9 if cut <= 8 else 0.1 for cut in probes))


@pytest.mark.parametrize("fault", ONCE)
@pytest.mark.parametrize("when", ["judge", "write"])
def test_target_recovers(pair, fault, when):
    """A fault that passes changes nothing; a stream that broke off is taken up where it broke."""
    target, _, generate, expected = pair
    before = len(target.seen)
    target.faults.extend([fault] if when == "judge" else [None, fault])
    result = generate()
    assert result.tokens == expected.tokens
    assert not target.faults
    asked = [body for _, body in target.seen[before:]]
    streamed = [body for body in asked if body.get("stream")]
    if when == "write" and fault in ("reset_stream", "broken_stream"):
        again, first = streamed[-1]["prompt"], streamed[0]["prompt"]
        # a reset may take with it what the client has not read yet
        assert len(again) > len(first) or fault == "reset_stream", "it should go on from the tokens that had come"
        assert again[: len(first)] == first
    assert result.counters.target_calls >= 2


@pytest.mark.parametrize("fault", ONCE)
def test_draft_recovers(pair, fault):
    _, draft, generate, expected = pair
    draft.faults.append(fault)
    result = generate()
    assert result.tokens == expected.tokens
    assert result.counters.kept_draft_tokens == expected.counters.kept_draft_tokens


def test_dead_draft_leaves_the_target_alone_and_says_so(pair):
    target, draft, generate, _ = pair
    draft.kill()
    result = generate()
    assert list(result.tokens) == tiny.plain_answer(tiny.model("llama"))[1][:NEW]
    assert all(span.author is Author.TARGET for span in result.spans)
    assert any("target went on alone" in note and draft.url in note for note in result.notes)
    started = time.monotonic()
    assert any("a short time ago" in note for note in generate().notes)
    assert time.monotonic() - started < LIMIT_S / 2
    assert target.seen


def test_draft_that_breaks_off_is_judged_as_far_as_it_came(pair):
    """Its server dies in mid-draft: what there is of it is not lost."""
    _, draft, generate, expected = pair
    draft.faults.extend(["broken_stream", "500", "500"])
    result = generate()
    assert result.rounds[0].judged_tokens == 3
    assert any("did not finish a draft" in note for note in result.notes)
    assert result.stop is StopReason.TOKEN_LIMIT
    assert result.new_tokens == expected.new_tokens


def test_slow_draft_is_given_up_in_time(pair):
    _, draft, generate, _ = pair
    draft.faults.extend(["slow"] * 3)
    started = time.monotonic()
    result = generate()
    assert time.monotonic() - started < 3 * FAST["read_timeout_s"] + LIMIT_S / 2
    assert any("did not finish a draft" in note and "read_timeout_s" in note for note in result.notes)


def in_choices(**fields):
    """A change of every choice of an answer."""
    return lambda answer: answer | {"choices": [choice | fields for choice in answer["choices"]]}


SPOILT_EVENTS = {
    "null": lambda event: None,
    "number": lambda event: 5,
    "list": lambda event: [event],
    "usage": lambda event: event | {"usage": [1]},
    "no choices": lambda event: event | {"choices": None},
    "ids": in_choices(token_ids=5),
    "id": in_choices(token_ids=[None]),
    "endless id": in_choices(token_ids=[float("inf")]),
}
SPOILT_ANSWERS = {
    "null": lambda answer: None,
    "number": lambda answer: 5,
    "deep": lambda answer: "[" * 100_000,
    "index": in_choices(index=None),
    "spelt index": in_choices(index="zero"),
    "endless index": in_choices(index=float("inf")),
    "spelt logprobs": in_choices(logprobs="none"),
    "rows": in_choices(logprobs={"top_logprobs": [None]}),
    "no numbers": in_choices(logprobs={"top_logprobs": [{"token_id:3": None}]}),
}


@pytest.mark.parametrize(
    ("spoilt", "when"),
    [*((spoilt, "write") for spoilt in SPOILT_EVENTS), *((spoilt, "judge") for spoilt in SPOILT_ANSWERS)],
)
def test_an_answer_in_another_layout_is_a_fault_like_others(pair, spoilt, when):
    """It is asked for again, and one that stays so leaves what was finished."""
    target, _, generate, expected = pair
    fault = (SPOILT_EVENTS if when == "write" else SPOILT_ANSWERS)[spoilt]
    before = [None] if when == "write" else []
    target.faults.extend([*before, fault])
    assert generate().tokens == expected.tokens
    assert not target.faults
    target.faults.extend([*before, fault, "500", "500", "500"])
    with pytest.raises(TargetLost) as lost:
        generate()
    target.faults.clear()
    partial = lost.value.partial.tokens
    assert partial == expected.tokens[: len(partial)]
    assert bool(partial) == (when == "write")


@pytest.mark.parametrize(
    "change",
    [
        lambda event: event | {"meta_info": None},
        lambda event: event | {"meta_info": {"finish_reason": 5}},
        lambda event: event | {"output_ids": [None]},
    ],
)
def test_sglangs_answers_in_another_layout_too(spoken, change):
    model = tiny.model("llama")
    prompt, _ = tiny.plain_answer(model)
    with FakeServer(model, "sglang") as server:
        engine = Parse(connect(server.url, tokenizer=spoken, **FAST))
        expected = engine.generate(prompt, max_new_tokens=NEW).tokens
        server.faults.append(change)
        assert engine.generate(prompt, max_new_tokens=NEW).tokens == expected
        assert not server.faults


@pytest.mark.parametrize(
    ("reason", "named"), [("stop", False), ("eos_token", False), ("stop_sequence", False), ("content_filter", True)]
)
def test_an_answer_may_end_for_a_reason_by_another_name(pair, reason, named):
    """One that nobody knows ends it, too, and the notes name it."""
    target, _, generate, expected = pair
    target.faults.extend([None, in_choices(finish_reason=reason)])
    result = generate()
    written = expected.tokens[: expected.counters.kept_draft_tokens + 4]
    assert result.tokens == (*written, 1)
    assert result.stop is StopReason.END_TOKEN
    assert any(f"finish_reason '{reason}'" in note for note in result.notes) is named


def test_a_limit_by_another_name_is_one():
    choice = {"text": "w1", "finish_reason": "max_tokens"}
    assert wire.piece(choice, TokensBack.TEXT).finish == "length"


@pytest.mark.parametrize(("reason", "requests"), [("abort", 3), ("", 2)])
def test_an_answer_that_its_server_gives_up_is_taken_up_again(pair, reason, requests):
    target, _, generate, expected = pair
    before = len(target.seen)
    target.faults.extend([None, in_choices(finish_reason=reason)])
    assert generate().tokens == expected.tokens
    assert len(target.seen) - before == requests


def test_no_error_beside_an_answer_is_none(pair):
    target, _, generate, expected = pair
    before = len(target.seen)
    target.faults.extend([None, lambda event: event | {"error": None}])
    assert generate().tokens == expected.tokens
    assert len(target.seen) - before == 2


@pytest.mark.parametrize("when", ["judge", "write"])
def test_a_busy_server_is_asked_again_when_it_says(pair, when):
    target, _, generate, expected = pair
    target.retry_after = "1"
    target.faults.extend([*([None] if when == "write" else []), "busy", "500"])
    started = time.monotonic()
    assert generate().tokens == expected.tokens
    assert time.monotonic() - started > 1.9, "twice a second, not hundredths of one"


def test_a_server_that_wants_to_be_left_alone_for_long_is_lost_at_once(pair):
    target, _, generate, _ = pair
    target.retry_after = "3600"
    before = len(target.seen)
    target.faults.append("busy")
    with pytest.raises(TargetLost, match=r"429: for now \(ask again in 3600 s\)\."):
        generate()
    assert len(target.seen) - before == 1


def test_the_target_does_not_wait_long_for_a_draft(pair):
    _, draft, generate, _ = pair
    draft.retry_after = "20"
    draft.faults.append("busy")
    started = time.monotonic()
    assert any("went on alone" in note for note in generate().notes)
    assert time.monotonic() - started < 15.0


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("2", 2.0), ("0.5", 0.5), (formatdate(0, usegmt=True), 0.0), *((no, None) for no in ("soon", "nan", "", None))],
)
def test_what_retry_after_says(said, seconds):
    assert _seconds(said) == seconds


def test_a_date_to_ask_again_at():
    assert 50 < _seconds(formatdate(time.time() + 60, usegmt=True)) <= 60


@pytest.mark.parametrize("fault", ["500", "malformed", "slow", "reset"])
def test_lost_target_gives_back_what_was_finished(pair, fault):
    """It goes away after the judge has kept half of the draft: the error holds that half."""
    target, _, generate, expected = pair
    target.faults.extend([None] + [fault] * 3)
    with pytest.raises(TargetLost, match=target.url) as lost:
        generate()
    partial = lost.value.partial
    kept = expected.counters.kept_draft_tokens
    assert partial.tokens == expected.tokens[:kept]
    assert (partial.stop, partial.new_tokens) == (StopReason.SERVER_LOST, kept)
    assert generate().tokens == expected.tokens, "the engine stays usable"


@pytest.mark.parametrize(("fault", "when"), [("400", "judge"), ("400", "write"), ("refused_stream", "write")])
def test_a_refusal_is_named_and_not_asked_again(pair, fault, when):
    """The target's server is there and says no: its words are in the error, and what was finished is kept."""
    target, _, generate, expected = pair
    before = len(target.seen)
    target.faults.extend([fault] if when == "judge" else [None, fault])
    with pytest.raises(TargetRefused, match=r"\(400\): this adapter is not allowed\. What was finished") as refused:
        generate()
    assert not isinstance(refused.value, TargetLost)
    assert (refused.value.status, len(target.seen) - before) == (400, 1 if when == "judge" else 2)
    partial, kept = refused.value.partial, expected.counters.kept_draft_tokens
    written = {"judge": 0, "write": kept + (3 if fault == "refused_stream" else 0)}[when]
    assert (partial.tokens, partial.stop) == (expected.tokens[:written], StopReason.SERVER_REFUSED)
    assert generate().tokens == expected.tokens, "the engine stays usable"


def test_a_refused_draft_is_named_and_its_server_asked_for_the_next(pair):
    _, draft, generate, expected = pair
    before = len(draft.seen)
    draft.faults.append("400")
    result = generate()
    assert any("(400): this adapter is not allowed" in note for note in result.notes)
    assert all(span.author is Author.TARGET for span in result.spans)
    assert len(draft.seen) - before == 1
    assert generate().tokens == expected.tokens


def test_target_killed_and_restarted(pair):
    target, _, generate, expected = pair
    target.kill()
    with pytest.raises(TargetLost) as lost:
        generate()
    assert lost.value.partial.tokens == ()
    with target:  # the same port
        assert generate().tokens == expected.tokens


def test_a_server_that_drips_is_bound_by_the_whole_time(spoken):
    with FakeServer(tiny.model("llama"), pace_s=0.0) as server:
        remote = connect(server.url, tokenizer=spoken, retries=0, request_timeout_s=1.0, read_timeout_s=5.0)
        server.pace_s = 0.3
        prompt, _ = tiny.plain_answer(tiny.model("llama"))
        with pytest.raises(TargetLost, match="longer than request_timeout_s=1") as lost:
            Parse(remote).generate(prompt, max_new_tokens=40)
        assert 0 < lost.value.partial.new_tokens < 10


@pytest.mark.parametrize("fault", ["drip", "drip500"])
def test_what_ends_neither_a_line_nor_an_error_is_bound_too(spoken, fault):
    prompt, _ = tiny.plain_answer(tiny.model("llama"))
    with FakeServer(tiny.model("llama")) as server:
        remote = connect(server.url, tokenizer=spoken, retries=0, request_timeout_s=1.0, read_timeout_s=5.0)
        server.slow_s = 10.0
        server.faults.extend([fault] * 2)
        started = time.monotonic()
        with pytest.raises(ServerError, match="longer than request_timeout_s=1"):
            remote.server.post("/v1/completions", {"prompt": "w1"}, dict)
        with pytest.raises(TargetLost, match="longer than request_timeout_s=1"):
            Parse(remote).generate(prompt, max_new_tokens=4)
        assert time.monotonic() - started < 8.0, "two seconds, not twenty"


def test_a_server_that_is_not_there_is_an_error_at_once(spoken):
    started = time.monotonic()
    with pytest.raises(ServerError, match="Check that the server runs"):
        connect("http://127.0.0.1:9", tokenizer=spoken, retries=1, backoff_s=0.01)
    assert time.monotonic() - started < LIMIT_S / 2
