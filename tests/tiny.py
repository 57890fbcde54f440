"""Tiny random models by family, and their tokenizer: 64 words, a chat template, end tokens."""

import copy
import dataclasses
import functools
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parsedec.judge import LabelJudge
from parsedec.models.language_model import LanguageModel

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


@functools.cache
def tokenizer():
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pattern = "|".join(
        w.replace("|", r"\|").replace("?", r"\?").replace(".", r"\.") for w in sorted(WORDS, key=len)[::-1]
    )

    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.add_special_tokens(SPECIAL)
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT)


@functools.cache
def model(family="llama", *, seed=0, layers=4, dtype=torch.float32, attention=None, experts=None, context_limit=None):
    """A random model, weights scaled up so that its greedy text is lively and its logits are well apart."""
    torch.manual_seed(seed)
    arguments = {**COMMON, "num_hidden_layers": layers, **FAMILIES[family]}
    if "layer_types" in arguments:
        arguments["layer_types"] = arguments["layer_types"][:layers]
    config = CONFIG_MAPPING[arguments.pop("model_type")](**arguments)
    experts = experts if "num_experts" in arguments else None
    chosen = {"attn_implementation": attention, "experts_implementation": experts}
    hf = AutoModelForCausalLM.from_config(config, **{key: value for key, value in chosen.items() if value})
    hf = hf.float().eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.dim() > 1 and "A_log" not in name:
                weight.mul_(6.0 if "embed" in name or "lm_head" in name else 3.0)
    return LanguageModel.wrap(hf.to(dtype), tokenizer(), name=f"tiny {family}", context_limit=context_limit)


def saved(model, folder):
    """The folder, as text, with the model's tokenizer and configuration: what `connect` reads of it."""
    model.tokenizer.save_pretrained(folder)
    model.hf.config.save_pretrained(folder)
    return str(folder)


def with_end_token(target, token):
    """The same model, closing its answers with another token."""
    other = dataclasses.replace(target)
    other.__dict__["end_ids"] = (token,)  # where a cached property keeps its value
    return other


def right_with_probability(target, rate):
    """A copy of `target` whose best token is the target's at a share `rate` of the positions, and another elsewhere."""
    hf = copy.deepcopy(target.hf)
    plain, argument = hf.forward, target.cache_argument

    @functools.wraps(plain)
    def forward(input_ids, **arguments):
        # pure Mamba counts no positions: there the token read last decides
        start = arguments[argument].get_seq_length() if target.has_attention else None
        out = plain(input_ids=input_ids, **arguments)
        for row in range(-out.logits.shape[1], 0):
            where = int(input_ids[0, row]) if start is None else start + input_ids.shape[1] + row
            if random.Random(f"position {where}").random() >= rate:
                out.logits[0, row] = out.logits[0, row].roll(1)
        return out

    hf.forward = forward
    return dataclasses.replace(target, hf=hf, name=f"right with probability {rate}")


def greedy(model, prompt, new):
    """Tokens of Hugging Face's own `generate`, and the smallest gap between its two best logits on the way."""
    out = model.hf.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=new,
        do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    best = torch.stack(out.logits)[:, 0].topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


@functools.cache
def plain_answer(model, length=7, new=48):
    """(prompt, greedy answer) of a random prompt on which no two best tokens nearly tie: rounding cannot decide."""
    for seed in range(200):
        prompt = torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        tokens, margin = greedy(model, prompt, new)
        if margin > 2e-4 and len(tokens) == new and len(set(tokens)) > new // 6:
            return prompt, tokens
    raise AssertionError(f"{model.name}: no prompt with a clear greedy answer")


@functools.cache
def letters():
    """Another vocabulary for the same texts: one token a letter."""
    alphabet = {token: i for i, token in enumerate([*SPECIAL, *sorted(set("".join(WORDS)))])}
    core = Tokenizer(models.WordLevel(alphabet, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.add_special_tokens(SPECIAL)
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT)


@dataclasses.dataclass(frozen=True)
class ScriptedJudge(LabelJudge):
    """The real judge's pass, but scores that depend on a seed and the cut alone: boundaries fall everywhere."""

    question: str = "?"
    seed: int = 0
    value: float | None = None

    def score(self, session, draft, cuts, probes):
        scores = super().score(session, draft, cuts, probes)
        start = session.length
        values = (random.Random(f"{self.seed}:{start}:{cut}").random() for cut in probes)
        return dataclasses.replace(scores, values=tuple(v if self.value is None else self.value for v in values))
