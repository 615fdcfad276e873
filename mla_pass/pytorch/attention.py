"""Softmax attention over grouped heads, differentiable, with rows that see nothing giving zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float = 0.0, mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(softcap(scale * query . key) + mask) @ value.

    `query` [B, H, S, D], `key` [B, G, T, D], `value` [B, G or 1, T, V]; `mask` broadcasts to [B, H, S, T], boolean
    (False hides) or added. `causal`: the queries are the last S of the T rows and see no later row. Returns
    [B, H, S, V].
    """
    new, total = query.shape[2], key.shape[2]
    key, value = (_for_heads(x, query.shape[1]) for x in (key, value))
    if causal and mask is None and new == total and not softcap:
        return _fused(query, key, value, scale, None, causal=True)
    if causal:
        mask = _both(mask, torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new))
    if mask is None:
        return _capped(query, key, value, scale, softcap, None) if softcap else _fused(query, key, value, scale, None)
    # A row of nothing but minus infinity has no softmax, and its gradient no number: let it see all, then drop it.
    blind = ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else torch.isneginf(mask).all(-1, keepdim=True)
    mask = mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0.0)
    context = _capped(query, key, value, scale, softcap, mask) if softcap else _fused(query, key, value, scale, mask)
    return context.masked_fill(blind, 0.0)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """[B, G, T, D] -> [B, H, T, D], each group repeated for its heads."""
    batch, groups, rows, size = x.shape
    return x[:, :, None].expand(batch, groups, heads // groups, rows, size).reshape(batch, heads, rows, size)


def _both(mask: Tensor | None, keep: Tensor) -> Tensor:
    if mask is None:
        return keep
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, *, causal: bool = False
) -> Tensor:
    """torch's own attention. It keeps no [S, T] scores as long as keys and values are of one size: pad the smaller."""
    size, width = value.shape[-1], max(value.shape[-1], key.shape[-1])
    query, key, value = (functional.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return context[..., :size]


def _capped(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, mask: Tensor | None) -> Tensor:
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value
