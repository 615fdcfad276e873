"""Rotary pairs as complex numbers.

RoPE turns the pair (i, i + R/2), or (2i, 2i + 1) when interleaved, by theta_i * position. Read as one complex number
kappa_i it is multiplied by exp(j theta_i position), and a logit is Re sum_i conj(chi_i) kappa_i exp(j theta_i (s - t)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_pass.site import Rope


@dataclass(frozen=True)
class Pairs:
    """Where the parts of a head's D numbers lie: `re`, `im` [R/2] of each pair, `rest` the dims that never turn."""

    re: np.ndarray
    im: np.ndarray
    rest: np.ndarray

    @property
    def count(self) -> int:
        """Number of rotary pairs, R/2."""
        return len(self.re)


def pairs_of(rope: Rope, head_dim: int) -> Pairs:
    """The pairs of a head of `head_dim` numbers under `rope`."""
    half = rope.rotary_dim // 2
    index = np.arange(half)
    rest = np.arange(rope.rotary_dim, head_dim)
    if rope.interleaved:
        return Pairs(2 * index, 2 * index + 1, rest)
    return Pairs(index, index + half, rest)


def complex_moment(second: np.ndarray, pairs: Pairs, groups: int, head_dim: int) -> np.ndarray:
    """E[kappa_i kappa_i^H] per pair, [R/2, G, G] complex Hermitian, from E[k k^T] [G*D, G*D] of the same tokens."""
    m = second.reshape(groups, head_dim, groups, head_dim)
    rr, ii = m[:, pairs.re][:, :, :, pairs.re], m[:, pairs.im][:, :, :, pairs.im]
    ir, ri = m[:, pairs.im][:, :, :, pairs.re], m[:, pairs.re][:, :, :, pairs.im]
    full = (rr + ii) + 1j * (ir - ri)
    return np.einsum("gihi->igh", full)


def complex_metric(metric: np.ndarray, pairs: Pairs, groups: int, head_dim: int) -> np.ndarray:
    """W_i [R/2, G, G] with E[e^T M e] = Re tr(W_i E[eps eps^H]) for errors eps of pair i whose phase is uniform."""
    return 0.5 * complex_moment(metric, pairs, groups, head_dim)


def sqrt_and_inverse(matrix: np.ndarray, floor: float = 1e-9) -> tuple[np.ndarray, np.ndarray]:
    """Hermitian square root and its inverse; eigenvalues below `floor` times the largest are raised to it."""
    values, vectors = np.linalg.eigh((matrix + matrix.conj().swapaxes(-1, -2)) / 2)
    top = np.maximum(values[..., -1:], np.finfo(np.float64).tiny)
    root = np.sqrt(np.maximum(values, floor * top))
    adjoint = vectors.conj().swapaxes(-1, -2)
    return (vectors * root[..., None, :]) @ adjoint, (vectors / root[..., None, :]) @ adjoint
