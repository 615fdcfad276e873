"""Which key components keep their own rotation in the cache.

Any complex-linear map across heads within one frequency commutes with RoPE. So per pair i the G complex numbers kappa_i
of a token are turned into the basis in which their energy, in units of the attention's output error, is concentrated,
and the components whose rotation the bands reproduce worst are cached rotated, one complex number for all heads:

    rho = u^H W^(1/2) kappa_i,     kappa_i = sum over components of (W^(-1/2) u) rho
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_pass.fold.pairs import sqrt_and_inverse


@dataclass(frozen=True)
class Components:
    """Rope components, ordered from the most to the least worth caching rotated; c counts over all of them, G*R/2.

    `pair` [c]: the frequency each belongs to. `analysis` [c, G]: rho = analysis @ kappa_pair. `synthesis` [c, G]:
    kappa_pair = sum_c synthesis[c] * rho[c] over the components of the pair. `loss` [c]: predicted output error when
    the component's rotation is left to the bands.
    """

    pair: np.ndarray
    analysis: np.ndarray
    synthesis: np.ndarray
    loss: np.ndarray


def rank_components(moment: np.ndarray, metric: np.ndarray, residual: np.ndarray) -> Components:
    """Rank all components by energy times `residual` [R/2], the share of a rotation that is lost when not cached.

    `moment` [R/2, G, G]: E[kappa kappa^H]; `metric` [R/2, G, G] as in :func:`complex_metric`.
    """
    root, inverse = sqrt_and_inverse(metric)
    energy, vectors = np.linalg.eigh(root @ moment @ root)
    pair_count, groups = energy.shape
    adjoint = vectors.conj().swapaxes(-1, -2)
    analysis = (adjoint @ root).reshape(-1, groups)
    synthesis = (inverse @ vectors).swapaxes(-1, -2).reshape(-1, groups)
    # Unit energy per cached number keeps half-precision caches away from their limits.
    size = np.sqrt(
        np.maximum(np.einsum("cg,cgh,ch->c", analysis, np.repeat(moment, groups, 0), analysis.conj()).real, 0)
    )
    size = np.maximum(size, 1e-6 * max(float(size.max(initial=0.0)), np.finfo(np.float64).tiny))
    loss = (np.maximum(energy, 0) * residual[:, None]).reshape(-1)
    pair = np.repeat(np.arange(pair_count), groups)
    order = np.argsort(-loss, kind="stable")
    return Components(pair[order], (analysis / size[:, None])[order], (synthesis * size[:, None])[order], loss[order])
