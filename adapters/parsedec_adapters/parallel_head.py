"""The drafting head of ParallelSpec: one transformer layer that predicts the next k tokens in one pass.

Xiao et al. 2024 (arXiv 2410.05589) draft with distinct mask tokens [MASK]_1 .. [MASK]_k, one group per draft. They
publish neither code nor weights, so this is our reading of the paper, with our own file layout. Rows of a pass:

    row                                                                                          predicts token
    known, at p      [ norm(embedding of token p) | norm(target's last hidden state at p - 1) ]   p + 1
    slot j at p + j  [ norm(learnt embedding e_j) | norm(learnt hidden state)                 ]   p + 1 + j

Queries, keys and values are computed from the 2H-wide rows (as in EAGLE-3), and the residual is their right half; then
come an MLP, a norm, and the target's own output matrix. Slot j of the group after p sees the known rows up to p and the
earlier slots of its group. A draft has a single group, after the root, so this is simply causal.

Files: `config.json` (the fields of `HeadConfig`, and `format`) and `model.safetensors` (the tensors of `ParallelHead`
by name). Embedding and output matrix are the target's and are not stored.

Shapes in this file:  B batch, T tokens, G groups, K slots, R rows, C cached rows, H hidden, d head dimension.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from parsedec.errors import ConfigError, IncompatibleStack
from parsedec.models.checkpoints import find_file, read_tensors, write_tensors
from parsedec.models.language_model import LanguageModel

FORMAT = "parsedec-parallel-head-1"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes of a head. `hidden_size` and `vocab_size` are those of the target it was trained for.

    slots  guesses per pass: one from the root's row, the others from mask slots
    """

    hidden_size: int
    vocab_size: int
    slots: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in asdict(self).items() if name not in ("rope_theta", "rms_norm_eps")}
        wrong = {name: value for name, value in sizes.items() if not isinstance(value, int) or value < 1}
        reals = {"rope_theta": self.rope_theta, "rms_norm_eps": self.rms_norm_eps}
        wrong |= {name: value for name, value in reals.items() if not isinstance(value, int | float) or value <= 0}
        if wrong:
            raise ConfigError(f"a parallel head has {wrong}; expected whole numbers from 1 (rope_theta, eps: above 0).")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ConfigError(
                f"a parallel head has {self.num_attention_heads} heads, {self.num_key_value_heads} key-value heads and "
                f"head_dim={self.head_dim}; expected the first divisible by the second, and an even head_dim."
            )

    @classmethod
    def for_target(cls, target: LanguageModel, slots: int = 6) -> HeadConfig:
        """A head as wide as one of the target's own layers."""
        config = target.hf.config.get_text_config()
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        return cls(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            slots=slots,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or target.hidden_size // heads,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * target.hidden_size,
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            rms_norm_eps=float(getattr(config, "rms_norm_eps", None) or 1e-6),
        )


class ParallelHead(nn.Module):
    """The head as a network. `forward` is for training, `draft` for decoding; both run the same layer."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.config = config
        self.embedding_norm = nn.RMSNorm(h, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(h, config.rms_norm_eps)
        self.q_proj = nn.Linear(2 * h, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(2 * h, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(2 * h, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=False)
        self.mlp_norm = nn.RMSNorm(h, config.rms_norm_eps)
        self.gate_proj = nn.Linear(h, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(h, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, h, bias=False)
        self.norm = nn.RMSNorm(h, config.rms_norm_eps)
        self.slot_embeddings = nn.Parameter(torch.randn(config.slots - 1, h) * h**-0.5)
        self.slot_hidden = nn.Parameter(torch.randn(h) * h**-0.5)

    def forward(self, embedded: Tensor, hidden: Tensor, anchors: Tensor | None = None) -> Tensor:
        """All groups of a text at once, for training.

        embedded  [B, T, H] the target's embeddings of the tokens
        hidden    [B, T, H] the target's last hidden states, after its norm, at the same tokens
        anchors   [G] positions that get a group; None: all. A pass has T + G * (K - 1) rows, so fewer cost less

        Returns [B, G, K, H] for the target's output matrix: entry (g, j) predicts token anchors[g] + 1 + j.
        """
        batch, length, _ = embedded.shape
        where = torch.arange(length, device=embedded.device)
        anchors = where if anchors is None else anchors
        extra = self.config.slots - 1
        slot = torch.arange(1, extra + 1, device=where.device)
        # for every row: its position, the last known row it sees, its group (-1: a known row)
        positions = torch.cat([where, (anchors[:, None] + slot).flatten()])  # [R]
        sees = torch.cat([where, anchors.repeat_interleave(extra)])
        groups = torch.arange(len(anchors), device=where.device).repeat_interleave(extra)
        group = torch.cat([torch.full_like(where, -1), groups])
        known = where[None] <= sees[:, None]  # [R, T]
        own = (group[:, None] == groups[None]) & (positions[None, length:] <= positions[:, None])
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
        rows = self._rows(embedded, before), self._slots(extra).repeat(len(anchors), 1).expand(batch, -1, -1)
        features, _, _ = self._layer(torch.cat(rows, dim=1), positions, torch.cat([known, own], dim=1))
        slots = features[:, length:].reshape(batch, len(anchors), extra, -1)
        return torch.cat([features[:, anchors, None], slots], dim=2)

    @torch.inference_mode()
    def draft(
        self, embedded: Tensor, before: Tensor, guesses: int, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over n known rows, the last of which is the root's, and the slots after it.

        embedded  [n, H] embeddings of the tokens
        before    [n, H] hidden states of the token before each
        past      keys and values of the C known rows before these, [key-value heads, C, d] each

        Returns features [guesses, H], and keys and values of the n known rows.
        """
        n, cached = embedded.shape[0], past[0].shape[1]
        rows = torch.cat([self._rows(embedded, before), self._slots(guesses - 1)])[None]
        r = rows.shape[1]
        positions = torch.arange(cached, cached + r, device=rows.device)
        causal = torch.ones(r, cached + r, dtype=torch.bool, device=rows.device).tril(cached)
        features, keys, values = self._layer(rows, positions, causal, past)
        return features[0, n - 1 :], keys[0, :, :n], values[0, :, :n]

    def _rows(self, embedded: Tensor, before: Tensor) -> Tensor:
        return torch.cat([self.embedding_norm(embedded), self.hidden_norm(before)], dim=-1)

    def _slots(self, count: int) -> Tensor:
        """The first `count` slots as rows [count, 2H]."""
        return self._rows(self.slot_embeddings[:count], self.slot_hidden.expand(count, -1))

    def _layer(
        self, rows: Tensor, positions: Tensor, visible: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rows [B, R, 2H], positions [R], visible [R, C + R] -> features [B, R, H]; keys, values [B, heads, R, d]."""
        split = (-1, self.config.head_dim)
        queries, keys, values = (
            projection(rows).unflatten(-1, split).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = _rotated(queries, positions, self.config), _rotated(keys, positions, self.config)
        all_keys, all_values = keys, values
        if past is not None:
            all_keys, all_values = torch.cat([past[0][None], keys], dim=2), torch.cat([past[1][None], values], dim=2)
        mixed = scaled_dot_product_attention(queries, all_keys, all_values, attn_mask=visible, enable_gqa=True)
        x = rows[..., self.config.hidden_size :] + self.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        x = x + self.down_proj(silu(self.gate_proj(y)) * self.up_proj(y))
        return self.norm(x), keys, values


def _rotated(x: Tensor, positions: Tensor, config: HeadConfig) -> Tensor:
    """Rotary position embedding of x [B, heads, R, d], halves layout; angles in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=x.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, None].float() * config.rope_theta**-exponents  # [R, d / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def save_head(head: ParallelHead, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`."""
    folder = Path(folder)
    write_tensors(head.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"format": FORMAT, **asdict(head.config)}, indent=2) + "\n")


def load_head(source: str | Path) -> ParallelHead:
    """A head from a directory or a hub id, in float32 on the CPU.

    Raises IncompatibleStack, naming file and tensor, for a file that is missing, damaged or of another layout.
    """
    config_file, weights_file = (_file(source, name) for name in ("config.json", "model.safetensors"))
    head = ParallelHead(_read_config(config_file))
    tensors = read_tensors(weights_file)
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    wrong += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        raise IncompatibleStack(
            f"{weights_file} does not hold the parallel head that its config.json describes: {'; '.join(wrong[:4])}"
            f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}. Use files that were saved together."
        )
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return head


def _file(source: str | Path, name: str) -> Path:
    found = find_file(source, name)
    if found is None:
        raise IncompatibleStack(
            f"{source} has no {name}, or cannot be reached; expected the directory or hub id of a parallel head. Set "
            "inner.head to a folder with config.json and model.safetensors."
        )
    return found


def _read_config(path: Path) -> HeadConfig:
    try:
        data: Any = json.loads(path.read_text())
    except ValueError as error:
        raise IncompatibleStack(f"{path} is not JSON: {error}.") from error
    kind = data.pop("format", None) if isinstance(data, dict) else None
    if kind != FORMAT:
        raise IncompatibleStack(
            f"{path} has format={kind!r}, expected {FORMAT!r}: it is not a parallel head. Was the folder of another "
            "speculator given?"
        )
    try:
        return HeadConfig(**data)
    except (TypeError, ConfigError) as error:
        raise IncompatibleStack(f"{path} does not describe a parallel head: {error}") from error
