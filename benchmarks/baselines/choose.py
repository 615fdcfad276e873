"""The rope cut that a loss likes best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from mla_pass.errors import MlaPassError

from .geometry import Geometry
from .rope_cut import RopeCut

FOLDS = (1, 2, 4, 8)

Option = TypeVar("Option")


def choose_cut(geometry: Geometry, row: int, loss: Callable[[RopeCut], float]) -> RopeCut:
    """The best cut for a row of `row` numbers: folds as in TransMLA, rope dims from all of the keys' downwards.

    TransMLA keeps one head's worth of rope dims (64) and doubles the fold while the loss falls. A small row wants fewer
    rope dims and a large row more, so that these are searched the same way, from the head's worth in both directions.
    """
    if row == 2 * geometry.keys:
        return RopeCut(heads=geometry.kv_heads)  # room for everything: exact
    known: dict[RopeCut, float] = {}

    def seen(cut: RopeCut) -> float:
        if cut not in known:
            known[cut] = loss(cut)
        return known[cut]

    def of_size(size: Sequence[RopeCut]) -> RopeCut:
        return descend(size, seen)

    sizes = [cuts for cuts in _sizes(geometry) if cuts[0].dims(geometry) < row]
    if not sizes:
        raise MlaPassError(f"a row of {row} numbers has no room for rope dims and a latent; ask for a larger budget")
    start = next((i for i, cuts in enumerate(sizes) if cuts[0].heads == 1), 0)
    fewer = descend(sizes[start:], lambda size: seen(of_size(size)))
    more = descend(sizes[start::-1], lambda size: seen(of_size(size)))
    return min(of_size(fewer), of_size(more), key=seen)


def descend(options: Sequence[Option], loss: Callable[[Option], float]) -> Option:
    """The option before the first one that is no better than the one before it."""
    for here, after in pairwise(options):
        if loss(after) >= loss(here):
            return here
    return options[-1]


def _sizes(geometry: Geometry) -> list[list[RopeCut]]:
    """The cuts of each number of rope dims, most first, by fold."""
    pairs = geometry.head_dim // 2
    folds = [fold for fold in FOLDS if pairs % fold == 0]
    many = [[RopeCut(fold, 1, heads) for fold in folds] for heads in range(geometry.kv_heads, 0, -1)]
    many[0] = many[0][:1]  # with every component rotated, a fold only loses
    few = [[RopeCut(fold, collapse) for fold in folds if fold % collapse == 0] for collapse in folds[1:]]
    return many + few
