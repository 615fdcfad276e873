"""Which key components keep their rotation: RoRoPE and FreqFold of TransMLA (arXiv:2502.07864, section 4).

A real orthogonal map across the heads of one frequency commutes with the rotation, since real and imaginary parts share
it. RoRoPE takes the principal components of the keys, so that one component per frequency holds most of them; only that
keeps its rotation. FreqFold pretends that `fold` neighbouring frequencies are one, which gives the principal components
more to choose from, and is no longer exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Geometry


@dataclass(frozen=True)
class RopeCut:
    """How much keeps its rotation: `heads` components per frequency, or one per `collapse` frequencies."""

    fold: int = 1
    """Neighbouring frequencies that share one PCA; a multiple of `collapse`."""
    collapse: int = 1
    heads: int = 1

    def dims(self, geometry: Geometry) -> int:
        """Rope dims of the cached row."""
        return self.heads * geometry.head_dim // self.collapse


@dataclass(frozen=True)
class KeyBasis:
    """Keys k [G * D] in an orthonormal basis, apart into what is rotated and what is not."""

    rope: Tensor
    """[p, G * D], rows [real parts | imaginary parts]."""
    nope: Tensor
    """[G * D - p, G * D]."""
    frequencies: Tensor
    """[p / 2] the frequency that turns each rotated component."""


def key_basis(moment: Tensor, geometry: Geometry, cut: RopeCut) -> KeyBasis:
    """The basis for keys whose second moment before rotation is `moment` [G * D, G * D]."""
    pairs = geometry.head_dim // 2
    groups, per_group = pairs // cut.fold, cut.heads * cut.fold // cut.collapse
    vectors = _components(moment, geometry, cut.fold)  # [groups, G * fold components, G, fold]
    spread = torch.zeros(*vectors.shape[:3], groups, cut.fold, dtype=moment.dtype)
    each = torch.arange(groups)
    spread[each, :, :, each] = vectors
    vectors = spread.flatten(3)  # [groups, components, G, D / 2]
    rank = torch.arange(per_group) % (cut.fold // cut.collapse)
    frequencies = each[:, None] * cut.fold + rank * cut.collapse  # the strongest turns fastest
    return KeyBasis(_both_parts(vectors[:, :per_group]), _both_parts(vectors[:, per_group:]), frequencies.flatten())


def _components(moment: Tensor, geometry: Geometry, fold: int) -> Tensor:
    """Principal components of each group of `fold` frequencies, strongest first: [groups, components, G, fold]."""
    heads, pairs = geometry.kv_heads, geometry.head_dim // 2
    parts = moment.view(heads, 2, pairs, heads, 2, pairs)
    shared = parts[:, 0, :, :, 0] + parts[:, 1, :, :, 1]  # real and imaginary parts are samples of one variable
    shared = shared.reshape(heads, pairs // fold, fold, heads, pairs // fold, fold)
    blocks = torch.einsum("gnfhne->ngfhe", shared).flatten(3).flatten(1, 2)
    vectors = torch.linalg.eigh(blocks).eigenvectors.flip(-1)
    return vectors.transpose(1, 2).unflatten(-1, (heads, fold))


def _both_parts(vectors: Tensor) -> Tensor:
    """[2 * n, G * D] rows that apply vectors [groups, n / groups, G, D / 2] to real, then to imaginary parts."""
    flat = vectors.flatten(0, 1)
    zero = torch.zeros_like(flat)
    real, imaginary = torch.cat([flat, zero], -1), torch.cat([zero, flat], -1)  # a head is [real | imaginary]
    return torch.cat([real, imaginary]).flatten(1)
