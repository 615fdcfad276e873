"""The function body, on ONNX Runtime and on the ONNX reference evaluator, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from mla_pass.fold import LatentWeights, Recipe, fold, prepare
from mla_pass.onnx.body import ATTRIBUTES, DOMAIN, INPUTS, OP_TYPE, Body, Variant, node_attributes
from mla_pass.reference import attend, rows
from mla_pass.storage import STORED
from tests.test_fold import Case, D, G, H, V, rope_of

MAX_POSITIONS = 256
SCALE = 0.2
# Largest error, in units of the largest number, that rounding explains.
TOLERANCE = {"float32": 2e-4, "float16": 2e-2}


def variant_of(w: LatentWeights, theta: np.ndarray, **changes) -> Variant:
    bands = w.bands
    base = Variant(
        num_heads=H, kv_groups=G, rank=w.rank, key_rank=w.key_rank, value_offset=w.value_offset, rope_dim=w.rope_dim,
        nope_dim=w.nope_dim, value_dim=V, band_index=tuple(bands.index.tolist()),
        band_block=tuple(bands.block.tolist()), band_a0=tuple(bands.a0), band_a1=tuple(bands.a1),
        band_theta=tuple(theta[bands.index]), scale=SCALE, softcap=0.0, window=0, causal=True, padding=True,
        bias=False, query_map=True, key_up=w.nope_dim > 0, value_up=True, shared_buffer=True,
        latent_dtype="same", rope_dtype="same", split=w.rank,
    )  # fmt: skip
    return replace(base, **changes)


def build(
    variant: Variant, w: LatentWeights, opset: int = 18, kind: ir.DataType = ir.DataType.FLOAT
) -> onnx.ModelProto:
    """A model of one node, its floats of `kind`; past tensors and all else are graph inputs."""
    kinds = dict.fromkeys(INPUTS, kind) | dict.fromkeys(("cos", "sin"), ir.DataType.FLOAT)
    kinds |= dict.fromkeys(("position_ids", "total_length", "padding_mask"), ir.DataType.INT64)
    for part, dtype in (("latent", variant.latent_dtype), ("rope", variant.rope_dtype)):
        kinds[part] = kinds[f"past_{part}"] = kind if dtype == "same" else ir.DataType.from_numpy(STORED[dtype])
    absent = {"padding_mask": not variant.padding, "attention_bias": not variant.bias}
    absent |= {
        "query_map": not variant.query_map,
        "key_up": not variant.key_up,
        "key_mean": not variant.key_up,
        "value_up": not variant.value_up,
    }
    ranks = dict.fromkeys(INPUTS, 3) | {"past_latent": 4, "past_rope": 4, "cos": 2, "sin": 2, "position_ids": 2}
    ranks |= {"total_length": 1, "padding_mask": 2, "attention_bias": 4, "key_mean": 2, "latent": 4, "rope": 4}
    ranks |= {"context": 3}

    def value(name: str, kind: ir.DataType) -> ir.Value:
        shape = ir.Shape([f"{name}_{axis}" for axis in range(ranks[name])])
        return ir.Value(name=name, type=ir.TensorType(kind), shape=shape)

    inputs = {n: None if absent.get(n) else value(n, kinds[n]) for n in INPUTS}
    outputs = [value(n, kinds.get(n, kind)) for n in ("context", "latent", "rope")]
    node = ir.Node(DOMAIN, OP_TYPE, list(inputs.values()), node_attributes(variant, w.rope_index), outputs=outputs)
    there = [v for v in inputs.values() if v is not None]
    graph = ir.Graph(there, outputs, nodes=[node], name="g", opset_imports={"": opset, DOMAIN: 1})
    function = Body(variant).build("", opset)
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))


class Scene:
    """B sequences of T tokens, the last S of them new, with random padding."""

    def __init__(self, case: Case, w: LatentWeights, batch: int, past: int, new: int, capacity: int) -> None:
        rng = np.random.default_rng(0)
        self.case, self.w, self.past, self.new, self.total = case, w, past, new, past + new
        self.y = np.stack([case.y[rng.permutation(len(case.y))][: self.total] for _ in range(batch)])
        self.q = rng.standard_normal((batch, new, H, D))
        self.mask = np.ones((batch, self.total), np.int64)
        self.pads = [0, *rng.integers(0, self.total // 2 + 1, batch - 1)]
        for b, pad in enumerate(self.pads):
            self.mask[b, :pad] = 0
        self.position = np.maximum(np.arange(self.total)[None] - np.array(self.pads)[:, None], 0)
        self.cache = np.stack([rows(w, case.rope.theta, y, p) for y, p in zip(self.y, self.position, strict=True)])
        self.capacity = capacity
        self.rng = rng

    def keep(self, b: int, window: int = 0, causal: bool = True) -> np.ndarray:
        key, query = np.arange(self.total)[None], np.arange(self.past, self.total)[:, None]
        keep = (key <= query) if causal else np.ones((self.new, self.total), bool)
        if window:
            keep = keep & (query - key < window)
        return keep & (self.mask[b] > 0)

    def want(self, softcap: float = 0.0, window: int = 0, bias: np.ndarray | None = None) -> np.ndarray:
        out = [
            attend(
                self.w, self.case.rope.theta, self.q[b], self.cache[b], self.position[b, self.past :],
                self.keep(b, window) if bias is None else bias[b, 0], scale=SCALE, softcap=softcap,
            )
            for b in range(len(self.q))
        ]  # fmt: skip
        return np.stack(out).reshape(len(out), self.new, -1)

    def feeds(self, v: Variant) -> dict[str, np.ndarray]:
        r, theta, w = self.w.rank, self.case.rope.theta, self.w
        raw = self.y[:, self.past :] @ w.encode.T + w.encode_bias
        angle = np.outer(np.arange(MAX_POSITIONS), theta)
        rows_there = self.capacity if v.shared_buffer else self.past
        # Rows that are not filled hold NaN: nothing may read them.
        pasts = np.full((len(self.q), 1, rows_there, r + w.rope_dim), np.nan)
        pasts[:, 0, : self.past] = self.cache[:, : self.past]
        feeds = {
            "query": self.q.reshape(len(self.q), self.new, -1), "row": raw, "past_latent": pasts[..., :r],
            "past_rope": pasts[..., r:], "cos": np.cos(angle), "sin": np.sin(angle), "query_map": w.query_map,
            "key_up": w.key_up, "key_mean": w.key_mean, "value_up": w.value_up,
        }  # fmt: skip
        feeds = {k: a.astype(np.float32) for k, a in feeds.items()}
        feeds["position_ids"], feeds["padding_mask"] = self.position[:, self.past :], self.mask
        feeds["total_length"] = np.array([self.total])
        return feeds

    def check(self, outputs: list[np.ndarray], want: np.ndarray, v: Variant) -> None:
        context, latent, rope = outputs
        tolerance = TOLERANCE[latent.dtype.name]
        if v.value_up:
            mean = np.repeat(self.w.value_mean, H // G, axis=0).reshape(-1)
            seen = np.stack([self.keep(b, v.window).any(1) for b in range(len(self.q))])
            np.testing.assert_allclose((context + mean)[seen], want[seen], rtol=0, atol=tolerance * np.abs(want).max())
            if not v.bias:
                assert (context[~seen] == 0).all()
        stored = np.concatenate([latent, rope], axis=3)[:, 0]
        np.testing.assert_allclose(
            stored[:, : self.total], self.cache, rtol=0, atol=tolerance / 2 * np.abs(self.cache).max()
        )
        assert stored.shape[1] == (self.capacity if v.shared_buffer else self.total)
        assert np.isnan(stored[:, self.total :]).all()


def run_ort(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


def run_reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(model).run(None, {i.name: feeds[i.name] for i in model.graph.input})


RUNTIMES = {"onnxruntime": run_ort, "reference": run_reference}
SHAPES = {
    "decode": (2, 70, 1), "speculative": (1, 33, 3), "prefill": (2, 0, 37), "chunk": (2, 15, 18), "first": (1, 0, 1),
}  # fmt: skip
RECIPES = {
    "order1": Recipe(finest_block=4), "order0": Recipe(finest_block=4, block_order=0),
    "one_row": Recipe(finest_block=1), "still": Recipe(rope_mode="extend"), "sixteen": Recipe(),
}  # fmt: skip


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_body_is_the_reference(
    runtime: str, shape: str, recipe: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, RECIPES[recipe]), 20, 6)
    batch, past, new = SHAPES[shape]
    scene = Scene(case, w, batch, past, new, capacity=past + new + 5)
    monkeypatch.setattr(Variant, "expand_from", property(lambda self: 1 if form == "expanded" else 1 << 30))
    v = variant_of(w, case.rope.theta)
    scene.check(RUNTIMES[runtime](build(v, w), scene.feeds(v)), scene.want(), v)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("rope", ["partial", "interleaved", "scaled"])
def test_every_rope(rope: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_fold import ROPES

    case = Case(ROPES[rope])
    w = fold(prepare(case.geometry, case.statistics, Recipe(finest_block=8)), 18, 4)
    monkeypatch.setattr(Variant, "expand_from", property(lambda self: 1 if form == "expanded" else 1 << 30))
    scene, v = Scene(case, w, 2, 30, 2, capacity=40), variant_of(w, case.rope.theta)
    scene.check(run_ort(build(v, w), scene.feeds(v)), scene.want(), v)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("recipe", ["order1", "still"])
def test_softcap_and_window(recipe: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rope_of())
    geometry = replace(case.geometry, softcap=True)
    w = fold(prepare(geometry, case.statistics, RECIPES[recipe]), 20, 4)
    monkeypatch.setattr(Variant, "expand_from", property(lambda self: 1 if form == "expanded" else 1 << 30))
    scene, v = Scene(case, w, 2, 30, 4, capacity=40), variant_of(w, case.rope.theta, softcap=2.0, window=9)
    scene.check(run_ort(build(v, w), scene.feeds(v)), scene.want(softcap=2.0, window=9), v)


def test_full_size_needs_no_key_up() -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe()), G * V, G * D)
    scene, v = Scene(case, w, 2, 20, 3, capacity=30), variant_of(w, case.rope.theta)
    assert not v.key_up
    scene.check(run_ort(build(v, w), scene.feeds(v)), scene.want(), v)


def test_growing_cache() -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe()), 20, 4)
    scene, v = Scene(case, w, 2, 20, 3, capacity=0), variant_of(w, case.rope.theta, shared_buffer=False)
    scene.check(run_ort(build(v, w), scene.feeds(v)), scene.want(), v)


def test_additive_bias() -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe()), 20, 4)
    scene = Scene(case, w, 2, 20, 3, capacity=30)
    v = variant_of(w, case.rope.theta, bias=True, padding=False, causal=False)
    bias = scene.rng.standard_normal((2, 1, 3, 23))
    bias[:, :, :, ::5] = -np.inf
    scene.mask[:] = 1
    feeds = scene.feeds(v) | {"attention_bias": bias.astype(np.float32)}
    scene.check(run_ort(build(v, w), feeds), scene.want(bias=bias), v)


def test_folded_projections() -> None:
    # Without query_map, key_up and value_up the query arrives absorbed and the context leaves as a latent.
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe(rope_mode="extend")), 20, 4)
    scene = Scene(case, w, 2, 20, 3, capacity=30)
    v = variant_of(w, case.rope.theta, query_map=False, key_up=False, value_up=False, nope_dim=20, value_dim=20)
    feeds, n = scene.feeds(v), w.nope_dim
    maps = np.concatenate([w.query_map[:, :, :n] @ w.key_up, w.query_map[:, :, n:]], axis=2)
    absorbed = np.stack([scene.q[:, :, h] @ maps[h * G // H] for h in range(H)], axis=2)
    feeds["query"] = absorbed.reshape(2, 3, -1).astype(np.float32)
    context, *presents = run_ort(build(v, w), feeds)
    value = np.einsum("bshr,hrv->bshv", context.reshape(2, 3, H, 20), np.repeat(w.value_up, H // G, axis=0))
    unfolded = replace(v, value_up=True)
    scene.check([value.reshape(2, 3, -1), *presents], scene.want(), unfolded)


def test_switch_point_counts_flops() -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe()), 20, 4)
    v = variant_of(w, case.rope.theta)
    assert 1 < v.expand_from < 64
    assert replace(v, num_heads=2 * H, kv_groups=G).expand_from <= v.expand_from


ORDERED = {"keys": (11, 0), "values": (20, 7), "both": (13, 5), "apart": (8, 12), "one": (1, 19)}


def ordered(w: LatentWeights, key_rank: int, value_offset: int) -> LatentWeights:
    """The same weights with the keys' last columns and the values' first columns gone."""
    return replace(w, key_up=w.key_up[:, :, :key_rank], value_up=w.value_up[:, value_offset:])


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("recipe", ["order1", "order0", "still"])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize(
    ("shape", "columns"),
    [("decode", "both"), ("decode", "one"), ("prefill", "keys"), ("chunk", "apart"), ("speculative", "values")],
)
def test_ordered_body_is_the_reference(
    runtime: str, shape: str, recipe: str, form: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(rope_of())
    w = ordered(fold(prepare(case.geometry, case.statistics, RECIPES[recipe]), 20, 6), *ORDERED[columns])
    batch, past, new = SHAPES[shape]
    scene = Scene(case, w, batch, past, new, capacity=past + new + 5)
    monkeypatch.setattr(Variant, "expand_from", property(lambda self: 1 if form == "expanded" else 1 << 30))
    v = variant_of(w, case.rope.theta)
    assert (v.key_rank, v.value_offset) == ORDERED[columns]
    scene.check(RUNTIMES[runtime](build(v, w), scene.feeds(v)), scene.want(), v)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_ordered_half_precision(recipe: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rope_of())
    w = ordered(fold(prepare(case.geometry, case.statistics, RECIPES[recipe]), 20, 6), *ORDERED["both"])
    scene, v = Scene(case, w, 2, 30, 3, capacity=40), variant_of(w, case.rope.theta)
    monkeypatch.setattr(Variant, "expand_from", property(lambda self: 1 if form == "expanded" else 1 << 30))
    feeds = {k: a if a.dtype.kind == "i" or k in ("cos", "sin") else a.astype(np.float16)
             for k, a in scene.feeds(v).items()}  # fmt: skip
    outputs = run_ort(build(v, w, kind=ir.DataType.FLOAT16), feeds)
    assert outputs[0].dtype == np.float16
    scene.check(outputs, scene.want(), v)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("shared", [True, False])
def test_ordered_softcap_and_growing_cache(softcap: float, shared: bool) -> None:
    case = Case(rope_of())
    p = prepare(replace(case.geometry, softcap=softcap > 0), case.statistics, RECIPES["order1"])
    w = ordered(fold(p, 20, 4), *ORDERED["both"])
    scene, v = Scene(case, w, 2, 30, 4, capacity=40), variant_of(w, case.rope.theta, softcap=softcap, window=9)
    v = replace(v, shared_buffer=shared)
    scene.check(run_ort(build(v, w), scene.feeds(v)), scene.want(softcap=softcap, window=9), v)


def test_unread_columns_are_columns_of_zeros() -> None:
    # What the reference makes of fewer columns is what it makes of all of them with zeros in the maps.
    case = Case(rope_of())
    w = ordered(fold(prepare(case.geometry, case.statistics, RECIPES["order1"]), 20, 6), *ORDERED["both"])
    k, first = ORDERED["both"]
    padded = replace(
        w,
        key_up=np.pad(w.key_up, ((0, 0), (0, 0), (0, 20 - k))),
        value_up=np.pad(w.value_up, ((0, 0), (first, 0), (0, 0))),
    )
    few, all_of_them = (Scene(case, x, 2, 20, 3, capacity=30).want() for x in (w, padded))
    np.testing.assert_allclose(few, all_of_them, rtol=0, atol=1e-12)


@pytest.mark.parametrize("columns", ORDERED)
@pytest.mark.parametrize("fold_keys", [True, False])
@pytest.mark.parametrize("fold_values", [True, False])
def test_ordered_folded_projections(columns: str, fold_keys: bool, fold_values: bool) -> None:
    # A folded query has key_rank numbers a head before its rope part, a folded context rank - value_offset.
    case, (k, first) = Case(rope_of()), ORDERED[columns]
    w = ordered(fold(prepare(case.geometry, case.statistics, Recipe(rope_mode="extend")), 20, 4), k, first)
    scene, n = Scene(case, w, 2, 20, 3, capacity=30), w.nope_dim
    v = variant_of(w, case.rope.theta, key_up=not fold_keys, query_map=not fold_keys, value_up=not fold_values)
    v = replace(v, nope_dim=k if fold_keys else n, value_dim=20 - first if fold_values else V)
    feeds = scene.feeds(v)
    if fold_keys:
        maps = np.concatenate([w.query_map[:, :, :n] @ w.key_up, w.query_map[:, :, n:]], axis=2)
        absorbed = np.stack([scene.q[:, :, h] @ maps[h * G // H] for h in range(H)], axis=2)
        assert absorbed.shape[3] == k + 4
        feeds["query"] = absorbed.reshape(2, 3, -1).astype(np.float32)
    context, *presents = run_ort(build(v, w), feeds)
    if fold_values:
        latents = context.reshape(2, 3, H, 20 - first)
        context = np.einsum("bshr,hrv->bshv", latents, np.repeat(w.value_up, H // G, axis=0)).astype(np.float32)
    scene.check([context.reshape(2, 3, -1), *presents], scene.want(), replace(v, value_up=True))


def test_fewer_columns_move_the_switch_point() -> None:
    # What keys and values do not read is cheap to absorb: more new tokens are needed before decoding pays.
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe()), 40, 4)
    many = variant_of(w, case.rope.theta)
    few = replace(many, key_rank=20, value_offset=20)
    assert many.expand_from < few.expand_from
    # Without maps there is nothing to decode; with the values' alone only theirs counts.
    assert replace(many, key_up=False, value_up=False).expand_from == 1 << 30
    values = replace(many, key_up=False, num_heads=6, kv_groups=2, value_dim=12)
    assert values.expand_from == int(np.ceil(2 * 40 * 12 / (6 * (40 - 12))))


def test_every_attribute_is_on_the_node() -> None:
    case = Case(rope_of())
    w = ordered(fold(prepare(case.geometry, case.statistics, Recipe()), 20, 4), *ORDERED["both"])
    written = {a.name: a.value for a in node_attributes(variant_of(w, case.rope.theta), w.rope_index)}
    assert written.keys() == ATTRIBUTES.keys()
    assert (written["key_rank"], written["value_offset"]) == ORDERED["both"]


def test_model_passes_the_checker() -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe()), 20, 4)
    onnx.checker.check_model(build(variant_of(w, case.rope.theta), w), full_check=True)
