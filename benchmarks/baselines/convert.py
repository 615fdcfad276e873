"""From a rope cut and a way to fit the low rank to a converted model: what all baselines share."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Latent, LatentAttention, restore
from .calibrate import input_moments, window_losses
from .choose import choose_cut
from .geometry import Geometry, read_geometry
from .lowrank import LowRank, Stack, affine, with_bias
from .rope_cut import RopeCut, key_basis

CHOICE_TOKENS = 4096
"""Calibration tokens that the rope cut is chosen by."""


@dataclass(frozen=True)
class Converted:
    """What a method made of a model."""

    row: int
    """Numbers cached per token and layer."""
    note: str


Fit = Callable[[Stack, int], LowRank]
"""A low rank for a stack: what the methods differ in."""


def convert(model: Any, calib_ids: Tensor, budget: float, fit: Fit) -> Converted:
    """Convert `model` in place, with the rope cut that predicts the calibration text best.

    `calib_ids` are windows [n, L]. As in TransMLA's own code the low rank is fitted to the inputs of the model whose
    rotation is cut already. Raises MlaPassError when the budget has no room for any cut.
    """
    restore(model)
    geometry = read_geometry(model)
    row = geometry.row(budget)
    before = _moments(model, calib_ids, None)
    cut = choose_cut(
        geometry, row, lambda cut: _choice_loss(model, calib_ids, lambda: apply(model, cut, before, before, fit, row))
    )
    apply(model, cut, before, before, keep_all, 2 * geometry.keys)
    after = _moments(model, calib_ids, cut)
    return apply(model, cut, before, after, fit, row)


def apply(model: Any, cut: RopeCut, before: Tensor, after: Tensor, fit: Fit, row: int) -> Converted:
    """Convert every layer in place: the cut by the input moments `before`, the low rank by those `after`."""
    restore(model)
    geometry = read_geometry(model)
    for layer, cut_moment, fit_moment in zip(model.base_model.layers, before, after, strict=True):
        latent = _latent(layer.self_attn, geometry, cut, (cut_moment, fit_moment), fit, row)
        layer.self_attn = LatentAttention(layer.self_attn, latent)
    kept, dims = model.base_model.layers[0].self_attn.row, cut.dims(geometry)
    return Converted(kept, f"rank {kept - dims} + {dims} rope dims, fold {cut.fold}")


def _choice_loss(model: Any, calib_ids: Tensor, change: Callable[[], Converted]) -> float:
    change()
    windows = max(1, CHOICE_TOKENS // calib_ids.shape[1])
    return float(window_losses(model, calib_ids[:windows]).mean())


_KNOWN: weakref.WeakKeyDictionary[Any, dict[RopeCut | None, tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()


def _moments(model: Any, ids: Tensor, cut: RopeCut | None) -> Tensor:
    """Input moments of the model as it is, `cut` saying how it is: several methods and budgets ask for the same."""
    known = _KNOWN.setdefault(model, {})
    if cut not in known or not torch.equal(known[cut][0], ids):
        known[cut] = (ids, input_moments(model, ids))
    return known[cut][1]


def keep_all(stack: Stack, rank: int) -> LowRank:
    """No low rank at all: the rotation cut alone."""
    return LowRank(stack.weight, with_bias(torch.eye(len(stack.weight), dtype=stack.weight.dtype)))


def _latent(
    attention: Any, geometry: Geometry, cut: RopeCut, moments: tuple[Tensor, Tensor], fit: Fit, row: int
) -> Latent:
    """One layer, in float64 throughout."""
    groups, dim = geometry.kv_heads, geometry.head_dim
    keys, values = affine(attention.k_proj), affine(attention.v_proj)
    basis = key_basis(keys @ moments[0] @ keys.T, geometry, cut)
    dims, rest = len(basis.rope), len(basis.nope)
    stack = Stack(torch.cat([basis.nope @ keys, values]), moments[1], rest, dims)
    low = fit(stack, min(row - dims, len(stack.weight)))
    return Latent(
        down=torch.cat([low.down, basis.rope @ keys]),
        key_up=(basis.nope.T @ low.up[:rest]).unflatten(0, (groups, dim)),
        value_up=low.up[rest:].unflatten(0, (groups, dim)),
        rope_query=basis.rope.T.unflatten(0, (groups, dim)),
        frequencies=basis.frequencies,
    )
