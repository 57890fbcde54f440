"""Finds out what a server can do, at start-up, by asking it for a few tokens. What it cannot do is then worked around,
or refused by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from parsedec.errors import ModelLoadError, ServerError, ServerRefused
from parsedec.remote import wire
from parsedec.remote.capabilities import Capabilities, Labels, TokensBack
from parsedec.remote.client import Server, reading
from parsedec.types import Sampling

log = logging.getLogger(__name__)

TEXT = "One two three four five six"
TOPS = (20, 5)  # numbers of probable tokens to try if a server does not allow what is wanted
KINDS = {"vllm": "/version", "sglang": "/get_server_info", "llamacpp": "/props"}  # owned_by -> where its version is
GREEDY = Sampling()
EDGES = " \n\ufffd"  # ignored at the ends of texts: decoders differ in them, or a character is incomplete


class Speaks(Protocol):
    """The part of a model that needs no weights."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, plain: bool = False) -> list[int]: ...

    def decode(self, ids: list[int] | tuple[int, ...]) -> str: ...


def probe(server: Server, speaks: Speaks, model: str | None, top: int, scoring: bool) -> Capabilities:
    """Ask `server` what it can do.

    speaks   tokenizer of the model there
    model    the model's name there; None: the only one
    top      how many of the most probable tokens are wanted, if labels cannot be asked for by id
    scoring  whether to read labels by /generative_scoring

    Raises ServerError if it cannot be reached, ModelLoadError if it serves another model than `speaks` is.
    """
    can = _introduction(server, model)
    ids = speaks.encode(TEXT)
    can = _native(server, can, ids) if can.kind == "sglang" else can
    if not can.native:
        can = _prompts(server, can, ids)
    _same_tokenizer(server, can, speaks, ids)
    prompts: Any = [ids, ids * 2] if can.token_prompts else [TEXT, TEXT * 2]
    pair = [ids[0], (ids[0] + 1) % speaks.vocab_size]
    can = _labels(server, can, prompts[0], pair, top)
    if scoring:
        if not can.token_prompts or not wire.works(lambda: wire.scored(server, can, ids, [ids], pair)):
            raise ServerError(f"labels=generative_scoring, but {server.url} does not serve it. Use labels=auto.")
        can = replace(can, labels=Labels.SCORING)
    can = replace(can, many_prompts=can.native or _many(server, can, prompts))
    if not _answered(server, can, prompts[0], 2):
        raise ServerError(f"{server.url} streams nothing; /v1/completions with stream=true is needed.")
    log.info("%s: %s", server.url, can)
    return can


def _introduction(server: Server, model: str | None) -> Capabilities:
    """Which server it is, what it calls its model, and how long requests may be."""
    listed = wire.entries(server.get("/v1/models"), "data")
    names = [str(entry.get("id")) for entry in listed]
    chosen = next((entry for entry in listed if entry.get("id") == model), None) if model else None
    if model is None and len(listed) == 1:
        chosen = listed[0]
    if chosen is None:
        raise ModelLoadError(f"{server.url} serves {names}, not {model!r}. Set model to the name of one of them.")
    kind = str(chosen.get("owned_by"))
    kind = kind if kind in KINDS else "unknown"
    with reading(chosen):
        limit = chosen.get("max_model_len") or (chosen.get("meta") or {}).get("n_ctx")
        limit, name = int(limit) if limit else None, str(chosen["id"])
    return Capabilities(kind=kind, version=_version(server, kind), model=name, context_limit=limit)


def _version(server: Server, kind: str) -> str | None:
    if kind not in KINDS:
        return None
    try:
        about = server.get(KINDS[kind])
    except ServerRefused:
        return None
    return str(about.get("version") or about.get("build_info")) if isinstance(about, dict) else None


def _native(server: Server, can: Capabilities, ids: Sequence[int]) -> Capabilities:
    """SGLang's own endpoint gives ids and label probabilities, which its /v1/completions does not."""
    native = replace(can, native=True, token_prompts=True, extensions=True, tokens_back=TokensBack.FIELD)
    return native if wire.works(lambda: _answered(server, native, ids, 1)) else can


def _prompts(server: Server, can: Capabilities, ids: Sequence[int]) -> Capabilities:
    """Which prompts and settings it takes, and how ids come back."""
    for extensions in (True, False):
        can = replace(can, extensions=extensions)
        if _counted(server, can, ids) == len(ids):
            can = replace(can, token_prompts=True)
            break
        if _counted(server, can, TEXT) is not None:
            break
    else:
        raise ServerError(f"{server.url} takes neither token ids nor text as a prompt of /v1/completions.")
    prompt = ids if can.token_prompts else TEXT
    for way in (TokensBack.FIELD, TokensBack.LOGPROBS):
        asking = replace(can, tokens_back=way)
        try:
            if any(piece.tokens for piece in _answered(server, asking, prompt, 2)):
                return asking
        except ServerRefused:
            continue
        except ServerError as error:  # ids in an unknown layout are as good as none
            log.info("%s: %s", server.url, error)
    return can


def _answered(server: Server, can: Capabilities, prompt: Sequence[int] | str, new: int) -> list[wire.Piece]:
    """A short streamed answer."""
    return server.again(lambda: list(wire.stream(server, can, prompt, new, GREEDY, None)))


def _counted(server: Server, can: Capabilities, prompt: Sequence[int] | str) -> int | None:
    """How many tokens the server counts in a prompt (-1 if it does not say); None if it refuses the prompt."""
    try:
        return server.post("/v1/completions", wire.completion(can, [prompt], 1, GREEDY, None), _prompt_tokens)
    except ServerRefused:
        return None
    except ServerError as error:  # some servers fail on ids instead of refusing them
        log.info("%s: %s", server.url, error)
        return None


def _prompt_tokens(answer: Any) -> int:
    wire.entries(answer, "choices")
    count = (answer.get("usage") or {}).get("prompt_tokens")
    return -1 if count is None else int(count)


def _same_tokenizer(server: Server, can: Capabilities, speaks: Speaks, ids: Sequence[int]) -> None:
    """Raise ModelLoadError unless ids spell the text that comes with them, and a text has as many tokens as here."""
    found = _answered(server, can, list(ids) if can.token_prompts else TEXT, 4)
    tokens = [token for piece in found for token in piece.tokens or ()]
    text = "".join(piece.text for piece in found)
    wrong = [token for token in tokens if not 0 <= token < speaks.vocab_size]
    spelt = "" if wrong else speaks.decode(tokens)
    counted = None if can.native else _counted(server, can, TEXT)
    if (
        wrong
        or (tokens and spelt.strip(EDGES) != text.strip(EDGES))
        or counted not in (None, -1, len(ids), len(ids) + 1)
    ):
        raise ModelLoadError(
            f"the model {can.model} at {server.url} does not speak the tokenizer of {speaks.name}: ids {tokens} are "
            f"{spelt!r} here and {text!r} there, and a text of {len(ids)} tokens has {counted} there. Set tokenizer to "
            "the model that is served."
        )


def _labels(server: Server, can: Capabilities, prompt: Any, ids: Sequence[int], top: int) -> Capabilities:
    """How to read the log-probabilities of two ids."""
    tries = [replace(can, labels=Labels.BY_ID)]
    if not can.native:
        most = [replace(can, labels=Labels.TOP, top=n) for n in (top, *(n for n in TOPS if n < top))]
        tries += most
        if can.extensions:  # some take those settings where they change nothing, and cannot name tokens by their ids
            tries += [replace(one, extensions=False) for one in most]
    for asking in tries:
        try:
            found = wire.labels(server, asking, [prompt], ids)[0]
        except ServerError as error:
            log.info("%s: %s", server.url, error)
            continue
        shown = max(len(found.by_id), len(found.by_text))
        if asking.labels is Labels.TOP and shown:
            return replace(asking, top=min(asking.top, shown))
        if set(ids) <= set(found.by_id) and shown <= len(ids) + 2:  # not the whole vocabulary: the ids were heeded
            return asking
    return can


def _many(server: Server, can: Capabilities, prompts: Any) -> bool:
    """Whether one request may hold two prompts, and each answer says whose it is."""
    try:
        return server.post("/v1/completions", wire.completion(can, prompts, 1, GREEDY, None), _two_choices)
    except ServerError as error:
        log.info("%s: %s", server.url, error)
        return False


def _two_choices(answer: Any) -> bool:
    return sorted(choice.get("index", 0) for choice in wire.entries(answer, "choices")) == [0, 1]
