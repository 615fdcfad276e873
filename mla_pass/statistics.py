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

    `metric` [N, N] and `covariance` [N, N] are such that an error R (y - mean) of the cached rows moves the block's
    output by about tr(metric R covariance R^T), squared and per projection of the output; tokens count in them by how
    much the output depends on them, and so they do in `mean` [N]. `distance` [L]: share of the attention that falls on
    keys that many rows back; sums to 1. `tokens`: how many were seen. All float64. `sample`: tokens that none of these
    have seen.
    """

    tokens: int
    mean: np.ndarray
    covariance: np.ndarray
    metric: np.ndarray
    distance: np.ndarray
    sample: SiteSample | None = None
