"""Whether the up-projections stay in the operator or are folded into the projections around it.

Folding saves a product and costs size: query_map turns H heads of D numbers into H heads of n + p (or key_rank + p),
each of them a column of the query projection. `auto` counts the numbers a decoding step reads, which is what such a
step costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_pass.fold import LatentWeights
from mla_pass.site import AttentionSite


@dataclass(frozen=True)
class Absorption:
    """Which of the maps are folded away. `key_up` implies `query_map`: both go into the query projection.

    `composed`: the two are one map of the graph where they are not folded, so that either both are or none is.
    """

    query_map: bool
    key_up: bool
    value_up: bool
    composed: bool = False

    def query_maps(self, w: LatentWeights) -> np.ndarray:
        """What the query's heads are multiplied with, [G, D, n + p], or [G, D, key_rank + p] with key_up in it."""
        if not (self.key_up or self.composed):
            return w.query_map
        n = w.nope_dim
        return np.concatenate([w.query_map[:, :, :n] @ w.key_up, w.query_map[:, :, n:]], axis=2)

    def fold_query(self, site: AttentionSite, w: LatentWeights) -> tuple[np.ndarray, np.ndarray | None]:
        """Query projection [E, H*(n+p)] (key_rank for n when key_up is folded) and its bias."""
        maps = np.repeat(self.query_maps(w), site.heads // site.kv_groups, axis=0)  # [H, D, width]
        projection = site.query.projection

        def folded(array: np.ndarray) -> np.ndarray:
            heads = array.reshape(*array.shape[:-1], site.heads, site.head_dim)
            return np.einsum("...hd,hdw->...hw", heads, maps).reshape(*array.shape[:-1], -1)

        bias = None if projection.bias is None else folded(projection.bias.read())
        return folded(projection.weight.read()), bias

    def fold_output(self, site: AttentionSite, w: LatentWeights) -> tuple[np.ndarray, np.ndarray]:
        """Output projection [H*(r - value_offset), E] and its bias, the mean of the values included."""
        per_group = site.heads // site.kv_groups
        weight = site.output.weight.read().reshape(site.heads, site.value_dim, -1)
        bias = np.einsum("hv,hve->e", np.repeat(w.value_mean, per_group, axis=0), weight)
        if site.output.bias is not None:
            bias = bias + site.output.bias.read()
        up = np.repeat(w.value_up, per_group, axis=0)
        return np.einsum("hrv,hve->hre", up, weight).reshape(site.heads * w.value_rank, -1), bias


def numbers_read(site: AttentionSite, w: LatentWeights, plan: Absorption) -> int:
    """Weights that a decoding step reads on the query's and the output's side."""
    hidden, heads, groups = site.query.projection.weight.shape[0], site.heads, site.kv_groups
    n, p, d, v = w.nope_dim, w.rope_dim, site.head_dim, site.value_dim
    if plan.key_up:
        query = hidden * heads * (w.key_rank + p)
    elif plan.composed:
        query = hidden * heads * d + groups * d * (w.key_rank + p)
    else:
        query = groups * n * w.key_rank + (
            hidden * heads * (n + p) if plan.query_map else hidden * heads * d + groups * d * (n + p)
        )
    embedding = site.output.weight.shape[1]
    output = heads * w.value_rank * embedding if plan.value_up else heads * v * embedding + groups * w.value_rank * v
    return query + output


def choose_absorption(site: AttentionSite, w: LatentWeights, mode: str, *, composed: bool = False) -> Absorption:
    """`never`, `always` (as far as the algebra allows) or `auto` (fewest numbers to read).

    A query norm stands between projection and query_map; bands, or a softcap with a key mean, stand between query_map
    and key_up, so that they cannot be `composed` either.
    """
    query_ok = site.query.norm is None
    if composed:
        assert len(w.bands.index) == 0 and not w.key_mean.any()
        both = [query_ok] if mode == "always" else [False, True] if mode == "auto" and query_ok else [False]
        values = {"never": [False], "always": [True], "auto": [False, True]}[mode]
        plans = [Absorption(query, query, value, composed=True) for query in both for value in values]
        return min(plans, key=lambda plan: numbers_read(site, w, plan))
    key_ok = query_ok and w.nope_dim > 0 and len(w.bands.index) == 0 and not w.key_mean.any()
    if mode == "never":
        return Absorption(False, False, False)
    if mode == "always":
        return Absorption(query_ok, key_ok, True)
    plans = [
        Absorption(query_map, key_up, value_up)
        for query_map, key_up in [
            (False, False),
            *([(True, False)] if query_ok else []),
            *([(True, True)] if key_ok else []),
        ]
        for value_up in (False, True)
    ]
    return min(plans, key=lambda plan: numbers_read(site, w, plan))
