"""More layers for a trained model, in which it can learn to find errors while all that it knows stays as it is.

A new layer adds nothing to the residual stream at first, so training goes on from all that the model can do. The first
new layer starts out attending to the position before: that one holds the token that the model expected, and an error
shows in the token being another. Random attention would have to discover this by itself, which takes far longer.

Shapes in this file:  H hidden, d head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parsedec.errors import ConfigError
from parsedec.models.language_model import LanguageModel

# Weights of rotation speeds 0 to 3, and of the slowest one, in the score of a head that looks one position back. They
# make the score 1 at that position, at most 0.3 at its neighbours and below 0 nearly everywhere else.
FAST, SLOWEST = 0.75, -2.0
SHARPNESS = 5.5  # the score is multiplied by this before the softmax


def grown(model: LanguageModel, layers: int, seed: int, texts: Sequence[Sequence[int]]) -> LanguageModel:
    """The model with `layers` new layers on top that change nothing yet; it reads `texts` to set up the first of them.

    Raises ConfigError for a model whose layers are not of the Llama type.
    """
    config = copy.deepcopy(model.hf.config)
    old = config.num_hidden_layers
    config.num_hidden_layers = old + layers
    torch.manual_seed(seed)  # transformers draws the new weights from the global generator
    try:
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = [*kinds, *kinds[-1:] * layers]
        hf: Any = type(model.hf)(config).to(model.device)
        missing, unknown = hf.load_state_dict(model.hf.state_dict(), strict=False)
        strays = [name for name in missing if not any(f"layers.{old + i}." in name for i in range(layers))]
        if unknown or strays:
            raise AttributeError(f"weights that do not fit: {[*unknown, *strays][:3]}")
        new = list(hf.base_model.layers[old:])
        for layer in new:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        _look_back(new[0].self_attn, _constant(hf, old, new[0].input_layernorm, texts))
    except AttributeError as missing:
        raise ConfigError(
            f"recipe.grow={layers}: layers cannot be added to a {type(model.hf).__name__} ({missing}); "
            "expected layers of the Llama type. Use recipe.grow=0."
        ) from missing
    return LanguageModel.wrap(hf, model.tokenizer, name=model.name, judge_card=model.judge_card)


def freeze(model: LanguageModel, layers: int) -> None:
    """Keep the embeddings and the first `layers` layers from being trained; 0 trains everything."""
    if not 0 <= layers < model.num_layers:
        raise ConfigError(f"recipe.freeze={layers}, but the model has {model.num_layers} layers; expected fewer.")
    if layers:
        for part in (model.hf.get_input_embeddings(), *model.hf.base_model.layers[:layers]):
            part.requires_grad_(False)


@torch.no_grad()
def renew(model: LanguageModel, tokens: Sequence[str], seed: int) -> None:
    """Give tokens that the model has never met new embeddings, in random directions.

    Training pushes the output rows of all unused tokens in the same direction. Unused control tokens can then hardly be
    told apart, and frozen embeddings would keep it so. The new rows are half as long as the median row, so that they
    are nowhere likely by chance.
    """
    ids = model.tokenizer.convert_tokens_to_ids(list(tokens))
    known = model.tokenizer.get_vocab()
    if strangers := [token for token in tokens if token not in known]:
        raise ConfigError(
            f"recipe.new_tokens has {strangers}, which are not in {model.name}'s vocabulary. Leave them out."
        )
    generator = torch.Generator().manual_seed(seed)
    tables = {part.weight for part in (model.hf.get_input_embeddings(), model.hf.get_output_embeddings())}
    for table in tables:  # only one if input and output share it
        rows = torch.randn(len(ids), table.shape[1], generator=generator)
        rows *= table.norm(dim=1).median().item() / 2 / rows.norm(dim=1, keepdim=True)
        table[ids] = rows.to(table)


@torch.no_grad()
def _constant(hf: Any, layer: int, norm: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """A direction [H] along which all normed inputs of a layer are about 1. It stands in for a bias, which projections
    here lack."""
    rows = torch.cat(
        [
            norm(hf.base_model(_ids(hf, text), use_cache=False, output_hidden_states=True).hidden_states[layer])[0]
            for text in texts
        ]
    ).double()
    gram = rows.T @ rows / len(rows)
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    constant: Tensor = torch.linalg.solve(gram, rows.mean(0))
    return constant.float()


def _ids(hf: Any, text: Sequence[int]) -> Tensor:
    return torch.tensor([list(text)], device=next(hf.parameters()).device)


@torch.no_grad()
def _look_back(attention: Any, constant: Tensor) -> None:
    """Make every head attend to the position before, and pass on what it finds there."""
    d, config = attention.head_dim, attention.config
    device = constant.device
    steps = torch.arange(0, d, 2, device=device) / d
    speeds = config.rope_parameters["rope_theta"] ** -steps  # radians a position, [d / 2]
    weights = torch.zeros(d // 2, device=device)
    weights[:4], weights[-1] = FAST, SLOWEST
    weights *= SHARPNESS * d**0.5
    zero = torch.zeros_like(weights)
    query = torch.cat([weights.abs().sqrt(), zero])  # rotation i turns components i and i + d / 2
    key = torch.cat([weights.sign() * weights.abs().sqrt() * turned for turned in (speeds.cos(), speeds.sin())])
    for projection, vector in ((attention.q_proj, query), (attention.k_proj, key)):
        heads = projection.out_features // d
        projection.weight.copy_(vector.repeat(heads)[:, None] * constant[None])
    nn.init.eye_(attention.v_proj.weight)
