"""From GQA to MLA: the maths, on numbers alone. Read `fold` top to bottom; each idea has a file of its own.

A cached row is [c, rho]: the latent c [r], shared by keys and values, and rho [p], the key components that keep their
own rotation. Per kv group g, with y = [k; v] of a token (k before rotation):

    c = E (y - mean),  rho = A y
    key (un-rotated part, in the op's order of dims) = key_up[g] c[:key_rank] + key_mean[g]
    value = value_up[g]^T c[value_offset:] + value_mean[g]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mla_pass.errors import MlaPassError
from mla_pass.fold.bands import Bands, choose_bands, no_bands, priced_bands, residual
from mla_pass.fold.components import Components, rank_components
from mla_pass.fold.latent import energies, low_rank
from mla_pass.fold.ordered import order_for_keys
from mla_pass.fold.pairs import Pairs, complex_metric, complex_moment, pairs_of
from mla_pass.fold.staggered import stagger
from mla_pass.site import Rope
from mla_pass.statistics import SiteStatistics

__all__ = [
    "Geometry", "LatentWeights", "Prepared", "Recipe", "fold", "key_losses", "phase_loss", "predicted_loss", "prepare",
    "prepare_layouts", "without_key_mean",
]  # fmt: skip


# Phase errors alternate in sign along a block, where truncation errors add up. Measured on SmolLM2: with this share the
# predicted best split of a row into rank and rope dims is the best of those tried, at half and three quarters.
PHASE_SHARE = 0.5


@dataclass(frozen=True)
class Geometry:
    """Shape of a site: `groups` G of `per_group` query heads each, `head_dim` D, `value_dim` V, the rope that turns its
    keys, and whether a softcap bends the logits (then a constant on a row's logits is no longer free)."""

    groups: int
    per_group: int
    head_dim: int
    value_dim: int
    rope: Rope
    softcap: bool = False

    @property
    def key_width(self) -> int:
        """Key numbers per token, G*D."""
        return self.groups * self.head_dim

    @property
    def width(self) -> int:
        """Numbers a GQA cache keeps per token, G*(D + V)."""
        return self.groups * (self.head_dim + self.value_dim)

    @property
    def rotary_width(self) -> int:
        """Key numbers per token that turn, G*R: the most rope dims there can be."""
        return self.groups * self.rope.rotary_dim


@dataclass(frozen=True)
class Recipe:
    """How the rotation and the metric are treated; see MlaConfig for the fields."""

    rope_mode: str = "block"
    finest_block: int = 16
    block_order: int = 1
    band_angle: float = 1.0
    band_price: float | None = None
    """With a price the block sizes are not laid out by `finest_block` and `band_angle` but for the least loss at that
    price of arithmetic (see `bands.priced_bands`), in units of the mean energy of a pair."""
    metric_mix: float = 0.1
    turn_all: bool = False


@dataclass(frozen=True)
class LatentWeights:
    """The folded site, float64. n = 2*m + u un-rotated query and key dims: m band pairs' real parts, their imaginary
    parts, then u dims that are not turned.

    `encode` [r + p, N], `encode_bias` [r + p]: row = encode @ y + encode_bias, rho = [real parts, imaginary parts].
    `query_map` [G, D, n + p]: a query head before rope -> [un-rotated, rope real parts, rope imaginary parts].
    `key_up` [G, n, key_rank]: keys read the latent's first key_rank columns; `key_mean` [G, n].
    `value_up` [G, r - value_offset, V]: values read its columns from value_offset on; `value_mean` [G, V].
    `rope_index` [p/2]: column of theta of each rope component. `bands`: the un-cached pairs.
    `kept`: share of the metric-weighted energy that the latent keeps. `predicted`: expected squared output error.
    """

    rank: int
    rope_dim: int
    encode: np.ndarray
    encode_bias: np.ndarray
    query_map: np.ndarray
    key_up: np.ndarray
    key_mean: np.ndarray
    value_up: np.ndarray
    value_mean: np.ndarray
    rope_index: np.ndarray
    bands: Bands
    kept: float
    predicted: float

    @property
    def nope_dim(self) -> int:
        """n, the width of the un-rotated part of the query."""
        return int(self.key_up.shape[1])

    @property
    def key_rank(self) -> int:
        """Columns of the latent that the keys read, the first ones."""
        return int(self.key_up.shape[2])

    @property
    def value_rank(self) -> int:
        """Columns of the latent that the values read, the last ones."""
        return int(self.value_up.shape[1])

    @property
    def value_offset(self) -> int:
        """First column of the latent that the values read."""
        return self.rank - self.value_rank


@dataclass(frozen=True)
class Prepared:
    """Everything about a site that does not depend on how the budget is split."""

    geometry: Geometry
    statistics: SiteStatistics
    pairs: Pairs
    metric: np.ndarray
    bands: Bands
    still_gain: np.ndarray
    """[k] complex: the constant that stands for the rotation of each pair that is not turned."""
    components: Components


def balanced_metric(statistics: SiteStatistics, key_width: int, mix: float) -> np.ndarray:
    """The output metric plus `mix` times an identity with the same split of the energy between keys and values.

    The quadratic model alone is best when little is cut and poor when much is.
    """
    metric = (statistics.metric + statistics.metric.T) / 2
    covariance = statistics.covariance
    identity = np.zeros(len(metric))
    for part in (slice(0, key_width), slice(key_width, None)):
        loss = float(np.sum(metric[part, part] * covariance[part, part]))
        energy = float(np.trace(covariance[part, part]))
        identity[part] = max(loss, 0.0) / energy if energy > 0 else 0.0
    # A part that never varies still needs a metric that can be inverted.
    floor = max(float(identity.max()), float(np.trace(metric)) / len(metric), np.finfo(np.float64).tiny)
    return metric + max(mix, 1e-6) * np.diag(np.maximum(identity, 1e-6 * floor))


def still_gains(theta: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """E[exp(-j theta d)] over the attended distances d: the best constant in place of each rotation."""
    return np.exp(-1j * np.outer(theta, np.arange(len(distance)))) @ distance


def lay_bands(recipe: Recipe, geometry: Geometry, energy: np.ndarray, still: np.ndarray) -> Bands:
    """The bands a recipe asks for; `energy` [R/2] of each pair in loss units, `still` [R/2] the share lost unturned."""
    theta = geometry.rope.theta
    if recipe.rope_mode != "block":
        return no_bands(len(theta))
    if recipe.band_price is not None:
        price = recipe.band_price * float(energy.mean())
        return priced_bands(
            theta, energy, still, order=recipe.block_order, price=price, per_group=geometry.per_group,
            turn_all=recipe.turn_all,
        )  # fmt: skip
    return choose_bands(
        theta, finest=recipe.finest_block, order=recipe.block_order, band_angle=recipe.band_angle,
        turn_all=recipe.turn_all,
    )  # fmt: skip


def prepare(geometry: Geometry, statistics: SiteStatistics, recipe: Recipe) -> Prepared:
    """Rank the site's rope components and lay out its bands. Raises MlaPassError when the statistics are not finite."""
    return prepare_layouts(geometry, statistics, [recipe])[0]


def prepare_layouts(geometry: Geometry, statistics: SiteStatistics, recipes: Sequence[Recipe]) -> list[Prepared]:
    """The same for several recipes that differ in their bands only; what they share is computed and kept once."""
    for name in ("mean", "covariance", "metric", "distance"):
        if not np.isfinite(getattr(statistics, name)).all():
            raise MlaPassError("calibration met NaN or infinite activations; check the model's weights and dtype")
    rope, keys = geometry.rope, slice(0, geometry.key_width)
    pairs = pairs_of(rope, geometry.head_dim)
    (mix,) = {recipe.metric_mix for recipe in recipes}
    metric = balanced_metric(statistics, geometry.key_width, mix)
    # Around zero, not around the mean: the mean turns, too.
    second = statistics.covariance[keys, keys] + np.outer(statistics.mean[keys], statistics.mean[keys])
    moment = complex_moment(second, pairs, geometry.groups, geometry.head_dim)
    weight = complex_metric(metric[keys, keys], pairs, geometry.groups, geometry.head_dim)
    gains = still_gains(rope.theta, statistics.distance)
    still = np.maximum(1 - np.abs(gains) ** 2, 0)
    energy = np.einsum("igh,ihg->i", weight, moment).real
    layouts = []
    for recipe in recipes:
        bands, lost = lay_bands(recipe, geometry, energy, still), still.copy()
        for index, block in zip(bands.index, bands.block, strict=True):
            lost[index] = residual(float(rope.theta[index]), int(block), recipe.block_order)
        components = rank_components(moment, weight, lost)
        layouts.append(Prepared(geometry, statistics, pairs, metric, bands, gains[bands.still], components))
    return layouts


def remainder_map(p: Prepared, rope_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """rope analysis A [p, G*D] and the map [G*D, G*D] from a key to what the rope components leave of it."""
    g, d, half = p.geometry.groups, p.geometry.head_dim, rope_dim // 2
    c, pairs = p.components, p.pairs
    analysis = np.zeros((2, half, g, d))
    synthesis = np.zeros((g, d, 2, half))
    for k in range(half):
        re, im = pairs.re[c.pair[k]], pairs.im[c.pair[k]]
        a, b = c.analysis[k], c.synthesis[k]
        analysis[0, k, :, re], analysis[0, k, :, im] = a.real, -a.imag
        analysis[1, k, :, re], analysis[1, k, :, im] = a.imag, a.real
        synthesis[:, re, 0, k], synthesis[:, re, 1, k] = b.real, -b.imag
        synthesis[:, im, 0, k], synthesis[:, im, 1, k] = b.imag, b.real
    flat = analysis.reshape(rope_dim, g * d)
    if rope_dim == p.geometry.rotary_width:
        # Every component is cached: nothing of a rotary dim is left, to the last bit.
        left = np.zeros(d)
        left[pairs.rest] = 1.0
        return flat, np.diag(np.tile(left, g))
    return flat, np.eye(g * d) - synthesis.reshape(g * d, rope_dim) @ flat


def remainder(p: Prepared, rope_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariance of [what the rope components leave of k; v], A [p, G*D], and the map [N, N] from y to it."""
    analysis, keys_left = remainder_map(p, rope_dim)
    left = np.eye(p.geometry.width)
    left[: p.geometry.key_width, : p.geometry.key_width] = keys_left
    # Only the keys' rows and columns change: values are never rotated.
    covariance, keys = p.statistics.covariance.copy(), slice(0, p.geometry.key_width)
    covariance[keys] = keys_left @ covariance[keys]
    covariance[:, keys] = covariance[:, keys] @ keys_left.T
    return covariance, analysis, left


def predicted_loss(p: Prepared, rope_dim: int, ranks: np.ndarray) -> np.ndarray:
    """Expected squared output error for each of `ranks` beside `rope_dim` rotated numbers."""
    energy = energies(remainder(p, rope_dim)[0], p.metric)
    tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return tail[ranks] + phase_loss(p, rope_dim)


def phase_loss(p: Prepared, rope_dim: int) -> float:
    """The part of :func:`predicted_loss` that the un-cached rotations cost."""
    return PHASE_SHARE * float(p.components.loss[rope_dim // 2 :].sum())


def key_losses(p: Prepared, rank: int, rope_dim: int) -> np.ndarray:
    """What :func:`predicted_loss` rises by when keys read only 0, 1, ..., rank columns of the latent, [rank + 1]."""
    keys = slice(0, p.geometry.key_width)
    decode = low_rank(remainder(p, rope_dim)[0], p.metric).decode[keys, :rank]
    return order_for_keys(decode, p.metric[keys, keys]).lost


def query_side(p: Prepared, rope_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """query_map [G, D, n + p], and the complex-linear key map [n, D] that belongs to it (gains applied)."""
    g, d, half = p.geometry.groups, p.geometry.head_dim, rope_dim // 2
    pairs, bands, c = p.pairs, p.bands, p.components
    everything = rope_dim == p.geometry.rotary_width
    index = np.zeros(0, np.int64) if everything else bands.index
    still = np.zeros(0, np.int64) if everything else bands.still
    order = np.concatenate([pairs.re[index], pairs.im[index], pairs.re[still], pairs.im[still], pairs.rest])
    n = len(order)
    keys = np.zeros((n, d))
    keys[np.arange(n), order] = 1.0
    if len(still):
        k, at = len(still), 2 * len(index)
        gain = np.diag(p.still_gain)
        re, im = keys[at : at + k].copy(), keys[at + k : at + 2 * k].copy()
        keys[at : at + k] = gain.real @ re - gain.imag @ im
        keys[at + k : at + 2 * k] = gain.imag @ re + gain.real @ im
    scaling = p.geometry.rope.attention_scaling**2  # on both q and k, but only where they turn
    query = np.zeros((g, d, n + rope_dim))
    query[:, order, np.arange(n)] = scaling
    query[:, pairs.rest, np.arange(n - len(pairs.rest), n)] = 1.0
    for k in range(half):
        re, im = pairs.re[c.pair[k]], pairs.im[c.pair[k]]
        b = c.synthesis[k].conj() * scaling
        query[:, re, n + k], query[:, im, n + k] = b.real, -b.imag
        query[:, re, n + half + k], query[:, im, n + half + k] = b.imag, b.real
    return query, keys


def check_sizes(geo: Geometry, rank: int, rope_dim: int, key_rank: int) -> None:
    """Raises MlaPassError when the row would be wider than what it replaces, or keys would read more than the row."""
    if not 1 <= rank <= geo.width or not 0 <= rope_dim <= geo.rotary_width:
        raise MlaPassError(
            f"a latent of rank {rank} with {rope_dim} rope dims does not fit this block: "
            f"rank must lie in 1..{geo.width} and rope dims in 0..{geo.rotary_width}"
        )
    if not 1 <= key_rank <= rank:
        raise MlaPassError(f"keys cannot read {key_rank} columns of a latent of rank {rank}: give 1..{rank}")


def fold(p: Prepared, rank: int, rope_dim: int, key_rank: int | None = None) -> LatentWeights:
    """Fold a prepared site to a latent of `rank` numbers beside `rope_dim` rotated ones.

    With `key_rank` below `rank` the latent is turned so that keys need read no more of it (see `ordered`).
    Raises MlaPassError when the row would be wider than what it replaces, or keys would read more than the row.
    """
    geo, key_rank = p.geometry, rank if key_rank is None else key_rank
    check_sizes(geo, rank, rope_dim, key_rank)
    covariance, analysis, left = remainder(p, rope_dim)
    code = low_rank(covariance, p.metric)
    query_map, key_map = query_side(p, rope_dim)
    encode_latent, decode = code.encode[:rank] @ left, code.decode[:, :rank].copy()
    split, unread = geo.key_width, 0.0
    if key_rank < rank:
        ordered = order_for_keys(decode[:split], p.metric[:split, :split])
        encode_latent, decode = ordered.turn.T @ encode_latent, decode @ ordered.turn
        unread = float(ordered.lost[key_rank])
    mean = left @ p.statistics.mean
    keys = key_map @ np.concatenate([decode, mean[:, None]], axis=1)[:split].reshape(geo.groups, geo.head_dim, rank + 1)
    key_up, key_mean = keys[:, :, :key_rank].copy(), keys[:, :, rank].copy()
    turning = 0 if rope_dim == geo.rotary_width else len(p.bands.index)
    if not geo.softcap:
        # The same number on every logit of a row changes nothing: only what turns with its block matters.
        key_mean[:, 2 * turning :] = 0.0
    if turning:
        turn, key_up = stagger(key_up, turning)
        encode_latent[:key_rank], decode[:, :key_rank] = turn.T @ encode_latent[:key_rank], decode[:, :key_rank] @ turn
    values = decode[split:].reshape(geo.groups, geo.value_dim, rank).swapaxes(1, 2)
    encode = np.concatenate([encode_latent, np.pad(analysis, ((0, 0), (0, geo.width - split)))])
    bias = np.concatenate([-encode_latent @ p.statistics.mean, np.zeros(rope_dim)])
    full = rope_dim == geo.rotary_width
    total = float(code.energy.sum())
    return LatentWeights(
        rank=rank,
        rope_dim=rope_dim,
        encode=encode,
        encode_bias=bias,
        query_map=query_map,
        key_up=key_up,
        key_mean=key_mean,
        value_up=values.copy(),
        value_mean=mean[split:].reshape(geo.groups, geo.value_dim),
        rope_index=p.components.pair[: rope_dim // 2],
        bands=no_bands(0) if full else p.bands,
        kept=(float(code.energy[:rank].sum()) - unread) / total if total else 1.0,
        predicted=unread + float(code.energy[rank:].sum()) + phase_loss(p, rope_dim),
    )


def without_key_mean(w: LatentWeights) -> LatentWeights:
    """The same site with its keys linear in the latent, for an attention that adds nothing to a score.

    Where the latent's columns span the mean of the keys, as they do at full size, the latent is moved by what decodes
    to it; what is left is a constant on a row's logits, which matters under a softcap only, and goes.
    """
    if not w.key_mean.any():
        return w
    move = np.linalg.lstsq(w.key_up.reshape(-1, w.key_rank), w.key_mean.reshape(-1), rcond=None)[0]
    bias, tail = w.encode_bias.copy(), np.zeros(w.rank)
    tail[: w.key_rank] = move
    bias[: w.rank] += tail
    moved = np.einsum("grv,r->gv", w.value_up, tail[w.value_offset :])
    return replace(w, encode_bias=bias, key_mean=np.zeros_like(w.key_mean), value_mean=w.value_mean - moved)
