"""Latent attention as the baselines leave it, in the place of a model's own attention.

Symbols: B sequences, T tokens, H heads, G kv heads, D head size, r rank of the latent, p rope dims. A token's cached
row is [c | rho], r + p numbers: c the latent that keys and values are read from, rho the one rotated key that all heads
share (DeepSeek-V2, arXiv:2405.04434, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mla_pass.errors import MlaPassError


@dataclass(frozen=True)
class Latent:
    """What a layer is converted to."""

    down: Tensor
    """[r + p, hidden + 1] from the layer's input, and one, to the row; rho is [real parts | imaginary parts]."""
    key_up: Tensor
    """[G, D, r + 1] from c, and one, to what is not rotated of the keys of each kv head."""
    value_up: Tensor
    """[G, D, r + 1] from c, and one, to the values."""
    rope_query: Tensor
    """[G, D, p] from a head's query to rho's partner."""
    frequencies: Tensor
    """[p / 2] which of the model's rotary frequencies turns each component of rho."""


class LatentAttention(nn.Module):
    """Takes the place of `original`, whose query and output projections it goes on using."""

    def __init__(self, original: Any, latent: Latent) -> None:
        super().__init__()
        self.original = original
        dtype = original.q_proj.weight.dtype
        for name in ("down", "key_up", "value_up", "rope_query"):
            self.register_buffer(name, getattr(latent, name).to(dtype).contiguous(), persistent=False)
        self.register_buffer("frequencies", latent.frequencies, persistent=False)

    @property
    def row(self) -> int:
        """Numbers cached per token."""
        return self.down.shape[0]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Output [B, T, hidden] for hidden_states [B, T, hidden]; cos and sin are [B, T, D], as in the model."""
        if past_key_values is not None:
            raise MlaPassError("a baseline keeps no cache between calls; run it with use_cache=False")
        batch, tokens, _hidden = hidden_states.shape
        groups, dim, dims = self.rope_query.shape
        query = self.original.q_proj(hidden_states).view(batch, tokens, groups, -1, dim)
        cos, sin = (part[..., self.frequencies] for part in position_embeddings)  # [B, T, p / 2]
        row = _affine(hidden_states, self.down)
        latent, rope = row[..., : self.row - dims], row[..., self.row - dims :]
        rope_query = _turn(
            torch.einsum("btgrd,gdp->btgrp", query, self.rope_query), cos[:, :, None, None], sin[:, :, None, None]
        )
        queries = torch.cat([query, rope_query], -1).flatten(2, 3).transpose(1, 2)
        rope_keys = _turn(rope, cos, sin)[:, None].expand(-1, groups, -1, -1)
        keys = torch.cat([self._expand(latent, self.key_up), rope_keys], -1)
        out = nn.functional.scaled_dot_product_attention(
            queries,
            keys,
            self._expand(latent, self.value_up),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.original.scaling,
            enable_gqa=True,
        )
        return self.original.o_proj(out.transpose(1, 2).flatten(2)), None

    @staticmethod
    def _expand(latent: Tensor, up: Tensor) -> Tensor:
        """[B, G, T, D] of the latents [B, T, r]."""
        return _affine(latent, up.flatten(0, 1)).unflatten(-1, up.shape[:2]).transpose(1, 2)


def _affine(values: Tensor, weight: Tensor) -> Tensor:
    """values [..., n] through weight [m, n + 1], whose last column is the bias."""
    return nn.functional.linear(values, weight[:, :-1], weight[:, -1])


def _turn(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [real parts | imaginary parts]."""
    real, imaginary = values.chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)


def restore(model: Any) -> None:
    """Give a converted model its own attention back; a model that was not converted stays as it is."""
    for layer in model.base_model.layers:
        if isinstance(layer.self_attn, LatentAttention):
            layer.self_attn = layer.self_attn.original
