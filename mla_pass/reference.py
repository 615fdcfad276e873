"""Latent attention in plain numpy, float64: the truth that every backend is held to, in its expanded form."""

from __future__ import annotations

import numpy as np

from mla_pass.fold import LatentWeights


def turn(z: np.ndarray, theta: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Rotate z [..., T, pairs] complex by theta * position [T]."""
    return z * np.exp(1j * theta * position[:, None])


def rows(weights: LatentWeights, theta: np.ndarray, y: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Cached rows [T, r + p] of tokens y [T, N] (keys before rotation, then values) at `position` [T]."""
    row = y @ weights.encode.T + weights.encode_bias
    r, half = weights.rank, weights.rope_dim // 2
    rope = turn(row[:, r : r + half] + 1j * row[:, r + half :], theta[weights.rope_index], position)
    return np.concatenate([row[:, :r], rope.real, rope.imag], axis=1)


def band_factors(weights: LatentWeights, theta: np.ndarray, count: int) -> np.ndarray:
    """exp(j theta centre) (a0 + j a1 delta) of rows 0..count-1 for each band pair, [T, m]."""
    bands, s = weights.bands, np.arange(count)[:, None]
    centre = s // bands.block * bands.block + (bands.block - 1) / 2
    return np.exp(1j * theta[bands.index] * centre) * (bands.a0 + 1j * bands.a1 * (s - centre))


def attend(
    weights: LatentWeights, theta: np.ndarray, query: np.ndarray, cache: np.ndarray, position: np.ndarray,
    keep: np.ndarray, *, scale: float, softcap: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Attention of S new queries over T cached rows.

    `query` [S, H, D] before rotation, at `position` [S] for the cached rotation; they are the last S of the T rows.
    `cache` [T, r + p] from :func:`rows`; `keep` [S, T] boolean or additive. Returns the context [S, H, V].
    """
    count, new, heads, groups = len(cache), len(query), query.shape[1], len(weights.key_up)
    r, m, n, half = weights.rank, len(weights.bands.index), weights.nope_dim, weights.rope_dim // 2
    latent, rope = cache[:, :r], cache[:, r : r + half] + 1j * cache[:, r + half :]
    factor = band_factors(weights, theta, count)
    bias = np.where(keep, 0.0, -np.inf) if keep.dtype == bool else keep
    row = np.arange(count - new, count)
    context = np.zeros((new, heads, weights.value_up.shape[2]))
    for h in range(heads):
        g = h * groups // heads
        q = query[:, h] @ weights.query_map[g]
        key = latent[:, : weights.key_rank] @ weights.key_up[g].T + weights.key_mean[g]
        turning = turn(q[:, :m] + 1j * q[:, m : 2 * m], theta[weights.bands.index], row)
        scores = (turning.conj() @ ((key[:, :m] + 1j * key[:, m : 2 * m]) * factor).T).real
        scores += q[:, 2 * m : n] @ key[:, 2 * m :].T
        q_rope = turn(q[:, n : n + half] + 1j * q[:, n + half :], theta[weights.rope_index], position)
        scores = (scores + (q_rope.conj() @ rope.T).real) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = scores + bias
        top = scores.max(axis=1, keepdims=True)
        weight = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
        total = weight.sum(axis=1, keepdims=True)
        attention = weight / np.where(total > 0, total, 1.0)
        value = latent[:, weights.value_offset :] @ weights.value_up[g] + weights.value_mean[g]
        context[:, h] = attention @ value
    return context
