"""TransMLA without training (arXiv:2502.07864): RoRoPE, FreqFold and balanced PCA of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convert import Converted, convert
from .lowrank import LowRank, Stack, with_bias

ROUNDING = 1e-6
"""Keys this much smaller than the values are what rounding left of none: not to be blown up to their size."""


def transmla(model: Any, calib_ids: Tensor, budget: float) -> Converted:
    """Convert `model` in place; see :func:`baselines.convert.convert`."""
    return convert(model, calib_ids, budget, balanced_pca)


def balanced_pca(stack: Stack, rank: int) -> LowRank:
    """PCA of [keys / ratio; values] (section 4.3), not centred, biases going through the latent as in their code.

    The ratio makes the root mean square of a key's component that of a value's. Their code leaves the first `rope_dims`
    values out of the mean, and so does this.
    """
    moment = stack.weight @ stack.moment @ stack.weight.T
    norms = moment.diagonal().clamp_min(0).sqrt()
    scale = torch.ones_like(norms)
    keys, values = norms[: stack.keys], norms[stack.keys :]
    if len(keys) and keys.mean() > ROUNDING * values.mean():
        counted = values[stack.rope_dims :] if len(values) > stack.rope_dims else values
        scale[: stack.keys] = counted.mean() / keys.mean()
    vectors = torch.linalg.eigh(scale[:, None] * moment * scale).eigenvectors.flip(-1)[:, :rank]
    return LowRank(vectors.T @ (scale[:, None] * stack.weight), with_bias(vectors / scale[:, None]))
