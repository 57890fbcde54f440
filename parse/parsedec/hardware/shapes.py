"""Models of real shapes with random weights, and prompts of random words, for measurements of speed alone.

`replay:NAME` in a `source` names a shape. What such a model writes means nothing; how long it takes does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from parsedec.errors import ConfigError, require_number
from parsedec.models.language_model import LanguageModel
from parsedec.tasks.base import Problem, Score

PREFIX = "replay:"
QWEN3 = dict(vocab_size=151_936, head_dim=128, num_key_value_heads=8, rms_norm_eps=1e-6, max_position_embeddings=40_960)
SHAPES: Mapping[str, Mapping[str, Any]] = {  # config.json of the Qwen3 checkpoints (arXiv 2505.09388)
    "qwen3_1.7b": QWEN3
    | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16)
    | dict(tie_word_embeddings=True),
    "qwen3_8b": QWEN3
    | dict(hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32)
    | dict(tie_word_embeddings=False),
    "qwen3_32b": QWEN3
    | dict(hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64)
    | dict(tie_word_embeddings=False),
    "tiny": dict(vocab_size=512, head_dim=32, num_key_value_heads=2, max_position_embeddings=4096)
    | dict(hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4)
    | dict(tie_word_embeddings=False),
    "tiny_draft": dict(vocab_size=512, head_dim=32, num_key_value_heads=1, max_position_embeddings=4096)
    | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    | dict(tie_word_embeddings=True),
}
ROPE_BASE = 1_000_000.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
END = "<|end|>"
SPECIAL = ("<|pad|>", END, "<|user|>", "<|assistant|>", "<|unknown|>", "Correct", "Incorrect")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' }}{{ m['content'] }}{{ ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def shape(source: str) -> Mapping[str, Any]:
    """The sizes of `replay:NAME`, as in a Qwen3 config.json. Raises ConfigError for an unknown name."""
    name = source.removeprefix(PREFIX)
    if not source.startswith(PREFIX) or name not in SHAPES:
        raise ConfigError(f"source='{source}' is no shape; expected {PREFIX}NAME with a NAME of {sorted(SHAPES)}.")
    return SHAPES[name]


def random_model(
    source: str,
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    context_limit: int | None = None,
    seed: int = 0,
    backend: str = "auto",
    compiled: bool = False,
    judge_kernel: str = "auto",
) -> LanguageModel:
    """A Qwen3 model of a known shape with random weights, created on its device. It never ends its answer.

    source   replay:NAME, with a NAME of SHAPES
    dtype    float32 or bfloat16
    device   "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"
    The other arguments are those of `parsedec.models.language_model.load`.
    Raises ConfigError for an unknown shape or dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype='{dtype}' of {source}; expected one of {sorted(DTYPES)}.")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    sizes = shape(source)
    config = Qwen3Config(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE}, bos_token_id=None,
        eos_token_id=SPECIAL.index(END), pad_token_id=0)  # fmt: skip
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []), where:
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    with torch.no_grad():
        # the end token's logit is then always 0, and among thousands of logits some other is larger
        hf.get_output_embeddings().weight[SPECIAL.index(END)] = 0
    return LanguageModel.wrap(
        hf,
        word_tokenizer(sizes["vocab_size"]),
        name=source,
        context_limit=context_limit,
        backend=backend,
        compiled=compiled,
        judge_kernel=judge_kernel,
    )


@cache
def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens: those that a chat needs, and the words w0, w1, …"""
    words = [*SPECIAL, *(f"w{i}" for i in range(size - len(SPECIAL)))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # puts a space between words
    core.add_special_tokens([word for word in SPECIAL if word.startswith("<|")])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=SPECIAL[0], eos_token=END, chat_template=TEMPLATE)


@dataclass(frozen=True, kw_only=True)
class RandomPrompts:
    """Prompts of random words. They have no right answer, so every answer is scored as wrong.

    n      how many prompts
    words  how many words each prompt has; a word is a token, and the chat template adds a few
    seed   of the random words
    Raises ConfigError for numbers out of range.
    """

    n: int = 8
    words: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        require_number("task.n", self.n, whole=True, low=1)
        require_number("task.words", self.words, whole=True, low=1)
        require_number("task.seed", self.seed, whole=True, low=0)

    @property
    def name(self) -> str:
        return "random_prompts"

    def problems(self) -> list[Problem]:
        fewest = min(sizes["vocab_size"] for sizes in SHAPES.values()) - len(SPECIAL)
        made = []
        for i in range(self.n):
            rng = random.Random(f"{self.seed}:{i}")
            prompt = " ".join(f"w{rng.randrange(fewest)}" for _ in range(self.words))
            made.append(Problem(id=f"random_{self.seed}_{i}", prompt=prompt, reference=""))
        return made

    def score(self, problem: Problem, text: str) -> Score:
        return Score(False, "not scored")
