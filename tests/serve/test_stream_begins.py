"""A stream begins soon, with or without text; what goes wrong before that is told by the status."""

import json
import time

import httpx
import pytest

from parsedec import Delta, Result, StopReason
from parsedec.errors import TargetLost
from parsedec.serve.app import GRACE_S
from parsedec.types import Author, Counters, PhaseTimes
from serving import listening

BODIES = {
    "chat/completions": {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True},
    "completions": {"model": "m", "prompt": "Hello", "stream": True},
}


class Late:
    """An engine whose first piece takes a while."""

    def __init__(self, wait_s, error=None):
        self.wait_s, self.error = wait_s, error

    def stream(self, prompt, **options):
        time.sleep(self.wait_s)
        if self.error:
            raise self.error
        times = PhaseTimes(prefill_s=0, draft_s=0, judge_s=0, decode_s=0, wall_s=0, first_token_s=0)
        done = Result(text="done", tokens=(1,), prompt_tokens=1, stop=StopReason.END_TOKEN, spans=(), rounds=(),
                      counters=Counters(), times=times)  # fmt: skip
        yield Delta(text="done", tokens=(1,), author=Author.TARGET, result=done)


def read(address, path, **fields):
    """(status, seconds to the headers, seconds to the first line, lines)"""
    start = time.monotonic()
    with httpx.stream("POST", f"{address}/v1/{path}", json={**BODIES[path], **fields}, timeout=60) as answer:
        headers, lines = time.monotonic() - start, answer.iter_lines()
        first = next(lines)
        return answer.status_code, headers, time.monotonic() - start, [first, *(line for line in lines if line)]


@pytest.mark.parametrize("path", BODIES)
def test_headers_and_a_sign_of_life_come_before_the_text(path):
    wait_s = 4 * GRACE_S + 1
    with listening(Late(wait_s), model="m", run="threads") as (address, _):
        status, headers, first, lines = read(address, path, n=2)
        assert status == 200
        assert max(headers, first) < wait_s - GRACE_S
        assert lines.pop() == "data: [DONE]"
        if path == "completions":
            assert lines.pop(0).startswith(":")
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        if path == "chat/completions":
            assert [choice["index"] for choice in choices[:2]] == [0, 1]
            assert [choice["delta"].get("role") for choice in choices] == ["assistant", "assistant", *[None] * 4]
        texts = {0: "", 1: ""}
        for choice in choices:
            texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content", "")
        assert texts == {0: "done", 1: "done"}


def test_what_goes_wrong_is_a_status_first_and_an_event_then():
    for wait_s, status in ((0, 503), (2 * GRACE_S, 200)):
        with listening(Late(wait_s, TargetLost("it was lost")), model="m", run="threads") as (address, _):
            got, *_, lines = read(address, "chat/completions")
            assert got == status
            if status == 200:
                assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "model_server_lost"
                assert lines[-1] == "data: [DONE]"
