"""The joint low rank of keys and values, weighed by what an error does to the attention's output.

With C the centred covariance of y = [k; v] and M the metric (expected output error e^T M e), Eckart-Young on
P S = svd(M^(1/2) C^(1/2)) gives encoder E = P_r^T M^(1/2) and decoder F = M^(-1/2) P_r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_pass.fold.pairs import sqrt_and_inverse

# Directions the calibration text never showed come last, but they must exist: full rank is exact for any input.
UNSEEN = 1e-10
# Latent channels are scaled to unit variance, except that rare ones are not blown up beyond this ratio.
SMALLEST_CHANNEL = 1e-4


@dataclass(frozen=True)
class LowRank:
    """`encode` [N, N], `decode` [N, N]: the first r rows and columns are the best rank-r code; `energy` [N] per channel."""

    encode: np.ndarray
    decode: np.ndarray
    energy: np.ndarray


def low_rank(covariance: np.ndarray, metric: np.ndarray) -> LowRank:
    """All ranks at once, in order of the output error they save; `covariance`, `metric` [N, N]."""
    ridge = UNSEEN * np.trace(covariance) / len(covariance)
    used = np.diag((np.abs(covariance).sum(0) > 0).astype(np.float64))
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2 + ridge * used)
    root_c = vectors * np.sqrt(np.maximum(values, 0))  # any R with R R^T = C serves
    root_m, inverse_m = sqrt_and_inverse(metric)
    left, size, _ = np.linalg.svd(root_m @ root_c)
    channel = np.maximum(size, SMALLEST_CHANNEL * max(size[0], np.finfo(np.float64).tiny))
    return LowRank((left.T @ root_m) / channel[:, None], (inverse_m @ left) * channel, size**2)
