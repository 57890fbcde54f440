"""The Medusa heads as a network (Cai et al. 2024, arXiv 2401.10774).

Head k reads the target's hidden state after the final norm - as does the target's own output matrix, which predicts the
next token - and predicts the token k + 2 places on:

    x <- x + SiLU(W x + b)   for every layer;      logits = O x

Shapes in this file:  K heads, J layers per head, H hidden size of the target, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.models.checkpoints import write_tensors
from parsedec.models.language_model import LanguageModel

LAYOUTS = ("v0.1", "legacy")
HEADS_FILE = "medusa_lm_head.safetensors"


class MedusaHeads(nn.Module):
    """K heads of J residual layers. Without output matrices of their own (`vocab` None), they borrow the target's.

    weight  [J, K, H, H]     bias  [J, K, H]     output  [K, V, H] or None

    The weights of all heads are one tensor per kind, so that a proposal is one batched product. New heads have zero
    weights and biases, so that layers are the identity and `for_target` starts from the target's own output matrix.
    """

    def __init__(self, *, heads: int, hidden: int, vocab: int | None, layers: int = 1) -> None:
        super().__init__()
        if min(heads, hidden, layers) < 1 or (vocab is not None and vocab < 1):
            raise ConfigError(
                f"Medusa heads with heads={heads}, layers={layers}, hidden={hidden}, vocab={vocab}; "
                "expected at least 1 of each."
            )
        self.weight = nn.Parameter(torch.zeros(layers, heads, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(layers, heads, hidden))
        self.output = None if vocab is None else nn.Parameter(torch.zeros(heads, vocab, hidden))

    @classmethod
    def for_target(cls, target: LanguageModel, *, heads: int = 5, layers: int = 1, own_output: bool = True) -> Self:
        """New heads for a target, in float32 on its device; every head starts as the target's own output matrix."""
        table = output_layer(target).weight
        made = cls(heads=heads, hidden=table.shape[1], vocab=table.shape[0] if own_output else None, layers=layers)
        if made.output is not None:
            with torch.no_grad():
                made.output.copy_(table.float().expand(heads, -1, -1))
        return made.to(target.device)

    @property
    def heads(self) -> int:
        return self.weight.shape[1]

    @property
    def layers(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden(self) -> int:
        return self.weight.shape[2]

    @property
    def vocab(self) -> int | None:
        """Rows of the heads' own output matrices; None if they use the target's."""
        return None if self.output is None else self.output.shape[1]

    def features(self, hidden: Tensor, first: int | None = None) -> Tensor:
        """The input of the output matrices: [..., H] -> [K, ..., H]. `first`: only the first so many heads."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # [R, H]
        x = rows.expand(self.heads if first is None else first, -1, -1)  # [K, R, H]
        for weight, bias in zip(self.weight[:, :first], self.bias[:, :first], strict=True):
            x = x + nn.functional.silu(torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)))
        return x.reshape(-1, *hidden.shape)

    def forward(self, hidden: Tensor, base: nn.Module | None = None, first: int | None = None) -> Tensor:
        """Logits of every head: [..., H] -> [K, ..., V]. `base`: the target's output layer, if heads have none."""
        x = self.features(hidden, first)
        if self.output is not None:
            rows = x.reshape(len(x), -1, self.hidden)  # [K, R, H]
            return torch.bmm(rows, self.output[:first].transpose(1, 2)).reshape(*x.shape[:-1], -1)
        if base is None:
            raise ConfigError("these Medusa heads have no output matrices; pass the target's output layer as base.")
        logits: Tensor = base(x)
        return logits


def output_layer(target: LanguageModel) -> nn.Linear:
    """The layer that turns the target's last hidden state into logits."""
    layer = target.hf.get_output_embeddings()
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise IncompatibleStack(
            f"inner=medusa needs the output matrix of {target.name} ({type(target.hf).__name__}), but the model does "
            "not say which of its layers that is. Use heads with output matrices of their own."
        )
    return layer  # type: ignore[no-any-return]


def save_heads(heads: MedusaHeads, folder: str | Path, *, layout: str = "v0.1", base_model: str = "") -> Path:
    """Write heads as config.json and medusa_lm_head.safetensors, which `load_heads` and public tools read.

    layout      "v0.1": layers and output matrices. "legacy": layers only, for heads that borrow the target's matrix
    base_model  name of the model they belong to, for readers of config.json

    The tensors keep their dtype. Returns the path of the weights.
    """
    if layout not in LAYOUTS or (layout == "legacy") != (heads.output is None):
        raise ConfigError(
            f"layout='{layout}' for heads {'without' if heads.output is None else 'with'} output matrices; expected "
            "v0.1 for heads with their own, legacy for heads without."
        )
    tensors: dict[str, Tensor] = {}
    for k in range(heads.heads):
        for j in range(heads.layers):
            tensors[f"{k}.{j}.linear.weight"] = heads.weight[j, k]
            tensors[f"{k}.{j}.linear.bias"] = heads.bias[j, k]
        if heads.output is not None:
            tensors[f"{k}.{heads.layers}.weight"] = heads.output[k]
    config = {"medusa_num_heads": heads.heads, "medusa_num_layers": heads.layers, "base_model_name_or_path": base_model}
    folder = Path(folder)
    write_tensors(tensors, folder / HEADS_FILE)
    config |= {"version": "2"} if layout == "legacy" else {}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder / HEADS_FILE
