"""The proof: every family passes it, and no wrong reading does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mla_pass.patterns import find_sites
from mla_pass.proof import TOLERANCE, admit, discrepancies, reference, rotated, visible
from mla_pass.site import AttentionSite, Branch, Mask, Refusal, Weight
from tests import graphs
from tests.families import FAMILIES, exported

# ------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_admits(family: str) -> None:
    _assert_admitted(family, 18, "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_admits_half_precision(family: str, dtype: str) -> None:
    _assert_admitted(family, 18, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_admits_everywhere(family: str, opset: int, dtype: str) -> None:
    _assert_admitted(family, opset, dtype)


def _assert_admitted(family: str, opset: int, dtype: str) -> None:
    model = ir.load(exported(family, opset, dtype) / "model.onnx")
    found = find_sites(model)
    assert found
    assert admit(model, found) == found
    site = found[-1]
    assert isinstance(site, AttentionSite)
    # Measured: under 2e-6 on all of these. Two orders under the tolerance, or the tolerance means nothing.
    assert max(each.error for each in discrepancies(model, site)) < TOLERANCE / 10


# ------------------------------------------------------------------------------------- wrong readings


def _scaled(weight: Weight, factor: float) -> Weight:
    return replace(weight, read=lambda: weight.read() * factor)


def _query(site: AttentionSite, change: Callable[[np.ndarray], np.ndarray]) -> AttentionSite:
    """The site with another query weight, viewed as [E, H, D]."""
    weight = site.query.projection.weight

    def read() -> np.ndarray:
        array = weight.read()
        return change(array.reshape(-1, site.heads, site.head_dim)).reshape(array.shape)

    return _with_query(site, projection=replace(site.query.projection, weight=replace(weight, read=read)))


def _with_query(site: AttentionSite, **changes: Any) -> AttentionSite:
    return replace(site, query=replace(site.query, **changes))


def _with_rope(site: AttentionSite, **changes: Any) -> AttentionSite:
    return replace(site, rope=replace(site.rope, **changes))


def _with_mask(site: AttentionSite, **changes: Any) -> AttentionSite:
    return replace(site, mask=replace(site.mask, **changes))


def _one_slow_pair(site: AttentionSite) -> AttentionSite:
    theta = site.rope.theta.copy()
    theta[-1] *= 1.01  # shows only far out
    return _with_rope(site, theta=theta)


WRONG: dict[str, tuple[str, Callable[[AttentionSite], AttentionSite]]] = {
    "theta": ("llama_opset18", lambda site: _with_rope(site, theta=site.rope.theta * 1.01)),
    "slowest theta": ("llama_opset18", _one_slow_pair),
    "direction of rotation": ("llama_opset18", lambda site: _with_rope(site, theta=-site.rope.theta)),
    "pairs": ("llama_opset18", lambda site: _with_rope(site, interleaved=True)),
    "pairs of an interleaved one": ("cohere_opset18", lambda site: _with_rope(site, interleaved=False)),
    "rotary dim": ("llama_opset18", lambda site: _with_rope(site, rotary_dim=4, theta=site.rope.theta[:2])),
    "attention scaling": ("llama_opset18", lambda site: _with_rope(site, attention_scaling=1.01)),
    "scale": ("llama_opset18", lambda site: replace(site, scale=site.scale * 1.01)),
    "no softcap": ("gemma2_opset18", lambda site: replace(site, softcap=0.0)),
    "softcap": ("gemma2_opset18", lambda site: replace(site, softcap=site.softcap * 1.2)),
    "window too wide": ("gemma2_opset18", lambda site: _with_mask(site, window=site.mask.window + 1)),
    "window too narrow": ("gemma2_opset18", lambda site: _with_mask(site, window=site.mask.window - 1)),
    "no window": ("gemma2_opset18", lambda site: _with_mask(site, window=0)),
    "not causal": ("llama_opset18", lambda site: _with_mask(site, causal=False)),
    "no padding": ("llama_opset18", lambda site: _with_mask(site, padding=None)),
    "order of heads": ("llama_opset18", lambda site: _query(site, lambda w: w[:, ::-1])),
    "numbers within heads": ("llama_opset18", lambda site: _query(site, lambda w: w[:, :, ::-1])),
    "norm weight": (
        "qwen3_opset18",
        lambda site: _with_query(site, norm=replace(site.query.norm, weight=_scaled(site.query.norm.weight, 1.01))),
    ),
    "no norm": ("qwen3_opset18", lambda site: _with_query(site, norm=None)),
    "epsilon": ("qwen3_opset18", lambda site: _with_query(site, norm=replace(site.query.norm, epsilon=1e-2))),
    "layout": ("qwen3_opset18", lambda site: _with_query(site, layout="BSHD")),
    "branch value": ("llama_opset18", lambda site: _with_query(site, value=site.context, layout="BSE")),
    "packed columns": (
        "phi3_opset18",
        lambda site: replace(site, key=replace(site.key, projection=site.value.projection)),
    ),
    "keys for values": ("llama_opset18", lambda site: replace(site, value=replace(site.key, norm=None))),
    "cache": (
        "llama_opset18",
        lambda site: replace(
            site, cache=replace(site.cache, present_key=site.cache.present_value, present_value=site.cache.present_key)
        ),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_refuses_wrong_reading(what: str) -> None:
    name, wrong = WRONG[what]
    model, _ = graphs.load(name)
    (site,) = find_sites(model)
    assert isinstance(site, AttentionSite)
    (refusal,) = admit(model, [wrong(site)])
    assert isinstance(refusal, Refusal)
    assert refusal.layer == site.name
    # Without a padding input the block does not even run: its mask is given too few numbers.
    assert ("a block that runs on its own" if what == "no padding" else "relative error") in refusal.expected


def test_refusals_pass_through() -> None:
    model, _ = graphs.load("nope_opset18")
    found = find_sites(model)
    assert admit(model, found) == found


def test_block_that_cannot_run_is_refused() -> None:
    model, _ = graphs.load("llama_opset18")
    found = find_sites(model)
    node = next(node for node in model.graph if node.op_type == "Softmax")
    node.domain, node.op_type = "nobody", "Mystery"
    (refusal,) = admit(model, found)
    assert isinstance(refusal, Refusal)
    assert "a block that runs on its own" in refusal.expected


# ------------------------------------------------------------------------------------- the reference itself


def test_reference_is_attention() -> None:
    """Against torch's own attention, for one site with groups, past, window and padding."""
    torch = pytest.importorskip("torch")
    model, _ = graphs.load("gemma2_opset18")
    (site,) = find_sites(model)
    assert isinstance(site, AttentionSite)
    site = replace(site, softcap=0.0)
    rng = np.random.default_rng(0)
    past, new = 4, 5
    hidden = rng.normal(size=(2, new, 32))
    past_key, past_value = rng.normal(size=(2, 2, 2, past, 8))
    padding = np.ones((2, past + new), np.int64)
    padding[1, :3] = 0
    positions = np.maximum(padding.cumsum(1) - 1, 0)[:, past:]
    keep = visible(site.mask, padding, new)
    got = reference(site, hidden, past_key, past_value, keep, positions)

    def branch(which: Branch) -> Any:
        flat = torch.from_numpy(hidden) @ torch.from_numpy(which.projection.weight.read())
        return flat.unflatten(-1, (which.heads, which.head_dim)).transpose(1, 2)

    angle = torch.from_numpy(positions)[:, None, :, None] * torch.from_numpy(site.rope.theta)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def turn(x: Any) -> Any:
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    key = torch.cat([torch.from_numpy(past_key), turn(branch(site.key))], 2)
    value = torch.cat([torch.from_numpy(past_value), branch(site.value)], 2)
    want = torch.nn.functional.scaled_dot_product_attention(
        turn(branch(site.query)), key, value, torch.from_numpy(keep), scale=site.scale, enable_gqa=True
    )
    want = want.transpose(1, 2).flatten(2)
    shown = keep.any(-1)[:, 0]
    np.testing.assert_allclose(got[shown], want.numpy()[shown], rtol=1e-10, atol=1e-12)


def test_rotation_keeps_lengths_and_composes() -> None:
    model, _ = graphs.load("phi3_opset18")
    (site,) = find_sites(model)
    assert isinstance(site, AttentionSite)
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 8))
    once = rotated(site.rope, x, np.array([[5, 6, 7]]))
    np.testing.assert_allclose(np.linalg.norm(once, axis=-1), np.linalg.norm(x, axis=-1))
    np.testing.assert_array_equal(once[..., 4:], x[..., 4:])
    np.testing.assert_allclose(rotated(site.rope, once, np.array([[-5, -6, -7]])), x)


def test_visible() -> None:
    mask = Mask("structured", causal=True, window=2, padding=object(), additive=None)
    keep = visible(mask, np.array([[0, 1, 1, 1]]), 2)
    np.testing.assert_array_equal(keep[0, 0], [[False, True, True, False], [False, False, True, True]])
