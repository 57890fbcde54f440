"""A model on a server. Its tokenizer, chat template and configuration are here; its weights stay there."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from parsedec.errors import ConfigError, IncompatibleStack, ModelLoadError
from parsedec.models.checkpoints import Checkpoint, find_checkpoint
from parsedec.models.judge_card import read_judge_card
from parsedec.models.language_model import LanguageModel, read_template
from parsedec.remote.capabilities import Capabilities, Labels
from parsedec.remote.client import Connection, Server, server_of
from parsedec.remote.probing import probe
from parsedec.text.chat import closing_token

log = logging.getLogger(__name__)

PROBES = ("auto", "together", "one_by_one")
SLOTS = {"llamacpp"}  # one cache per slot: prompts of one request share nothing, successive requests do


@dataclass(frozen=True, eq=False)
class RemoteModel(LanguageModel):
    """A `LanguageModel` that is reached through a server.

    `hf` is a shell on the meta device: shapes and end tokens without weights. Made by `connect`.

    server    where it is
    can       what that server can do
    together  whether the probes of a judge pass are sent as one request or one by one
    """

    server: Server = field(kw_only=True)
    can: Capabilities = field(kw_only=True)
    together: bool = field(kw_only=True, default=True)

    def forward(
        self,
        ids: list[list[int]],
        cache: DynamicCache,
        *,
        keep: int | Tensor,
        positions: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        raise IncompatibleStack(
            f"the weights of {self.name} are at {self.server.url}; there are no logits or hidden states of it here. "
            "Use what works through completions (outer=parse, parse_streamed or none; inner=none), or engine=local."
        )

    def prompt(self, ids: Sequence[int]) -> list[int] | str:
        """A prompt as the server takes it: ids, or text, in which the server recognises the names of control tokens."""
        if self.can.token_prompts:
            return list(ids)
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        first = self.tokenizer.bos_token
        added = self.encode("a", whole=True)[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(first) if first and added else text  # the server adds it again

    def spellings(self, token: int) -> list[str]:
        """How a server that names tokens by their text may spell one."""
        pieces = (self.tokenizer.decode([token]), self.tokenizer.convert_ids_to_tokens(token))
        return [str(piece) for piece in pieces]

    @property
    def end_token(self) -> int | None:
        """The id to commit when the server has ended the answer."""
        if not self.end_ids:
            return None
        return closing_token(self) if self.has_template else self.end_ids[0]

    @property
    def judge_obstacle(self) -> str | None:
        """Why it cannot judge, or None if it can."""
        if self.can.labels is Labels.NONE:
            return f"a server ({self.server.url}) that gives no log-probabilities"
        return None

    @property
    def provenance(self) -> dict[str, Any]:
        """What a record says about it."""
        names = ("kind", "version", "model", "token_prompts", "many_prompts")
        known = {name: getattr(self.can, name) for name in names}
        ways = {"tokens_back": str(self.can.tokens_back), "labels": str(self.can.labels), "together": self.together}
        return {"url": self.server.url} | known | ways


def connect(
    url: str,
    *,
    tokenizer: str,
    model: str | None = None,
    api_key_env: str | None = None,
    labels: str = "auto",
    probes: str = "auto",
    top_logprobs: int = 100,
    context_limit: int | None = None,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    connect_timeout_s: float = 5.0,
    read_timeout_s: float = 120.0,
    request_timeout_s: float = 1800.0,
    retries: int = 3,
    backoff_s: float = 0.25,
    cooldown_s: float = 30.0,
    max_connections: int = 16,
) -> RemoteModel:
    """A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp). Asks the server what it can do.

    url            where it listens
    tokenizer      directory, hub id, `.gguf` file or `zoo:NAME` with its tokenizer; no weights are loaded
    model          what it is called there; None: the only one there is
    api_key_env    environment variable that holds the bearer token, which so stays out of configurations and records
    labels         "auto": read the judge's labels by id if the server can, else from the most probable tokens;
                   "generative_scoring": by vLLM's endpoint of that name
    probes         "together": all probes of a pass in one request; "one_by_one"; "auto": together, but one by one on
                   llama.cpp, where the prompts of one request share no cache
    top_logprobs   how many of the most probable tokens to ask for, if labels cannot be asked for by id
    context_limit  most tokens of a request; None: the server's, else the model's own
    chat_template, template_args as in `load`; the others as in `Connection`

    Raises ServerError if it cannot be reached, ModelLoadError if the tokenizer is not that of the model there.
    """
    _check_ways(labels, probes, top_logprobs)
    place = find_checkpoint(tokenizer)
    spoken = _tokenizer(tokenizer, place)
    server = server_of(
        Connection(
            url=url, api_key=_key(api_key_env), connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s,
            request_timeout_s=request_timeout_s, retries=retries, backoff_s=backoff_s, cooldown_s=cooldown_s,
            max_connections=max_connections)
    )  # fmt: skip
    here = LanguageModel.wrap(_shell(place, spoken), spoken, name=tokenizer)
    can = probe(server, here, model, top_logprobs, labels == "generative_scoring")
    together = can.many_prompts and (probes == "together" or (probes == "auto" and can.kind not in SLOTS))
    return RemoteModel(
        name=f"{can.model} at {server.url}",
        hf=here.hf,
        tokenizer=spoken,
        context_limit=context_limit or min(can.context_limit or here.context_limit, here.context_limit),
        chat_template=read_template(chat_template),
        template_args=dict(here.template_args if template_args is None else template_args),
        judge_card=read_judge_card(place),
        server=server,
        can=can,
        together=together,
    )


def _check_ways(labels: str, probes: str, top_logprobs: int) -> None:
    if labels not in ("auto", "generative_scoring"):
        raise ConfigError(f"labels='{labels}'; expected auto or generative_scoring.")
    if probes not in PROBES:
        raise ConfigError(f"probes='{probes}'; expected one of {', '.join(PROBES)}.")
    if top_logprobs < 2:
        raise ConfigError(f"top_logprobs={top_logprobs}; expected at least 2, one for each label.")


def _key(name: str | None) -> str | None:
    if name is not None and name not in os.environ:
        raise ConfigError(f"api_key_env='{name}', but there is no such environment variable. Set it to the key.")
    return None if name is None else os.environ[name]


def _tokenizer(source: str, place: Checkpoint) -> PreTrainedTokenizerBase:
    try:
        place.find(place.gguf or "tokenizer_config.json")  # settles the commit that everything is read at
        return AutoTokenizer.from_pretrained(place.location, **place.arguments)
    except Exception as error:  # the loaders below raise a dozen kinds; each is chained and shown
        raise ModelLoadError(
            f"cannot load the tokenizer '{source}': {type(error).__name__}: {error}. Expected a hub id, a directory, a "
            ".gguf file or zoo:NAME of the model that is served."
        ) from error


def _shell(place: Checkpoint, spoken: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model without weights, as far as it is known here: by its configuration, or else by its tokenizer alone."""
    try:
        config = AutoConfig.from_pretrained(place.location, **place.arguments)
    except (OSError, ValueError) as error:  # a folder with a tokenizer only, or a family transformers does not know
        log.info("no configuration for %s (%s); its tokenizer has to do", place.location, error)
        config = LlamaConfig(vocab_size=len(spoken), eos_token_id=spoken.eos_token_id, num_hidden_layers=0)
        config.max_position_embeddings = 1 << 20  # unknown: the server's own limit holds
    with torch.device("meta"):
        shell: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    try:
        shell.generation_config = GenerationConfig.from_pretrained(place.location, revision=place.commit or "main")
    except OSError:  # there is none: what the configuration says holds
        log.info("no generation config at %s", place.location)
    return shell
