"""Running the original graph over text and keeping, site by site, the moments that folding needs.

The graph itself is run, with each site's query, key and value before rotation as extra outputs; no knowledge of the
architecture. What folding minimises is an expected square E <R, X>^2 / 2, where R maps a cached row y_t to its error
and X = sum_t gamma_t y_t^T over a window; it is exact to second order, also where errors of neighbouring tokens add up
and where one token, that all others attend to, matters more than the rest. There are two choices of gamma_t:

- `output`: the gradient at y_t of sum_i omega_i . W_o context_i, omega_i random signs on the output of every token i.
  Then the square is that of the block's output error. Forward passes on ONNX Runtime are all it needs: attention is
  recomputed in numpy and differentiated by hand. It is taken relative to what the block puts out.
- `fisher`: the gradient at y_t of the model's log-likelihood, labels drawn from its own prediction. Then it is the
  expected loss in nats, which also weighs layer against layer. Torch differentiates the graph (`pytorch.gradients`).
  An equal share of the output metric, brought to the same units, steadies it: neither form of product holds all, and
  what one misses the other sees (SmolLM2 at half the cache: 0.088, output alone 0.096, together 0.079 nats).

Folding needs this as a product, tr(M R C R^T). The best one obeys M = E[X C^-1 X^T] / N and C = E[X^T M^-1 X] / N
(each the nearest to the truth given the other); both are followed window by window, each window weighed by what the
windows before it told. Replacing C by the plain covariance and M by E[gamma gamma^T] takes tokens for independent and
equally important; that costs half as much again in loss on SmolLM2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from mla_pass.fold.pairs import pairs_of
from mla_pass.parallel import each
from mla_pass.site import AttentionSite, Rope
from mla_pass.statistics import Calibration, SiteSample, SiteStatistics
from mla_pass.windows import hold_out

SAMPLE_TOKENS = 160
"""Tokens of the held-out window that are kept to measure each site's output error."""
MASS_WINDOWS = 8
"""Windows that the attention's distances are read off, with the Fisher metric; they settle sooner than the moments."""
DAMPING = 0.05
"""Share of the diagonal added before a moment is inverted: few windows do not fill all directions."""
ROUNDING = 1e-6
"""Share of a channel's mean square that its variance may be wrong by: the difference of larger numbers in float32."""


class Accumulator:
    """Moments of one site, improved window by window; its size does not depend on how many there are."""

    def __init__(self, site: AttentionSite, length: int) -> None:
        """`length` is the window's."""
        width = site.cache_width
        self.site, self.length = site, length
        self.tokens = self.windows = 0
        self.metric = np.zeros((width, width))
        self.moment = np.zeros((width + 1, width + 1))  # of [y, 1], so that it holds the mean
        self.mean = np.zeros(width)
        self.covariance = np.zeros((width, width))
        self.distance = np.zeros(length)

    def add(self, y: np.ndarray, gammas: Sequence[np.ndarray]) -> None:
        """One window: y [T, N], and for each sample of the gradient gamma [T, N]."""
        y = y.astype(np.float32)
        if self.windows == 0:
            self.mean, self.covariance = y.mean(axis=0, dtype=np.float64), np.diag(y.var(axis=0, dtype=np.float64))
        self.tokens += len(y)
        width = len(self.mean)
        rows = np.pad(y, ((0, 0), (0, 1)), constant_values=1)
        for gamma in gammas:
            self.windows += 1
            cross = (gamma.T @ rows).astype(np.float64)
            centred = cross[:, :width] - np.outer(cross[:, width], self.mean)
            spread = self.covariance + ROUNDING * np.diag(np.diag(self.covariance) + self.mean**2)
            self.metric += centred @ np.linalg.solve(damped(spread), centred.T) / width
            self.moment += cross.T @ np.linalg.solve(damped(self.metric / self.windows), cross) / width
            mass = self.moment[width, width]
            self.mean = self.moment[:width, width] / mass
            self.covariance = self.moment[:width, :width] / mass - np.outer(self.mean, self.mean)

    def result(self, sample: SiteSample, unit: float = 1.0) -> SiteStatistics:
        """The moments of all windows added, the metric per token and in units of `unit`."""
        distance = self.distance / self.distance.sum()
        metric = self.metric / (self.windows * self.length * unit)
        return SiteStatistics(self.tokens, self.mean, self.covariance, metric, distance, sample)


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
    site: AttentionSite, query: np.ndarray, key: np.ndarray, value: np.ndarray, omega: np.ndarray, output: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Gradient at y [T, N] of a projection `omega` [T, E] of the block's output, the attention mass per distance [T],
    and the sum of the output's squares over the window; `output` [H*V, E] is the output projection."""
    length, per_group = len(query), site.heads // site.kv_groups
    angle = np.outer(np.arange(length), site.rope.theta)
    q, k = rotate(query, site.rope, angle), rotate(key, site.rope, angle)
    keep = visible(site, length)
    upstream = (omega @ output.T).reshape(length, site.heads, site.value_dim)
    d_key, d_value, mass = np.zeros_like(k), np.zeros_like(value), np.zeros_like(keep, dtype=np.float32)
    context = np.zeros_like(upstream)
    for head in range(site.heads):
        group = head // per_group
        weights, slope = attention(site, q[:, head], k[:, group], keep)
        mass += weights
        context[:, head] = weights @ value[:, group]
        d_value[:, group] += weights.T @ upstream[:, head]
        d_weights = upstream[:, head] @ value[:, group].T
        d_scores = weights * (d_weights - (d_weights * weights).sum(axis=1, keepdims=True)) * slope
        d_key[:, group] += site.scale * (d_scores.T @ q[:, head])
    d_key = rotate(d_key, site.rope, -angle)
    gamma = np.concatenate([d_key.reshape(length, -1), d_value.reshape(length, -1)], axis=1)
    squares = float(np.square(context.reshape(length, -1) @ output).sum(dtype=np.float64))
    return gamma, mass_by_distance(mass), squares


def mass_by_distance(mass: np.ndarray) -> np.ndarray:
    """Attention weights [T, T] summed by how many rows back the key lies, [T]."""
    return np.array([mass.trace(-d) for d in range(len(mass))])


def attention_mass(site: AttentionSite, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The attention mass of all heads per distance [T]; query [T, H, D], key [T, G, D], before rotation."""
    length, per_group = len(query), site.heads // site.kv_groups
    angle = np.outer(np.arange(length), site.rope.theta)
    q, k, keep = rotate(query, site.rope, angle), rotate(key, site.rope, angle), visible(site, length)
    mass = np.zeros((length, length), np.float32)
    for head in range(site.heads):
        mass += attention(site, q[:, head], k[:, head // per_group], keep)[0]
    return mass_by_distance(mass)


def cached(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """y [T, N] from key [T, G, D] and value [T, G, V]."""
    return np.concatenate([key.reshape(len(key), -1), value.reshape(len(value), -1)], axis=1)


@dataclass(frozen=True)
class Run:
    """The instrumented graph: `forward(ids [T])` gives each site's query, key and value, [T, heads, size] float32."""

    forward: Callable[[np.ndarray], list[tuple[np.ndarray, np.ndarray, np.ndarray]]]


class Gradients(Protocol):
    """A graph that can be differentiated (`mla_pass.pytorch.gradients`)."""

    def window(self, ids: np.ndarray, random: np.random.Generator, samples: int) -> Sequence[SiteWindow]:
        """Every site's activations and `samples` gradients of one window of ids [T]."""


class SiteWindow(Protocol):
    """One site in one window: query [T, H, D], key [T, G, D], value [T, G, V], and gradients [T, N] at y: of the
    log-likelihood, and `outward` of the block's output."""

    @property
    def query(self) -> np.ndarray: ...
    @property
    def key(self) -> np.ndarray: ...
    @property
    def value(self) -> np.ndarray: ...
    @property
    def gammas(self) -> list[np.ndarray]: ...
    @property
    def outward(self) -> np.ndarray: ...


def calibrate(
    sites: Sequence[AttentionSite], run: Run, windows: np.ndarray, *, progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Moments of every site under the output metric over `windows` [n, T] of token ids, the last ones held out.

    Raises MlaPassError when there are fewer than two windows.
    """
    seen, held_out = hold_out(windows)
    sums = [Accumulator(site, windows.shape[1]) for site in sites]
    projections = [site.output.weight.read().astype(np.float32) for site in sites]
    randoms = [np.random.default_rng(seed) for seed in range(len(sites))]
    squares = np.zeros(len(sites))

    def add(layer: tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        i, (query, key, value) = layer
        omega = randoms[i].choice(np.array([-1, 1], np.float32), size=(len(query), projections[i].shape[1]))
        gamma, mass, square = output_gradient(sites[i], query, key, value, omega, projections[i])
        sums[i].add(cached(key, value), [gamma])
        sums[i].distance += mass
        squares[i] += square

    for done, window in enumerate(seen):
        list(each(add, enumerate(run.forward(window))))
        if progress is not None:
            progress(done + 1, len(seen) + 1)
    samples = [SiteSample(*branches) for branches in run.forward(held_out[-1][:SAMPLE_TOKENS])]
    if progress is not None:
        progress(len(seen) + 1, len(seen) + 1)
    units = squares / seen.size  # what the block puts out, squared and per token
    results = [s.result(sample, max(u, 1e-30)) for s, sample, u in zip(sums, samples, units.tolist(), strict=True)]
    return Calibration(tuple(results), held_out, seen[: len(held_out)], "output")


def calibrate_fisher(
    sites: Sequence[AttentionSite], gradients: Gradients, windows: np.ndarray, *, samples: int = 2, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:  # fmt: skip
    """Moments of every site under the Fisher metric over `windows` [n, T] of token ids, the last ones held out.

    `samples` draws of labels a window: a backward pass each. Raises MlaPassError when there are fewer than two windows.
    """
    seen, held_out = hold_out(windows)
    random = np.random.default_rng(seed)
    sums = [(Accumulator(site, windows.shape[1]), Accumulator(site, windows.shape[1])) for site in sites]
    for done, window in enumerate(seen):
        found = gradients.window(window, random, samples)
        mass = [done < MASS_WINDOWS] * len(sums)
        list(each(add_window, zip(sums, found, mass, strict=True)))
        if progress is not None:
            progress(done + 1, len(seen) + 1)
    kept = gradients.window(held_out[-1][:SAMPLE_TOKENS], random, 0)
    if progress is not None:
        progress(len(seen) + 1, len(seen) + 1)
    results = [
        blended(fisher.result(sample), output.result(sample))
        for (fisher, output), sample in zip(sums, (SiteSample(k.query, k.key, k.value) for k in kept), strict=True)
    ]
    return Calibration(tuple(results), held_out, seen[: len(held_out)], "fisher")


def add_window(layer: tuple[tuple[Accumulator, Accumulator], SiteWindow, bool]) -> None:
    """Add one window of one site to its two accounts, and its attention mass if that is wanted, too."""
    (fisher, output), found, mass = layer
    y = cached(found.key, found.value)
    fisher.add(y, found.gammas)
    output.add(y, [found.outward])
    if mass:
        fisher.distance += attention_mass(fisher.site, found.query, found.key)
        output.distance = fisher.distance


def blended(fisher: SiteStatistics, output: SiteStatistics) -> SiteStatistics:
    """Equal parts of two accounts of one site, in the units of the first."""
    size = [float(np.trace(s.covariance)) for s in (fisher, output)]
    loss = [float(np.sum(s.metric * s.covariance)) for s in (fisher, output)]
    if min(*size, *loss) <= 0:  # nothing varies, or nothing depends on it
        return fisher
    return replace(
        fisher,
        mean=(fisher.mean + output.mean) / 2,
        covariance=(fisher.covariance + output.covariance * (size[0] / size[1])) / 2,
        # A metric stands against its own covariance: rescaling that one rescales this one back.
        metric=(fisher.metric + output.metric * (loss[0] / loss[1]) * (size[1] / size[0])) / 2,
    )


def tokens_needed(sites: Sequence[AttentionSite]) -> int:
    """Fewest tokens that can tell a site's moments apart from noise: twice the numbers it caches per token."""
    return 2 * max(site.cache_width for site in sites)
