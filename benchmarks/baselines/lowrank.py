"""What of a layer goes through the latent, and the low rank that stands for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """The map from a layer's input to [keys that are not rotated; values], n rows."""

    weight: Tensor
    """[n, hidden + 1], the last column the bias."""
    moment: Tensor
    """[hidden + 1, hidden + 1] of the layer's input, a one appended."""
    keys: int
    """How many of the rows are keys."""
    rope_dims: int
    """Rope dims that were split off the keys."""


@dataclass(frozen=True)
class LowRank:
    """weight ~ up[:, :-1] @ down, and the last column of up added to that of the bias."""

    down: Tensor
    """[r, hidden + 1]."""
    up: Tensor
    """[n, r + 1], the last column a bias that is added after the latent."""


def affine(linear: Any) -> Tensor:
    """[out, in + 1] float64 of a torch Linear, the last column its bias."""
    weight = linear.weight.detach().double()
    return with_bias(weight, None if linear.bias is None else linear.bias.detach().double())


def with_bias(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[m, n + 1] of a weight [m, n] and a bias [m], zero by default."""
    return torch.cat([weight, weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]], 1)


def project(weight: Tensor, kept: Tensor) -> LowRank:
    """The weight [n, hidden + 1] projected on orthonormal columns `kept` [n, r]; its bias stays outside, and whole.

    A constant needs no room in a latent: that of the values is a bias of the output, that of keys that are not rotated
    is the same for all keys, which the softmax does not see.
    """
    return LowRank(with_bias(kept.T @ weight[:, :-1]), with_bias(kept, weight[:, -1]))
