"""Running the original graph over text and keeping, site by site, the moments that folding needs.

The graph itself is run, on ONNX Runtime, with each site's query, key and value before rotation as extra outputs; no
torch and no knowledge of the architecture. Attention is recomputed from these in numpy and differentiated by hand.

What folding minimises is the error of the block's output. If R maps a cached row y_t to its error, then for random
signs omega_i on the output of every token i the output moves by <R, X>, X = sum_t gamma_t y_t^T, with gamma_t the
gradient of sum_i omega_i . W_o context_i at y_t; the expected squared error is E <R, X>^2, exact to first order, also
where errors of neighbouring tokens add up and where one token, that all others attend to, matters more than the rest.
Folding needs this as a product, tr(M R C R^T). The best one obeys M = E[X C^-1 X^T] / N and C = E[X^T M^-1 X] / N
(each the nearest to the truth given the other); both are followed window by window, each window weighed by what the
windows before it told. Replacing C by the plain covariance and M by E[gamma gamma^T] takes tokens for independent and
equally important; that costs half as much again in loss on SmolLM2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mla_pass.errors import MlaPassError
from mla_pass.fold.pairs import pairs_of
from mla_pass.site import AttentionSite, Rope
from mla_pass.statistics import SiteSample, SiteStatistics

SAMPLE_TOKENS = 160
"""Tokens of the held-out window that are kept to measure each site's output error."""


DAMPING = 0.05
"""Share of the diagonal added before a moment is inverted: few windows do not fill all directions."""


class Accumulator:
    """Moments of one site, improved window by window; its size does not depend on how many there are."""

    def __init__(self, site: AttentionSite, length: int, seed: int) -> None:
        """`length` is the window's; `seed` draws the output projections."""
        width = site.cache_width
        self.site = site
        self.tokens = self.windows = 0
        self.metric = np.zeros((width, width))
        self.moment = np.zeros((width + 1, width + 1))  # of [y, 1], so that it holds the mean
        self.mean = np.zeros(width)
        self.covariance = np.zeros((width, width))
        self.distance = np.zeros(length)
        self.random = np.random.default_rng(seed)
        self.output = site.output.weight.read().astype(np.float32)

    def add(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        """One window: query [T, H, D], key [T, G, D], value [T, G, V], before rotation."""
        gamma, distance = output_gradient(self.site, query, key, value, self.output, self.random)
        y = np.concatenate([key.reshape(len(key), -1), value.reshape(len(value), -1)], axis=1).astype(np.float32)
        if self.windows == 0:
            self.mean, self.covariance = y.mean(axis=0, dtype=np.float64), np.diag(y.var(axis=0, dtype=np.float64))
        self.windows += 1
        self.tokens += len(y)
        self.distance += distance
        width = len(self.mean)
        cross = (gamma.T @ np.pad(y, ((0, 0), (0, 1)), constant_values=1)).astype(np.float64)
        centred = cross[:, :width] - np.outer(cross[:, width], self.mean)
        self.metric += centred @ np.linalg.solve(damped(self.covariance), centred.T) / width
        self.moment += cross.T @ np.linalg.solve(damped(self.metric / self.windows), cross) / width
        mass = self.moment[width, width]
        self.mean = self.moment[:width, width] / mass
        self.covariance = self.moment[:width, :width] / mass - np.outer(self.mean, self.mean)

    def result(self, sample: SiteSample) -> SiteStatistics:
        """The moments of all windows added."""
        distance = self.distance / self.distance.sum()
        return SiteStatistics(self.tokens, self.mean, self.covariance, self.metric / self.windows, distance, sample)


def damped(moment: np.ndarray) -> np.ndarray:
    """A moment that can be inverted."""
    diagonal = np.diag(moment)
    return moment + np.diag(DAMPING * diagonal + 1e-6 * diagonal.mean() + np.finfo(np.float64).tiny)


def rotate(x: np.ndarray, rope: Rope, angle: np.ndarray) -> np.ndarray:
    """RoPE on x [T, heads, D] with `angle` [T, R/2]; the angles' negatives undo it but for the scaling."""
    pairs = pairs_of(rope, x.shape[-1])
    cos, sin = (rope.attention_scaling * f(angle)[:, None].astype(x.dtype) for f in (np.cos, np.sin))
    out = x.copy()
    re, im = x[..., pairs.re], x[..., pairs.im]
    out[..., pairs.re], out[..., pairs.im] = re * cos - im * sin, re * sin + im * cos
    return out


def attention(
    site: AttentionSite, query: np.ndarray, key: np.ndarray, keep: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax weights [T, T] of one head's rotated query and key [T, D], and the softcap's slope."""
    scores = site.scale * (query @ key.T)
    slope = np.ones((), scores.dtype)
    if site.softcap:
        bent = np.tanh(scores / site.softcap)
        scores, slope = site.softcap * bent, 1 - bent * bent
    scores = np.where(keep, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True), slope


def visible(site: AttentionSite, length: int) -> np.ndarray:
    """Which keys each of `length` tokens sees when nothing is padded: [T, T]."""
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    keep = column <= row
    return keep & (row - column < site.mask.window) if site.mask.window else keep


def output_gradient(
    site: AttentionSite,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    output: np.ndarray,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient at y [T, N] of a random projection of the output, and the attention mass per distance [T]."""
    length, per_group = len(query), site.heads // site.kv_groups
    angle = np.outer(np.arange(length), site.rope.theta)
    q, k = rotate(query, site.rope, angle), rotate(key, site.rope, angle)
    keep = visible(site, length)
    omega = random.choice(np.array([-1, 1], np.float32), size=(length, output.shape[1]))
    upstream = (omega @ output.T).reshape(length, site.heads, site.value_dim)
    d_key, d_value, mass = np.zeros_like(k), np.zeros_like(value), np.zeros_like(keep, dtype=np.float32)
    for head in range(site.heads):
        group = head // per_group
        weights, slope = attention(site, q[:, head], k[:, group], keep)
        mass += weights
        d_value[:, group] += weights.T @ upstream[:, head]
        d_weights = upstream[:, head] @ value[:, group].T
        d_scores = weights * (d_weights - (d_weights * weights).sum(axis=1, keepdims=True)) * slope
        d_key[:, group] += site.scale * (d_scores.T @ q[:, head])
    d_key = rotate(d_key, site.rope, -angle)
    gamma = np.concatenate([d_key.reshape(length, -1), d_value.reshape(length, -1)], axis=1)
    return gamma, np.array([mass.trace(-d) for d in range(length)])


@dataclass(frozen=True)
class Run:
    """The instrumented graph: `forward(ids [T])` gives each site's query, key and value, [T, heads, size] float32."""

    forward: Callable[[np.ndarray], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]


def calibrate(
    sites: Sequence[AttentionSite], run: Run, windows: np.ndarray, *, progress: Callable[[int, int], None] | None = None
) -> list[SiteStatistics]:
    """Moments of every site over `windows` [n, T] of token ids; the last window is held out as a sample.

    Raises MlaPassError when there are fewer than two windows.
    """
    if len(windows) < 2:
        raise MlaPassError(
            f"calibration needs at least 2 windows of text, {2 * windows.shape[1]} tokens; got {windows.size}"
        )
    sums = [Accumulator(site, windows.shape[1], seed) for seed, site in enumerate(sites)]
    for done, window in enumerate(windows[:-1]):
        for accumulator, (query, key, value) in zip(sums, run.forward(window), strict=True):
            accumulator.add(query, key, value)
        if progress is not None:
            progress(done + 1, len(windows))
    held_out = [SiteSample(*branches) for branches in run.forward(windows[-1][:SAMPLE_TOKENS])]
    if progress is not None:
        progress(len(windows), len(windows))
    return [accumulator.result(sample) for accumulator, sample in zip(sums, held_out, strict=True)]


def tokens_needed(sites: Sequence[AttentionSite]) -> int:
    """Fewest tokens that can tell a site's moments apart from noise: twice the numbers it caches per token."""
    return 2 * max(site.cache_width for site in sites)


def cut_windows(ids: np.ndarray, context: int, tokens: int, needed: int, origin: str | Path) -> np.ndarray:
    """The first `tokens` of a stream of ids as windows [n, context], one more than asked so that one can be held out.

    Raises MlaPassError when the text has fewer than `needed` tokens or does not fill two windows.
    """
    context = min(context, len(ids) // 2)
    count = min(len(ids) // max(context, 1), -(-tokens // max(context, 1)) + 1)
    if context < 2 or (count - 1) * context < needed:
        raise MlaPassError(
            f"calibration text too short: {origin} has {len(ids)} tokens, but this model needs at least "
            f"{needed + max(context, 2)}; give a longer text, or calibrate on 'self'"
        )
    return ids[: count * context].reshape(count, context)
