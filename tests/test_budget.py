"""Pouring a budget over layers, against every way of pouring it; and the arithmetic limit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mla_pass import MlaConfig, MlaPassError
from mla_pass.budget import Curve, choose_splits, hull, layer_curve, pour, rope_dims_to_try
from mla_pass.fold import Geometry, Recipe, fold, predicted_loss, prepare
from mla_pass.fold.arithmetic import attention_flops, plain_flops
from mla_pass.onnx.choose import recipes
from mla_pass.site import Rope
from mla_pass.storage import RowFormat, row_format
from tests.test_fold import ROPES, Case


def curve(loss: np.ndarray) -> Curve:
    """A curve over row widths 2, 4, ..."""
    rows = 2 * np.arange(1, len(loss) + 1)
    return Curve(rows, loss, tuple((int(row), 0) for row in rows))


def spent(sizes: list[tuple[int, int]]) -> int:
    return sum(rank + rope for rank, rope in sizes)


def lost(curves: list[Curve], sizes: list[tuple[int, int]]) -> float:
    return sum(float(c.loss[c.sizes.index(size)]) for c, size in zip(curves, sizes, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_pouring_over_convex_curves_is_the_best_there_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Falling, and by ever less: what is lost beyond each width when singular values descend.
    curves = [curve(np.cumsum(np.sort(rng.exponential(size=6)))[::-1].copy()) for _ in range(4)]
    sizes = pour(curves, [6] * 4)
    assert spent(sizes) <= 24
    # every width that the least share leaves open
    ways = itertools.product(*([c.sizes for c in curves]))
    best = min(lost(curves, list(way)) for way in ways if spent(list(way)) <= 24)
    assert lost(curves, sizes) == pytest.approx(best)


def test_the_order_of_layers_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    curves = [curve(np.sort(rng.exponential(size=8))[::-1].copy()) for _ in range(5)]
    order = [3, 0, 4, 1, 2]
    sizes = pour(curves, [6] * 5)
    assert pour([curves[i] for i in order], [6] * 5) == [sizes[i] for i in order]


def test_what_no_step_of_the_hull_fits_is_still_spent() -> None:
    # The hull goes from the first point straight to the last, which is too wide: the points between do what they can.
    assert pour([curve(np.array([9.0, 8.0, 7.0, 0.0]))], [6]) == [(6, 0)]


def test_no_layer_is_starved() -> None:
    rich, poor = (curve(scale * np.exp(-np.arange(30) / 9)) for scale in (1.0, 1e-9))
    assert pour([rich, poor], [20, 20]) == [(36, 0), (4, 0)]  # a fifth of an even row is everyone's


def test_hull_is_convex_and_below_the_curve() -> None:
    bumpy = curve(np.array([9.0, 8.9, 5.0, 4.9, 4.95, 1.0, 0.9]))
    kept = hull(bumpy)
    assert kept == [0, 2, 5, 6]
    slopes = [(bumpy.loss[a] - bumpy.loss[b]) / (bumpy.rows[b] - bumpy.rows[a]) for a, b in itertools.pairwise(kept)]
    assert slopes == sorted(slopes, reverse=True)


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(MlaPassError, match="leaves 1 bytes a token"):
        pour([Curve(np.array([4]), np.array([1.0]), ((2, 2),))], [1])


FLOATS = RowFormat("float32", "float32", "float32")


def options(config: MlaConfig, seeds: tuple[int, ...] = (0, 1), scales: tuple[float, ...] = (1.0, 1.0)) -> list:
    made = []
    for seed, scale in zip(seeds, scales, strict=True):
        case = Case(ROPES["half"], seed)
        statistics = replace(case.statistics, metric=case.statistics.metric * scale)
        made.append([prepare(case.geometry, statistics, recipe) for recipe in recipes(config)])
    return made


def test_curve_tells_what_the_fold_predicts() -> None:
    case = Case(ROPES["half"])
    p = prepare(case.geometry, case.statistics, Recipe())
    found = layer_curve(p, FLOATS, MlaConfig())
    for row, loss, (rank, rope) in zip(found.rows, found.loss, found.sizes, strict=True):
        assert 4 * (rank + rope) == row
        assert fold(p, rank, rope).predicted == pytest.approx(loss, rel=1e-6, abs=1e-9)


def test_a_layer_that_matters_more_gets_more() -> None:
    config = MlaConfig(metric_mix=0.1)
    alike = choose_splits(options(config, (0, 0), (1.0, 1.0)), [FLOATS] * 2, config)
    unlike = choose_splits(options(config, (0, 0), (1.0, 30.0)), [FLOATS] * 2, config)
    width = [s.rank + s.rope_dims for s in unlike]
    assert width[0] < alike[0].rank + alike[0].rope_dims < width[1]
    assert sum(width) <= 2 * 28
    even = replace(config, layers="even")
    splits = choose_splits(options(even, (0, 0), (1.0, 30.0)), [FLOATS] * 2, even)
    assert len({(s.rank, s.rope_dims) for s in splits}) == 1


@pytest.mark.parametrize("limit", [1.2, 1.5, 2.0, 4.0])
def test_no_layer_costs_more_arithmetic_than_allowed(limit: float) -> None:
    config = MlaConfig(metric_mix=0.1, attention_flops=limit)
    losses = []
    for split in choose_splits(options(config), [FLOATS] * 2, config):
        p = split.prepared
        flops = attention_flops(
            split.rank, split.key_rank, split.rank, split.rope_dims, p.bands, p.geometry.per_group, p.geometry.groups
        )  # fmt: skip
        assert flops <= limit * plain_flops(split.rank, split.rope_dims)
        losses.append(float(predicted_loss(split.prepared, split.rope_dims, np.array([split.rank]))[0]))
    assert np.isfinite(losses).all()


def test_more_arithmetic_loses_less() -> None:
    def predicted(limit: float) -> float:
        config = MlaConfig(metric_mix=0.1, attention_flops=limit, rope_dims=2, budget=0.6)
        splits = choose_splits(options(config), [FLOATS] * 2, config)
        return sum(fold(s.prepared, s.rank, s.rope_dims, s.key_rank).predicted for s in splits)

    found = [predicted(limit) for limit in (1.0, 1.5, 3.0, 10.0)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("layers", ["loss", "even"])
@pytest.mark.parametrize("dtypes", [("int8", "auto"), ("float16", "auto"), ("float8", "float8"), ("same", "float16")])
def test_a_budget_is_in_bytes(layers: str, dtypes: tuple[str, str]) -> None:
    config = MlaConfig(metric_mix=0.1, budget=0.25, layers=layers, cache_dtype=dtypes[0], rope_dtype=dtypes[1])
    row = row_format("float32", config)
    splits = choose_splits(options(config), [row] * 2, config)
    spent = sum(row.bytes(s.rank, s.rope_dims) for s in splits)
    given = 2 * int(0.25 * 4 * splits[0].prepared.geometry.width)
    # Ranks come in steps of two, and so do rope dims.
    assert given - 2 * row.bytes(4, 2) < spent <= given


def test_the_rank_that_bytes_hold() -> None:
    types = (("float32", "int8", "auto"), ("float16", "float8", "int8"), ("bfloat16", "same", "auto"))
    for model, cache, rope in types:
        row = row_format(model, MlaConfig(cache_dtype=cache, rope_dtype=rope))
        for room in range(40, 90):
            rank = row.rank_within(room, 4)
            assert row.bytes(rank, 4) <= room < row.bytes(rank + 1, 4)


@pytest.mark.parametrize(
    ("model", "cache", "rope", "want"),
    [
        ("float32", "same", "auto", FLOATS),
        ("float32", "int8", "auto", RowFormat("float32", "int8", "float16")),
        ("bfloat16", "int8", "auto", RowFormat("bfloat16", "int8", "bfloat16")),
        ("float32", "float8", "auto", RowFormat("float32", "float8", "float16")),
        ("float32", "float16", "auto", RowFormat("float32", "float16", "float16")),
        ("float16", "int8", "same", RowFormat("float16", "int8", "float16")),
    ],
)
def test_types_that_follow_from_others(model: str, cache: str, rope: str, want: RowFormat) -> None:
    assert row_format(model, MlaConfig(cache_dtype=cache, rope_dtype=rope)) == want


def test_halves_are_of_one_type_and_shape() -> None:
    row = row_format("float32", MlaConfig(layout="genai", cache_dtype="int8"))
    assert row == RowFormat("float32", "int8", "int8", halves=True)
    assert row.split(30, 10) == 20
    assert row.bytes(30, 10) == 2 * (20 + 4)
    with pytest.raises(MlaPassError, match="rank 1 and 10 rope dims make an odd one"):
        row.split(1, 10)
    with pytest.raises(MlaPassError, match="rope_dtype float16 beside cache_dtype int8 makes two"):
        MlaConfig(layout="genai", cache_dtype="int8", rope_dtype="float16")
    with pytest.raises(MlaPassError, match="rank must be even; got 15"):
        MlaConfig(layout="genai", rank=15)


def test_wide_rows_may_keep_few_rotated_numbers() -> None:
    geometry = Geometry(3, 3, 64, 64, Rope(np.ones(32), 64, False, 1.0, None))
    assert rope_dims_to_try(geometry, MlaConfig())[:3] == [2, 4, 8]
    assert all(rope % 16 == 0 for rope in rope_dims_to_try(geometry, MlaConfig(), tile=16))
