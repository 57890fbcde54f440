"""The wire format: bodies of requests and the meaning of answers, for /v1/completions and SGLang's /generate.

Letters:  K prompts of one request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parsedec.errors import ServerError, ServerRefused
from parsedec.remote.capabilities import Capabilities, Labels, TokensBack
from parsedec.remote.client import Server
from parsedec.types import Sampling

Prompts = Sequence[Sequence[int] | str]  # K of them
NAME = "token_id:"  # how vLLM spells a token whose id was asked for
GREEDY = Sampling()
ENDS = {"eos_token": "stop", "stop_sequence": "stop", "max_tokens": "length"}  # other names for them, as of TGI
BROKEN = {"abort", "error", "cancelled"}  # reasons that mean that the server gave up


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: ids (None if the server gives none), text, and why the answer ended, if it did.

    finish  "stop", "length", or a reason of the server's own
    count   how many tokens the server counts in the whole answer, if it says
    """

    tokens: tuple[int, ...] | None
    text: str
    finish: str | None
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Log-probabilities of tokens in one place, in nats.

    by_id    of ids that the server named
    by_text  of tokens that it spelt
    floor    the smallest one shown: no missing token is more probable. -inf if exactly the ids asked for are shown
    """

    by_id: Mapping[int, float]
    by_text: Mapping[str, float]
    floor: float

    def of(self, token: int, spellings: Sequence[str]) -> float | None:
        found = self.by_id.get(token)
        return found if found is not None else next((self.by_text[s] for s in spellings if s in self.by_text), None)


def stream(
    server: Server, can: Capabilities, prompt: Sequence[int] | str, new: int, sampling: Sampling, seed: int | None
) -> Generator[Piece, None, None]:
    """Up to `new` tokens behind the prompt, as they arrive. To close the generator is to hang up."""
    if can.native:
        yield from _native_pieces(server, _native(can, [prompt], new, sampling, seed, alone=True) | {"stream": True})
        return

    def read(event: Any) -> list[Piece]:
        count = (event.get("usage") or {}).get("completion_tokens")
        return [piece(choice, can.tokens_back, count) for choice in entries(event, "choices")]

    body = completion(can, [prompt], new, sampling, seed) | {"stream": True}
    for pieces in server.events("/v1/completions", body, read):
        yield from pieces


def labels(server: Server, can: Capabilities, prompts: Prompts, ids: Sequence[int]) -> list[Found]:
    """Log-probabilities of `ids` as the next token behind each of K prompts, in one request."""

    def read(answer: Any) -> list[Found]:
        if can.native:
            found = [_native_found(each) for each in (answer if isinstance(answer, list) else [answer])]
        else:
            # choices may come in any order: the index says whose they are
            choices = sorted(entries(answer, "choices"), key=lambda choice: int(choice.get("index", 0)))
            found = [logprobs(choice) for choice in choices]
        return _all(found, len(prompts), server)

    if can.native:
        body = _native(can, list(prompts), 1, GREEDY, None)
        return server.post("/generate", body | {"return_logprob": True, "token_ids_logprob": list(ids)}, read)
    return server.post("/v1/completions", completion(can, list(prompts), 1, GREEDY, None) | asked(can, ids), read)


def scored(
    server: Server, can: Capabilities, query: Sequence[int], items: Sequence[Sequence[int]], ids: Sequence[int]
) -> list[Found]:
    """As `labels`, by vLLM's /generative_scoring: each of `items` follows `query`; the first of two ids is scored."""
    body = {
        "model": can.model,
        "query": list(query),
        "items": [list(item) for item in items],
        "label_token_ids": list(ids),
        "apply_softmax": True,
    }

    def read(answer: Any) -> list[Found]:
        rows = sorted(entries(answer, "data"), key=lambda row: int(row.get("index", 0)))
        scores = [min(max(_number(row.get("score"), "score"), 1e-9), 1 - 1e-9) for row in rows]
        found = [Found({ids[0]: math.log(s), ids[1]: math.log1p(-s)}, {}, -math.inf) for s in scores]
        return _all(found, len(items), server)

    return server.post("/generative_scoring", body, read)


def _all(found: list[Found], wanted: int, server: Server) -> list[Found]:
    if len(found) != wanted:
        raise ServerError(f"{server.url} gave {len(found)} answers to {wanted} prompts.")
    return found


def completion(can: Capabilities, prompts: Prompts, new: int, sampling: Sampling, seed: int | None) -> dict[str, Any]:
    """Body of a /v1/completions request. One prompt is sent as it is, several as a list."""
    body: dict[str, Any] = {
        "model": can.model,
        "prompt": prompts[0] if len(prompts) == 1 else list(prompts),
        "max_tokens": new,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if seed is not None:
        body["seed"] = seed
    if can.extensions:  # a server may take missing settings from the checkpoint's generation config
        body |= {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
    if can.tokens_back is TokensBack.FIELD:
        body["return_token_ids"] = True
    if can.tokens_back is TokensBack.LOGPROBS:
        body |= {"logprobs": 1, "return_tokens_as_token_ids": True}
    return body


def asked(can: Capabilities, ids: Sequence[int]) -> dict[str, Any]:
    """What to add to a completion's body to get the log-probabilities of `ids`."""
    if can.labels is Labels.BY_ID:
        return {"logprobs": 1, "logprob_token_ids": list(ids), "return_tokens_as_token_ids": True}
    names = {"return_tokens_as_token_ids": True} if can.extensions else {}
    return {"logprobs": can.top} | names


def piece(choice: Mapping[str, Any], tokens_back: TokensBack, count: object = None) -> Piece:
    """The piece that a choice, or a streamed part of one, holds."""
    text, finish = choice.get("text", ""), choice.get("finish_reason") or None
    if not isinstance(text, str) or not isinstance(finish, str | None):
        raise ServerError(f"a server sent a choice with text {text!r} and finish_reason {finish!r}; expected text.")
    if finish in BROKEN:
        raise ServerError(f"a server broke off its answer with finish_reason {finish!r}; expected stop or length.")
    finish = ENDS.get(finish, finish) if finish else None
    return Piece(_tokens(choice, tokens_back), text, finish, count if isinstance(count, int) else None)


def logprobs(choice: Mapping[str, Any]) -> Found:
    """The log-probabilities of a choice's first token, in the layout of OpenAI, vLLM or llama.cpp."""
    given = choice.get("logprobs")
    rows = given.get("content") or given.get("top_logprobs") if isinstance(given, Mapping) else None
    if not isinstance(rows, list) or not rows:
        raise ServerError(f"a server sent no log-probabilities, but {str(given)[:100]}.")
    by_id, by_text = {}, {}
    if "top_logprobs" in rows[0]:  # llama.cpp and chat completions: one object a token
        for row in rows[0]["top_logprobs"]:
            if "id" in row:
                by_id[int(row["id"])] = _number(row.get("logprob"), "logprob")
            by_text[str(row["token"])] = _number(row.get("logprob"), "logprob")
    else:  # completions: one dictionary from tokens to numbers
        for name in rows[0]:
            if name.startswith(NAME):
                by_id[int(name.removeprefix(NAME))] = _number(rows[0][name], name)
            else:
                by_text[name] = _number(rows[0][name], name)
    return Found(by_id, by_text, min([*by_id.values(), *by_text.values()], default=0.0))


def _tokens(choice: Mapping[str, Any], tokens_back: TokensBack) -> tuple[int, ...] | None:
    if tokens_back is TokensBack.FIELD:
        return tuple(int(i) for i in choice.get("token_ids") or ())
    if tokens_back is TokensBack.TEXT:
        return None
    given = choice.get("logprobs") or {}
    if given.get("content"):
        return tuple(int(row["id"]) for row in given["content"])
    return tuple(int(str(name).removeprefix(NAME)) for name in given.get("tokens") or ())


def _native(
    can: Capabilities,
    prompts: Prompts,
    new: int,
    sampling: Sampling,
    seed: int | None,
    alone: bool = False,
) -> dict[str, Any]:
    """Body of an SGLang /generate request."""
    settings: dict[str, Any] = {
        "max_new_tokens": new,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    if seed is not None:
        settings["sampling_seed"] = seed
    name = "input_ids" if can.token_prompts else "text"
    return {name: prompts[0] if alone else list(prompts), "sampling_params": settings}


def _native_pieces(server: Server, body: Mapping[str, Any]) -> Iterator[Piece]:
    """Pieces of an SGLang stream, whose events repeat all that was sent before, unless it runs with --stream-output."""
    known, shown = 0, 0

    def read(event: Any) -> Piece:
        nonlocal known, shown
        about = event.get("meta_info", {})
        tokens, text = [int(i) for i in event.get("output_ids") or ()], str(event.get("text", ""))
        repeated = len(tokens) == about.get("completion_tokens") and known > 0
        new, added = (tokens[known:], text[shown:]) if repeated else (tokens, text)
        known, shown = known + len(new), shown + len(added)
        finish = (about.get("finish_reason") or {}).get("type")
        return piece({"text": added, "finish_reason": finish, "token_ids": new}, TokensBack.FIELD)

    return server.events("/generate", body, read)


def _native_found(answer: Mapping[str, Any]) -> Found:
    rows = answer.get("meta_info", {}).get("output_token_ids_logprobs")
    if not isinstance(rows, list) or not rows or not rows[0]:
        raise ServerError(f"SGLang sent no output_token_ids_logprobs, but {str(answer)[:100]}.")
    return Found({int(row[1]): _number(row[0], "logprob") for row in rows[0]}, {}, -math.inf)


def entries(answer: Any, name: str) -> list[dict[str, Any]]:
    rows = answer.get(name) if isinstance(answer, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ServerError(f"a server's answer has no list '{name}': {str(answer)[:200]}.")
    return rows


def _number(value: object, name: str) -> float:
    if not isinstance(value, int | float) or math.isnan(value):
        raise ServerError(f"a server's answer has {name}={value!r}; expected a number.")
    return float(value)


def works(attempt: Callable[[], object]) -> bool:
    """Whether a server takes a request. Raises ServerError if it cannot be reached."""
    try:
        attempt()
    except ServerRefused:
        return False
    return True
