"""Tiny random models by family, and their tokenizer: 64 words, a chat template, end tokens."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parsedec.model import LanguageModel

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = ["Correct", "Incorrect", "?", ".", "\n", *(f"w{i}" for i in range(54))]
VOCABULARY = {word: i for i, word in enumerate(SPECIAL + WORDS)}
VOCAB = 64

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES = {
    "llama": dict(model_type="llama"),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3"),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "mistral_window": dict(model_type="mistral", sliding_window=12),
    "gemma3": dict(
        model_type="gemma3_text",
        sliding_window=12,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mixtral": dict(model_type="mixtral", sliding_window=None, **EXPERTS),
    "qwen3_moe": dict(model_type="qwen3_moe", **EXPERTS),
    "qwen3_next": dict(
        model_type="qwen3_next",
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"] * 2,
        **EXPERTS,
    ),
    "lfm2": dict(model_type="lfm2", layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(model_type="mamba2", num_heads=8, state_size=16, expand=2, n_groups=2, chunk_size=16),
}
PACKED = [name for name in FAMILIES if name not in ("qwen3_next", "lfm2", "mamba2")]
FORKED = ["qwen3_next", "lfm2", "mamba2"]


@cache
def tokenizer():
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pattern = "|".join(
        w.replace("|", r"\|").replace("?", r"\?").replace(".", r"\.") for w in sorted(WORDS, key=len)[::-1]
    )
    from tokenizers import Regex

    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.add_special_tokens(SPECIAL)
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT)


@cache
def model(family="llama", *, seed=0, layers=4, dtype=torch.float32, attention=None, context_limit=None):
    """A random model, weights scaled up so that its greedy text is lively and its logits are well apart."""
    torch.manual_seed(seed)
    arguments = {**COMMON, "num_hidden_layers": layers, **FAMILIES[family]}
    if "layer_types" in arguments:
        arguments["layer_types"] = arguments["layer_types"][:layers]
    config = CONFIG_MAPPING[arguments.pop("model_type")](**arguments)
    hf = (
        AutoModelForCausalLM.from_config(config, **({} if attention is None else {"attn_implementation": attention}))
        .float()
        .eval()
    )
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.dim() > 1 and "A_log" not in name:
                weight.mul_(6.0 if "embed" in name or "lm_head" in name else 3.0)
    return LanguageModel.wrap(hf.to(dtype), tokenizer(), name=f"tiny {family}", context_limit=context_limit)
