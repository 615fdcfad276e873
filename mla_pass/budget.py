"""How a cache budget is spent: rank against rope dims in a layer, layer against layer, under an arithmetic limit.

1. Each layer gets a curve: the least predicted loss for every row's bytes, over the rope dims beside the rank.
2. The budget is poured over the layers where it lowers the loss most a byte (water-filling on the curves' convex
   hulls); or every layer of one shape gets the same (`even`), with the split that serves them best in sum.
3. Each layer then takes the band layout, and the number of latent columns its keys read, that lose least while the
   absorbed attention costs at most `attention_flops` times what it would cost without block rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mla_pass.config import MlaConfig
from mla_pass.errors import BudgetTooSmall, MlaPassError
from mla_pass.fold import Geometry, Prepared, key_losses, phase_loss, predicted_loss
from mla_pass.fold.arithmetic import attention_flops, plain_flops
from mla_pass.parallel import each
from mla_pass.storage import RowFormat

# Rows of real models come in multiples of 16 numbers, as kernels like them; toys are too small for that.
WIDE = 128
CANDIDATES, CANDIDATES_WIDE = 8, 3
"""Numbers of rope dims that are tried beside all: an eigenvalue problem each, of the cache's width."""
VERY_WIDE = 1024
LEAST_SHARE = 0.2
"""No layer gets less than this share of an even row: the quadratic model underrates what the last numbers hold."""


@dataclass(frozen=True)
class Split:
    """What one layer gets: `rank` + `rope_dims` numbers a token, keys reading `key_rank` of it; `prepared` carries
    the band layout."""

    prepared: Prepared
    rank: int
    rope_dims: int
    key_rank: int


@dataclass(frozen=True)
class Curve:
    """Of one layer, for the bytes of a row in `rows` [n], ascending: `loss` [n] and the (rank, rope dims) behind it."""

    rows: np.ndarray
    loss: np.ndarray
    sizes: tuple[tuple[int, int], ...]


def choose_splits(
    options: Sequence[Sequence[Prepared]], formats: Sequence[RowFormat], config: MlaConfig
) -> list[Split]:  # fmt: skip
    """The split of each layer; `options` are its band layouts, each with everything else equal.

    Raises MlaPassError when the budget, or the sizes asked for, cannot hold any split.
    """
    usual = [representative(layouts, row, config) for layouts, row in zip(options, formats, strict=True)]
    geometries = [p.geometry for p in usual]
    if config.rank is not None:
        sizes = [sizes_by_hand(config, g, row) for g, row in zip(geometries, formats, strict=True)]
    elif config.layers == "even":
        sizes = even_sizes(usual, formats, config)
    else:
        curves = list(each(lambda layer: layer_curve(*layer, config), zip(usual, formats, strict=True)))
        sizes = pour(curves, [room(g, row, config) for g, row in zip(geometries, formats, strict=True)])
    layers = zip(options, usual, sizes, strict=True)
    return list(each(lambda layer: choose_layout(layer[0], layer[1], *layer[2], config), layers))


def room(geometry: Geometry, row: RowFormat, config: MlaConfig) -> int:
    """Bytes of one row that the budget is for one layer, were all layers to get the same share."""
    return int(config.budget * row.full_bytes(geometry.width) + 1e-9)


# ---- the arithmetic limit


def representative(layouts: Sequence[Prepared], row: RowFormat, config: MlaConfig) -> Prepared:
    """The layout that the sizes are chosen with: the best one that half the latent's columns for the keys can pay."""
    geometry = layouts[0].geometry
    holds = max(row.rank_within(room(geometry, row, config), 0), 2) if config.rank is None else config.rank
    rank = min(holds, geometry.width)
    rope = min(geometry.rotary_width, 2 * max(1, rank // 16))
    affordable = [p for p in layouts if largest_key_rank(p, rank, rope, config) >= rank // 2]
    return min(affordable or layouts, key=lambda p: phase_loss(p, rope))


def largest_key_rank(p: Prepared, rank: int, rope_dims: int, config: MlaConfig) -> int:
    """The most latent columns that keys may read within the arithmetic limit; 0 if there are none."""
    full = rope_dims == p.geometry.rotary_width
    if full or len(p.bands.index) == 0:
        return rank
    limit = config.attention_flops * plain_flops(rank, rope_dims)

    def cost(key_rank: int) -> float:
        return attention_flops(rank, key_rank, rank, rope_dims, p.bands, p.geometry.per_group, p.geometry.groups)

    step = row_step(p.geometry)
    steps = [k for k in (*range(step, rank, step), rank) if cost(k) <= limit]
    return max(steps, default=0)


def choose_layout(
    layouts: Sequence[Prepared], usual: Prepared, rank: int, rope_dims: int, config: MlaConfig
) -> Split:  # fmt: skip
    """The layout and key_rank of least predicted loss. Raises MlaPassError when none is within the limit.

    What keys lose by reading fewer columns hardly depends on the layout: it is taken from the `usual` one.
    """
    affordable = [(p, k) for p in layouts if (k := largest_key_rank(p, rank, rope_dims, config))]
    if not affordable:
        raise MlaPassError(
            f"no block rotation of rank {rank} costs at most {config.attention_flops} times plain absorbed attention; "
            "raise attention_flops, or choose rope_mode 'extend'"
        )
    fewer = any(key_rank < rank for _, key_rank in affordable)
    unread = key_losses(usual, rank, rope_dims) if fewer else np.zeros(rank + 1)
    p, key_rank = min(affordable, key=lambda option: phase_loss(option[0], rope_dims) + float(unread[option[1]]))
    return Split(p, rank, rope_dims, key_rank)


# ---- one layer


def layer_curve(p: Prepared, row: RowFormat, config: MlaConfig) -> Curve:
    """The least loss for every number of bytes that the layer could get a row."""
    geometry = p.geometry
    candidates = rope_dims_to_try(geometry, config, row.tile)
    best: dict[int, tuple[float, tuple[int, int]]] = {}
    step = row_step(geometry, row.tile)
    for rope in candidates:
        most = geometry.width - rope
        ranks = np.unique(np.append(np.arange(step, most, step), most))
        ranks = np.array([rank for rank in ranks.tolist() if rank >= 1 and row.holds(rank, rope)], np.int64)
        if len(ranks) == 0:
            continue
        for rank, loss in zip(ranks.tolist(), predicted_loss(p, rope, ranks).tolist(), strict=True):
            size = row.bytes(rank, rope)
            if size not in best or loss < best[size][0]:
                best[size] = loss, (rank, rope)
    sizes = sorted(best)
    return Curve(np.array(sizes), np.array([best[size][0] for size in sizes]), tuple(best[size][1] for size in sizes))


def rope_dims_to_try(geometry: Geometry, config: MlaConfig, tile: int = 1) -> list[int]:
    """Rope dims worth a look: a few small ones, multiples of `tile`, and all."""
    full = geometry.rotary_width
    if config.rope_mode == "repeat":
        return [full]
    if config.rope_dims is not None:
        return [min(config.rope_dims, full)]
    step = max(8 if geometry.width >= WIDE else 2, tile)
    count = CANDIDATES if geometry.width <= VERY_WIDE else CANDIDATES_WIDE
    spread = np.unique(np.round(np.geomspace(step, max(full // 2, step), count) / step).astype(int) * step)
    # Where block rotation turns all pairs a single component may be all that is worth its place in every row.
    few = [rope for rope in (2, 4) if rope < step and rope % tile == 0]
    return [*few, *(int(rope) for rope in spread if 2 <= rope < full), full]


def hull(curve: Curve) -> list[int]:
    """Indices of the curve's lower convex hull, by ascending bytes, as far as it descends."""
    kept: list[int] = []
    for i in range(len(curve.rows)):
        if kept and curve.loss[i] >= curve.loss[kept[-1]]:
            continue
        while len(kept) >= 2 and slope(curve, kept[-2], kept[-1]) <= slope(curve, kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def slope(curve: Curve, a: int, b: int) -> float:
    """Loss saved a byte of the row between two points of a curve."""
    return float((curve.loss[a] - curve.loss[b]) / (curve.rows[b] - curve.rows[a]))


# ---- all layers


def pour(curves: Sequence[Curve], even: Sequence[int]) -> list[tuple[int, int]]:
    """(rank, rope dims) of every layer: the sum of the rows at most the sum of `even`, the loss least.

    Raises MlaPassError when not even the narrowest rows fit.
    """
    total = sum(even)
    at = [start(curve, LEAST_SHARE * row) for curve, row in zip(curves, even, strict=True)]
    left = total - sum(int(c.rows[i]) for c, i in zip(curves, at, strict=True))
    if left < 0:
        at = [0] * len(curves)
        left = total - sum(int(c.rows[0]) for c in curves)
    if left < 0:
        raise too_small(total, sum(int(c.rows[0]) for c in curves))
    hulls = [[i for i in hull(c) if i > first] for c, first in zip(curves, at, strict=True)]
    while True:
        # The next point of a layer's hull that still fits; past it, single points between fill what is left.
        moves = [
            (slope(c, now, nexts[0]), layer)
            for layer, (c, now, nexts) in enumerate(zip(curves, at, hulls, strict=True))
            if nexts and c.rows[nexts[0]] - c.rows[now] <= left
        ]
        if not moves:
            break
        _, layer = max(moves)
        step_to = hulls[layer].pop(0)
        left -= int(curves[layer].rows[step_to] - curves[layer].rows[at[layer]])
        at[layer] = step_to
    fill(curves, at, left)
    return [c.sizes[i] for c, i in zip(curves, at, strict=True)]


def start(curve: Curve, least: float) -> int:
    """The first point of a curve that is at least so wide."""
    return min(int(np.searchsorted(curve.rows, least)), len(curve.rows) - 1)


def fill(curves: Sequence[Curve], at: list[int], left: int) -> None:
    """Spend what the hulls' steps were too large for, best gain first."""
    while True:
        moves = [
            (slope(c, now, j), layer, j)
            for layer, (c, now) in enumerate(zip(curves, at, strict=True))
            for j in range(now + 1, len(c.rows))
            if c.rows[j] - c.rows[now] <= left and c.loss[j] < c.loss[now]
        ]
        if not moves:
            return
        _, layer, j = max(moves)
        left -= int(curves[layer].rows[j] - curves[layer].rows[at[layer]])
        at[layer] = j


def even_sizes(
    prepared: Sequence[Prepared], formats: Sequence[RowFormat], config: MlaConfig
) -> list[tuple[int, int]]:  # fmt: skip
    """The same (rank, rope dims) for all layers of one shape, the pair of least loss in sum over them."""
    kinds = [
        (p.geometry.groups, p.geometry.head_dim, p.geometry.value_dim, p.geometry.rotary_width, row)
        for p, row in zip(prepared, formats, strict=True)
    ]
    chosen = {}
    for kind in dict.fromkeys(kinds):
        alike = [p for p, k in zip(prepared, kinds, strict=True) if k == kind]
        geometry, row = alike[0].geometry, kind[-1]
        most, ropes = room(geometry, row, config), rope_dims_to_try(geometry, config, row.tile)
        fitted = [(fit_rank(row.rank_within(most, rope), geometry, rope, row), rope) for rope in ropes]
        sizes = [(rank, rope) for rank, rope in fitted if rank >= 1 and row.holds(rank, rope)]
        if not sizes:
            raise too_small(most, row.bytes(row.tile, min(ropes)))
        losses = [sum(float(predicted_loss(p, rope, np.array([rank]))[0]) for p in alike) for rank, rope in sizes]
        chosen[kind] = sizes[int(np.argmin(losses))]
    return [chosen[kind] for kind in kinds]


def fit_rank(left: int, geometry: Geometry, rope: int, row: RowFormat) -> int:
    """The largest rank in steps that `left` numbers hold, no more than there is to keep, or than a row can have."""
    if row.widest is not None:
        left = min(left, row.widest - rope)
    most = geometry.width - rope
    step = row_step(geometry, row.tile)
    rank = most if left >= most else left // step * step if left >= step else left
    return rank // row.tile * row.tile


def row_step(geometry: Geometry, tile: int = 1) -> int:
    """Ranks are multiples of this."""
    return max(16 if geometry.width >= WIDE else 2, tile)


def sizes_by_hand(config: MlaConfig, geometry: Geometry, row: RowFormat) -> tuple[int, int]:
    """Sizes given by hand. Raises MlaPassError when they are larger than what they replace, or no row can have them."""
    assert config.rank is not None
    full = geometry.rotary_width
    usual = -(-2 * max(1, round(full / 16)) // row.tile) * row.tile
    rope = full if config.rope_mode == "repeat" else (config.rope_dims or usual)
    if rope > full or config.rank + rope > geometry.width:
        raise MlaPassError(
            f"rank {config.rank} with {rope} rope dims is larger than the full size of this model: at most "
            f"{full} rope dims, and {geometry.width} numbers a token and layer in all"
        )
    if not row.holds(config.rank, rope):
        raise MlaPassError(
            f"a row of rank {config.rank} with {rope} rope dims cannot be stored as target {config.target} asks: both "
            f"must be multiples of {row.tile}, and at most {row.widest} in sum"
        )
    return config.rank, rope


def too_small(given: int, needed: int) -> BudgetTooSmall:
    """The error of a budget that holds nothing."""
    return BudgetTooSmall(
        f"the budget leaves {given} bytes a token, which holds no latent beside rope dims; at least {needed} are "
        "needed: give a larger budget"
    )
