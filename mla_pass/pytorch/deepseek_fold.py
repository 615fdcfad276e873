"""The tensors of one ``deepseek_v3`` attention block from a folded site.

What the block computes, x [E] the normed hidden state, per query head (p rotated numbers, shared by all heads):

    [c, rho] = kv_a_proj_with_mqa x + bias;   c <- norm(c);   the cache keeps c and the rotated rho
    [key, value] = kv_b_proj c;   logit = scale * (query . key + rotated query . rotated rho)

1. Its norm over the latent is made neutral by one more channel that is constant and large (see `NeutralNorm`).
2. It scales by (nope + rope)^-1/2, and rotated numbers by what its rope table does: the query makes up for both.
3. It has no bias on the query. A query bias rides on a constant channel of its query latent, at full rank.
4. Its rotary pairs are neighbours, (2i, 2i + 1).
5. The mean of the values passes through the attention unchanged: it becomes a bias on the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mla_pass.fold import Geometry, LatentWeights, Prepared, Recipe, fold, prepare
from mla_pass.fold.ladder import Ladder, on_ladder
from mla_pass.site import AttentionSite, Branch, Projection
from mla_pass.statistics import SiteStatistics

INSTEAD = "save it in mla_pass's own format instead"
CONSTANT = 2.0**15
"""The constant channel: representable in float16, and 2^14 times what stands beside it."""


@dataclass(frozen=True)
class NeutralNorm:
    """An RMS norm over `width` channels that passes x [width - 1] through, up to a known factor.

    The last channel holds `constant`, the others `scale` * x. The root mean square is then that constant over
    sqrt(width), but for 1 + 2 rms(x)^2 / constant^2: 2e-9 at unit variance, 2e-5 at a hundred times that. All factors
    are powers of two, exact in every type, but `gain`, which what reads the norm's result has to divide by; `one` is
    what the last channel becomes.
    """

    width: int
    scale: float
    constant: float
    gain: float
    one: float
    weight: np.ndarray
    """The norm's weight, [width]."""


def neutral_norm(width: int) -> NeutralNorm:
    """The norm of `width` channels, the constant one included."""
    root = math.sqrt(width)
    # Twice the root mean square stays of x: small beside the constant, and within float16's range after the division.
    scale = 2.0 ** round(1 - math.log2(root))
    weight, last = CONSTANT / 2, 2.0 ** -round(math.log2(root))
    weights = np.append(np.full(width - 1, weight), last)
    return NeutralNorm(width, scale, CONSTANT, scale * weight * root / CONSTANT, last * root, weights)


def query_norm(hidden: int) -> NeutralNorm:
    """A norm that holds `hidden` numbers and a constant, wide enough for the constant to come out without rounding.

    The norm turns the constant into sqrt(width), which half precision holds exactly when width is a square.
    """
    return neutral_norm((math.isqrt(hidden) + 1) ** 2)


@dataclass(frozen=True)
class TargetScale:
    """What the target multiplies by: logits by `logits`, both rotated sides by `rotated`."""

    logits: float
    rotated: float


def prepared(site: AttentionSite, statistics: SiteStatistics, metric_mix: float) -> Prepared:
    """The site with every rotation left off that is not cached."""
    per_group = site.heads // site.kv_groups
    geometry = Geometry(site.kv_groups, per_group, site.head_dim, site.value_dim, site.rope)
    return prepare(geometry, statistics, Recipe(rope_mode="extend", metric_mix=metric_mix))


def laddered(p: Prepared, ladder: Ladder) -> Prepared:
    """The same with the ladder's rope components in front."""
    return replace(p, components=on_ladder(p.components, ladder))


def folded(p: Prepared, ladder: Ladder, rank: int, rope_dims: int) -> LatentWeights:
    """The site's latent beside one rotated component for each of the ladder's frequencies."""
    return fold(laddered(p, ladder), rank, rope_dims)


def block_tensors(site: AttentionSite, weights: LatentWeights, target: TargetScale) -> dict[str, np.ndarray]:
    """Names within the attention block, and arrays in float64, matrices [out, in]."""
    return {**row_side(site, weights), **query_side(site, weights, target), **output_side(site, weights)}


def row_side(site: AttentionSite, weights: LatentWeights) -> dict[str, np.ndarray]:
    """From the hidden state to the row, and from the row to the keys and values of every query head."""
    norm, rank, groups = neutral_norm(weights.rank + 1), weights.rank, site.kv_groups
    matrix = np.concatenate([b.projection.weight.read() for b in (site.key, site.value)], axis=1)
    bias = np.concatenate([bias_of(site.key), bias_of(site.value)])
    row, shift = weights.encode @ matrix.T, weights.encode @ bias + weights.encode_bias
    row[:rank] *= norm.scale
    shift[:rank] *= norm.scale
    order = rank + neighbours(weights.rope_dim)
    per_head = np.zeros((groups, site.heads // groups, weights.nope_dim + site.value_dim, rank + 1))
    per_head[:, :, : weights.nope_dim, :rank] = weights.key_up[:, None] / norm.gain
    per_head[:, :, : weights.nope_dim, rank] = weights.key_mean[:, None] / norm.one
    per_head[:, :, weights.nope_dim :, :rank] = weights.value_up.swapaxes(1, 2)[:, None] / norm.gain
    return {
        "kv_a_proj_with_mqa.weight": np.concatenate([row[:rank], np.zeros((1, row.shape[1])), row[order]]),
        "kv_a_proj_with_mqa.bias": np.concatenate([shift[:rank], [norm.constant], shift[order]]),
        "kv_a_layernorm.weight": norm.weight,
        "kv_b_proj.weight": per_head.reshape(-1, rank + 1),
    }


def query_side(site: AttentionSite, weights: LatentWeights, target: TargetScale) -> dict[str, np.ndarray]:
    """From the hidden state to the query: one product or, where there is a bias, two with a norm between them."""
    hidden, nope = site.query.projection.weight.shape[0], weights.nope_dim
    factor = np.full(nope + weights.rope_dim, site.scale / target.logits)
    factor[nope:] /= target.rotated**2
    order = np.concatenate([np.arange(nope), nope + neighbours(weights.rope_dim)])
    per_group = (weights.query_map * factor)[:, :, order]

    def mapped(rows: np.ndarray) -> np.ndarray:
        heads = rows.reshape(-1, site.kv_groups, site.heads // site.kv_groups, site.head_dim)
        return np.einsum("egrd,gdn->grne", heads, per_group).reshape(-1, len(rows))

    matrix = mapped(site.query.projection.weight.read())
    if site.query.projection.bias is None:
        return {"q_proj.weight": matrix}
    norm = query_norm(hidden)
    down, shift, up = np.zeros((norm.width, hidden)), np.zeros(norm.width), np.zeros((len(matrix), norm.width))
    down[:hidden] = norm.scale * np.eye(hidden)
    shift[-1] = norm.constant
    up[:, :hidden], up[:, -1:] = matrix / norm.gain, mapped(bias_of(site.query)[None]) / norm.one
    return {"q_a_proj.weight": down, "q_a_proj.bias": shift, "q_a_layernorm.weight": norm.weight, "q_b_proj.weight": up}


def output_side(site: AttentionSite, weights: LatentWeights) -> dict[str, np.ndarray]:
    """The output projection as it is; its bias takes the mean of the values in."""
    matrix = site.output.weight.read()
    mean = np.repeat(weights.value_mean, site.heads // site.kv_groups, axis=0).reshape(-1)
    return {"o_proj.weight": matrix.T, "o_proj.bias": mean @ matrix + projection_bias(site.output)}


def neighbours(rope_dim: int) -> np.ndarray:
    """Where each number of (re, im, re, im, ...) lies in (all re, all im)."""
    return np.arange(rope_dim).reshape(2, -1).T.reshape(-1)


def bias_of(branch: Branch) -> np.ndarray:
    """A branch's bias, or zeros."""
    return projection_bias(branch.projection)


def projection_bias(projection: Projection) -> np.ndarray:
    """A projection's bias, or zeros, [out]."""
    return np.zeros(projection.weight.shape[1]) if projection.bias is None else projection.bias.read()
