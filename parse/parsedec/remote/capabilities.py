"""What a server can do, found out by asking it (`probing`). Its name says nothing but how it batches."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TokensBack(StrEnum):
    """How the ids of generated tokens come back."""

    FIELD = "field"  # token_ids beside the text (vLLM), output_ids (SGLang)
    LOGPROBS = "logprobs"  # among the log-probabilities: an id (llama.cpp) or a name "token_id:7" (vLLM before 0.10)
    TEXT = "text"  # not at all: the text has to be encoded again


class Labels(StrEnum):
    """How the log-probabilities of the judge's labels are read."""

    BY_ID = "by_id"  # of exactly these ids: logprob_token_ids (vLLM), token_ids_logprob (SGLang)
    TOP = "top"  # among the most probable tokens
    SCORING = "generative_scoring"  # by vLLM's endpoint of that name
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a server can do with one of its models.

    kind           "vllm", "sglang", "llamacpp" or "unknown"; `version` is what it says
    model          what the model is called there
    native         use SGLang's /generate instead of /v1/completions
    token_prompts  prompts may be token ids
    many_prompts   one request may hold several prompts
    extensions     takes top_k, min_p and repetition_penalty, whose defaults some servers read from the checkpoint
    tokens_back    how to read the ids of generated tokens
    labels         how to read the log-probabilities of the judge's labels
    top            how many of the most probable tokens it shows, for Labels.TOP
    context_limit  most tokens of a request, prompt included; None: it does not say
    """

    kind: str
    version: str | None
    model: str
    native: bool = False
    token_prompts: bool = False
    many_prompts: bool = False
    extensions: bool = False
    tokens_back: TokensBack = TokensBack.TEXT
    labels: Labels = Labels.NONE
    top: int = 0
    context_limit: int | None = None

    @property
    def workarounds(self) -> tuple[str, ...]:
        """What the server lacks and what is done instead, for the notes of results."""
        found = []
        if not self.token_prompts:
            found.append("prompts go as text: the server takes no token ids, so its own tokens may differ at the seams")
        if self.tokens_back is TokensBack.TEXT:
            found.append("tokens are its text encoded again: the server gives no token ids")
        if not self.many_prompts:
            found.append("probes go one by one: the server takes one prompt a request")
        if self.labels is Labels.TOP:
            found.append(f"scores from the {self.top} most probable tokens: a label beyond them makes a score a bound")
        if not self.extensions:
            found.append("top_k and the server's own sampling defaults are not controlled: it refuses their names")
        return tuple(found)
