"""A basis of the latent in which the pairs of the finest blocks need few of its columns.

Where blocks of rows are short it takes less to decode a pair's key, 2*G numbers of every row, than to make queries for
each block (mla_pass/native/levels.cc), and the decoder U [2*G*m, k] of m such pairs is most of the arithmetic: each of
its rows reads all k columns of the latent that keys read. With U = L Q^T, L lower triangular and Q orthogonal, the
latent Q^T c in place of c has the decoder L: its row i reads i + 1 columns. That is exact, and as in `ordered` the
channels stay uncorrelated and of unit variance. Nothing else changes: keys of the other dims, and values, read what
they read before. Which pairs a kernel decodes is its own choice; with the finest first, any first few are triangular.
"""

from __future__ import annotations

import numpy as np


def stagger(key_up: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """`turn` [k, k] orthogonal, and key_up @ turn with exact zeros where it has them.

    `key_up` [G, n, k]: the real parts of `pairs` pairs, finest blocks first, then their imaginary parts, then the dims
    that no band turns. Pair i of any group reads the first 2*G*(i + 1) columns of the turned latent.
    """
    groups, _, width = key_up.shape
    planes = np.stack([key_up[:, :pairs], key_up[:, pairs : 2 * pairs]])
    rows = planes.transpose(2, 0, 1, 3).reshape(-1, width)  # pair, part, group
    turn, lower = np.linalg.qr(rows[:width].T, mode="complete")
    staggered = key_up @ turn
    exact = (rows @ turn).reshape(pairs, 2, groups, width)
    exact.reshape(-1, width)[: len(lower.T)] = lower.T
    staggered[:, :pairs], staggered[:, pairs : 2 * pairs] = exact.transpose(1, 2, 0, 3)
    return turn, staggered
