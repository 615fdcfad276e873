"""The fold against grouped-query attention written out in float64: exact where it claims to be, and close where not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mla_pass.errors import MlaPassError
from mla_pass.fold import Geometry, LatentWeights, Prepared, Recipe, fold, key_losses, predicted_loss, prepare
from mla_pass.fold.bands import fit, priced_bands, residual
from mla_pass.reference import attend, rows
from mla_pass.site import Rope
from mla_pass.statistics import SiteStatistics

G, H, D, V, T, S = 2, 6, 16, 12, 90, 5


def rope_of(rotary: int = D, interleaved: bool = False, scaling: float = 1.0, base: float = 1e4) -> Rope:
    theta = base ** (-np.arange(rotary // 2) / (rotary // 2))
    return Rope(theta, rotary, interleaved, scaling, None)


def rotate(x: np.ndarray, position: np.ndarray, rope: Rope) -> np.ndarray:
    """RoPE by rotation matrices on [T, heads, D], as the original models define it."""
    out = x.copy()
    half = rope.rotary_dim // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        c, s = np.cos(rope.theta[i] * position), np.sin(rope.theta[i] * position)
        c, s = rope.attention_scaling * c[:, None], rope.attention_scaling * s[:, None]
        out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return out


def gqa(q: np.ndarray, k: np.ndarray, v: np.ndarray, keep: np.ndarray, rope: Rope, scale: float, softcap: float):
    """Grouped-query attention, float64: q [S, H, D] are the last rows of k [T, G, D], v [T, G, V]."""
    position = np.arange(len(k))
    q, k = rotate(q, position[-len(q) :], rope), rotate(k, position, rope)
    out = np.zeros((len(q), q.shape[1], v.shape[2]))
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        scores = scale * q[:, h] @ k[:, g].T
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        scores = np.where(keep, scores, -np.inf)
        p = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h] = p / p.sum(1, keepdims=True) @ v[:, g]
    return out


class Case:
    """Correlated random tokens with a large mean, as real keys have, and their statistics."""

    def __init__(self, rope: Rope, seed: int = 0, *, noise: float = 0.05) -> None:
        rng = np.random.default_rng(seed)
        width = G * (D + V)
        basis = rng.standard_normal((width // 3, width))
        mean = 2 * rng.standard_normal(width)

        def draw(n: int) -> np.ndarray:
            seen = rng.standard_normal((n, width // 3)) @ basis / 4
            return seen + mean + noise * rng.standard_normal((n, width))

        y, self.y = draw(4000), draw(T)
        gamma = rng.standard_normal((4000, width)) * rng.uniform(0.3, 3, width)
        self.q = rng.standard_normal((S, H, D))
        self.rope, self.geometry = rope, Geometry(G, H // G, D, V, rope)
        distance = np.exp(-np.arange(T) / 20)
        self.statistics = SiteStatistics(
            4000, y.mean(0), np.cov(y.T), gamma.T @ gamma / 4000, distance / distance.sum()
        )
        self.keep = np.arange(T)[None, :] <= np.arange(T - S, T)[:, None]

    def original(self, softcap: float = 0.0) -> np.ndarray:
        k, v = self.y[:, : G * D].reshape(T, G, D), self.y[:, G * D :].reshape(T, G, V)
        return gqa(self.q, k, v, self.keep, self.rope, 0.2, softcap)

    def latent(self, rank: int, rope_dim: int, recipe: Recipe = Recipe(), softcap: float = 0.0) -> np.ndarray:  # noqa: B008
        geometry = replace(self.geometry, softcap=softcap > 0)
        w = fold(prepare(geometry, self.statistics, recipe), rank, rope_dim)
        position = np.arange(T)
        cache = rows(w, self.rope.theta, self.y, position)
        return attend(w, self.rope.theta, self.q, cache, position[-S:], self.keep, scale=0.2, softcap=softcap)

    def error(self, rank: int, rope_dim: int, recipe: Recipe = Recipe()) -> float:  # noqa: B008
        want = self.original()
        return float(np.abs(self.latent(rank, rope_dim, recipe) - want).max() / np.abs(want).max())


ROPES = {
    "half": rope_of(),
    "interleaved": rope_of(interleaved=True),
    "partial": rope_of(rotary=8),
    "scaled": rope_of(scaling=1.3),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_full_size_is_exact(rope: Rope, softcap: float) -> None:
    case = Case(rope)
    full = G * rope.rotary_dim
    got = case.latent(case.geometry.width - full, full, softcap=softcap)
    np.testing.assert_allclose(got, case.original(softcap), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("rope_dim", [0, 4])
def test_blocks_of_one_row_are_exact(rope: Rope, order: int, rope_dim: int) -> None:
    # Every pair in its own one-row block: no approximation is left but the rank, and that is full.
    case = Case(rope)
    recipe = Recipe(finest_block=1, block_order=order, band_angle=1e-9)
    np.testing.assert_allclose(case.latent(case.geometry.width, rope_dim, recipe), case.original(), rtol=0, atol=1e-9)


def test_bands_beat_no_rotation_and_order_one_beats_order_zero() -> None:
    slow = replace(rope_of(), theta=rope_of().theta / 8)  # no pair too fast for the finest block
    case = Case(slow)
    full = case.geometry.width
    extend = case.error(full, 4, Recipe(rope_mode="extend"))
    order0 = case.error(full, 4, Recipe(block_order=0))
    order1 = case.error(full, 4, Recipe(block_order=1))
    assert order1 < 0.2 * order0 < 0.2 * 0.5 * extend


def test_error_does_not_grow_with_distance() -> None:
    # The promise of block rotation: bounded error at any distance, where leaving the rotation off drifts.
    theta, far = 0.02, np.arange(100_000, 100_064)
    block, start = 64, far // 64 * 64
    a0, a1 = fit(theta, block, 1)
    centre = start + (block - 1) / 2
    approx = np.exp(1j * theta * centre) * (a0 + 1j * a1 * (far - centre))
    worst = np.abs(approx - np.exp(1j * theta * far)).max()
    assert worst < (theta * block / 2) ** 2 / 2
    assert residual(theta, block, 1) == pytest.approx(np.mean(np.abs(approx - np.exp(1j * theta * far)) ** 2))


def test_the_worst_reproduced_components_are_cached() -> None:
    case = Case(rope_of())
    p = prepare(case.geometry, case.statistics, Recipe(rope_mode="extend"))
    assert (np.diff(p.components.loss) <= 0).all()
    best = case.error(case.geometry.width, 8, Recipe(rope_mode="extend"))
    flipped = replace(p, components=type(p.components)(*(a[::-1] for a in vars(p.components).values())))
    w = fold(flipped, case.geometry.width, 8)
    cache = rows(w, case.rope.theta, case.y, np.arange(T))
    got = attend(w, case.rope.theta, case.q, cache, np.arange(T)[-S:], case.keep, scale=0.2)
    worst = np.abs(got - case.original()).max() / np.abs(case.original()).max()
    assert best < 0.7 * worst


def test_a_pair_left_still_is_exact_at_the_attended_distance() -> None:
    # All attention falls three rows back: the constant in place of the rotation is then the rotation itself.
    case = Case(rope_of())
    geometry = replace(case.geometry, softcap=True)  # keeps the keys' mean
    statistics = replace(case.statistics, distance=np.eye(T)[3])
    w = fold(prepare(geometry, statistics, Recipe(rope_mode="extend")), geometry.width, 0)
    want = rotate(case.q[:1], np.array([8]), case.rope)[0]
    key = rotate(case.y[:1, : G * D].reshape(1, G, D), np.array([5]), case.rope)[0]
    latent = w.encode @ case.y[0] + w.encode_bias
    for h in range(H):
        g = h * G // H
        got = case.q[0, h] @ w.query_map[g] @ (w.key_up[g] @ latent + w.key_mean[g])
        assert got == pytest.approx(want[h] @ key[g])


def test_repeat_rotates_every_key_and_compresses_values_only() -> None:
    case = Case(rope_of(), noise=0.0)
    recipe = Recipe(rope_mode="repeat")
    w = fold(prepare(case.geometry, case.statistics, recipe), 8, G * D)
    assert w.nope_dim == 0 and w.key_up.size == 0
    # 17 directions carry all tokens, of which values alone need at most that many.
    assert case.error(G * V, G * D, recipe) < 1e-9 < case.error(4, G * D, recipe)


def test_centring_is_free() -> None:
    # The mean lies far outside the span of the centred data: without centring it would eat rank.
    case = Case(rope_of(), noise=0.0)
    recipe = Recipe(finest_block=1, band_angle=1e-9)
    assert case.error(G * (D + V) // 3, 4, recipe) < 1e-6
    mean = case.statistics.mean
    raw = case.statistics.covariance + np.outer(mean, mean)
    case.statistics = replace(case.statistics, mean=np.zeros_like(mean), covariance=raw)
    assert case.error(G * (D + V) // 3, 4, recipe) > 1e-3


def test_prediction_orders_ranks_and_matches_fold() -> None:
    case = Case(rope_of())
    p = prepare(case.geometry, case.statistics, Recipe())
    ranks = np.array([4, 8, 16, 32])
    loss = predicted_loss(p, 6, ranks)
    assert (np.diff(loss) <= 0).all()
    assert fold(p, 16, 6).predicted == pytest.approx(loss[2])


def test_better_metric_gives_smaller_weighted_error() -> None:
    # Eckart-Young in the metric: no other code of the same rank does better on it, plain PCA included.
    case = Case(rope_of(), noise=0.5)
    recipe = Recipe(metric_mix=1e-3, finest_block=1)  # finest block 1: no pair is left still
    plain = replace(case.statistics, metric=np.eye(case.geometry.width))
    ours, pca = (prepare(case.geometry, s, recipe) for s in (case.statistics, plain))

    def weighted(p: Prepared) -> float:
        return loss_of(case, ours.metric, decoder(p, fold(p, 12, 0)), fold(p, 12, 0).encode)

    assert weighted(ours) < 0.98 * weighted(pca)


def decoder(p: Prepared, w: LatentWeights) -> np.ndarray:
    """From the latent to [k; v] in the model's own order, [N, r], no pair being left still; unread columns are zero."""
    decode = np.zeros((p.geometry.width, w.rank))
    order = np.concatenate([p.pairs.re[p.bands.index], p.pairs.im[p.bands.index]])
    for g in range(G):
        decode[g * D + order, : w.key_rank] = w.key_up[g]
        decode[G * D + g * V : G * D + (g + 1) * V, w.value_offset :] = w.value_up[g].T
    return decode


def loss_of(case: Case, metric: np.ndarray, decode: np.ndarray, encode: np.ndarray) -> float:
    """E[e^T M e] of tokens that went through the latent and back."""
    miss = np.eye(case.geometry.width) - decode @ encode[: decode.shape[1]]
    return float(np.trace(metric @ miss @ case.statistics.covariance @ miss.T))


ONE_ROW = Recipe(finest_block=1, band_angle=1e-9)  # no pair left still: the rank is the only loss


def planted(rank: int, rope: Rope) -> Case:
    """Tokens that differ in `rank` directions only, both in calibration and later."""
    case = Case(rope, noise=0.0)
    rng = np.random.default_rng(9)
    basis, codes = rng.standard_normal((rank, case.geometry.width)), rng.standard_normal((4000 + T, rank))
    y = 2 * rng.standard_normal(case.geometry.width) + codes @ basis / 4
    case.y, seen = y[4000:], y[:4000]
    case.statistics = replace(case.statistics, mean=seen.mean(0), covariance=np.cov(seen.T))
    return case


@pytest.mark.parametrize("mix", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_planted_rank_is_recovered(rope: Rope, mix: float) -> None:
    # Whatever the metric: what varies in 11 directions fits a latent of 11, and no smaller one.
    case, recipe = planted(11, rope), Recipe(finest_block=1, band_angle=1e-9, metric_mix=mix)
    assert case.error(11, 0, recipe) < 1e-6  # the statistics hold squares, of which eigh keeps half the digits
    assert case.error(10, 0, recipe) > 1e-3


def test_optimum_beats_a_thousand_perturbations() -> None:
    # Of encoder and decoder both, large and small: the loss under the metric is at its least.
    case, rng = Case(rope_of(), noise=0.5), np.random.default_rng(4)
    p = prepare(case.geometry, case.statistics, ONE_ROW)
    w = fold(p, 12, 0)
    decode, encode = decoder(p, w), w.encode
    ours = loss_of(case, p.metric, decode, encode)
    assert ours == pytest.approx(w.predicted)
    for i in range(1000):
        size = 10.0 ** -(i % 4)
        moved = [x + size * np.std(x) * rng.standard_normal(x.shape) for x in (decode, encode)]
        assert loss_of(case, p.metric, *moved) > ours


def test_the_order_of_heads_does_not_matter() -> None:
    # Swap the kv groups everywhere: the folded attention of every query head is the same.
    case = Case(rope_of())
    swapped = Case(rope_of())
    order = np.arange(case.geometry.width)
    order = np.concatenate([order[: G * D].reshape(G, D)[::-1].ravel(), order[G * D :].reshape(G, V)[::-1].ravel()])
    s = case.statistics
    swapped.statistics = replace(
        s, mean=s.mean[order], covariance=s.covariance[np.ix_(order, order)], metric=s.metric[np.ix_(order, order)]
    )
    swapped.y = case.y[:, order]
    swapped.q = case.q.reshape(S, G, H // G, D)[:, ::-1].reshape(S, H, D)
    want = case.latent(14, 4).reshape(S, G, H // G, V)
    got = swapped.latent(14, 4).reshape(S, G, H // G, V)[:, ::-1]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7 * np.abs(want).max())


@pytest.mark.parametrize("key_rank", [None, G * D])
@pytest.mark.parametrize("mix", [0.0, 1.0])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("finest", [1, 16])
def test_full_size_is_exact_for_every_switch(finest: int, order: int, mix: float, key_rank: int | None) -> None:
    # All rope components cached: no band is left to be wrong, whatever was asked of them.
    case = Case(rope_of())
    recipe = Recipe(finest_block=finest, block_order=order, metric_mix=mix)
    w = fold(prepare(case.geometry, case.statistics, recipe), G * V, G * D, key_rank and min(key_rank, G * V))
    np.testing.assert_allclose(outputs_of(case, w), case.original(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("rank", [12, 40])
def test_extra_loss_of_unread_columns_is_as_predicted(rank: int) -> None:
    case = Case(rope_of(), noise=0.5)
    p = prepare(case.geometry, case.statistics, ONE_ROW)
    lost = key_losses(p, rank, 0)
    assert lost.shape == (rank + 1,) and lost[rank] == 0 and (np.diff(lost) <= 0).all()
    whole = fold(p, rank, 0)
    base = loss_of(case, p.metric, decoder(p, whole), whole.encode)
    assert base == pytest.approx(whole.predicted)
    for key_rank in (1, 3, 7, 11, rank):
        w = fold(p, rank, 0, key_rank)
        assert (w.key_rank, w.value_rank, w.value_offset) == (key_rank, rank, 0)
        loss = loss_of(case, p.metric, decoder(p, w), w.encode)
        assert loss - base == pytest.approx(lost[key_rank], rel=1e-6, abs=1e-9 * base)
        assert loss == pytest.approx(w.predicted)
        assert 1 - w.kept == pytest.approx(loss / float(np.trace(p.metric @ case.statistics.covariance)))


def test_no_rotation_of_the_latent_suits_the_keys_better() -> None:
    case, key_rank, rng = Case(rope_of(), noise=0.5), 6, np.random.default_rng(3)
    p = prepare(case.geometry, case.statistics, ONE_ROW)
    whole, w = fold(p, 16, 0), fold(p, 16, 0, key_rank)
    chosen = np.linalg.pinv(whole.encode).T @ w.encode.T  # [16, 16]
    decode, encode = decoder(p, whole), whole.encode

    def loss(turn: np.ndarray) -> float:
        turned = decode @ turn
        turned[: G * D, key_rank:] = 0
        return loss_of(case, p.metric, turned, turn.T @ encode)

    ours = loss_of(case, p.metric, decoder(p, w), w.encode)
    assert loss(chosen) == pytest.approx(ours)
    anywhere = [loss(np.linalg.qr(rng.standard_normal((16, 16)))[0]) for _ in range(1000)]
    close_by = [loss(chosen @ np.linalg.qr(np.eye(16) + 0.01 * rng.standard_normal((16, 16)))[0]) for _ in range(200)]
    assert ours < min(close_by) < min(anywhere)


@pytest.mark.parametrize("rope_dim", [0, 6])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_ordered_at_the_keys_own_rank_loses_nothing(rope: Rope, rope_dim: int) -> None:
    # All keys of all tokens lie in five directions, whatever the values do: five columns hold them.
    case = Case(rope)
    rng = np.random.default_rng(1)
    plant = rng.standard_normal((G * D, 5)) @ rng.standard_normal((5, case.geometry.width)) / 20
    change = np.eye(case.geometry.width)
    change[: G * D] = plant
    case.y = case.y @ change.T
    s = case.statistics
    case.statistics = replace(s, mean=change @ s.mean, covariance=change @ s.covariance @ change.T)
    p = prepare(case.geometry, case.statistics, ONE_ROW)
    lost = key_losses(p, 20, rope_dim)
    assert lost[5] < 1e-12 * lost[0] < lost[4]
    want, got, less = (outputs_of(case, fold(p, 20, rope_dim, k)) for k in (None, 5, 4))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())
    assert np.abs(less - want).max() > 1e-4 * np.abs(want).max()


def test_keys_never_need_more_columns_than_they_have_numbers() -> None:
    # Exact for any input, the tokens calibration never saw included.
    case = Case(rope_of())
    p = prepare(case.geometry, case.statistics, Recipe())
    assert key_losses(p, 50, 6)[G * D] == pytest.approx(0, abs=1e-20)
    case.y = np.random.default_rng(5).standard_normal(case.y.shape)
    want, got = (outputs_of(case, fold(p, 50, 6, k)) for k in (None, G * D))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())


def test_fold_is_what_it_was_when_keys_read_everything() -> None:
    case = Case(rope_of())
    p = prepare(case.geometry, case.statistics, Recipe())
    plain, all_columns = fold(p, 20, 6), fold(p, 20, 6, 20)
    for name in ("encode", "key_up", "value_up", "query_map"):
        assert np.array_equal(getattr(plain, name), getattr(all_columns, name))
    full = fold(p, G * V, G * D)
    assert (full.key_rank, full.value_offset, full.nope_dim) == (G * V, 0, 0)


def outputs_of(case: Case, w: LatentWeights) -> np.ndarray:
    position = np.arange(T)
    cache = rows(w, case.rope.theta, case.y, position)
    return attend(w, case.rope.theta, case.q, cache, position[-S:], case.keep, scale=0.2)


@pytest.mark.parametrize("key_rank", [0, 21])
def test_impossible_key_ranks_are_refused(key_rank: int) -> None:
    case = Case(rope_of())
    with pytest.raises(MlaPassError, match=f"keys cannot read {key_rank} columns .* give 1..20"):
        fold(prepare(case.geometry, case.statistics, Recipe()), 20, 4, key_rank)


@pytest.mark.parametrize(("rank", "rope_dim"), [(0, 4), (57, 4), (8, 34)])
def test_impossible_sizes_are_refused(rank: int, rope_dim: int) -> None:
    case = Case(rope_of())
    with pytest.raises(MlaPassError, match="rank must lie in 1..56"):
        fold(prepare(case.geometry, case.statistics, Recipe()), rank, rope_dim)


def test_nan_statistics_are_refused() -> None:
    case = Case(rope_of())
    case.statistics.covariance[3, 4] = np.nan
    with pytest.raises(MlaPassError, match="NaN or infinite"):
        prepare(case.geometry, case.statistics, Recipe())


@pytest.mark.parametrize(
    ("per_group", "order", "dearer"), [(8, 1, (4, 8, 16)), (8, 0, (4, 8)), (4, 1, (4, 8)), (1, 1, ())]
)
def test_no_block_costs_more_than_decoding(per_group: int, order: int, dearer: tuple[int, ...]) -> None:
    theta, energy = np.geomspace(1, 1e-3, 40), np.geomspace(1, 1e-2, 40)
    seen = set()
    for price in np.geomspace(1e-4, 1, 20):
        bands = priced_bands(theta, energy, np.ones(40), order=order, price=price, per_group=per_group)
        seen.update(bands.block.tolist())
    assert 1 in seen
    assert not seen.intersection(dearer)
    assert seen.issuperset({4, 8, 16, 32} - set(dearer))
