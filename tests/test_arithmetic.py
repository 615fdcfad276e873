"""The count of multiply-adds against those that a small absorbed attention really executes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mla_pass.fold import LatentWeights, Recipe, fold, prepare
from mla_pass.fold.arithmetic import attention_flops, band_flops, plain_flops
from mla_pass.fold.bands import choose_bands, no_bands
from mla_pass.fold.staggered import stagger
from mla_pass.reference import attend, rows
from tests.test_fold import Case, G, H, rope_of


class Counter:
    """Arithmetic that counts its multiply-adds, one for every a*b + c."""

    def __init__(self) -> None:
        self.count = 0

    def product(self, a: np.ndarray, b: np.ndarray, start: np.ndarray | float = 0.0) -> np.ndarray:
        """start + a @ b, one scalar at a time as far as the count goes: a [i, k], b [k, j]."""
        out = np.broadcast_to(np.asarray(start, float), (a.shape[0], b.shape[1])).copy()
        for i, j in np.ndindex(out.shape):
            for k in range(a.shape[1]):
                out[i, j] += a[i, k] * b[k, j]
                self.count += 1
        return out

    def scaled(self, x: np.ndarray, factor: float, start: np.ndarray) -> np.ndarray:
        """start + factor * x."""
        self.count += x.size
        return start + factor * x

    def complex_product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a * b, complex: four real multiply-adds each."""
        self.count += 4 * a.size
        return a * b


class Absorbed:
    """One query over all rows, head by head, a cached row at a time: the operator's absorbed form written plainly."""

    def __init__(self, w: LatentWeights, theta: np.ndarray, cache: np.ndarray) -> None:
        self.w, self.theta, self.cache, self.per_row, self.per_query = w, theta, cache, Counter(), Counter()
        self.orders = 1 + int(w.bands.a1.any())
        self.decoded: dict[int, np.ndarray] = {}
        a0, a1, middle = w.bands.a0, w.bands.a1, (w.bands.block - 1) / 2
        phase = np.exp(1j * theta[w.bands.index] * middle)
        self.fits = [phase * (a0 - 1j * a1 * middle), phase * 1j * a1][: self.orders]

    def context(self, q: np.ndarray, h: int, scale: float) -> np.ndarray:
        """Context [V] of the query q [D] of head h, which is that of the last row."""
        w, g, last = self.w, h * G // H, len(self.cache) - 1
        q = self.per_query.product(q[None], w.query_map[g])[0]
        half, n = w.rope_dim // 2, w.nope_dim
        rope = np.exp(1j * self.theta[w.rope_index] * last) * (q[n : n + half] + 1j * q[n + half :])
        rope = np.concatenate([rope.real, rope.imag])
        scores = np.zeros(last + 1)
        queries, finest = self.absorbed(q, g)
        for s, row in enumerate(self.cache):
            query = queries[s // finest] if finest else queries[0]
            latent = row[: w.key_rank, None]
            sums = [self.per_row.product(x[None, :-1], latent, x[-1])[0] for x in query]
            if len(sums) == 2:
                sums[0] = self.per_row.scaled(sums[1], s % finest, sums[0])
            scores[s] = self.per_row.product(rope[None], row[w.rank :, None], sums[0])[0, 0]
        scores = self.fine(q, g, scores)
        weights = np.exp(scale * scores - (scale * scores).max())
        weights /= weights.sum()
        mixed = self.per_row.product(weights[None], self.cache[:, w.value_offset : w.rank])
        return self.per_query.product(mixed, w.value_up[g])[0]

    def fine(self, q: np.ndarray, g: int, scores: np.ndarray) -> np.ndarray:
        """Scores with those of the pairs in blocks of one row, whose keys a group's heads decode once."""
        bands, m, last = self.w.bands, len(self.w.bands.index), len(self.cache) - 1
        count = int((bands.block == 1).sum())
        if not count:
            return scores
        dims = np.r_[:count, m : m + count]
        theta = self.theta[bands.index[:count]]
        if g not in self.decoded:
            latent, up = self.cache[:, : self.w.key_rank], self.w.key_up[g][dims]
            mean = self.w.key_mean[g][dims, None]
            keys = np.stack([self.per_row.product(up, row[:, None], mean)[:, 0] for row in latent])
            turn = np.exp(1j * np.outer(np.arange(last + 1), theta)) * bands.a0[:count]
            self.decoded[g] = self.per_row.complex_product(keys[:, :count] + 1j * keys[:, count:], turn)
        keys = self.decoded[g]
        query = (q[:count] + 1j * q[m : m + count]) * np.exp(1j * theta * last)
        flat = np.concatenate([query.real, query.imag])[None]
        columns = np.concatenate([keys.real, keys.imag], axis=1)
        return np.array([self.per_row.product(flat, k[:, None], s)[0, 0] for k, s in zip(columns, scores, strict=True)])

    def absorbed(self, q: np.ndarray, g: int) -> tuple[list[list[np.ndarray]], int]:
        """For each finest block the absorbed queries [key_rank + 1] of every order, and the block's size (0: none)."""
        w, bands, count, last = self.w, self.w.bands, len(self.cache), len(self.cache) - 1
        m, n = len(bands.index), w.nope_dim
        up = np.concatenate([w.key_up[g], w.key_mean[g][:, None]], axis=1)
        still = self.per_query.product(q[None, 2 * m : n], up[2 * m :])[0]
        carried: list[list[np.ndarray]] = []
        size = 0
        for block, a, b in reversed(bands.levels[bool((bands.block == 1).any()) :]):
            tables = self.tables(up, a, b)
            made = []
            for first in range(0, count, block):
                # Rows after the query's see nothing of it, here as in the reference.
                factor = np.exp(1j * self.theta[bands.index[a:b]] * (last - first))
                z = self.per_row.complex_product(q[a:b] + 1j * q[m + a : m + b], factor)
                start = [np.zeros(up.shape[1]) for _ in tables]
                if carried:
                    start = list(carried[first // size])
                    if self.orders == 2:
                        start[0] = self.per_row.scaled(start[1], first % size, start[0])
                else:
                    start[0] = still
                turned = np.concatenate([z.real, z.imag])[None]
                made.append([self.per_row.product(turned, t, s)[0] for t, s in zip(tables, start, strict=True)])
            carried, size = made, block
        return (carried, size) if carried else ([[still]], 0)

    def tables(self, up: np.ndarray, a: int, b: int) -> list[np.ndarray]:
        """For each order the map [2*pairs, key_rank + 1] from turned pairs to absorbed queries; made once a model."""
        m = len(self.w.bands.index)
        pairs = up[a:b] + 1j * up[m + a : m + b]
        turned = [fit[a:b, None] * pairs for fit in self.fits]
        return [np.concatenate([x.real, x.imag]) for x in turned]


RECIPES = {
    "order1": Recipe(finest_block=4, band_angle=0.5), "order0": Recipe(finest_block=4, block_order=0, band_angle=0.5),
    "one_level": Recipe(finest_block=64, band_angle=1e-9), "one_row": Recipe(finest_block=1, band_angle=1e-9),
    "some_rows": Recipe(finest_block=1, band_angle=0.5),
    "still": Recipe(rope_mode="extend"),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("columns", [(20, 0), (9, 0), (9, 6)], ids=str)
def test_the_count_is_what_is_executed(recipe: str, columns: tuple[int, int]) -> None:
    key_rank, value_offset = columns
    rope = replace(rope_of(), theta=np.array([0.8, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.009]))
    case = Case(rope)
    w = fold(prepare(case.geometry, case.statistics, RECIPES[recipe]), 20, 6, key_rank)
    w = replace(w, value_up=w.value_up[:, value_offset:])
    if recipe.startswith("order"):
        assert [level[0] for level in w.bands.levels] == [4, 16]
    if recipe == "some_rows":
        assert [level[0] for level in w.bands.levels] == [1, 4, 16]
    count = 64  # whole blocks of every level
    cache = rows(w, rope.theta, case.y[:count], np.arange(count))
    ours = Absorbed(w, rope.theta, cache)
    got = np.stack([ours.context(case.q[0, h], h, 0.2) for h in range(H)])
    want = attend(
        w, rope.theta, case.q[:1], cache, np.array([count - 1]), np.ones((1, count), bool), scale=0.2
    )[0] - w.value_mean[np.arange(H) * G // H]  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
    counted = ours.per_row.count / (count * H)
    assert attention_flops(20, w.key_rank, w.value_rank, 6, w.bands, H // G) == pytest.approx(counted, rel=1e-12)


def test_without_bands_it_is_the_plain_count() -> None:
    assert attention_flops(20, 20, 20, 6, no_bands(8), 3) == plain_flops(20, 6) == 46
    # Everything cached rotated: keys read nothing of the latent.
    assert attention_flops(20, 0, 20, 32, no_bands(0), 3) == 52


def test_figures_of_a_large_model() -> None:
    # LLaMA-3's frequencies, order 1, finest block 64: about 3.8 latent widths with an octave a level, a little more
    # with the two that we take, where plain absorbed attention has 2; keys that read half the row come near that again.
    theta = 5e5 ** (-np.arange(64) / 64)
    bands = choose_bands(theta, finest=64, order=1, band_angle=2.0)
    assert 3.8 < attention_flops(512, 512, 512, 0, bands, 4) / 512 < 4
    assert attention_flops(512, 256, 512, 0, bands, 4) / 512 < 2.5


@pytest.mark.parametrize(("key_rank", "value_rank"), [(21, 20), (20, 21), (-1, 20)])
def test_more_columns_than_the_row_has_are_refused(key_rank: int, value_rank: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 0\.\.20"):
        attention_flops(20, key_rank, value_rank, 6, no_bands(8), 3)


def test_keys_of_a_staggered_latent_read_no_more_than_is_counted() -> None:
    groups, pairs, width = 3, 5, 20
    _, key_up = stagger(np.random.default_rng(0).standard_normal((groups, 2 * pairs + 2, width)), pairs)
    levels = [(1, 0, pairs)]
    dense, counted = (band_flops(levels, 2, width, per_group=2, groups=g) for g in (None, groups))
    read = sum(
        width - (np.cumsum(np.abs(row[::-1])) == 0).sum() for row in key_up[:, : 2 * pairs].reshape(-1, width)
    )  # fmt: skip
    products = dense - pairs * (4 / 2 + 2)  # what is left are the complex product and the query's
    assert products * groups * 2 == 2 * pairs * groups * width
    assert read < (counted - pairs * (4 / 2 + 2)) * groups * 2 < 0.8 * products * groups * 2
