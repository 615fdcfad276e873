"""Covariance-aware SVD as in CARE (uniform ranks), on TransMLA's rope cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convert import Converted, convert
from .lowrank import LowRank, Stack, project


def care(model: Any, calib_ids: Tensor, budget: float) -> Converted:
    """Convert `model` in place; see :func:`baselines.convert.convert`."""
    return convert(model, calib_ids, budget, covariance_svd)


def covariance_svd(stack: Stack, rank: int) -> LowRank:
    """The rank that is nearest on the calibration text: the left singular vectors of W C^{1/2}, C = E[x x^T].

    Multiplying with C^{-1/2} afterwards is not needed: U U^T W C^{1/2} C^{-1/2} = U U^T W.
    """
    values, vectors = torch.linalg.eigh(stack.moment[:-1, :-1])
    root = stack.weight[:, :-1] @ (vectors * values.clamp_min(0).sqrt())
    return project(stack.weight, torch.linalg.svd(root, full_matrices=False).U[:, :rank])
