"""What a conversion costs and saves at one site, for the report."""

from __future__ import annotations

import numpy as np

from mla_pass.calibrate import attention, rotate, visible
from mla_pass.onnx.absorb import numbers_read
from mla_pass.onnx.emit import Conversion
from mla_pass.reference import attend, rows
from mla_pass.report import LayerReport
from mla_pass.statistics import SiteStatistics
from mla_pass.storage import rounded


def output_error(conversion: Conversion, statistics: SiteStatistics) -> float | None:
    """Relative error of the block's output on tokens that calibration held out, by the float64 reference, on rows as
    the cache gives them back where it has fewer bits than the model."""
    site, weights = conversion.site, conversion.weights
    sample = statistics.sample
    if sample is None:
        return None
    query, key, value = (a.astype(np.float64) for a in (sample.query, sample.key, sample.value))
    position, keep = np.arange(len(query)), visible(site, len(query))
    angle = np.outer(position, site.rope.theta)
    q, k = rotate(query, site.rope, angle), rotate(key, site.rope, angle)
    per_group = site.heads // site.kv_groups
    before = np.stack(
        [attention(site, q[:, h], k[:, h // per_group], keep)[0] @ value[:, h // per_group] for h in range(site.heads)],
        axis=1,
    )
    y = np.concatenate([key.reshape(len(key), -1), value.reshape(len(value), -1)], axis=1)
    row, split = rows(weights, site.rope.theta, y, position), conversion.row.split(weights.rank, weights.rope_dim)
    stored = zip(np.split(row, [split], axis=1), (conversion.row.latent, conversion.row.rope), strict=True)
    cache = np.concatenate([part if dtype == site.dtype else rounded(part, dtype) for part, dtype in stored], axis=1)
    after = attend(weights, site.rope.theta, query, cache, position, keep, scale=site.scale, softcap=site.softcap)
    output = site.output.weight.read()
    missed, whole = ((a.reshape(len(query), -1) @ output) for a in (after - before, before))
    return float(np.linalg.norm(missed) / max(float(np.linalg.norm(whole)), np.finfo(np.float64).tiny))


def layer_report(conversion: Conversion, error: float | None) -> LayerReport:
    """One line of the report."""
    site, weights, plan = conversion.site, conversion.weights, conversion.absorption
    row = weights.rank + weights.rope_dim
    hidden = site.key.projection.weight.shape[0]
    behind_norm = site.key.norm is not None or site.value.norm is not None
    key_value = hidden * site.cache_width
    down = key_value + site.cache_width * row if behind_norm else hidden * row
    heads_out = site.heads * site.value_dim * site.output.weight.shape[1]
    absorbed = [n for n in ("query_map", "key_up", "value_up") if getattr(plan, n)]
    notes = ["folded: " + ", ".join(absorbed)] if absorbed else []
    if weights.key_rank < weights.rank:
        notes.append(f"keys read {weights.key_rank}")
    if conversion.row.latent != site.dtype or conversion.row.rope != site.dtype:
        notes.append(f"latent {conversion.row.latent}, rope {conversion.row.rope}")
    return LayerReport(
        name=site.name, heads=site.heads, kv_groups=site.kv_groups, head_dim=site.head_dim, rank=weights.rank,
        rope_dims=weights.rope_dim, kept=weights.kept, output_error=error,
        cache_before=conversion.row.full_bytes(site.cache_width),
        cache_after=conversion.row.bytes(weights.rank, weights.rope_dim),
        weights_before=hidden * site.heads * site.head_dim + key_value + heads_out,
        weights_after=numbers_read(site, weights, plan) + down,
        note="; ".join(notes),
    )  # fmt: skip
