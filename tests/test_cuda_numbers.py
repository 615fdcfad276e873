"""The CUDA kernels, whole calls of them through the tests' shim, against the float64 reference."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_pass.storage import CODED
from tests.cuda_build import PLAN_SOURCES, SHIM, SHIM_SOURCES, Operator, ShimDevice, build, needs_compiler
from tests.cuda_build import build_folder as build_folder  # fixtures
from tests.cuda_build import operator as operator
from tests.native_cases import ROUNDING, Case, Drawn, cases, check, needs_library, open_model, run_session
from tests.test_native_entry import Node

pytestmark = needs_compiler
Feeds = dict[str, np.ndarray]
FORMS = ("absorbed", "expanded")
DTYPES = ("float16", "bfloat16")
# Queries, keys, weights, joined sums and the context are rounded once each, and a score's error, which is that of a few
# times its number, is one of its weight.
ROUNDINGS = 8


def error_of(drawn: Drawn) -> float:
    """Of the largest number of the context, or of what that is as a rule."""
    return ROUNDINGS * ROUNDING[drawn.case.dtype] * drawn.slack()


def attend(
    operator: Operator, drawn: Drawn, device: ShimDevice, feeds: Feeds | None = None, *, apart: bool = False
) -> list[np.ndarray]:
    """Context and presents, with some of the case's inputs replaced by `feeds`."""
    node = Node(drawn)
    return operator(node.attributes, node.feeds | (feeds or {}), device, drawn.weights.value_up.shape[2], apart=apart)


def taken(case: Case) -> Case:
    """The same case with parts that CUDA kernels take: of the model's type, or of 8 bits."""
    latent, rope = (x if x in CODED else "same" for x in (case.latent, case.rope))
    return replace(case, latent=latent, rope=rope)


@st.composite
def devices(draw: st.DrawFn) -> ShimDevice:
    """With room for everything at once, or for little, so that runs of tokens and waves of keys are many."""
    room = st.sampled_from([1 << 28, 1 << 28, 1 << 13, 1])
    return ShimDevice(
        exact=draw(st.booleans()), processors=draw(st.sampled_from([1, 3, 40])), cache_bytes=draw(room),
        query_bytes=draw(room), key_bytes=draw(room), eager=draw(st.booleans()), backward=draw(st.booleans()),
    )  # fmt: skip


@given(cases(), devices(), st.sampled_from(DTYPES), st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_reference_and_kernels_agree(
    operator: Operator, case: Case, device: ShimDevice, dtype: str, apart: bool
) -> None:
    case = taken(replace(case, dtype=dtype))
    for form in FORMS:
        drawn = Drawn(case)
        check(drawn, attend(operator, drawn, replace(device, form=form), apart=apart), error_of(drawn))


# heads, kv groups
HEADS = ((1, 1), (4, 2), (9, 3), (14, 2), (16, 4), (20, 4), (32, 8), (64, 8), (128, 8))
RANKS = (64, 80, 128, 256, 384, 512)
LENGTHS = (0, 1, 63, 64, 65, 1000)


def matrix() -> list:
    """Every pair of heads, ranks and lengths, thinned so that each value meets most of the others' once."""
    params = []
    for h, (heads, groups) in enumerate(HEADS):
        for r, rank in enumerate(RANKS):
            past = LENGTHS[(h + r) % len(LENGTHS)]
            case = Case(
                dtype=DTYPES[(h // 2 + r) % 2], past=past, new=1 + h % 2, spare=2, groups=groups,
                per_group=heads // groups, head_dim=32, rank=rank, key_rank=rank, rope_dim=64 if r % 3 else 8, still=6,
                blocks=((16, 64, 64, 128), (64, 64), (1, 4))[(h + r) % 3], value_dim=32, padding=False, seed=10 * h + r,
            )  # fmt: skip
            slow = heads * rank * (past + 64) > 4e6
            name = f"{heads}-{groups}-{rank}-{past}"
            params.append(pytest.param(case, id=name, marks=[pytest.mark.slow] if slow else []))
    return params


@pytest.mark.parametrize("case", matrix())
def test_models_shapes(operator: Operator, case: Case) -> None:
    for form in FORMS:
        drawn = Drawn(case)
        device = ShimDevice(form=form, exact=False, processors=8, cache_bytes=1 << 21)
        check(drawn, attend(operator, drawn, device), error_of(drawn))


@pytest.mark.parametrize("new", [1, 30])
@pytest.mark.parametrize("latent", ["same", "int8", "float8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_waves_and_runs(operator: Operator, dtype: str, latent: str, new: int) -> None:
    # Waves of one block and runs of a few tokens, in a cache of three sequences, each padded otherwise.
    case = Case(
        dtype=dtype, batch=3, past=700, new=new, blocks=(4, 64, 64, 256), rank=48, key_rank=40, value_offset=5,
        latent=latent, seed=4,
    )  # fmt: skip
    for form in FORMS:
        drawn = Drawn(case)
        device = ShimDevice(form=form, processors=16, cache_bytes=1, key_bytes=1, query_bytes=1 << 14)
        check(drawn, attend(operator, drawn, device), error_of(drawn))


@pytest.mark.parametrize("form", FORMS)
def test_rows_outside_the_window_are_not_read(operator: Operator, form: str) -> None:
    drawn = Drawn(Case(dtype="float16", past=300, new=3, window=70, blocks=(16, 64, 128), padding=False))
    pasts = {name: drawn.feeds()[name] for name in ("past_latent", "past_rope")}
    for past in pasts.values():
        past[:, :, : 300 - 70 + 1] = np.nan
    context, latent, _ = attend(operator, drawn, ShimDevice(form=form), pasts)
    want = drawn.want(drawn.cache())
    np.testing.assert_allclose(context, want, rtol=0, atol=error_of(drawn) * np.abs(want).max())
    assert np.isnan(latent[:, :, :231]).all()


@pytest.mark.parametrize("form", FORMS)
def test_padding_on_the_left_is_not_read(operator: Operator, form: str) -> None:
    drawn = Drawn(Case(dtype="bfloat16", batch=3, past=190, new=2, seed=3, blocks=(64, 64)))
    past = drawn.feeds()["past_latent"]
    assert len(set(drawn.pads)) == 3 and drawn.pads.max() > 0
    for b, pad in enumerate(drawn.pads):
        past[b, :, : min(pad, 190)] = np.nan
    context, *_ = attend(operator, drawn, ShimDevice(form=form), {"past_latent": past})
    want = drawn.want(drawn.cache())
    np.testing.assert_allclose(context.astype(np.float64), want, rtol=0, atol=error_of(drawn) * np.abs(want).max())


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_nothing_gives_zeros(operator: Operator, form: str) -> None:
    drawn = Drawn(Case(dtype="float16", batch=2, past=10, new=3))
    mask = drawn.feeds()["padding_mask"]
    mask[1] = 0
    context, *_ = attend(operator, drawn, ShimDevice(form=form), {"padding_mask": mask})
    assert (context[1] == 0).all() and (context[0] != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_is_not_hidden(operator: Operator, form: str) -> None:
    drawn = Drawn(Case(dtype="float16", batch=2, padding=False))
    past = drawn.feeds()["past_latent"]
    past[1, 0, 4, 7] = np.nan
    context, *_ = attend(operator, drawn, ShimDevice(form=form), {"past_latent": past})
    assert np.isnan(context[1]).all() and np.isfinite(context[0]).all()


class TestNumbersThatTheHostCannotSee:
    """What the CPU kernel refuses becomes NaN here: loud, and of the sequence it concerns alone."""

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("total", [-1, 1, 16])
    def test_a_wrong_total(self, operator: Operator, form: str, total: int) -> None:
        drawn = Drawn(Case(dtype="float16", batch=2, past=10, new=2, padding=False, blocks=(4, 64)))
        before = drawn.feeds()["past_latent"]
        context, latent, _ = attend(operator, drawn, ShimDevice(form=form), {"total_length": np.array([total])})
        assert np.isnan(context).all()
        np.testing.assert_array_equal(latent, before)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("position", [-1, 12])
    def test_a_position_outside_the_tables(self, operator: Operator, form: str, position: int) -> None:
        drawn = Drawn(Case(dtype="bfloat16", batch=2, past=10, new=2, padding=False))
        positions = drawn.feeds()["position_ids"].copy()
        positions[1, 1] = position
        context, latent, rope = attend(operator, drawn, ShimDevice(form=form), {"position_ids": positions})
        assert np.isnan(context[1].astype(np.float64)).all() and np.isfinite(context[0].astype(np.float64)).all()
        assert np.isnan(latent[1, 0, 11].astype(np.float64)).all() and np.isnan(rope[1, 0, 11].astype(np.float64)).all()

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", CODED)
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_row_that_8_bits_cannot_hold(self, operator: Operator, form: str, dtype: str, bad: float) -> None:
        drawn = Drawn(Case(dtype="float16", batch=2, latent=dtype, padding=False))
        row = drawn.feeds()["row"].copy()
        row[1, 0, 3] = bad
        before = drawn.feeds()["past_latent"]
        context, latent, _ = attend(operator, drawn, ShimDevice(form=form), {"row": row})
        assert np.isnan(context[1]).all() and np.isfinite(context[0]).all()
        np.testing.assert_array_equal(latent[1], before[1])


@pytest.mark.parametrize("form", FORMS)
def test_one_plan_serves_a_growing_cache(operator: Operator, form: str) -> None:
    # As a captured graph is replayed: the shapes stay, and T is known to the device alone.
    drawn = Drawn(Case(dtype="float16", past=200, new=1, padding=False, blocks=(4, 64, 128), spare=300))
    attributes = Node(drawn).attributes
    for past in (0, 5, 64, 130, 199):
        feeds = Node(drawn).feeds
        feeds["row"] = np.ascontiguousarray(drawn.row[:, past : past + 1].astype(np.float16))
        feeds |= {"total_length": np.array([past + 1]), "position_ids": drawn.position[:, past : past + 1]}
        for name in ("past_latent", "past_rope"):
            feeds[name][:, :, past:] = np.nan
        feeds["cos"], feeds["sin"] = (np.resize(feeds[name], (600, feeds[name].shape[1])) for name in ("cos", "sin"))
        context, *_ = operator(attributes, feeds, ShimDevice(form=form), drawn.weights.value_up.shape[2])
        short = Drawn(replace(drawn.case, past=past))
        short.weights, short.theta, short.query = drawn.weights, drawn.theta, drawn.query
        short.position, short.mask = drawn.position[:, : past + 1], drawn.mask[:, : past + 1]
        want = short.want(drawn.cache()[:, : past + 1])
        np.testing.assert_allclose(context, want, rtol=0, atol=error_of(drawn) * np.abs(want).max())


@needs_library
@pytest.mark.parametrize("latent", ["same", *CODED])
@pytest.mark.parametrize("cut", [-1.0, 0.4, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_stored_bit_for_bit_as_by_the_cpu_kernel(
    operator: Operator, dtype: str, cut: float, latent: str
) -> None:
    case = Case(dtype=dtype, batch=2, past=3, new=40, rank=57, rope_dim=30, latent=latent, rope="int8", cut=cut)
    drawn = Drawn(case)
    rng = np.random.default_rng(5)
    row = (drawn.row * np.exp(rng.uniform(-20, 5, (*drawn.row.shape[:2], 1))))[:, case.past :]
    row = np.ascontiguousarray(row.astype(drawn.feeds()["row"].dtype))
    ours = attend(operator, drawn, ShimDevice(), {"row": row})
    cpu = run_session(open_model(drawn.model()), drawn.feeds() | {"row": row})
    for got, want in zip(ours[1:], cpu[1:], strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


class TestRefusals:
    def refused(self, operator: Operator, case: Case, device: ShimDevice, told: str) -> None:
        with pytest.raises(RuntimeError, match=f"LatentAttention: {told}"):
            attend(operator, Drawn(case), device)

    def test_values_that_are_too_wide(self, operator: Operator) -> None:
        case = Case(dtype="float16", rank=600, key_rank=32, value_offset=3)
        told = "values of 597 columns from column 3 are too wide; expected at most 509 on a CUDA device"
        self.refused(operator, case, ShimDevice(), told)

    def test_rows_that_do_not_fit_shared_memory(self, operator: Operator) -> None:
        case = Case(dtype="float16", rank=512, key_rank=512)
        told = r"attention over rows of 520 numbers takes \d+ bytes of shared memory at the least; expected at most 48"
        self.refused(operator, case, ShimDevice(shared_bytes=48000), told)

    def test_more_band_pairs_than_kernels_hold(self, operator: Operator) -> None:
        case = Case(dtype="float16", blocks=(64,) * 129)
        self.refused(operator, case, ShimDevice(), "the number of band pairs is 129; expected at most 128")

    def test_a_16_bit_part_of_another_type(self, operator: Operator) -> None:
        case = Case(dtype="bfloat16", latent="float16")
        self.refused(operator, case, ShimDevice(), "input past_latent is of 16 bits other than the model's; expected")


@pytest.mark.parametrize("name", ["test_host", "test_attend", "test_products", "test_plan"])
def test_kernels_and_plan_alone(build_folder: Path, name: str) -> None:
    sources = (*SHIM_SOURCES, SHIM / f"{name}.cc", *PLAN_SOURCES)
    program = build(build_folder, name, sources)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
