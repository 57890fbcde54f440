"""The configuration of an EAGLE-3 head, read from the config.json of every public layout.

    EAGLE repository     flat Llama-like configuration
    SpecForge / SGLang   the same, taps under `eagle_config`, sometimes `fc_norm` and `norm_output` (EAGLE-3.1)
    vLLM speculators     nested: `speculators_model_type`, `transformer_layer_config`

The raw JSON is read rather than a Hugging Face configuration object, which fills in a rope base that the file does not
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.activations import ACT2FN

from parsedec.errors import IncompatibleStack
from parsedec_adapters.eagle3.rotation import check_rope

DEFAULT_ROPE_BASE = 10000.0  # heads without `rope_theta` are trained with this, whatever the target's base is
DEFAULT_POSITIONS = 2048
DEFAULT_TAPS = 3


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes and variants of a head.

    hidden_size, target_hidden_size   width of the head and of the target's hidden states
    vocab_size, draft_vocab_size      sizes of the target's vocabulary and of the part of it that the head can guess
    max_position_embeddings           context length the head was trained on, in tokens
    num_taps, taps                    how many hidden states are fused, and which (None: EAGLE's choice for the target)
    rope                              `rope_theta`, `rope_type` and what that type needs, as in transformers
    norm_before_residual              whether the first layer's residual is the normed hidden state
    norm_before_fc, fc_norm           one norm over all taps, or one for each, before they are fused
    norm_output                       whether the output is normed before it is fed back (EAGLE-3.1)
    mlp_stream                        whether layers after the first get the MLP's output without its residual, as
                                      SGLang runs `additional_layers`
    own_embedding                     whether the head has token embeddings of its own
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    num_taps: int = DEFAULT_TAPS
    num_layers: int = 1
    max_position_embeddings: int = DEFAULT_POSITIONS
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": DEFAULT_ROPE_BASE})
    taps: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = False
    mlp_stream: bool = False
    own_embedding: bool = False
    trained_for: str = ""

    @property
    def reduced(self) -> bool:
        """Whether the head has a smaller vocabulary of its own."""
        return self.draft_vocab_size != self.vocab_size


def read_config(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str) -> HeadConfig:
    """The configuration of a head from its raw config.json and the shapes of its tensors (canonical names).

    In the flat layouts the weights decide on optional tensors (biases, query norms, more layers), since trainers copy
    those keys from the target's configuration. Raises IncompatibleStack that names a missing or unsupported key.
    """
    nested = "speculators_model_type" in raw or "transformer_layer_config" in raw
    layer = raw.get("transformer_layer_config", {}) if nested else raw
    _refuse_strangers(raw, layer, nested, source)
    whole = _Required(layer, source)
    hidden, heads = whole.number("hidden_size"), whole.number("num_attention_heads")
    vocab = whole.number("vocab_size")
    target_hidden = int(raw.get("target_hidden_size") or hidden)
    first = "layers.0.self_attn"
    flat_bias = f"{first}.q_proj.bias" in shapes
    bias = bool(layer.get("attention_bias")) if nested else flat_bias
    return HeadConfig(
        hidden_size=hidden,
        intermediate_size=whole.number("intermediate_size"),
        num_heads=heads,
        num_kv_heads=int(layer.get("num_key_value_heads") or heads),
        head_dim=int(layer.get("head_dim") or hidden // heads),
        vocab_size=vocab,
        draft_vocab_size=int(raw.get("draft_vocab_size") or vocab),
        target_hidden_size=target_hidden,
        num_taps=_count_taps(shapes, target_hidden, source),
        num_layers=int(layer.get("num_hidden_layers") or 1) if nested else _count_layers(shapes),
        max_position_embeddings=int(layer.get("max_position_embeddings") or DEFAULT_POSITIONS),
        rms_norm_eps=float(layer.get("rms_norm_eps", 1e-6)),
        hidden_act=str(layer.get("hidden_act", "silu")),
        rope=_rope(layer, source),
        taps=_taps(raw),
        norm_before_residual=_norm_before_residual(raw, nested, source),
        norm_before_fc=bool(raw.get("norm_before_fc")),
        fc_norm=bool(raw.get("fc_norm")),
        norm_output=bool(raw.get("norm_output")),
        qk_norm=layer.get("model_type") == "qwen3" if nested else f"{first}.q_norm.weight" in shapes,
        qkv_bias=bias,
        output_bias=bias if nested else f"{first}.o_proj.bias" in shapes,
        mlp_bias=bool(layer.get("mlp_bias")) if nested else "layers.0.mlp.gate_proj.bias" in shapes,
        fc_bias=bool(raw.get("bias")) and "fc.bias" in shapes,
        mlp_stream="layers.1.hidden_norm.weight" in shapes,
        own_embedding="embed_tokens.weight" in shapes,
        trained_for=_trained_for(raw),
    )


def flat_config(config: HeadConfig) -> dict[str, Any]:
    """The config.json of a head in the EAGLE repository's layout, with the keys of its variants where they differ."""
    rope = dict(config.rope)
    theta = rope.pop("rope_theta")
    written: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_layers,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "rope_theta": theta,
        "tie_word_embeddings": False,
    }
    if rope.get("rope_type") != "default":
        written["rope_scaling"] = rope
    if config.target_hidden_size != config.hidden_size:
        written["target_hidden_size"] = config.target_hidden_size
    if config.taps is not None:
        written["eagle_aux_hidden_state_layer_ids"] = list(config.taps)
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        if getattr(config, name):
            written[name] = True
    if config.fc_bias:
        written["bias"] = True
    return written


class _Required:
    """Reads whole numbers that a configuration must have."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def number(self, key: str) -> int:
        value = self.raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise IncompatibleStack(
                f"{self.source}/config.json has {key}={value!r}; expected a whole number, as EAGLE-3 heads have. "
                "Is this an EAGLE-3 head, and is the file complete?"
            )
        return value


def _refuse_strangers(raw: Mapping[str, Any], layer: Mapping[str, Any], nested: bool, source: str) -> None:
    kind = raw.get("speculators_model_type", "eagle3")
    if nested and kind != "eagle3":
        raise IncompatibleStack(
            f"{source} is a '{kind}' speculator; inner=eagle3 reads 'eagle3'. Choose another inner."
        )
    if (raw.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        raise IncompatibleStack(
            f"{source} says use_aux_hidden_state=false: a head of EAGLE-1 or 2, which reads no taps of the target. "
            "inner=eagle3 needs an EAGLE-3 head."
        )
    if raw.get("norm_before_fc") and raw.get("fc_norm"):
        raise IncompatibleStack(f"{source} sets both norm_before_fc and fc_norm; expected at most one of them.")
    windowed = "sliding_attention" in (layer.get("layer_types") or [])
    if nested and (windowed or (layer.get("sliding_window") and layer.get("use_sliding_window", True))):
        raise IncompatibleStack(
            f"{source} has sliding-window attention (sliding_window={layer.get('sliding_window')}), which is not "
            "supported in a head; expected full attention."
        )
    act = layer.get("hidden_act", "silu")
    if act not in ACT2FN:
        raise IncompatibleStack(
            f"{source} has hidden_act='{act}', which transformers does not know; expected e.g. silu."
        )


def _count_taps(shapes: Mapping[str, tuple[int, ...]], target_hidden: int, source: str) -> int:
    """How many taps `fc` fuses, by its width, whatever the configuration says."""
    shape = shapes.get("fc.weight")
    if shape is None or len(shape) != 2:
        return DEFAULT_TAPS  # the loader then names fc.weight
    if shape[1] % target_hidden:
        raise IncompatibleStack(
            f"{source}: fc.weight is {list(shape)}; expected a multiple of the target's hidden size {target_hidden} in "
            "its second dimension. Is target_hidden_size missing from config.json?"
        )
    return shape[1] // target_hidden


def _count_layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("layers.")), default=0)


def _taps(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Taps as `output_hidden_states` indices; None if the head names none.

    A top-level list names layers whose *input* is read, which are these indices. Under `eagle_config` there are two
    conventions: a list that begins with 1 names layers whose *output* is read (SGLang decides the same way).
    """
    if (ids := raw.get("eagle_aux_hidden_state_layer_ids")) is not None:
        return tuple(int(i) for i in ids)
    ids = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not ids:
        return None
    return tuple(int(i) + (1 if int(ids[0]) == 1 else 0) for i in ids)


def _norm_before_residual(raw: Mapping[str, Any], nested: bool, source: str) -> bool:
    value = raw.get("norm_before_residual")
    if value is None and nested:
        raise IncompatibleStack(
            f"{source}/config.json does not set norm_before_residual, and readers of the speculators layout disagree "
            "on its default. Set inner.norm_before_residual to what the head was trained with."
        )
    return bool(value)


def _rope(layer: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`rope_theta`, `rope_type` and the rest, from whichever of the three spellings the file uses."""
    given = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    given.setdefault("rope_type", given.pop("type", None) or "default")
    given.pop("type", None)
    theta = given.get("rope_theta")
    given["rope_theta"] = float(layer.get("rope_theta") or DEFAULT_ROPE_BASE) if theta is None else float(theta)
    if "partial_rotary_factor" in layer:
        given.setdefault("partial_rotary_factor", layer["partial_rotary_factor"])
    check_rope(given, source)
    return given


def _trained_for(raw: Mapping[str, Any]) -> str:
    verifier = (raw.get("speculators_config") or {}).get("verifier") or {}
    return str(verifier.get("name_or_path") or raw.get("target_model_name_or_path") or "")
