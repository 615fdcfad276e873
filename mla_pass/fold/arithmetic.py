"""How much arithmetic the absorbed form of the attention costs, counted.

The unit is one multiply-add, a*b + c, per cached row and query head. Adding a number that an accumulation can start
from (a key mean's scalar, the rope score, what a coarser level hands down) is part of it and costs nothing of its own.
What is done once a query, however many rows there are, has no share: the query map, the dims that do not turn, the
value up-projection. So has the softmax, which is the same in every form.

With k = key_rank, v = value_rank, p = rope_dim, and `orders` 1 or 2 (does any band follow the offset within a block?):

    scores    orders*k, one product of each order's query with the row; order 1 adds slope*offset, 1; rope: p
    values    v
    bands     every level of m pairs and blocks of B rows has, once a block,
              4*m                    the pairs turned to the block's first row, one complex product each
              2*m*orders*(k + 1)     the matrix product that makes the absorbed queries, key_mean's column included
              (orders - 1)*(k + 1)   the hand-down: the slope moves the constant to the finer block's first row
                                     (not for the coarsest level, which nothing hands down to)
              Pairs in blocks of one row are decoded instead, once for all `per_group` heads of a kv group:
              2*m*k + 4*m            their keys, and one complex product each, for every row and group; of pair i only
                                     2*min(k, 2*G*(i + 1)) + 4 where the latent is laid for that (`staggered`)
              2*m                    the product with the query

Rows are taken to fill their blocks: short caches pay up to one block of each level more. Kernels may decode the pairs
of longer blocks, too, where that takes more multiply-adds and less time (mla_pass/native/levels.cc); what they compute
is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from mla_pass.fold.bands import Bands


def plain_flops(rank: int, rope_dim: int) -> int:
    """Multiply-adds per cached row and query head of absorbed attention without bands: scores, rope and values."""
    return 2 * rank + rope_dim


def attention_flops(
    rank: int, key_rank: int, value_rank: int, rope_dim: int, bands: Bands, per_group: int, groups: int | None = None
) -> float:  # fmt: skip
    """Multiply-adds per cached row and query head of the absorbed form, as counted above.

    `key_rank` columns of the row's `rank` are read by the keys (0 where every key component is cached rotated),
    `value_rank` by the values; `per_group` query heads share a kv group. With the number of `groups` keys are decoded
    from a staggered latent, as a kernel does; without, from all its columns. Raises ValueError when the keys or the
    values read more than there is.
    """
    if not 0 <= key_rank <= rank or not 0 <= value_rank <= rank:
        raise ValueError(f"key_rank {key_rank} and value_rank {value_rank} must lie in 0..{rank}, the rank")
    orders = 1 + int(bands.a1.any())
    in_bands = band_flops(bands.levels, orders, key_rank, per_group, groups)
    return orders * key_rank + (orders - 1) + rope_dim + value_rank + in_bands


def band_flops(
    levels: Sequence[tuple[int, int, int]], orders: int, key_rank: int, per_group: int, groups: int | None = None
) -> float:  # fmt: skip
    """The bands' share: `levels` as `Bands.levels`, (block, first pair, end pair), finest first; `groups` as above."""
    total, columns = 0.0, key_rank + 1
    for depth, (block, a, b) in enumerate(levels, start=1):
        if block == 1:
            read = [key_rank if groups is None else min(key_rank, 2 * groups * (pair + 1)) for pair in range(a, b)]
            total += sum((2 * columns_read + 4) / per_group + 2 for columns_read in read)
            continue
        made = (b - a) * (4 + 2 * orders * columns)
        handed = (orders - 1) * columns if depth < len(levels) else 0
        total += (made + handed) / block
    return total
