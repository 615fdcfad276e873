"""The joint low rank of keys and values, weighed by what an error does to the attention's output.

With C the centred covariance of y = [k; v], M = L L^T the metric (expected output error e^T M e), Eckart-Young on
P S^2 P^T = L^T C L gives encoder E = P_r^T L^T and decoder F = L^-T P_r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Directions the calibration text never showed come last, but they must exist: full rank is exact for any input.
UNSEEN = 1e-10
# Latent channels are scaled to unit variance, except that rare ones are not blown up beyond this ratio.
SMALLEST_CHANNEL = 1e-4


@dataclass(frozen=True)
class LowRank:
    """`encode` [N, N], `decode` [N, N]: the first r rows and columns are the best rank-r code; `energy` [N] of each."""

    encode: np.ndarray
    decode: np.ndarray
    energy: np.ndarray


def weighted(covariance: np.ndarray, metric: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L^T C L over the coordinates in use, those coordinates, and L there, M = L L^T.

    A coordinate that never varies (a key component that is cached rotated) takes no part: full rank then spans all
    others, whatever the text showed.
    """
    used = np.flatnonzero(np.abs(covariance).sum(0) > 0)
    ridge = UNSEEN * np.trace(covariance) / max(len(used), 1)
    root = np.linalg.cholesky(metric[np.ix_(used, used)])
    inner = covariance[np.ix_(used, used)] + ridge * np.eye(len(used))
    return root.T @ inner @ root, used, root


def energies(covariance: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """The output error that each channel of :func:`low_rank` saves, descending, [N]."""
    values = np.linalg.eigvalsh(weighted(covariance, metric)[0])[::-1]
    return np.pad(np.maximum(values, 0), (0, len(covariance) - len(values)))


def low_rank(covariance: np.ndarray, metric: np.ndarray) -> LowRank:
    """All ranks at once, in order of the output error they save; `covariance`, `metric` [N, N]."""
    product, used, root = weighted(covariance, metric)
    values, vectors = np.linalg.eigh(product)
    left, energy = vectors[:, ::-1], np.maximum(values[::-1], 0)
    size = np.sqrt(energy)
    channel = np.maximum(size, SMALLEST_CHANNEL * max(float(size[0]), np.finfo(np.float64).tiny))
    n, k = len(covariance), len(used)
    encode, decode = np.zeros((n, n)), np.zeros((n, n))
    encode[:k, used], decode[used, :k] = (left.T @ root.T) / channel[:, None], np.linalg.solve(root.T, left) * channel
    return LowRank(encode, decode, np.pad(energy, (0, n - k)))
