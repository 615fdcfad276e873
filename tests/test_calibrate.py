"""Calibration against finite differences of attention written out, and against torch's own activations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from mla_pass import MlaPassError
from mla_pass.calibrate import (
    Accumulator,
    Run,
    attention_mass,
    blended,
    calibrate,
    calibrate_fisher,
    output_gradient,
)  # fmt: skip
from mla_pass.onnx.instrument import instrument
from mla_pass.onnx.io import load_model
from mla_pass.patterns import find_sites
from mla_pass.site import AttentionSite, Branch, Cache, Mask, Projection, Weight
from tests.families import FAMILIES, exported
from tests.test_fold import ROPES, D, G, H, V, gqa, rope_of

T, E = 20, 24


def make_site(rope=None, softcap: float = 0.0, window: int = 0) -> AttentionSite:
    output = np.random.default_rng(3).standard_normal((H * V, E))
    weight = Weight(output.shape, "float32", lambda: output)
    branch = lambda heads, size: Branch(Projection(None, weight, None), None, None, "BSE", heads, size)  # noqa: E731
    mask = Mask("structured", True, window, None, None)
    return AttentionSite(
        "site", 0, branch(H, D), branch(G, D), branch(G, V), rope or rope_of(), Cache(None, None, None, None), mask,
        0.2, softcap, None, Projection(None, weight, None), "float32",
    )  # fmt: skip


def activations(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((T, H, D)), rng.standard_normal((T, G, D)), rng.standard_normal((T, G, V))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (2.0, 0), (0.0, 6)])
def test_gradient_is_that_of_the_output(rope, softcap: float, window: int) -> None:
    site = make_site(rope, softcap, window)
    q, k, v = activations()
    omega = np.random.default_rng(1).choice([-1.0, 1.0], size=(T, E))
    row, column = np.arange(T)[:, None], np.arange(T)[None]
    keep = (column <= row) & ((row - column < window) if window else True)
    output = site.output.weight.read()

    def projected(key: np.ndarray, value: np.ndarray) -> float:
        return float((omega * (gqa(q, key, value, keep, rope, 0.2, softcap).reshape(T, -1) @ output)).sum())

    gamma, _, squares = output_gradient(site, q, k, v, omega, output)
    whole = gqa(q, k, v, keep, rope, 0.2, softcap).reshape(T, -1) @ output
    assert squares == pytest.approx(float((whole**2).sum()), rel=1e-9)
    d_key, d_value = gamma[:, : G * D], gamma[:, G * D :]
    rng = np.random.default_rng(2)
    for array, gradient, of in (
        (k, d_key, lambda step: projected(k + step, v)),
        (v, d_value, lambda step: projected(k, v + step)),
    ):
        for _ in range(6):
            at = (rng.integers(T), rng.integers(G), rng.integers(array.shape[2]))
            step = np.zeros_like(array)
            step[at] = 1e-5
            slope = (of(step) - of(-step)) / 2e-5
            assert gradient.reshape(array.shape)[at] == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_attention_mass_by_distance() -> None:
    site, (q, k, v) = make_site(), activations()
    omega, output = np.ones((T, E)), site.output.weight.read()
    distance = attention_mass(site, q, k)
    assert distance.sum() == pytest.approx(T * H)
    np.testing.assert_allclose(output_gradient(site, q, k, v, omega, output)[1], distance, rtol=1e-5)
    only = [np.zeros_like(x) for x in (q, k)]
    only[1][5], only[0][9] = 60.0, 60.0  # token 9 looks at token 5, four rows back, and nowhere else
    flat = make_site(rope_of(base=1e9))
    one, uniform = attention_mass(flat, *only), attention_mass(flat, *(np.zeros_like(x) for x in only))
    assert one[4] - uniform[4] > 0.8 * H


def test_held_out_window_is_not_counted() -> None:
    windows = [activations(seed) for seed in (0, 1, 2)]
    run = Run(lambda ids: [tuple(a[: len(ids)] for a in windows[int(ids[0])])])
    made = calibrate([make_site()], run, np.repeat(np.arange(3)[:, None], T, axis=1))
    got = made.sites[0]
    assert made.metric == "output" and np.array_equal(made.held_out, np.full((1, T), 2))
    assert got.tokens == 2 * T
    assert got.sample is not None and np.array_equal(got.sample.key, windows[2][1])


def drawn(sink: float, windows: int = 60, length: int = 300):
    """Statistics of rows and gradients drawn independently with known moments, and those moments.

    With `sink` every window starts with one and the same row that has gradients that many times the usual.
    """
    rng, site, width = np.random.default_rng(5), make_site(), G * (D + V)
    row_root, gradient_root = (rng.standard_normal((width, width)) * np.geomspace(3, 0.3, width) for _ in range(2))
    mean, outlier = 5 * rng.standard_normal(width), 10 * rng.standard_normal(width)
    sums = Accumulator(site, length)
    sums.distance += 1
    for _ in range(windows):
        y = rng.standard_normal((length, width)) @ row_root.T + mean
        gamma = rng.standard_normal((length, width)) @ gradient_root.T
        if sink:
            y[0], gamma[0] = outlier, sink * rng.standard_normal(width)
        sums.add(y, [gamma])
    return sums.result(None), mean, row_root @ row_root.T, gradient_root @ gradient_root.T


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine between two matrices: 1 when they differ by a factor only."""
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_moments_of_independent_tokens_are_the_plain_ones() -> None:
    got, mean, covariance, metric = drawn(sink=0.0)
    assert alike(got.covariance, covariance) > 0.99
    assert alike(got.metric, metric) > 0.97  # the first windows were weighed by a poor guess
    assert np.abs(got.mean - mean).max() < 0.2 * np.sqrt(np.diag(covariance)).max()


def test_a_token_everything_depends_on_goes_to_the_covariance() -> None:
    # E[gamma gamma^T] would be the outlier's alone; here it shows as one row that must be kept, and nothing more.
    got, mean, _, metric = drawn(sink=100.0)
    assert alike(got.metric, metric) > 0.9
    top = np.linalg.eigh(got.covariance)[1][:, -1]
    rng = np.random.default_rng(5)
    width = len(mean)
    _ = [rng.standard_normal((width, width)) for _ in range(2)], rng.standard_normal(width)
    outlier = 10 * rng.standard_normal(width) - got.mean
    assert abs(top @ outlier) / np.linalg.norm(outlier) > 0.9


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_graph_gives_torchs_queries_keys_and_values(family: str) -> None:
    import torch

    model = load_model(exported(family))
    sites = [site for site in find_sites(model) if isinstance(site, AttentionSite)]
    ids = np.random.default_rng(0).integers(3, 97, 19)
    got = instrument(model, sites).forward(ids)
    torch_model, seen = FAMILIES[family](), {}
    for layer, block in enumerate(torch_model.model.layers):
        attention = block.self_attn
        names = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
        if hasattr(attention, "q_norm"):
            names = ["q_norm", "k_norm", "v_proj"]
        for name in names:
            getattr(attention, name).register_forward_hook(
                lambda _m, _i, out, key=(layer, name): seen.__setitem__(key, out.detach()[0].numpy())
            )
    with torch.no_grad():
        torch_model(torch.from_numpy(ids)[None])
    for site, arrays in zip(sites, got, strict=True):
        want = [seen[site.layer, name] for name in names]
        if len(want) == 1:
            sizes = [b.heads * b.head_dim for b in (site.query, site.key, site.value)]
            want = np.split(want[0], np.cumsum(sizes)[:-1], axis=-1)
        for ours, theirs in zip(arrays, want, strict=True):
            theirs = theirs.swapaxes(0, 1) if theirs.ndim == 3 and len(theirs) != len(ids) else theirs
            np.testing.assert_allclose(ours.reshape(len(ids), -1), theirs.reshape(len(ids), -1), rtol=0, atol=1e-4)


def test_accumulator_keeps_no_window() -> None:
    site = make_site()
    sums = Accumulator(site, T)
    held = {name: value.nbytes for name, value in vars(sums).items() if isinstance(value, np.ndarray)}
    rng = np.random.default_rng(0)
    for _ in range(2):
        sums.add(rng.standard_normal((T, site.cache_width)), [rng.standard_normal((T, site.cache_width))])
    assert {name: value.nbytes for name, value in vars(sums).items() if isinstance(value, np.ndarray)} == held


def test_bfloat16_graph_is_calibrated_in_float32() -> None:
    half, full = (load_model(exported("llama", 18, dtype)) for dtype in ("bfloat16", "float32"))
    ids = np.random.default_rng(0).integers(3, 97, 19)
    runs = [
        instrument(m, [s for s in find_sites(m) if isinstance(s, AttentionSite)]).forward(ids) for m in (half, full)
    ]
    for ours, theirs in zip(*runs, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert np.abs(a - b).max() < 0.05 * np.abs(b).max()  # bfloat16 weights keep 8 bits


def test_weights_in_two_folders_are_refused(tmp_path) -> None:
    model = load_model(exported("llama"))
    first = next(v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor))
    old = first.const_value
    first.const_value = ir.ExternalTensor(
        old.location, old.offset, old.length, old.dtype, shape=old.shape, name=old.name, base_dir=tmp_path
    )
    with pytest.raises(MlaPassError, match="several folders"):
        instrument(model, [s for s in find_sites(model) if isinstance(s, AttentionSite)])


def test_blended_statistics_weigh_both_alike() -> None:
    a, b = drawn(sink=0.0)[0], drawn(sink=0.0, windows=20)[0]
    same = blended(a, replace(a, metric=7.0 * a.metric, covariance=3.0 * a.covariance))
    np.testing.assert_allclose(same.metric, a.metric, rtol=1e-9)  # units of the second do not matter
    np.testing.assert_allclose(same.covariance, a.covariance, rtol=1e-9)
    both = blended(a, b)
    share = [float(np.sum(m * both.covariance)) for m in (a.metric / 2, both.metric - a.metric / 2)]
    assert share[0] == pytest.approx(share[1], rel=0.1)


def test_fisher_counts_every_sample_and_holds_out_the_last_window() -> None:
    class Fake:
        def window(self, ids: np.ndarray, random: np.random.Generator, samples: int) -> list[SimpleNamespace]:
            q, k, v = (a[: len(ids)] for a in activations(int(ids[0])))
            rng = np.random.default_rng(int(ids[0]))
            gammas = [rng.standard_normal((len(ids), G * (D + V))) for _ in range(samples)]
            outward = rng.standard_normal((len(ids), G * (D + V)))
            return [SimpleNamespace(query=q, key=k, value=v, gammas=gammas, outward=outward)]

    made = calibrate_fisher([make_site()], Fake(), np.repeat(np.arange(4)[:, None], T, axis=1))
    got = made.sites[0]
    assert made.metric == "fisher" and np.array_equal(made.held_out, np.full((1, T), 3))
    assert got.tokens == 3 * T and got.distance.sum() == pytest.approx(1)
    assert got.sample is not None and np.array_equal(got.sample.key, activations(3)[1])


def test_metric_and_covariance_predict_the_mean_square() -> None:
    # A token's share of the squared sum over a window of gamma . R y, here of independent tokens.
    rng, site = np.random.default_rng(0), make_site()
    width, length = site.cache_width, 200
    sums = Accumulator(site, length)
    sums.distance += 1
    for _ in range(80):
        sums.add(rng.standard_normal((length, width)), [3 * rng.standard_normal((length, width))])
    got = sums.result(None)
    error = rng.standard_normal((width, width))
    truth = 9 * float((error**2).sum())
    told = float(np.sum(got.metric * (error @ got.covariance @ error.T)))
    assert told == pytest.approx(truth, rel=0.25)  # the first windows were weighed by a poor guess
