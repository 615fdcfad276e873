"""What calibration learns about one site, and all that folding needs to know of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SiteSample:
    """Held-out activations of one sequence: query [T, H, D], key [T, G, D], value [T, G, V], before rotation."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class SiteStatistics:
    """Moments of y = [k; v], the N = G*(D + V) numbers a GQA cache keeps per token; k before rotation, after any norm.

    Tokens count by how much the block's output depends on them, keys and values apart: a token that all others attend
    to must be kept better than one that nobody looks at. `tokens`: how many were seen. `mean` [N]: E[w y]. `covariance`
    [N, N]: that of sqrt(w) (y - mean). `metric` [N, N]: E[gamma gamma^T / w], gamma the gradient at y of a random
    projection of the block's output; trace(metric @ covariance of an error) is then its expected squared output error.
    `distance` [L]: share of the attention that falls on keys that many rows back; sums to 1. All float64.
    `sample`: tokens that none of these have seen.
    """

    tokens: int
    mean: np.ndarray
    covariance: np.ndarray
    metric: np.ndarray
    distance: np.ndarray
    sample: SiteSample | None = None
