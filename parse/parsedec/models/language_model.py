"""A causal language model with its tokenizer, and the facts about both that the engine needs; `load` reads one.

Shapes in this file:  B rows of n ids, V vocabulary, L taps, H hidden.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import output_capturing

from parsedec.errors import ConfigError, ModelLoadError, first_line
from parsedec.models import placement, ranks
from parsedec.models.checkpoints import Checkpoint, find_checkpoint, refuse_part
from parsedec.models.judge_card import JudgeCard as JudgeCard
from parsedec.models.judge_card import read_judge_card
from parsedec.models.tokenizer import plain_reader
from parsedec.models.turns import turns_of
from parsedec.sessions import kv
from parsedec.sessions.inference import inference, whole_numbers

log = logging.getLogger(__name__)

# Attention functions that take a 4-D additive mask. Flash kernels ignore or reject one, and flex attention with a
# 4-D tensor aborts the process (torch 2.13, CPU).
MASKABLE = {"eager", "sdpa"}
NO_THINKING = {"enable_thinking": False}  # what Qwen3-type chat templates read; others ignore it
SELECTS_LAYERS = hasattr(output_capturing, "selected_hidden_states")  # before 5.23, transformers captures all or none
ATTENTION_KINDS = {"full_attention", "sliding_attention"}
BACKENDS = ("eager", "static", "auto")
JUDGE_KERNELS = ("auto", "sdpa", "cascade", "flex")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A Hugging Face causal LM, its tokenizer, and the facts about both that the engine relies on.

    name             what records and error messages call it
    hf               the model, in eval mode. Facts about it are remembered: move or change it before wrapping it
    tokenizer        its tokenizer
    context_limit    most tokens a request may hold, prompt included
    chat_template    Jinja text that replaces the tokenizer's own, or None
    template_args    extra variables for the template, e.g. {"enable_thinking": False}
    judge_card       how to ask this checkpoint for a verdict, if it was trained to judge (judge.json beside it)
    backend          what its sessions run on: "eager", "static" or "auto" (`sessions.backends`)
    compiled         whether static sessions run their decode steps through torch.compile
    judge_kernel     attention in judge passes of static sessions: "auto", "sdpa", "cascade", "flex" (`static.judging`)
    """

    name: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context_limit: int
    chat_template: str | None = None
    template_args: dict[str, Any] = field(default_factory=lambda: dict(NO_THINKING))
    judge_card: JudgeCard | None = None
    backend: str = "eager"
    compiled: bool = False
    judge_kernel: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("backend", BACKENDS), ("judge_kernel", JUDGE_KERNELS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}='{getattr(self, name)}' is unknown; expected one of {', '.join(known)}.")

    @classmethod
    def wrap(
        cls,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        context_limit: int | None = None,
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        judge_card: JudgeCard | None = None,
        backend: str = "eager",
        compiled: bool = False,
        judge_kernel: str = "auto",
    ) -> LanguageModel:
        """Use a model in memory; arguments as for `load`. "eager" is the default, as its holder may still change it."""
        if isinstance(hf, LanguageModel):
            raise ConfigError(
                f"LanguageModel.wrap() was given {hf.name}, which is wrapped already; expected a transformers model. "
                "Use it as it is, or dataclasses.replace(model, backend=…) for other settings."
            )
        limit = getattr(hf.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        if context_limit is not None:
            if not 1 < context_limit <= limit:
                raise ConfigError(
                    f"context_limit={context_limit} for {name or hf.config.name_or_path}; expected 2 to "
                    f"{limit} (the model's max_position_embeddings). Lower it or leave it out."
                )
            limit = context_limit
        model = cls(
            name=name or hf.config.name_or_path or type(hf).__name__,
            hf=hf.eval(),
            tokenizer=tokenizer,
            context_limit=limit,
            chat_template=chat_template,
            template_args=dict(NO_THINKING if template_args is None else template_args),
            judge_card=judge_card,
            backend=backend,
            compiled=compiled,
            judge_kernel=judge_kernel,
        )
        _ = model.end_ids  # remembered now: `generation_config` may be replaced for a while (`drop_in`)
        return model

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self.hf.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.hf.dtype)

    @cached_property
    def shared(self) -> bool:
        """Whether several processes each hold a part of it (tensor parallelism, `ranks`)."""
        return (getattr(self.hf, "_tp_size", None) or 1) > 1

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered as a prompt."""
        return bool(self.chat_template or self.tokenizer.chat_template)

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the output matrix; because of padding there may be more than the tokenizer has tokens."""
        return int(self.hf.config.get_text_config().vocab_size)

    @cached_property
    def num_layers(self) -> int:
        return int(self.hf.config.get_text_config().num_hidden_layers)

    @cached_property
    def hidden_size(self) -> int:
        return int(self.hf.config.get_text_config().hidden_size)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that closes an answer, from the generation config, the model config and the tokenizer."""
        generation = getattr(self.hf, "generation_config", None)
        found: list[int] = []
        for value in (
            getattr(generation, "eos_token_id", None),
            getattr(self.hf.config.get_text_config(), "eos_token_id", None),
            self.tokenizer.eos_token_id,
        ):
            ids = value if isinstance(value, (list, tuple)) else [value]
            found += [int(i) for i in ids if i is not None and int(i) not in found]
        return tuple(found)

    def ending_with(self, end_ids: tuple[int, ...]) -> LanguageModel:
        """The same model with other end ids; itself if it has these already."""
        if set(end_ids) == set(self.end_ids):
            return self
        other = replace(self)
        other.__dict__["end_ids"] = end_ids  # where a cached property keeps its value
        return other

    @cached_property
    def windows(self) -> dict[str, int | None]:
        """Layer kind -> its sliding window (None: full attention), for every kind of layer in the model."""
        config = self.hf.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        kinds = getattr(config, "layer_types", None) or [("sliding_attention" if window else "full_attention")]
        return {kind: window if kind != "full_attention" else None for kind in dict.fromkeys(kinds)}

    @cached_property
    def recurrent(self) -> bool:
        """Whether any layer carries a state that cannot be cut back to an earlier token."""
        return kv.is_recurrent(DynamicCache(config=self.hf.config))

    @cached_property
    def cache_argument(self) -> str:
        """What the model's forward calls its cache (Mamba's has another name, and a wrong one is silently ignored)."""
        parameters = inspect.signature(self.hf.forward).parameters
        return "cache_params" if "cache_params" in parameters else "past_key_values"

    @cached_property
    def has_attention(self) -> bool:
        """Whether any layer attends to earlier tokens (pure Mamba models have none, and take no mask)."""
        return any(hasattr(layer, "keys") for layer in DynamicCache(config=self.hf.config).layers)

    @cached_property
    def mask_obstacle(self) -> str | None:
        """Why a custom attention mask cannot work on this model, or None where it can."""
        if self.recurrent:
            return "recurrent or convolutional layers, which no attention mask reaches"
        strange = set(self.windows) - ATTENTION_KINDS
        if strange:
            return f"layers of kind {sorted(strange)}, whose masks are not known here"
        if self.attention not in MASKABLE:
            return f"attention implementation '{self.attention}', which takes no 4-D mask (sdpa and eager do)"
        return None

    @property
    def attention(self) -> str:
        """Its own attention implementation, which a joint forward in another thread (`joint`) replaces for a while."""
        with turns_of(self.hf).plain():
            return str(self.hf.config._attn_implementation)

    @inference
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
        """One forward behind `cache`, which grows by it.

        ids        B rows of n ids; B is 1 except for forked probes and branches
        keep       which tokens of a row to give logits for: indices, or how many of the last ones
        positions  [B, n]; None: counting on from the end of the cache
        mask       as the model takes it; None: causal

        Returns logits [B, kept, V], and the hidden states of the layers `taps` [B, n, L, H], None for no taps.
        """
        if self.shared:
            ranks.check_same(self.name, self.device, ids)
        one = len(ids) == 1
        rows = whole_numbers(ids[0], self.device).unsqueeze(0) if one else torch.tensor(ids, device=self.device)
        with turns_of(self.hf).plain():
            out = self.hf(
                input_ids=rows,
                position_ids=None if positions is None else positions.to(self.device),
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=keep if isinstance(keep, int) else keep.to(self.device),
                output_hidden_states=captured(taps),
                **{self.cache_argument: cache},
            )
        return out.logits, torch.stack([out.hidden_states[i] for i in taps], dim=2) if taps else None

    def encode(self, text: str, *, plain: bool = False, whole: bool = False) -> list[int]:
        """Token ids of a piece of text.

        plain  read control tokens that are spelt out in it as mere text
        whole  it is a complete input: add what the tokenizer adds to one, such as a BOS token
        """
        tokenizer = plain_reader(self.tokenizer) if plain else self.tokenizer
        return list(tokenizer.encode(text, add_special_tokens=whole, split_special_tokens=plain))

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, without special tokens unless `special`."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    def same_vocabulary(self, other: LanguageModel) -> bool:
        """Whether ids mean the same tokens in both models, apart from padding (`readable`). Vocabularies are large, so
        each pair is compared once."""
        if self is other:
            return True
        known = _same_vocabulary.setdefault(self, WeakKeyDictionary())
        if other not in known:
            known[other] = self.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        return known[other]

    def readable(self, ids: Sequence[int]) -> list[int]:
        """Ids of another model of the same vocabulary, those that this model has no row for replaced by its last row.

        Models of one vocabulary may have different numbers of rows (Qwen2.5: 7B has 152,064, 0.5B 151,936). Rows beyond
        the tokenizer's tokens are padding and spell nothing, yet a model may write them, and prompts may hold them.
        """
        last = self.vocab_size - 1
        return [min(i, last) for i in ids]


def captured(taps: Sequence[int]) -> list[int] | bool | None:
    """`output_hidden_states` for a forward of which the layers `taps` are read: no others, where that can be said, as
    they would all stay in memory through a long prefill."""
    return (list(taps) if SELECTS_LAYERS else True) if taps else None


_same_vocabulary: WeakKeyDictionary[LanguageModel, WeakKeyDictionary[LanguageModel, bool]] = WeakKeyDictionary()


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    attention: str = "auto",
    context_limit: int | None = None,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    device_map: str | None = None,
    tp_plan: str | None = None,
    backend: str = "auto",
    compiled: bool = False,
    judge_kernel: str = "auto",
    name: str | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer.

    source         directory, `.gguf` file, hub id (also ID@REVISION and ID/FILE.gguf), or `zoo:NAME` for one of ours
    dtype          "float32", "bfloat16", "float16", a torch dtype, or "auto": the checkpoint's own, but float32 for the
                   zoo's small models and where the processor has no fast products in the checkpoint's
    device         "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"
    attention      "auto" (transformers' choice) or a Hugging Face name; the packed judge pass needs "sdpa" or "eager"
    chat_template  Jinja text, or the path of a file that holds it, in place of the tokenizer's own
    template_args  variables for the template; None: {"enable_thinking": False}, for templates that know it
    device_map     as in transformers, for a model spread over several devices; `device` is then ignored
    tp_plan        "auto": load this process' part of a model that torchrun divides among processes (`ranks`); `device`
                   is then ignored, and the backend is eager
    backend        "eager" (Hugging Face's forward), "static" (preallocated caches) or "auto": static where it can
    compiled       static backend: torch.compile the decode step. The first tokens then take long, later ones less
    judge_kernel   static backend: attention in judge passes, "auto" (by size and device), "sdpa", "cascade" or "flex"

    Raises ModelLoadError for anything that is missing, damaged or not on this machine.
    """
    where, precision = placement.device_of(device), placement.dtype_of(dtype, str(source))
    spread = placement.spread(device_map, tp_plan, backend)
    place = find_checkpoint(source)
    given = spread if attention == "auto" else {**spread, "attn_implementation": attention}
    hf, tokenizer = _read(place, str(source), dtype=precision, **given)
    fixed = dtype != "auto" or spread or getattr(hf, "is_quantized", False)
    if not fixed and not placement.multiplies(where, hf.dtype):
        log.warning(
            "%s is computed in float32 and takes %.1f GB, twice of what it is stored in: this processor has no fast "
            "products in %s. dtype=%s computes in it all the same.",
            *(source, 4e-9 * sum(part.numel() for part in hf.parameters())),
            *[str(hf.dtype).removeprefix("torch.")] * 2,
        )
        hf = hf.float()
    return LanguageModel.wrap(
        hf if spread else hf.to(where),
        tokenizer,
        name=name or str(source),
        context_limit=context_limit,
        chat_template=read_template(chat_template),
        template_args=template_args,
        judge_card=read_judge_card(place),
        backend="eager" if tp_plan else backend,
        compiled=compiled,
        judge_kernel=judge_kernel,
    )


def _read(place: Checkpoint, source: str, **given: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a checkpoint, both at one commit. `given` goes to the model's `from_pretrained`."""
    try:
        place.find(place.gguf or "config.json")  # settles the commit that everything is read at
        if place.gguf is None:  # if the repository does not exist, AutoConfig says so, and AutoTokenizer does not
            refuse_part(place, source)
            AutoConfig.from_pretrained(place.location, **place.arguments)
        tokenizer = AutoTokenizer.from_pretrained(place.location, **place.arguments)
        return AutoModelForCausalLM.from_pretrained(place.location, **place.arguments, **given), tokenizer
    except ModelLoadError:
        raise
    except Exception as error:  # the loaders above raise a dozen kinds; each is chained and shown
        check = (
            "Check the path, and that the download or copy is complete."
            if place.local
            else "Check the id and the network; a gated or private repository needs your login (hf auth login)."
        )
        raise ModelLoadError(
            f"cannot load the model '{source}': {type(error).__name__}: {first_line(error)}. Expected "
            f"a hub id, a directory with config.json and weights, a .gguf file or zoo:NAME. {check}"
        ) from error


def read_template(chat_template: str | None) -> str | None:
    """The chat template of a setting that is Jinja text or the path of a file."""
    if chat_template is None or "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise ModelLoadError(
            f"chat_template='{chat_template}' is neither Jinja text nor an existing file. Check the path."
        )
    return path.read_text()
