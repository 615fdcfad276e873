"""Ordered latents: a basis of the latent in which the keys need only the first columns.

A latent c [r] may be turned by any orthogonal Q: encoder Q^T E and decoder F Q give the same keys and values. Keys need
far fewer directions than values, so turn their part to the front and let them read only the first k columns; the
scores of the absorbed form then cost k multiply-adds a row in place of r, and key_up shrinks alike.

Which Q: the channels of c are uncorrelated and of unit variance (`low_rank` scales them so), and turned they still are.
Leaving the columns from k on out of the keys changes a key by F_k Q_tail c_tail, which is uncorrelated with what the
rank had cut already, so the expected loss under the metric's key block M_k = L_k L_k^T rises by exactly

    tr(M_k F_k Q_tail Q_tail^T F_k^T) = |L_k^T F_k Q_tail|^2

which is least, for every k at once, when Q holds the right singular vectors of L_k^T F_k: it is then the sum of the
squared singular values from k on. Values read every column, so theirs are turned and lose nothing. The few channels
that `low_rank` does not blow up to unit variance vary less; for them the rise is an upper bound.

Where keys have fewer directions than the latent has columns (r > G*D at the latest) the tail is zero, for any input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ordered:
    """`turn` [r, r] orthogonal: encoder turn^T E, decoder F turn. `lost` [r + 1]: rise of the expected squared output
    error when keys read only the first 0, 1, ..., r columns; descending, the last is 0."""

    turn: np.ndarray
    lost: np.ndarray


def order_for_keys(decode: np.ndarray, metric: np.ndarray) -> Ordered:
    """The basis in which the keys' weighted decoder is concentrated in the first columns.

    `decode` [G*D, r]: the keys' rows of the decoder, channels of unit variance; `metric` [G*D, G*D]: the metric's key
    block, positive definite.
    """
    rank = decode.shape[1]
    _, size, adjoint = np.linalg.svd(np.linalg.cholesky(metric).T @ decode)
    energy = np.pad(size**2, (0, rank - len(size)))
    return Ordered(adjoint.T, np.append(np.cumsum(energy[::-1])[::-1], 0.0))
