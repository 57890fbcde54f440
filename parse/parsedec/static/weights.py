"""Which models the static backend can run, and their weights: the Hugging Face modules' own tensors.

Known are dense decoders of one kind - RMSNorm, rotary positions, grouped-query attention, SwiGLU - with or without
biases and norms of queries and keys: Llama, Mistral without a window, Qwen2 and Qwen3.

Shapes in this file:  H hidden, I intermediate, A query heads, G key and value heads, d head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parsedec.models.language_model import LanguageModel

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Angles that depend on the position alone. "dynamic" and "longrope" change with the length of the text.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
DEVICES = ("cpu", "cuda")
HARMLESS = ("transformers.utils.output_capturing", "parsedec.")  # modules whose hooks change no result
PACK_LIMIT = 1 << 30  # bytes: the largest weights that packed copies are made of


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W + b.  weight [in, out]: the module's own, transposed by a view, or a packed copy; bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def onto(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """x + y W + b: on the CPU as one tensor, since the product can add x; on CUDA as x and what is to be added.

        On CUDA the product would first copy x, while the norm that follows adds at no cost.
        """
        if x.is_cuda:
            return x, self(y)
        return torch.addmm(x if self.bias is None else x + self.bias, y, self.weight), None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm over the last dimension, of size H: x w / sqrt(mean(x²) + epsilon).

    Packed: with scaled = w sqrt(H) and least = sqrt(H epsilon), the same is x scaled / hypot(|x|, least). That is four
    operations; on the CPU, torch takes ten.
    """

    weight: Tensor
    epsilon: float
    scaled: Tensor | None
    least: Tensor | None

    @classmethod
    def of(cls, module: Any, pack: bool) -> Norm:
        weight, epsilon, size = module.weight, float(module.variance_epsilon), module.weight.numel()
        least = torch.tensor(math.sqrt(size * epsilon)) if pack else None
        return cls(weight, epsilon, weight * math.sqrt(size) if pack else None, least)

    def __call__(self, x: Tensor) -> Tensor:
        if self.scaled is None or self.least is None:
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * self.scaled).div_(torch.hypot(length, self.least))


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; with norms of queries and keys, if the family has them.

    Packed and joined layers have one matrix for queries, keys and values, and one for gate and up; others have more.
    """

    qkv: tuple[Linear, ...]  # [H, A * d], [H, G * d] twice; or [H, (A + 2 * G) * d]
    o: Linear  # [A * d, H]
    gate_up: tuple[Linear, ...]  # [H, I] twice; or [H, 2 * I]
    down: Linear  # [I, H]
    before_attention: Norm  # [H]
    before_mlp: Norm  # [H]
    q_norm: Norm | None  # [d]
    k_norm: Norm | None  # [d]

    @property
    def norms(self) -> tuple[Norm, Norm] | None:
        """The norms of queries and keys."""
        return None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model: its tensors, and the few numbers that say how to use them.

    rotary    the model's own module, (x, position ids) -> (cos, sin)
    scale     of the attention scores
    packed    bytes of the copies that were made
    versions  of the parameters when they were read
    points    if copies were made: one number of each parameter, and in `values` what it was. Writing to `.data`, as
              merging adapters does, does not count as a new version
    """

    embedding: Tensor  # [V, H]
    layers: tuple[Layer, ...]
    norm: Norm  # [H]
    head: Linear  # [H, V]
    rotary: nn.Module
    query_heads: int
    kv_heads: int
    head_size: int
    scale: float
    packed: int
    parameters: tuple[Tensor, ...]
    versions: tuple[tuple[int, int], ...]
    points: tuple[Tensor, ...]
    values: Tensor | None

    @property
    def fresh(self) -> bool:
        """Whether the parameters are still those that were read; if copies were made, with the same content."""
        same = _versions(self.parameters, bool(self.packed)) == self.versions
        return same and (self.values is None or torch.equal(torch.cat(self.points), self.values))

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[1]


def static_obstacle(model: LanguageModel) -> str | None:
    """Why the static backend cannot run this model, or None if it can."""
    hf = model.hf
    if type(hf).__name__ not in FAMILIES or not type(hf).__module__.startswith("transformers.models."):
        return f"an architecture that is not written for it ({type(hf).__name__}; it has {', '.join(FAMILIES)})"
    if any(model.windows.values()):
        return f"a sliding window ({model.windows})"
    replaced = [type(module).__name__ for module in hf.modules() if "forward" in vars(module)]
    if replaced:
        return f"modules whose forward was replaced ({replaced[0]}), as device_map does"
    hooked = [type(module).__name__ for module in hf.modules() if foreign_hooks(module)]
    if hooked:
        return f"modules with hooks of somebody's ({hooked[0]}), which only their own forward calls"
    return _strange_modules(hf) or _strange_tensors(hf) or _strange_rope(hf)


def foreign_hooks(module: nn.Module) -> tuple[int, ...]:
    """The hooks of a module's forward, except harmless ones that only collect or count."""
    if not module._forward_hooks and not module._forward_pre_hooks:  # the usual case, checked for every new session
        return ()
    hooks = {**module._forward_hooks, **module._forward_pre_hooks}
    return tuple(key for key, hook in hooks.items() if not str(getattr(hook, "__module__", "")).startswith(HARMLESS))


def _strange_modules(hf: Any) -> str | None:
    """Modules of an unknown kind, as quantisation and adapters put in the places of plain ones."""
    kinds = {type(module).__name__ for module in _projections(hf) if type(module) is not nn.Linear}
    if kinds or type(hf.model.embed_tokens) is not nn.Embedding:
        found = sorted(kinds) or [type(hf.model.embed_tokens).__name__]
        return f"weights in modules of another kind ({', '.join(found)}), as quantisation and adapters put there"
    if hf.config.hidden_act != "silu":
        return f"the activation '{hf.config.hidden_act}' (expected silu)"
    return None


def _strange_tensors(hf: Any) -> str | None:
    places = {(tensor.device.type, tensor.device, tensor.dtype) for tensor in hf.parameters()}
    if len(places) > 1 or next(iter(places))[0] not in DEVICES:
        return f"weights on several devices, of several dtypes, or elsewhere than on {' or '.join(DEVICES)}"
    return None


def _strange_rope(hf: Any) -> str | None:
    kind = getattr(hf.model.rotary_emb, "rope_type", None)
    if kind not in FIXED_ROPE:
        return f"rotary positions of type '{kind}' (it has {', '.join(FIXED_ROPE)}: angles that depend on nothing else)"
    x = torch.zeros(1, dtype=hf.dtype, device=hf.device)
    cos, _ = hf.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long, device=hf.device))
    size = hf.model.layers[0].self_attn.head_dim
    return None if cos.shape[-1] == size else f"rotary positions in {cos.shape[-1]} of {size} dimensions of a head"


def _projections(hf: Any) -> Iterator[Any]:
    for layer in hf.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    yield hf.lm_head


@torch.no_grad()
def read_weights(hf: Any) -> Weights:
    """The weights of a model that has no obstacle.

    They are the modules' own tensors: nothing is copied, and whatever is trained or loaded into them counts at once.

    The one exception is a float32 model of up to PACK_LIMIT bytes on the CPU. There, the time of a product of few rows
    depends on the order in which the matrix is read. Copies laid out [in, out], side by side where they are read
    together, make a token a third faster (MKL, two kinds of CPU). They are made again when a parameter has changed.

    On CUDA, weights that are read together are joined: the modules' parameters become parts of one tensor. This saves
    three matrix products per layer, and leaves none too small to keep the memory busy.
    """
    attention, parameters = hf.model.layers[0].self_attn, tuple(hf.parameters())
    if hf.device.type == "cuda":
        join_weights(hf)
        torch.cuda.empty_cache()  # the parameters' former blocks, which are too small for joined ones
    size = attention.head_dim
    copied = sum(module.weight.nbytes for module in _projections(hf))
    pack = hf.device.type == "cpu" and hf.dtype == torch.float32 and copied <= PACK_LIMIT
    points = tuple(part.detach().flatten().narrow(0, part.numel() // 2, 1) for part in parameters) if pack else ()
    return Weights(
        embedding=hf.model.embed_tokens.weight,
        layers=tuple(_layer(layer, pack) for layer in hf.model.layers),
        norm=Norm.of(hf.model.norm, pack),
        head=_linears([hf.lm_head], pack)[0],
        rotary=hf.model.rotary_emb,
        query_heads=attention.q_proj.out_features // size,
        kv_heads=attention.k_proj.out_features // size,
        head_size=size,
        scale=float(attention.scaling),
        packed=copied if pack else 0,
        parameters=parameters,
        versions=_versions(parameters, pack),
        points=points,
        values=torch.cat(points) if pack else None,
    )


def _layer(module: Any, pack: bool) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        qkv=_linears([attention.q_proj, attention.k_proj, attention.v_proj], pack),
        o=_linears([attention.o_proj], pack)[0],
        gate_up=_linears([mlp.gate_proj, mlp.up_proj], pack),
        down=_linears([mlp.down_proj], pack)[0],
        before_attention=Norm.of(module.input_layernorm, pack),
        before_mlp=Norm.of(module.post_attention_layernorm, pack),
        q_norm=None if q_norm is None else Norm.of(q_norm, pack),
        k_norm=None if k_norm is None else Norm.of(k_norm, pack),
    )


@torch.no_grad()
def join_weights(hf: Any) -> None:
    """Move weights that one product can read together next to each other in memory, so that `joined` finds them.

    The parameters stay the same objects, for the modules and for an optimizer; only their storage changes, one group of
    a layer at a time.
    """
    for layer in hf.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for modules in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
            for parts in ([module.weight for module in modules], [module.bias for module in modules]):
                if parts[0] is None or joined(parts) is not None or any(part.is_inference() for part in parts):
                    continue
                whole = torch.cat(parts)
                for part, place in zip(parts, whole.split_with_sizes([len(part) for part in parts]), strict=True):
                    part.data = place


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """One tensor of all rows of `parts`, if they are next to each other in memory; else None."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        one_storage = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not part.is_contiguous() or not one_storage or part.storage_offset() != at:
            return None
        at += part.numel()
    return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def _linears(modules: list[Any], pack: bool) -> tuple[Linear, ...]:
    if not pack:
        weight = joined([module.weight for module in modules])
        bias = None if modules[0].bias is None else joined([module.bias for module in modules])
        if weight is not None and (bias is None) == (modules[0].bias is None):
            return (Linear(weight.t(), bias),)
        return tuple(Linear(module.weight.t(), module.bias) for module in modules)
    biases = [module.bias for module in modules]
    weight = torch.cat([module.weight for module in modules]).t().contiguous()
    return (Linear(weight, torch.cat(biases) if biases[0] is not None else None),)


def _versions(parameters: tuple[Tensor, ...], content: bool) -> tuple[tuple[int, int], ...]:
    """Where the parameters are and, for `content`, how often they were written to (unknown for inference tensors)."""
    return tuple((p.data_ptr(), p._version if content and not p.is_inference() else 0) for p in parameters)
