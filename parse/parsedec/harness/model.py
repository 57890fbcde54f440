"""`ParsedecLM`: an engine as a model of the harness. Generation is the engine's; likelihoods are the target's own.

Shapes in this file:  C context tokens, T continuation tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor

from parsedec.engine import Parse
from parsedec.errors import ConfigError, ParsedecError, PromptError
from parsedec.experiment.build import apply_runtime, build_engine, plain
from parsedec.experiment.cli import progress
from parsedec.experiment.record import SCHEMA_VERSION, provenance, to_json, write_record
from parsedec.experiment.summary import summarise
from parsedec.harness.settings import composed, of_the_harness
from parsedec.sampling import request_generator
from parsedec.sessions import kv
from parsedec.text.chat import bare_ids, prompt_text
from parsedec.text.prompt import BareText, NewTurn, Prompt
from parsedec.types import Limits, Sampling

log = logging.getLogger(__name__)
NAME = "parsedec"
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}  # what a task may ask for
SAVE_EVERY_S = 5.0

Scored = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) as text, then as tokens


@register_model(NAME)
class ParsedecLM(TemplateLM):  # type: ignore[misc]
    """A model of the harness around an engine.

    engine  answers `generate_until`; likelihoods come from its target alone
    config  the configuration that the engine was built from, for the record; may be empty
    limits  the most tokens of an answer if a task does not say, and stop strings besides the task's
    seed    of sampled answers: request i of a call uses seed * 1000003 + i
    record  file for what the engine did, in the format of a run's record.json; None: only a summary, in the results
    """

    def __init__(
        self,
        engine: Parse,
        *,
        config: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        record: Path | None = None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.model = engine.target
        self.tokenizer = self.model.tokenizer
        self.config = dict(config or {})
        self.limits = limits or Limits()
        self.seed = seed
        self.record = record
        self.requests: list[dict[str, Any]] = []  # every request that was answered, as in a run's record
        self._head = {"schema_version": SCHEMA_VERSION, "title": "lm-evaluation-harness", "config": self.config}
        self._head |= {"provenance": provenance(), "resumed_from": None}
        self._rendered: dict[str, Prompt] = {}  # prompt as rendered -> what it was made of
        self._warned: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> ParsedecLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> ParsedecLM:
        """The model that the harness's `--model_args` describe: see `parsedec.harness.settings`."""
        cfg = composed(of_the_harness(additional_config) | arg_dict)
        apply_runtime(cfg)
        record = arg_dict.get("record")
        return cls(
            build_engine(cfg),
            config=plain(cfg),
            limits=Limits(max_new_tokens=cfg.max_new_tokens, stop=cfg.stop),
            seed=cfg.seed,
            record=None if record is None else Path(str(record)).expanduser(),
        )

    # --- text to tokens ---

    @property
    def eot_token_id(self) -> int:
        return int(self.model.end_ids[0])

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one of a text that has no context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja text of the target's template, for the harness's results. ConfigError for a choice by name."""
        if isinstance(chat_template, str):
            raise ConfigError(
                f"--apply_chat_template {chat_template}: templates are not chosen by name here; use the option alone, "
                "and target.chat_template=FILE for another template."
            )
        return (self.model.chat_template or self.tokenizer.chat_template) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt as the target's template renders it. The messages are remembered, since the draft model may have a
        template and a vocabulary of its own."""
        text = prompt_text(self.model, chat_history, continued=not add_generation_prompt)
        messages = [dict(message) for message in chat_history]
        if add_generation_prompt:
            self._rendered[text] = NewTurn(messages)
        else:  # both models can continue a message of the assistant's; a user's is given as the target's tokens
            begun = messages[-1]["role"] == "assistant"
            self._rendered[text] = messages if begun else self.model.encode(text)
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The tokens of a text, with what the tokenizer puts before it, but only once if the text begins with it."""
        if add_special_tokens is None:
            return bare_ids(self.model, string)
        return self.model.encode(string, whole=add_special_tokens)

    # --- generation ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, in the order of the requests. A request that cannot be run (too long, say) gets the answer "" and a
        warning, and counts as an error in the record; if none can be run, the first one's error is raised."""
        if self.model.has_template and any(request.args[0] not in self._rendered for request in requests):
            self._warn_once(
                f"{self.model.name} has a chat template but is given bare text; --apply_chat_template gives it what it "
                "was trained on."
            )
        rows, failures, saved = [], [], time.monotonic()
        with progress(len(requests)) as step:
            for index, request in enumerate(requests):
                row, failure = self._answer(request, index)
                rows.append(row)
                self.requests.append(row)
                failures += [failure] if failure else []
                self.cache_hook.add_partial("generate_until", request.args, _text(row))
                step("generate_until")
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self._save("running")
                    saved = time.monotonic()
        self._save("failed" if len(failures) == len(rows) > 0 else "finished")
        if failures and len(failures) == len(rows):
            raise failures[0]
        return [_text(row) for row in rows]

    def _answer(self, request: Any, index: int) -> tuple[dict[str, Any], ParsedecError | None]:
        """One request in the form of a run's record, and the error that kept it from being answered, if any."""
        context, asked = request.args
        limits, sampling = _wanted(asked, self.limits)
        row = {"id": _identity(request), "prompt": context, "reference": "", "correct": None, "detail": ""}
        started = time.time()
        try:
            result = self.engine.generate(
                self._rendered.get(context, BareText(context)),
                max_new_tokens=limits.max_new_tokens,
                stop=limits.stop,
                sampling=sampling,
                generator=request_generator(self.seed, index),
            )
        except ParsedecError as error:
            log.warning("%s: %s", row["id"], error)
            return row | {"error": f"{type(error).__name__}: {error}", "result": None}, error
        return row | {"error": None, "at": started, "first_wrong_line": None, "result": to_json(result)}, None

    # --- likelihoods ---

    def _loglikelihood_tokens(self, requests: Sequence[Scored], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of every continuation under the target, and whether greedy decoding would write it.

        Consecutive requests with the same context, such as the options of a question, share its forward.
        """
        answers, held = [], None
        with progress(len(requests)) as step:
            for texts, context, continuation in requests:
                context = self._fitting(context, continuation)
                if held is None or held[0] != context:
                    cache = kv.new_cache(self.model.hf)
                    logits, _ = self.model.forward([context], cache, keep=1)
                    held = (context, cache, logits[0])
                answers.append(_scored(self._continued(held[1], held[2], continuation), continuation))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
                step("loglikelihood")
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows as long as the context, each token predicted once."""
        answers = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.context_limit,
                context_len=1,
            )
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            answers.append(sum(logprob for logprob, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
        return answers

    def _continued(self, cache: Any, after: Tensor, continuation: list[int]) -> Tensor:
        """The logits [T, V] that predict the continuation's tokens; `after` [1, V] are those after the context."""
        if len(continuation) == 1:
            return after
        logits, _ = self.model.forward([continuation[:-1]], kv.snapshot(cache), keep=len(continuation) - 1)
        return torch.cat([after, logits[0]])

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """The context, cut at its start to leave room for the continuation, as the harness's own models do it.

        Raises PromptError for a continuation that is empty or longer than the model's context.
        """
        room = self.model.context_limit - len(continuation) + 1
        if room < 1 or not continuation:
            raise PromptError(
                f"a continuation of {len(continuation)} tokens cannot be scored by {self.model.name}, whose context "
                f"holds {self.model.context_limit}; expected 1 to {self.model.context_limit}. Choose another task."
            )
        if len(context) > room:
            self._warn_once(f"contexts longer than the {self.model.context_limit} tokens of {self.model.name} are cut")
        return context[-room:]

    # --- what is left behind ---

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the harness's results: a summary of what the engine did, and the path of the record."""
        return {
            "parsedec": summarise(self.requests),
            "parsedec_record": None if self.record is None else str(self.record),
        }

    def _save(self, status: str) -> None:
        if self.record is None:
            return
        summary = summarise(self.requests)
        arm = {"name": NAME, "description": "", "summary": summary, "requests": self.requests}
        write_record(self._head | {"status": status, "arms": [arm], "summary": summary}, self.record)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)


def _wanted(asked: Mapping[str, Any], ours: Limits) -> tuple[Limits, Sampling]:
    """What a task asks for: when an answer ends, and how its tokens are chosen. ConfigError for anything else."""
    wanted = dict(normalize_gen_kwargs(dict(asked), ours.max_new_tokens))
    if wanted.get("num_beams", 1) == 1:
        wanted.pop("num_beams", None)
    if unknown := sorted(set(wanted) - GENERATION):
        raise ConfigError(
            f"the task asks for {unknown} = {[wanted[key] for key in unknown]}; expected only {sorted(GENERATION)}. "
            "Change its generation_kwargs, or set --gen_kwargs."
        )
    stop = tuple(dict.fromkeys(text for text in (*ours.stop, *wanted["until"]) if text))
    limits = Limits(max_new_tokens=wanted["max_gen_toks"], stop=stop)
    if not wanted["do_sample"]:
        return limits, Sampling()
    return limits, Sampling(
        temperature=float(wanted.get("temperature", 1.0)),
        top_p=float(wanted.get("top_p", 1.0)),
        top_k=int(wanted.get("top_k", 0)),
    )


def _scored(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """(log-probability, whether greedy) of T tokens from the logits [T, V] that predict them."""
    wanted = torch.tensor(continuation, device=logits.device)  # [T]
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, wanted[:, None]).sum()
    return float(chosen), bool((logprobs.argmax(-1) == wanted).all())


def _identity(request: Any) -> str:
    """An id that is unique in a record, since a task may ask for several answers to a document."""
    return f"{request.task_name}/{request.doc_id}" + (f"/{request.idx}" if request.idx else "")


def _text(row: Mapping[str, Any]) -> str:
    return str(row["result"]["text"]) if row["result"] else ""
