"""ONNX graphs in torch: the numbers of ONNX Runtime, the gradients of finite differences and of the original model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import mla_pass
from mla_pass import MlaConfig, MlaPassError
from mla_pass.fold import Recipe, fold, prepare
from mla_pass.onnx.body import INPUTS, Variant, node_attributes
from mla_pass.onnx.instrument import instrument
from mla_pass.onnx.io import load_model
from mla_pass.patterns import find_sites
from mla_pass.pytorch.gradients import Gradients, draw
from mla_pass.pytorch.graph import TorchGraph
from mla_pass.pytorch.latent import latent_attention
from mla_pass.pytorch.ops import operator
from mla_pass.site import AttentionSite
from tests.families import FAMILIES, VOCAB, exported
from tests.test_body import ORDERED, RECIPES, SHAPES, Scene, ordered, variant_of
from tests.test_fold import Case, rope_of
from tests.threads import one_thread  # noqa: F401  applies to every test

SMALL = {"calibrate_tokens": 512, "calibrate_context": 64, "metric": "output", "metric_mix": 0.1}
ROUNDING = 1e-5
"""Largest relative difference that the order of float32 sums explains."""


def tokens_of(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (batch, length))


def logits_of(graph: TorchGraph, tokens: np.ndarray) -> torch.Tensor:
    return graph.run(torch.from_numpy(tokens), wanted=[graph.logits])[graph.logits]


def check_equal(graph: TorchGraph, folder: Path, batch: int = 2, length: int = 43) -> None:
    tokens = tokens_of(batch, length)
    want = mla_pass.session(folder, threads=1).logits(tokens)
    np.testing.assert_allclose(logits_of(graph, tokens).numpy(), want, rtol=0, atol=ROUNDING * np.abs(want).max())


def sites_of(model: ir.Model) -> list[AttentionSite]:
    sites = [site for site in find_sites(model) if isinstance(site, AttentionSite)]
    assert sites
    return sites


def converted(family: str, **config: object) -> mla_pass.Result:
    model = load_model(exported(family))
    return mla_pass.convert(model, MlaConfig(**{**SMALL, **config}), calibrate=tokens_of(1, 2000, seed=7)[0])


# ---- forward


@pytest.mark.parametrize("family", FAMILIES)
def test_originals_are_onnx_runtimes(family: str) -> None:
    check_equal(TorchGraph(load_model(exported(family))), exported(family))


@pytest.mark.parametrize(("family", "opset"), [("llama", 23), ("gemma2", 24)])
def test_newer_opsets(family: str, opset: int) -> None:
    check_equal(TorchGraph(load_model(exported(family, opset))), exported(family, opset))


CONVERSIONS = {
    "small": ("llama", {"budget": 0.6}), "full": ("llama", {"budget": 1.0}),
    "growing": ("llama", {"budget": 0.6, "cache": "growing"}),
    "still": ("qwen3", {"budget": 0.6, "rope_mode": "extend"}),
    "absorbed": ("llama", {"budget": 0.6, "rope_mode": "extend", "absorb": "always"}),
    "full absorbed": ("llama", {"budget": 1.0, "absorb": "always"}), "capped, window": ("gemma2", {"budget": 0.6}),
    "two ropes": ("gemma3", {"budget": 0.6}), "scaled rope": ("llama_yarn", {"budget": 0.6}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERSIONS)
def test_converted_models_are_onnx_runtimes(case: str, tmp_path: Path) -> None:
    family, config = CONVERSIONS[case]
    result = converted(family, **config)
    folder = result.save(tmp_path / "out")
    check_equal(TorchGraph(result.model), folder)
    check_equal(TorchGraph(load_model(folder)), folder, batch=1, length=1)


@pytest.mark.parametrize(("dtype", "error"), [("int8", 2e-3), ("float8", 2e-2)])
@pytest.mark.parametrize("cache", ["shared", "growing"])
def test_rows_of_8_bits(cache: str, dtype: str, error: float, tmp_path: Path) -> None:
    result = converted("llama", budget=0.3, cache_dtype=dtype, rope_dtype=dtype, cache=cache)
    graph, folder = TorchGraph(result.model), result.save(tmp_path / "out")
    # A number on the edge between two may be rounded either way: a step is 1/116 of a segment's largest, or 1/8 of it.
    tokens = tokens_of(2, 43)
    want = mla_pass.session(folder, threads=1).logits(tokens)
    np.testing.assert_allclose(logits_of(graph, tokens).numpy(), want, rtol=0, atol=error * np.abs(want).max())
    # Rounding passes gradients as they come: those of the same matrices without it.
    found = {}
    for kind, weights in (("eight", graph), ("same", TorchGraph(unrounded(result)))):
        name = next(name for name in weights.parameters if name.endswith("latent_proj.weight"))
        weights.parameters[name].requires_grad_(True)
        (logits_of(weights, tokens) * torch.from_numpy(want)).sum().backward()
        found[kind] = weights.parameters[name].grad
    assert torch.nn.functional.cosine_similarity(found["eight"].flatten(), found["same"].flatten(), 0) > 0.995


def unrounded(result: mla_pass.Result) -> ir.Model:
    """The same conversion with its rows as floats."""
    model = result.model.clone()
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.INT8:
            width = value.shape[3] - 4
            value.shape, value.type = ir.Shape([*value.shape.dims[:3], width]), ir.TensorType(ir.DataType.FLOAT)
    return model


def test_weights_are_copies_and_shared_where_the_graph_shares_them() -> None:
    model = load_model(exported("llama"))
    values = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape) == 2]
    first, twin = [v for v in values if v.shape == values[0].shape][:2]
    first.const_value = ir.tensor(first.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy()))
    twin.const_value = first.const_value
    graph = TorchGraph(model)
    assert {parameter.dtype for parameter in graph.parameters.values()} == {torch.float32}
    assert graph.parameters[first.name] is graph.parameters[twin.name]
    tokens, before = tokens_of(1, 5), [value.const_value.numpy().copy() for value in values]
    logits = logits_of(graph, tokens)
    for parameter in graph.parameters.values():
        parameter.mul_(1.1)
    assert not torch.equal(logits_of(graph, tokens), logits)
    for value, array in zip(values, before, strict=True):
        assert np.array_equal(value.const_value.numpy(), array)


def test_only_what_is_wanted_is_kept() -> None:
    model = load_model(exported("llama"))
    key = sites_of(model)[0].key.value
    graph = TorchGraph(model, outputs=[key])
    assert set(graph.run(torch.from_numpy(tokens_of(3, 4)), wanted=[key])) == {key}
    assert len(graph.parameters) < len(TorchGraph(model).parameters) / 2
    with pytest.raises(MlaPassError, match="'logits' is not computed here"):
        logits_of(graph, tokens_of(1, 4))


def test_unknown_operators_are_named() -> None:
    model = load_model(exported("llama"))
    first, last = [node for node in model.graph if node.op_type == "MatMul"][:: len(sites_of(model)) * 7]
    last.op_type = "MatMulNBits"
    with pytest.raises(MlaPassError, match=f"'{last.name}' is a MatMulNBits.*use the 'output' metric"):
        TorchGraph(model)
    TorchGraph(model, outputs=first.outputs)  # the unknown one is not needed for this


def test_old_opsets_are_refused() -> None:
    model = load_model(exported("llama"))
    model.graph.opset_imports[""] = 11
    with pytest.raises(MlaPassError, match="opset 11.*18 and newer"):
        TorchGraph(model)


# ---- operators that the families' exports use in one of their forms only, against ONNX's own evaluator


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


INTS = np.array([[3, -7, 2], [-1, 4, -2]])
NODES: dict[str, tuple[str, list[np.ndarray], dict]] = {
    "division of integers": ("Div", [INTS, np.array([2])], {}),
    "power": ("Pow", [np.abs(floats(2, 3)), floats(3)], {}),
    "gemm": ("Gemm", [floats(4, 3), floats(4, 5), floats(5)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    "gelu": ("Gelu", [floats(2, 5)], {}),
    "min": ("Min", [floats(2, 3), floats(3), floats(2, 1)], {}),
    "erf": ("Erf", [floats(2, 3)], {}),
    "sum over all": ("ReduceSum", [floats(2, 3)], {"keepdims": 0}),
    "sum over none": ("ReduceSum", [floats(2, 3), np.array([], np.int64)], {"noop_with_empty_axes": 1}),
    "rms norm": ("RMSNormalization", [floats(2, 3, 4), floats(3, 4)], {"axis": 1, "epsilon": 0.1}),
    "layer norm": ("LayerNormalization", [floats(2, 3, 4), floats(4), floats(4)], {"epsilon": 0.1}),
    "smallest": ("TopK", [floats(3, 6), np.array([2])], {"largest": 0, "axis": 0}),
    "shape from behind": ("Shape", [floats(2, 3, 4)], {"start": -2}),
    "reshape by zero": ("Reshape", [floats(2, 3, 4), np.array([0, -1])], {}),
    "transpose": ("Transpose", [floats(2, 3, 4)], {}),
    "unsqueeze": ("Unsqueeze", [floats(2, 3), np.array([-1, 0])], {}),
    "squeeze": ("Squeeze", [floats(1, 3, 1)], {}),
    "expand to less": ("Expand", [floats(2, 1, 4), np.array([3, 1])], {}),
    "split in parts": ("Split", [floats(2, 7), np.array([3, 4])], {"axis": 1}),
    "split unevenly": ("Split", [floats(2, 7)], {"axis": -1, "num_outputs": 2}),
    "slice backwards": ("Slice", [floats(3, 7), *map(np.array, ([-1], [-(2**63)], [1], [-2]))], {}),
    "slice without axes": ("Slice", [floats(3, 7), np.array([1, -4]), np.array([99, -1])], {}),
    "gather": ("Gather", [floats(3, 7), np.array([[0, -1], [2, -7]])], {"axis": 1}),
    "gather one": ("Gather", [floats(3, 7), np.array(-1)], {}),
    "gather nd": ("GatherND", [floats(2, 3, 4), np.array([[[1], [2]], [[0], [2]]])], {"batch_dims": 1}),
    "cumulative sum": ("CumSum", [floats(3, 7), np.array(1)], {"exclusive": 1, "reverse": 1}),
    "rotation": ("RotaryEmbedding", [floats(2, 3, 5, 8), floats(2, 5, 4), floats(2, 5, 4)], {"interleaved": 1}),
    "partial rotation": (
        "RotaryEmbedding", [floats(2, 5, 24), floats(9, 2), floats(9, 2), np.arange(10).reshape(2, 5) % 9],
        {"num_heads": 3, "rotary_embedding_dim": 4},
    ),
    "causal attention": ("Attention", [floats(2, 4, 5, 8), floats(2, 2, 5, 8), floats(2, 2, 5, 6)], {"is_causal": 1}),
    "packed attention": (
        "Attention", [floats(2, 5, 32), floats(2, 7, 16), floats(2, 7, 12), floats(5, 7)],
        {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NODES)
def test_operators_are_onnxs(case: str) -> None:
    op_type, arrays, attributes = NODES[case]
    outputs = [f"y{i}" for i in range(2 if op_type in ("Split", "TopK") else 1)]
    names = [f"x{i}" for i in range(len(arrays))]
    node = onnx.helper.make_node(op_type, names, outputs, **attributes)
    port = onnx.helper.make_tensor_value_info
    kinds = [onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays]
    ports = [port(name, kind, array.shape) for name, kind, array in zip(names, kinds, arrays, strict=True)]
    graph = onnx.helper.make_graph([node], "g", ports, [port(name, 1, None) for name in outputs])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    want = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    read = {name: attribute.value for name, attribute in ir.from_proto(node).attributes.items()}
    got = operator(ir.from_proto(node))(read, [torch.from_numpy(array) for array in arrays])
    for ours, theirs in zip((got,) if isinstance(got, torch.Tensor) else got, want, strict=False):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)
        assert ours.numpy().dtype == theirs.dtype


def test_attention_with_capped_scores_is_refused() -> None:
    node = ir.Node("", "Attention", [None] * 3, [ir.AttrFloat32("softcap", 3.0)], name="capped")
    with pytest.raises(MlaPassError, match="'capped' is an Attention with capped scores"):
        operator(node)


# ---- the latent attention alone, against the float64 reference


def check_latent(scene: Scene, v: Variant, want: np.ndarray, **changes: np.ndarray) -> None:
    feeds = scene.feeds(v) | changes
    absent = {"padding_mask": not v.padding, "attention_bias": not v.bias, "query_map": not v.query_map}
    absent |= {"key_up": not v.key_up, "key_mean": not v.key_up}
    operands = [None if absent.get(name) else torch.from_numpy(feeds[name]) for name in INPUTS]
    attributes = {attribute.name: attribute.value for attribute in node_attributes(v, scene.w.rope_index)}
    scene.check([x.numpy() for x in latent_attention(attributes, operands)], want, v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shared", [True, False])
def test_latent_attention_is_the_reference(recipe: str, shape: str, shared: bool) -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, RECIPES[recipe]), 20, 6)
    batch, past, new = SHAPES[shape]
    scene = Scene(case, w, batch, past, new, capacity=past + new + 5)
    check_latent(scene, variant_of(w, case.rope.theta, shared_buffer=shared), scene.want())


@pytest.mark.parametrize("columns", ORDERED)
@pytest.mark.parametrize("recipe", ["order1", "still"])
def test_latent_attention_reads_only_its_columns(recipe: str, columns: str) -> None:
    case = Case(rope_of())
    w = ordered(fold(prepare(case.geometry, case.statistics, RECIPES[recipe]), 20, 6), *ORDERED[columns])
    scene = Scene(case, w, 2, 15, 18, capacity=40)
    check_latent(scene, variant_of(w, case.rope.theta), scene.want())


def test_latent_attention_with_softcap_and_window() -> None:
    case = Case(rope_of())
    w = fold(prepare(replace(case.geometry, softcap=True), case.statistics, RECIPES["order1"]), 20, 4)
    scene = Scene(case, w, 2, 30, 4, capacity=40)
    for softcap in (0.0, 2.0):
        v = variant_of(w, case.rope.theta, softcap=softcap, window=9)
        check_latent(scene, v, scene.want(softcap=softcap, window=9))


def test_latent_attention_with_a_bias() -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe()), 20, 4)
    scene = Scene(case, w, 2, 20, 3, capacity=30)
    scene.mask[:] = 1
    bias = scene.rng.standard_normal((2, 1, 3, 23)).astype(np.float32)
    bias[:, :, :, ::5] = -np.inf
    v = variant_of(w, case.rope.theta, bias=True, padding=False, causal=False)
    check_latent(scene, v, scene.want(bias=bias), attention_bias=bias)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("masked", ["padding", "bias"])
def test_rows_that_see_nothing_are_zero_and_have_gradients(masked: str, softcap: float) -> None:
    case = Case(rope_of())
    w = fold(prepare(case.geometry, case.statistics, Recipe()), 20, 4)
    scene, padded = Scene(case, w, 2, 0, 9, capacity=9), masked == "padding"
    v = variant_of(w, case.rope.theta, softcap=softcap, padding=padded, bias=not padded, causal=padded)
    feeds = scene.feeds(v)
    feeds["past_latent"], feeds["past_rope"] = (np.zeros_like(feeds[name]) for name in ("past_latent", "past_rope"))
    feeds["padding_mask"][1, :4] = 0
    feeds["attention_bias"] = np.where(feeds["padding_mask"], 0, -np.inf).astype(np.float32)[:, None, None].repeat(9, 2)
    feeds["attention_bias"][1, :, :4] = -np.inf
    feeds.pop("attention_bias" if padded else "padding_mask")
    given = [torch.from_numpy(feeds[name]) if name in feeds else None for name in INPUTS]
    leaves = [x.requires_grad_(True) for x in given if x is not None and x.is_floating_point()]
    attributes = {attribute.name: attribute.value for attribute in node_attributes(v, w.rope_index)}
    context = latent_attention(attributes, given)[0]
    assert (context[1, :4] == 0).all() and (context[0] != 0).all()
    gradients = torch.autograd.grad(context.square().sum(), leaves, allow_unused=True)
    assert all(x is None or x.isfinite().all() for x in gradients)
    assert sum(x is not None and bool(x.any()) for x in gradients) >= 6


# ---- gradients


def with_step(model: ir.Model, value: ir.Value, shape: tuple[int, ...]) -> str:
    """Adds an initializer of zeros to a value, everywhere it is read; the initializer's name."""
    zeros = ir.val("step", const_value=ir.tensor(np.zeros(shape, np.float32), name="step"))
    readers = [node for node, _ in value.uses()]
    moved = ir.Node("", "Add", [value, zeros], name="moved")
    model.graph.register_initializer(zeros)
    for reader in readers:
        for place, operand in enumerate(reader.inputs):
            if operand is value:
                reader.replace_input_with(place, moved.outputs[0])
    model.graph.append(moved)
    model.graph.sort()
    return "step"


def slope(graph: TorchGraph, name: str, at: tuple[int, ...], tokens: np.ndarray, weigh: torch.Tensor) -> float:
    """Central difference of the weighed logits in one number of a weight."""
    parameter, losses = graph.parameters[name], []
    for step in (1e-5, -1e-5):
        graph.parameters[name] = parameter.detach().clone()
        graph.parameters[name][at] += step
        with torch.no_grad():
            losses.append(float((logits_of(graph, tokens) * weigh).sum()))
    graph.parameters[name] = parameter
    return (losses[0] - losses[1]) / 2e-5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradient_at_a_key_is_the_finite_difference(family: str) -> None:
    tokens = tokens_of(2, 9)
    weigh = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 9, VOCAB)))
    for kind in ("key", "value"):
        model = load_model(exported(family))
        leaves = [getattr(site, kind).value for site in sites_of(model)[:2]]
        graph = TorchGraph(model, outputs=[*leaves, *model.graph.outputs], dtype=torch.float64)
        found = graph.run(torch.from_numpy(tokens), wanted=[graph.logits], require_grad=leaves)
        gradients = torch.autograd.grad((found[graph.logits] * weigh).sum(), [found[leaf] for leaf in leaves])
        # The second layer's keys depend on the first's: its being a leaf, too, must not cut the first one's chain.
        for leaf, gradient in zip(leaves, gradients, strict=True):
            model = load_model(exported(family))
            value = next(v for node in model.graph for v in node.outputs if v.name == leaf.name)
            name = with_step(model, value, tuple(gradient.shape))
            moved = TorchGraph(model, dtype=torch.float64)
            rng = np.random.default_rng(2)
            for _ in range(5):
                at = tuple(int(rng.integers(n)) for n in gradient.shape)
                want = slope(moved, name, at, tokens, weigh)
                assert float(gradient[at]) == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("gemma2", {}), ("qwen3", {"cache": "growing"}), ("llama", {"absorb": "always"})],
)
def test_weights_of_a_converted_model_can_be_trained(family: str, config: dict) -> None:
    extend = {"rope_mode": "extend"} if "absorb" in config else {}
    graph = TorchGraph(converted(family, budget=0.6, **config, **extend).model, dtype=torch.float64)
    tokens = tokens_of(2, 37)
    weigh = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 37, VOCAB)))
    kinds = (
        "latent_proj",
        "q_proj_latent",
        "query_map",
        "key_up",
        "key_mean",
        "value_up",
        "value_mean",
        "o_proj_latent",
    )
    names = [name for name in graph.parameters if any(kind in name for kind in kinds)]
    assert len(names) >= 10
    for name in names:
        graph.parameters[name].requires_grad_(True)
    (logits_of(graph, tokens) * weigh).sum().backward()
    rng = np.random.default_rng(3)
    for name in names:
        parameter = graph.parameters[name]
        for _ in range(2):
            at = tuple(int(rng.integers(n)) for n in parameter.shape)
            want = slope(graph, name, at, tokens, weigh)
            assert float(parameter.grad[at]) == pytest.approx(want, rel=1e-4, abs=1e-5), name


def torch_branches(family: str, model: torch.nn.Module) -> dict[tuple[int, str], torch.Tensor]:
    """Fills, at each forward, with what the original's layers project keys and values to, each a leaf or on the way."""
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        names = {"qwen3": ["k_norm", "v_proj"], "phi3": ["qkv_proj"]}.get(family, ["k_proj", "v_proj"])
        for name in names:

            def hook(_module: object, _inputs: object, out: torch.Tensor, key: tuple = (layer, name)) -> torch.Tensor:
                seen[key] = out if out.requires_grad else out.detach().requires_grad_(True)
                return seen[key]

            getattr(block.self_attn, name).register_forward_hook(hook)
    return seen


def torch_gammas(family: str, tokens: np.ndarray, labels: np.ndarray) -> list[list[np.ndarray]]:
    """For each row of labels the gradients [T, N] of every layer, from the original model; a label below 0 is none."""
    model = FAMILIES[family]().requires_grad_(False)
    seen = torch_branches(family, model)
    chances = model(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)
    places = torch.arange(len(tokens))
    gammas = []
    for row in torch.from_numpy(labels):
        loss = -chances[places[row >= 0], row[row >= 0]].sum()
        slopes = dict(zip(seen, torch.autograd.grad(loss, list(seen.values()), retain_graph=True), strict=True))
        layers = [[slopes[key][0].reshape(len(tokens), -1) for key in seen if key[0] == n] for n in range(2)]
        gammas.append([torch.cat(parts, 1).numpy() for parts in layers])
    return gammas


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "mixtral"])
def test_gradients_for_given_labels_are_the_originals(family: str) -> None:
    model = load_model(exported(family))
    tokens, labels = tokens_of(1, 21)[0], tokens_of(2, 21, seed=5)
    found = Gradients(model, sites_of(model)).labelled(tokens, labels)
    for sample, layers in enumerate(torch_gammas(family, tokens, labels)):
        for site, want in zip(found, layers, strict=True):
            want = want[:, -site.gammas[sample].shape[1] :]  # behind the queries, where all are one product
            np.testing.assert_allclose(site.gammas[sample], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_window_gives_the_branches_and_one_gradient_a_sample() -> None:
    model = load_model(exported("qwen3"))
    sites, tokens = sites_of(model), tokens_of(1, 19)[0]
    gradients = Gradients(model, sites)
    found = gradients.window(tokens, np.random.default_rng(0), 3)
    for site, got, want in zip(sites, found, instrument(model, sites).forward(tokens), strict=True):
        for ours, theirs in zip(got[:3], want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
            assert ours.dtype == np.float32
        assert [gamma.shape for gamma in got.gammas] == [(19, site.cache_width)] * 3
        assert not np.array_equal(got.gammas[0], got.gammas[1])
    again = gradients.window(tokens, np.random.default_rng(0), 3)
    assert all(np.array_equal(a, b) for x, y in zip(found, again, strict=True) for a, b in zip(x[3], y[3], strict=True))


def test_labels_are_drawn_from_the_prediction() -> None:
    chances = torch.softmax(torch.from_numpy(np.random.default_rng(0).standard_normal((3, VOCAB))) * 2, -1)
    chances[2] = 0
    chances[2, 40] = 1
    count = 20000
    drawn = draw(chances, np.random.default_rng(1), count)
    assert drawn.shape == (count, 3) and (drawn[:, 2] == 40).all()
    for row in range(2):
        seen, want = torch.bincount(drawn[:, row], minlength=VOCAB), count * chances[row]
        chi = float(((seen - want) ** 2 / want).sum())
        assert abs(chi - (VOCAB - 1)) < 5 * np.sqrt(2 * (VOCAB - 1))


def test_squares_of_the_gradients_have_the_fisher_informations_trace() -> None:
    # Exactly: positions draw their labels independently, so every label of each, weighed by its chance, adds up.
    tokens, samples = tokens_of(1, 4)[0], 300
    labels = np.full((4 * VOCAB, 4), -1)
    for t in range(4):
        labels[t * VOCAB : (t + 1) * VOCAB, t] = np.arange(VOCAB)
    with torch.no_grad():
        chances = FAMILIES["llama"]()(torch.from_numpy(tokens)[None]).logits[0].softmax(-1).numpy().reshape(-1)
    gammas = torch_gammas("llama", tokens, labels)
    model = load_model(exported("llama"))
    found = Gradients(model, sites_of(model)).window(tokens, np.random.default_rng(0), samples)
    for layer, site in enumerate(found):
        want = sum(p * float(np.square(gamma[layer]).sum()) for p, gamma in zip(chances, gammas, strict=True))
        squares = np.array([np.square(gamma).sum() for gamma in site.gammas])
        assert abs(squares.mean() - want) < 4 * squares.std() / np.sqrt(samples)
        assert squares.std() / np.sqrt(samples) < 0.15 * want
