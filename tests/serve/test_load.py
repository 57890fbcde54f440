"""The load's own verdict: a sound server passes it, one that mixes answers up, loses or never refuses them does not."""

import asyncio

from parsedec import Delta, Limits, Parse, Result, StopReason, load
from parsedec.serve.load import Load, apply_load, sound
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.types import Author, Counters, PhaseTimes
from serving import listening

PROMPTS = [f"question {i}" for i in range(6)]


class Echo:
    """Answers in two pieces with the prompt; every `wrong`-th answer is another one's, or breaks off."""

    def __init__(self, wrong=None, breaks=False):
        self.wrong, self.breaks, self.asked = wrong, breaks, 0

    def stream(self, prompt, **options):
        self.asked += 1
        text = prompt[-1]["content"]
        if self.wrong and self.asked > len(PROMPTS) and self.asked % self.wrong == 0:
            if self.breaks:
                raise RuntimeError("broken")
            text = PROMPTS[(PROMPTS.index(text) + 1) % len(PROMPTS)]
        yield Delta(text=text[:4], tokens=(1,), author=Author.DRAFT)
        times = PhaseTimes(prefill_s=0, draft_s=0, judge_s=0, decode_s=0, wall_s=0, first_token_s=0)
        result = Result(text=text, tokens=(1, 2), prompt_tokens=1, stop=StopReason.END_TOKEN, spans=(), rounds=(),
                        counters=Counters(), times=times)  # fmt: skip
        yield Delta(text=text[4:], tokens=(2,), author=Author.TARGET, result=result)


def under_load(engine, prompts=PROMPTS, seconds=0.5, clients=4, room=8, model="echo", **options):
    with listening(engine, model=model, at_once=4, queue=max(4, room - 4), **options) as (address, _):
        settings = Load(address=address, model=model, clients=clients, seconds=seconds, leave=0.2, overflow=8,
                        room=room, max_tokens=64, pid=None)  # fmt: skip
        return asyncio.run(apply_load(settings, prompts))


def test_mixed_up_answers_are_found():
    summary = under_load(Echo(wrong=5), run="threads")
    assert summary["outcomes"]["anothers"] > 0
    assert "anothers" in " ".join(sound(summary))


def test_lost_answers_are_found():
    summary = under_load(Echo(wrong=3, breaks=True), run="threads")
    assert summary["outcomes"]["lost"] > 0
    assert "lost" in " ".join(sound(summary))


def test_answers_with_separators_of_lines_are_read():
    prompts = [f"one\u2028two\x85three {i}" for i in range(3)]
    summary = under_load(Echo(), prompts, seconds=0.2, run="threads")
    assert summary["outcomes"]["own"] > 0
    assert summary["outcomes"]["lost"] == 0, summary["errors"]


def test_a_server_that_takes_more_than_it_said_is_found():
    summary = under_load(Echo(), room=1, run="threads")
    summary["overflow"]["refused"] = 0
    assert "got 429" in " ".join(sound(summary))


def test_the_embedded_pair_bears_it():
    """Eight clients for five seconds; the real run is experiments/load.py. A client that leaves asks again before the
    server knows, so there is room for twice as many."""
    pair = (load(f"zoo:{name}", dtype="float32", device="cpu") for name in ("target", "draft"))
    prompts = [problem.prompt for problem in ZooArithmetic(n=3, seed=11).problems()]
    summary = under_load(Parse(*pair), prompts, 5, 8, 16, "zoo", limits=Limits(max_new_tokens=64))
    assert sound(summary) == []
    outcomes = summary["outcomes"]
    assert outcomes["own"] >= 3
    assert outcomes["other"] == outcomes["lost"] == outcomes["anothers"] == 0
    assert summary["overflow"]["statuses"]["429"] >= 1
    assert summary["overflow"]["refused_s"]["p100"] < summary["overflow"]["served_s"]["p100"]
