"""Plain SVD of the weights, blind to any text but for TransMLA's rope cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convert import Converted, convert
from .lowrank import LowRank, Stack, project


def svd(model: Any, calib_ids: Tensor, budget: float) -> Converted:
    """Convert `model` in place; see :func:`baselines.convert.convert`."""
    return convert(model, calib_ids, budget, weight_svd)


def weight_svd(stack: Stack, rank: int) -> LowRank:
    """The nearest weight of that rank."""
    return project(stack.weight, torch.linalg.svd(stack.weight[:, :-1], full_matrices=False).U[:, :rank])
