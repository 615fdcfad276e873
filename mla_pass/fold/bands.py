"""Block-rotary bands: the rotation of un-cached key components, applied on the query's side block by block.

For a block of B rows starting at row b*B, the rotation of row s at frequency theta is replaced by

    exp(j theta s)  ->  exp(j theta centre_b) * (a0 + j a1 delta),    delta = s - centre_b,  centre_b = b*B + (B - 1)/2

with a0, a1 the least-squares fit of exp(j theta delta) over the block. The left factor is the same for a whole block,
so it moves to the query, and the cache holds only un-rotated numbers. Where a block would be shorter than the number
of heads that share a key it takes less to decode the key and turn it, which is exact: that is what B = 1 means. A
frequency's B is a power of two with
theta * B <= band_angle where it can be; pairs that turn too far within the finest block stay un-rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

# An octave costs little arithmetic, but every level costs a dozen stock operators: two octaves a level.
LEVEL_RATIO = 4
COARSEST_BLOCK = 4096
PRICED_BLOCKS = (1, 4, 8, 16, 32, 64, 256, 1024, 4096)
"""Block sizes that priced bands choose from: finely where arithmetic is at stake, few levels in all."""
# Beyond these angles within a block the fit of that order is no better than not turning at all.
MAX_ANGLE = {0: np.pi, 1: 2 * np.pi}


@dataclass(frozen=True)
class Bands:
    """The un-cached rotary pairs.

    `index` [m]: columns of the rope's theta, finest blocks first; `block`, `a0`, `a1` [m] as above.
    `still` [k]: columns of the pairs that are not turned at all.
    """

    index: np.ndarray
    block: np.ndarray
    a0: np.ndarray
    a1: np.ndarray
    still: np.ndarray

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """(block size, first pair, end pair) of every run of equal block size, finest first."""
        return levels_of(self.block)


def levels_of(block: np.ndarray) -> list[tuple[int, int, int]]:
    """(value, start, end) of every run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(block)]
    return [(int(block[a]), a, b) for a, b in pairwise(edges) if b > a]


def fit(theta: float, block: int, order: int) -> tuple[float, float]:
    """a0, a1 of the least-squares fit of exp(j theta delta) by a0 + j a1 delta over one block of rows."""
    delta = np.arange(block) - (block - 1) / 2
    a0 = float(np.cos(theta * delta).mean())
    if order == 0 or block == 1:
        return a0, 0.0
    return a0, float((delta * np.sin(theta * delta)).mean() / (delta**2).mean())


@lru_cache(maxsize=65536)
def residual(theta: float, block: int, order: int) -> float:
    """Mean of |exp(j theta delta) - fit|^2 over a block: what the band loses of a component's energy."""
    delta = np.arange(block) - (block - 1) / 2
    a0, a1 = fit(theta, block, order)
    return float((np.abs(np.exp(1j * theta * delta) - (a0 + 1j * a1 * delta)) ** 2).mean())


def choose_bands(
    theta: np.ndarray, *, finest: int, order: int, band_angle: float, turn_all: bool = False
) -> Bands:  # fmt: skip
    """Block size and fit of every frequency in `theta` [R/2] (radians per row).

    One that turns too far within the finest block is not turned, or with `turn_all` row by row.
    """
    block = np.zeros(len(theta), dtype=np.int64)
    for i, t in enumerate(np.abs(theta)):
        size = finest
        while size * LEVEL_RATIO <= max(COARSEST_BLOCK, finest) and size * LEVEL_RATIO * t <= band_angle:
            size *= LEVEL_RATIO
        # A block of one row is exact at any angle.
        block[i] = size if size == 1 or size * t <= MAX_ANGLE[order] else int(turn_all)
    return laid_out(theta, block, order)


def priced_bands(
    theta: np.ndarray, energy: np.ndarray, still: np.ndarray, *, order: int, price: float, per_group: int,
    turn_all: bool = False,
) -> Bands:  # fmt: skip
    """Block sizes that lose least when arithmetic has a price: a point of the best trade of one for the other.

    Of every frequency in `theta` [R/2] a block of B rows loses `energy` times the share :func:`residual`, and costs
    `price` times the products a row and head that its absorbed queries take, 2 * (1 + order) / B latent widths, or
    2 / `per_group` at the most where its keys are decoded, once for so many heads: the fastest pairs from few columns
    of the latent (`staggered`), more for each, and from all at half of the pairs (keys then have half of the rank there
    is). Not turning the pair loses energy times `still` [R/2] and costs nothing; with `turn_all` that is no choice.
    """
    cost = {size: 2 * (1 + order) / size for size in PRICED_BLOCKS}
    block = np.zeros(len(theta), dtype=np.int64)
    for place, i in enumerate(np.argsort(-np.abs(theta), kind="stable").tolist()):
        t, e = abs(float(theta[i])), energy[i]
        cost[1] = 2 / per_group * min(1.0, 2 * (place + 1) / len(theta))
        lost = [e * residual(t, size, order) + price * cost[size] for size in PRICED_BLOCKS]
        best = int(np.argmin(lost))
        block[i] = PRICED_BLOCKS[best] if turn_all or lost[best] < e * still[i] else 0
    return laid_out(theta, block, order)


def laid_out(theta: np.ndarray, block: np.ndarray, order: int) -> Bands:
    """The bands of given block sizes [R/2], 0 for a pair that is not turned."""
    still = np.flatnonzero(block == 0)
    index = np.flatnonzero(block)
    index = index[np.argsort(block[index], kind="stable")]
    fits = np.array([fit(float(theta[i]), int(block[i]), order) for i in index]).reshape(-1, 2)
    return Bands(index, block[index], fits[:, 0], fits[:, 1], still)


def no_bands(pair_count: int) -> Bands:
    """Every un-cached pair stays un-rotated."""
    empty = np.zeros(0)
    return Bands(np.zeros(0, np.int64), np.zeros(0, np.int64), empty, empty, np.arange(pair_count))
