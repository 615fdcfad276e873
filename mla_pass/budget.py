"""How a cache budget is spent: rank against rope dims, alike in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_pass.fold import Geometry, Prepared, predicted_loss

# Rows of real models come in multiples of 16 numbers, as kernels like them; toys are too small for that.
WIDE = 128
CANDIDATES = 10


def row_step(geometry: Geometry) -> int:
    """Ranks are multiples of this."""
    return 16 if geometry.width >= WIDE else 2


def choose_splits(prepared: Sequence[Prepared], config: MlaConfig) -> list[tuple[int, int]]:
    """(rank, rope dims) of each layer; layers of one shape get the same."""
    shapes = [(p.geometry.groups, p.geometry.head_dim, p.geometry.value_dim, p.geometry.rotary_width) for p in prepared]
    chosen = {
        shape: choose_split([p for p, s in zip(prepared, shapes, strict=True) if s == shape], config)
        for shape in dict.fromkeys(shapes)
    }
    return [chosen[shape] for shape in shapes]


def choose_split(prepared: Sequence[Prepared], config: MlaConfig) -> tuple[int, int]:
    """(rank, rope dims) of every layer: the split of the budget with the smallest predicted output error in sum.

    Each layer's error is taken relative to the energy of what it caches, so that no layer's scale rules.
    Raises MlaPassError when the budget, or the sizes asked for, cannot hold any split.
    """
    geometry = prepared[0].geometry
    full_rope, width = geometry.rotary_width, geometry.width
    if config.rank is not None:
        rope = full_rope if config.rope_mode == "repeat" else (config.rope_dims or 2 * max(1, round(full_rope / 16)))
        return check_sizes(config.rank, rope, geometry)
    row = max(int(config.budget * width + 1e-9), 0)
    if config.rope_mode == "repeat":
        candidates = [full_rope]
    elif config.rope_dims is not None:
        candidates = [config.rope_dims]
    else:
        candidates = rope_candidates(geometry, row)
    splits = [(fit_rank(row - rope, geometry, rope), rope) for rope in candidates if row - rope >= 1]
    splits = [(rank, rope) for rank, rope in splits if rank >= 1 and rope <= full_rope]
    if not splits:
        least = (candidates[0] + row_step(geometry)) / width
        raise MlaPassError(
            f"a budget of {config.budget} leaves {row} numbers a token and layer, which holds no latent beside "
            f"{candidates[0]} rope dims; give at least {least:.3f}"
        )
    if len(splits) == 1:
        return splits[0]
    losses = [split_loss(prepared, rank, rope) for rank, rope in splits]
    return splits[int(np.argmin(losses))]


def split_loss(prepared: Sequence[Prepared], rank: int, rope: int) -> float:
    """Predicted output error over all layers, each in units of its own."""
    total = 0.0
    for p in prepared:
        energy = max(float(np.sum(p.metric * p.statistics.covariance)), np.finfo(np.float64).tiny)
        total += float(predicted_loss(p, rope, np.array([rank]))[0]) / energy
    return total


def rope_candidates(geometry: Geometry, row: int) -> list[int]:
    """Rope dims worth trying for a row: few for small rows, up to every component for a full one."""
    step = 8 if geometry.width >= WIDE else 2
    full = geometry.rotary_width
    if row >= geometry.width:
        return [full]
    top = min(full, row - 1, max(step, row // 2))
    spread = np.unique(np.round(np.geomspace(step, max(top, step), CANDIDATES) / step).astype(int) * step)
    return [int(rope) for rope in spread if 2 <= rope <= top] or [2]


def fit_rank(left: int, geometry: Geometry, rope: int) -> int:
    """The largest rank in steps that `left` numbers hold, and no more than there is to keep."""
    most = geometry.width - rope
    step = row_step(geometry)
    if left >= most:
        return most
    return left // step * step if left >= step else left


def check_sizes(rank: int, rope: int, geometry: Geometry) -> tuple[int, int]:
    """Sizes given by hand. Raises MlaPassError when they are larger than what they replace."""
    if rope > geometry.rotary_width or rank + rope > geometry.width:
        raise MlaPassError(
            f"rank {rank} with {rope} rope dims is larger than the full size of this model: at most "
            f"{geometry.rotary_width} rope dims, and {geometry.width} numbers a token and layer in all"
        )
    return rank, rope
