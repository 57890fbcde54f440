"""What a client asks for: the bodies of `/v1/chat/completions` and `/v1/completions`, and the answers to be written.

Fields that would change the answer but are not supported are refused by name, and so are unknown ones. Fields that
change nothing (`user`, `metadata` …) are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from parsedec.errors import ConfigError
from parsedec.serve.jobs import Task
from parsedec.serve.refusals import Refusal
from parsedec.text.prompt import BareText, NewTurn, Prompt, is_unicode
from parsedec.types import Limits, Sampling, warmth

MOST_STOPS = 16
MOST_TOP, MOST_TOP_OF_CHATS = 5, 20  # most log-probabilities of other tokens that may be asked for
NEUTRAL: dict[str, tuple[Any, ...]] = {  # OpenAI's and vLLM's, not supported; these values, and null, ask for nothing
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
TAKEN = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "user"}
WHY = {"echo": "only what was written is returned"}


def _unicode(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("it holds half of a surrogate pair, which is no Unicode text")
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class Part(BaseModel):
    """A part of a message's content. Only text can be read."""

    type: Literal["text"]
    text: Text


def _read_as_text(content: object) -> object:
    """The content, if it may be text. Checked here so that there is one message, not one for each form it may have."""
    if content is None:
        raise ValueError("it is null; expected text, or a list of parts of type text")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(f"it holds a part of type {kind!r}, and this server reads text alone")
    return content


class Turn(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | list[Part], BeforeValidator(_read_as_text)]

    def message(self) -> dict[str, Any]:
        """The message as the engine takes it, which joins parts of text itself."""
        content = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Asked(BaseModel):
    """What both kinds of request share. None stands for the server's own setting."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None  # as in other servers, where 0 and -1 switch it off
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: Text | list[Text] | None = None
    seed: StrictInt | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many log-probabilities are asked for besides each token's own; None: not even its own."""
        raise NotImplementedError

    def prompts(self) -> list[Prompt]:
        """The prompts, as the engine takes them."""
        raise NotImplementedError

    def check_fields(self) -> None:
        """Raise Refusal for fields that are unknown, or would change the answer and are not supported."""
        for name, value in (self.model_extra or {}).items():
            if name in TAKEN:
                continue
            if name not in NEUTRAL:
                raise Refusal(400, f"'{name}' is no field of this request.", code="unknown_parameter", param=name)
            if value is not None and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
                why = f": {WHY[name]}" if name in WHY else ""
                raise Refusal(
                    400,
                    f"'{name}' is not supported by this server{why}. Leave it out.",
                    code="unsupported_parameter",
                    param=name,
                )


class ChatAsked(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_TOP_OF_CHATS)] | None = None

    @property
    def top(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            said = "'top_logprobs' is only for requests with logprobs=true."
            raise Refusal(400, said, code="invalid_value", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompts(self) -> list[Prompt]:
        return [NewTurn(turn.message() for turn in self.messages)]  # as OpenAI does


class TextAsked(Asked):
    """The body of /v1/completions: one prompt or several, each a text to be continued, or its token ids."""

    prompt: Text | list[Text] | list[StrictInt] | list[list[StrictInt]]
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[Prompt]:
        if isinstance(self.prompt, str):
            return [BareText(self.prompt)]
        if not self.prompt or self.prompt == [[]]:
            raise Refusal(400, "'prompt' is empty; expected text or token ids.", code="invalid_value", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return [BareText(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Defaults for what a client leaves out, and how much it may ask for. `no_logprobs`: why there can be none."""

    limits: Limits
    sampling: Sampling
    max_tokens: int
    max_choices: int
    no_logprobs: str | None = None


def tasks_of(asked: Asked, defaults: Defaults) -> list[Task]:
    """The answers a request asks for, in the order of their `index`. Raises Refusal."""
    asked.check_fields()
    most = asked.most_tokens
    if most is not None and not 1 <= most <= defaults.max_tokens:
        raise Refusal(
            400,
            f"{most} tokens are asked for; expected 1 to {defaults.max_tokens}.",
            code="invalid_value",
            param="max_tokens" if asked.max_tokens == most else "max_completion_tokens",
        )
    top = asked.top
    if top is not None and defaults.no_logprobs:
        said = f"'logprobs' is not supported by this server: {defaults.no_logprobs}. Leave it out."
        raise Refusal(400, said, code="unsupported_parameter", param="logprobs")
    prompts, n = asked.prompts(), asked.n or 1
    if n * len(prompts) > defaults.max_choices:
        raise Refusal(
            400,
            f"the request asks for {n * len(prompts)} answers; expected at most {defaults.max_choices}.",
            code="invalid_value",
            param="n",
        )
    task = Task(
        prompt="",
        max_new_tokens=most or min(defaults.limits.max_new_tokens, defaults.max_tokens),
        stop=_stops(asked.stop, defaults.limits.stop),
        sampling=_sampling(asked, defaults.sampling),
        seed=asked.seed,
        top=top,
    )
    return [replace(task, prompt=prompt, choice=i * n + j) for i, prompt in enumerate(prompts) for j in range(n)]


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values are equal and of one type: 0 is not False."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _stops(asked: str | list[str] | None, own: Sequence[str]) -> tuple[str, ...]:
    stops = tuple(own) if asked is None else (asked,) if isinstance(asked, str) else tuple(asked)
    if len(stops) > MOST_STOPS or not all(stops):
        raise Refusal(
            400,
            f"'stop' has {len(stops)} strings or an empty one; expected up to {MOST_STOPS}, none of them empty.",
            code="invalid_value",
            param="stop",
        )
    return stops


def _sampling(asked: Asked, own: Sampling) -> Sampling:
    try:
        return Sampling(
            temperature=own.temperature if asked.temperature is None else warmth(float(asked.temperature)),
            top_p=own.top_p if asked.top_p is None else float(asked.top_p),
            top_k=own.top_k if asked.top_k is None else max(0, asked.top_k),
        )
    except ConfigError as error:
        raise Refusal(400, str(error), code="invalid_value", param="temperature") from error
