"""What calibration learns about one site, and all that folding needs to know of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SiteStatistics:
    """Moments of y = [k; v], the N = G*(D + V) numbers a GQA cache keeps per token; k before rotation, after any norm.

    `tokens`: how many tokens were seen. `mean` [N]: E[y]. `second` [N, N]: E[y y^T]. `metric` [N, N]: E[gamma gamma^T],
    gamma the gradient at y of a random projection of the block's output, so that e^T metric e is the expected squared
    error of the output for an error e in y. `distance` [L]: share of the attention that falls on keys that many rows
    back; sums to 1. All float64.
    """

    tokens: int
    mean: np.ndarray
    second: np.ndarray
    metric: np.ndarray
    distance: np.ndarray
