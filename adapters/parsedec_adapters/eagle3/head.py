"""The EAGLE-3 head (arXiv 2503.01840): fuses hidden states of the target and continues them token by token.

    row t reads  h = fuse(taps of the target at t)  and  token t + 1,  and guesses token t + 2
    x = [norm(embedding of the token), norm(h)]      r = h + attention(x)      out = r + MLP(norm(r))
    logits = lm_head(norm(out));  `out` takes the place of h where the target has not read yet

Variants (EAGLE-3.1, vLLM speculators, SGLang) are flags of `HeadConfig`.

Shapes in this file:  B batch, n rows of this call, S rows attended to, L taps, H target hidden, D head hidden,
                      d head dim, V vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from parsedec_adapters.eagle3.config import HeadConfig
from parsedec_adapters.eagle3.rotation import CosSin, Rotations, rotate


class Cache(Protocol):
    """Keys and values of earlier rows."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of this call [B, kv, n, d]; returns all of them [B, kv, S, d]."""


class ConcatCache:
    """A cache that gradients flow through, for training, which feeds the head its own outputs."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._rows:
            before = self._rows[layer]
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        self._rows[layer] = keys, values
        return keys, values


class HeadOutput(NamedTuple):
    """hidden [B, n, D], to be fed back; logits [B, n, W] over the draft vocabulary."""

    hidden: Tensor
    logits: Tensor


class Attention(nn.Module):
    """Grouped-query attention whose input may be twice as wide as its output."""

    def __init__(self, config: HeadConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        wide = config.hidden_size * (2 if layer == 0 else 1)
        inner, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(wide, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(wide, shared, bias=config.qkv_bias)
        self.v_proj = nn.Linear(wide, shared, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.grouped = config.num_heads != config.num_kv_heads

    def forward(self, x: Tensor, rotation: CosSin, mask: Tensor | None, cache: Cache | None) -> Tensor:
        query, key, value = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        if self.grouped and mask is not None and query.shape[0] == 1:
            seen = _by_groups(query, key, value, mask)
        else:
            causal = mask is None and query.shape[2] > 1
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped
            )  # [B, heads, n, d]
            seen = out.transpose(1, 2).flatten(2)
        attended: Tensor = self.o_proj(seen)
        return attended

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, heads, n, d]


def _by_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Grouped attention with the groups as a batch, since no fused CUDA kernel takes both groups and a mask.

    query [1, heads, n, d], key and value [1, kv, S, d]; returns [1, n, heads * d].
    """
    shared = key.shape[1]
    groups = query.view(shared, -1, *query.shape[2:])  # [kv, heads / kv, n, d]
    key, value = (part.transpose(0, 1).expand(-1, groups.shape[1], -1, -1) for part in (key, value))
    out = functional.scaled_dot_product_attention(groups, key, value, attn_mask=mask)
    return out.permute(2, 0, 1, 3).reshape(1, query.shape[2], -1)


class GatedMLP(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        written: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return written


class Layer(nn.Module):
    """The first layer reads token and hidden state side by side; the others are ordinary decoder layers."""

    def __init__(self, config: HeadConfig, layer: int) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config)
        # names as in the public files: `additional_layers` call their one input norm hidden_norm
        self.hidden_norm = nn.RMSNorm(*norm) if layer == 0 or config.mlp_stream else None
        self.input_layernorm = nn.RMSNorm(*norm) if layer == 0 or not config.mlp_stream else None
        self.post_attention_layernorm = nn.RMSNorm(*norm)

    def read(self, hidden: Tensor, embedded: Tensor | None, norm_before_residual: bool) -> tuple[Tensor, Tensor]:
        """(input of the attention, residual)."""
        if embedded is None:
            norm = self.input_layernorm or self.hidden_norm
            assert norm is not None
            return norm(hidden), hidden
        assert self.input_layernorm is not None
        assert self.hidden_norm is not None
        normed = self.hidden_norm(hidden)
        return torch.cat([self.input_layernorm(embedded), normed], -1), normed if norm_before_residual else hidden


class EagleHead(nn.Module):
    """The network and its vocabulary map. Callers own the caches of their requests.

    Without embeddings of its own, it borrows the target's (`with_embedding`).
    """

    d2t: Tensor | None
    t2d: Tensor | None

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        eps, fused = config.rms_norm_eps, config.num_taps * config.target_hidden_size
        self.fc = nn.Linear(fused, config.hidden_size, bias=config.fc_bias)
        self.input_norm = nn.RMSNorm(fused, eps) if config.norm_before_fc else None
        each = [nn.RMSNorm(config.target_hidden_size, eps) for _ in range(config.num_taps if config.fc_norm else 0)]
        self.fc_norm = nn.ModuleList(each) if each else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if config.own_embedding else None
        reduced = config.reduced
        # target id = draft id + d2t[draft id]; t2d: whether a target token can be guessed
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long) if reduced else None)
        first = torch.arange(config.vocab_size) < config.draft_vocab_size
        self.register_buffer("t2d", first if reduced else None)
        self.rotations = Rotations(config.head_dim, config.max_position_embeddings, config.rope)
        self._borrowed: Tensor | None = None
        self.shared: dict[Any, Any] = {}  # what speculators share among all requests of this head and its twins

    @property
    def embedding(self) -> Tensor | None:
        """Token embeddings [V, D]: the head's own, or borrowed ones."""
        return self._borrowed if self.embed_tokens is None else self.embed_tokens.weight

    def with_embedding(self, weight: Tensor) -> EagleHead:
        """A head with the same parameters that reads tokens through `weight` [V, D], unless it has embeddings."""
        twin = copy.copy(self)
        twin.shared = self.shared
        twin._borrowed = weight.detach()  # detached: a parameter would be registered, in this head as well
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files, without graphs and stores, which belong to this head alone."""
        return {**self.__dict__, "shared": {}}

    def set_vocabulary(self, tokens: Tensor) -> None:
        """Set the W target ids that the head can guess, ascending; for a head that is about to be trained."""
        assert self.d2t is not None
        assert self.t2d is not None
        tokens = tokens.to(self.d2t.device)
        self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
        self.t2d.zero_()[tokens] = True

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft ids as ids of the target's vocabulary."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def fuse(self, taps: Tensor) -> Tensor:
        """Hidden states of the target, [B, n, L, H] or [B, n, L * H], as one [B, n, D]."""
        taps = taps.flatten(2)
        if self.input_norm is not None:
            taps = self.input_norm(taps)
        if self.fc_norm is not None:
            parts = taps.chunk(len(self.fc_norm), -1)
            taps = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        fused: Tensor = self.fc(taps)
        return fused

    def advance(
        self,
        hidden: Tensor,
        tokens: Tensor,
        rotation: CosSin,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The head's output [B, n, D] for hidden states [B, n, D] and the tokens [B, n] after them, to be fed back.

        rotation  for the rows' positions, from `self.rotations`
        mask      [.., n, S], True where a row may attend, or additive; None: all of S for one row, causal for several
                  rows without a cache before them
        """
        assert self.embedding is not None, "the head has no token embeddings; lend it those of the target"
        embedded: Tensor | None = functional.embedding(tokens, self.embedding).to(hidden.dtype)
        last = self.layers[-1]
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x, residual = layer.read(hidden, embedded, self.config.norm_before_residual)
            residual = residual + layer.self_attn(x, rotation, mask, cache)
            written = layer.mlp(layer.post_attention_layernorm(residual))
            hidden = written if self.config.mlp_stream and layer is not last else residual + written
            embedded = None
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the draft vocabulary [.., W] from `advance`'s output."""
        scores: Tensor = self.lm_head(hidden if self.config.norm_output else self.norm(hidden))
        return scores

    def guess(
        self,
        hidden: Tensor,
        tokens: Tensor,
        rotation: CosSin,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> HeadOutput:
        """As `advance`, with the scores of the next token."""
        hidden = self.advance(hidden, tokens, rotation, mask=mask, cache=cache)
        return HeadOutput(hidden, self.logits(hidden))

    def forward(
        self, taps: Tensor, tokens: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> HeadOutput:
        """A whole batch at once, as in training.

        taps       [B, T, L, H] or [B, T, L * H], the target's at positions t
        tokens     [B, T], those at t + 1
        positions  [B, T]; None: 0..T-1
        mask       [B, 1, T, T], True or additive; None: causal
        """
        hidden = self.fuse(taps)
        if positions is None:
            rotation = self.rotations.rows(0, tokens.shape[1], hidden)
        else:
            rotation = self.rotations.at(positions, hidden)
        return self.guess(hidden, tokens, rotation, mask=mask)
