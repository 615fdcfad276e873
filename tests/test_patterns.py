"""The walk: what it reads from real exports, and what it refuses, each refusal planted in an otherwise good graph."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from mla_pass.patterns import find_sites
from mla_pass.proof import admit
from mla_pass.site import AttentionSite, Refusal
from tests import graphs
from tests.families import FAMILIES, exported

# ------------------------------------------------------------------------------------- every family

_PLAIN = "H=4 G=2 D=16 rope=16h mask=causal+padding scale=0.25"
_WINDOW = "H=4 G=2 D=16 rope=16h mask=causal+window8+padding scale=0.25"
_GEMMA2 = "H=4 G=2 D=16 rope=16h mask=causal{}+padding scale=0.204124 softcap=5"
_GEMMA3 = "H=4 G=2 D=16 rope=16h norm=qk mask=causal{}+padding scale=0.204124"
EXPECTED = {
    "llama": [_PLAIN] * 2,
    "llama_mha": [_PLAIN.replace("G=2", "G=4")] * 2,
    "llama_mqa": [_PLAIN.replace("G=2", "G=1")] * 2,
    "llama_tied": [_PLAIN] * 2,
    "llama3": [_PLAIN] * 2,
    "llama_yarn": [_PLAIN.replace("rope=16h", "rope=16h*1.139")] * 2,
    "qwen2": [_PLAIN.replace("mask", "bias=qkv mask")] * 2,
    "qwen3": [_PLAIN.replace("mask", "norm=qk mask")] * 2,
    "mistral": [_WINDOW] * 2,
    "mixtral": [_PLAIN] * 2,
    "gemma": [_PLAIN] * 2,
    "gemma2": [_GEMMA2.format("+window8"), _GEMMA2.format("")] * 2,
    "gemma3": [_GEMMA3.format(window) for window in ("+window8", "+window8", "", "+window8")],
    "phi3": [_PLAIN] * 2,
    "phi3_partial": [_PLAIN.replace("rope=16h", "rope=8h")] * 2,
}
"""What the configuration of each family says, layer by layer."""


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    _assert_family(family, 18)


@pytest.mark.parametrize("opset", [23, 24])
def test_opset(opset: int) -> None:
    _assert_family("gemma3", opset)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_at_every_opset(family: str, opset: int) -> None:
    _assert_family(family, opset)


def _assert_family(family: str, opset: int) -> None:
    found = find_sites(ir.load(exported(family, opset) / "model.onnx"))
    lines = [_line(site) for site in found]
    assert lines == [
        f"model.layers.{layer}.self_attn: {line} float32" for layer, line in enumerate(EXPECTED[family])
    ]
    assert [site.layer for site in found if isinstance(site, AttentionSite)] == list(range(len(EXPECTED[family])))


@pytest.mark.parametrize("family", ["llama3", "llama_yarn", "gemma3", "phi3_partial"])
def test_angles_are_torchs(family: str) -> None:
    """The angles read off the graph are the frequencies that the model was built with, each layer its own."""
    model = FAMILIES[family]()
    buffers = dict(model.model.rotary_emb.named_buffers())
    kinds = getattr(model.config, "layer_types", None) or [""] * model.config.num_hidden_layers
    sites = find_sites(ir.load(exported(family) / "model.onnx"))
    assert len(sites) == len(kinds)
    for site, kind in zip(sites, kinds, strict=True):
        assert isinstance(site, AttentionSite)
        theta = buffers[f"{kind}_inv_freq" if f"{kind}_inv_freq" in buffers else "inv_freq"].double().numpy()
        np.testing.assert_array_equal(site.rope.theta, theta)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision(family: str, dtype: str) -> None:
    """The same reading, but for the scale, which the graph rounds."""
    sites = find_sites(ir.load(exported(family, 18, dtype) / "model.onnx"))
    lines = [re.sub(r"scale=\S+", "", _line(site)) for site in sites]
    expected = [re.sub(r"scale=\S+", "", line) for line in EXPECTED[family]]
    assert lines == [f"model.layers.{layer}.self_attn: {line} {dtype}" for layer, line in enumerate(expected)]
    for site in sites:
        assert isinstance(site, AttentionSite)
        assert site.scale == pytest.approx(0.25 if family == "llama" else 24**-0.5, rel=1e-2)
        assert site.query.projection.weight.dtype == dtype


# ------------------------------------------------------------------------------------- golden graphs


@pytest.mark.parametrize("name", graphs.NAMES)
def test_golden(name: str) -> None:
    model, expected = graphs.load(name)
    assert [_line(found) for found in find_sites(model)] == expected


@pytest.mark.parametrize("name", graphs.NAMES)
def test_golden_is_left_untouched_and_admitted(name: str) -> None:
    model, _ = graphs.load(name)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    found = find_sites(model)
    assert admit(model, found) == found
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_handles_are_values_of_the_graph() -> None:
    model, _ = graphs.load("llama_opset18")
    site = _only_site(model)
    values = ir.convenience.create_value_mapping(model.graph)
    assert site.cache.past_key is values["past_key_values.0.key"]
    assert site.cache.present_value is values["present.0.value"]
    assert site.rope.positions is values["position_ids"]
    assert site.mask.padding is values["attention_mask"]
    assert site.context is site.output.x
    assert (site.query.value.name, site.query.layout) == ("transpose", "BHSD")


def test_rope_angles_are_the_graphs_own() -> None:
    model, _ = graphs.load("llama_opset18")
    table = np.asarray(model.graph.initializers["m.model.rotary_emb.inv_freq"].const_value.numpy())
    np.testing.assert_array_equal(_only_site(model).rope.theta, table.astype(np.float64))


def test_packed_weight_is_cut_by_columns() -> None:
    model, _ = graphs.load("phi3_opset18")
    site = _only_site(model)
    packed = next(v for v in model.graph.initializers.values() if list(v.shape.numpy()) == [32, 64])
    parts = [branch.projection.weight.read() for branch in (site.query, site.key, site.value)]
    assert [part.shape for part in parts] == [(32, 32), (32, 16), (32, 16)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), packed.const_value.numpy().astype(np.float64))


def test_weights_are_read_when_asked_and_never_before() -> None:
    """A weight file may be larger than memory: finding sites reads no weight, and none is kept."""
    model, _ = graphs.load("llama_opset18")
    reads: list[str] = []
    for value in model.graph.initializers.values():
        if value.const_value.size > 100:
            value.const_value = _Counted(value.const_value, reads)
    site = _only_site(model)
    assert reads == []
    site.query.projection.weight.read()
    site.query.projection.weight.read()
    assert len(reads) == 2


# ------------------------------------------------------------------------------------- spellings


def test_weight_behind_transpose_and_cast() -> None:
    """Weights stored transposed in float16, as tied or compressed models have them."""
    model, expected = graphs.load("llama_opset18")
    weight = _producer(model, "linear").inputs[1]
    stored = weight.const_value.numpy().T.astype(np.float16)
    other = ir.Value(name="stored", const_value=ir.tensor(stored, name="stored"))
    model.graph.register_initializer(other)
    cast = ir.node("Cast", [other], {"to": ir.DataType.FLOAT})
    transpose = ir.node("Transpose", cast.outputs, {"perm": [1, 0]})
    node = _producer(model, "linear")
    model.graph.insert_before(node, [cast, transpose])
    node.replace_input_with(1, transpose.outputs[0])
    site = _only_site(model)
    assert _line(site) == expected[0]
    np.testing.assert_array_equal(site.query.projection.weight.read(), stored.T.astype(np.float64))
    assert admit(model, [site]) == [site]


def test_constants_as_nodes() -> None:
    """Constants may be Constant nodes instead of initializers."""
    model, expected = graphs.load("llama_opset18")
    for name, value in list(model.graph.initializers.items()):
        node = ir.node("Constant", [], {"value": value.const_value})
        model.graph.insert_before(model.graph[0], node)
        value.replace_all_uses_with(node.outputs[0])
        del model.graph.initializers[name]
    found = find_sites(model)
    assert [_line(each) for each in found] == expected
    assert admit(model, found) == found


def test_gemm_projection_with_bias() -> None:
    """x as [B*S, E] into a Gemm with a transposed weight and its own bias."""
    model, _ = graphs.load("llama_opset18")
    node = _producer(model, "linear")
    x, weight = node.inputs
    stored = ir.Value(name="w_t", const_value=ir.tensor(weight.const_value.numpy().T.copy(), name="w_t"))
    bias = ir.Value(name="w_b", const_value=ir.tensor(np.linspace(-1, 1, 32, dtype=np.float32), name="w_b"))
    rows = ir.Value(name="rows", const_value=ir.tensor(np.array([-1, 32]), name="rows"))
    back = ir.Value(name="back", const_value=ir.tensor(np.array([0, -1, 4, 8]), name="back"))
    for value in (stored, bias, rows, back):
        model.graph.register_initializer(value)
    flat = ir.node("Reshape", [x, rows])
    gemm = ir.node("Gemm", [flat.outputs[0], stored, bias], {"transB": 1})
    model.graph.insert_before(node, [flat, gemm])
    node.outputs[0].replace_all_uses_with(gemm.outputs[0])
    site = _only_site(model)
    assert "bias=q" in site.summary()
    assert site.query.projection.x is x
    assert admit(model, [site]) == [site]


def test_tables_gathered_by_position() -> None:
    """Cos and sin as stored tables; the angles come from the tables alone."""
    model, expected = graphs.load("llama_opset18")
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    theta = np.asarray(model.graph.initializers["m.model.rotary_emb.inv_freq"].const_value.numpy())
    angle = np.arange(2000, dtype=np.float32)[:, None] * np.concatenate([theta, theta])
    for name, table in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
        stored = ir.Value(name=f"{name}_table", const_value=ir.tensor(table, name=f"{name}_table"))
        model.graph.register_initializer(stored)
        gather = ir.node("Gather", [stored, positions])
        old = _producer(model, name)
        model.graph.insert_before(old, gather)
        old.outputs[0].replace_all_uses_with(gather.outputs[0])
    site = _only_site(model)
    assert _line(site) == expected[0]
    np.testing.assert_allclose(site.rope.theta, theta, rtol=2e-7)
    assert admit(model, [site]) == [site]


def test_positions_counted_from_the_past() -> None:
    """Positions that the graph counts itself, one row for the whole batch."""
    model, expected = graphs.load("llama_opset18")
    first = ir.Value(name="first", const_value=ir.tensor(np.array([0]), name="first"))
    model.graph.register_initializer(first)
    row = ir.node("Unsqueeze", [_value(model, "add_34"), first])
    model.graph.insert_after(_producer(model, "add_34"), row)
    _producer(model, "unsqueeze_12").replace_input_with(0, row.outputs[0])
    site = _only_site(model)
    assert _line(site) == expected[0]
    assert site.rope.positions is row.outputs[0]
    assert admit(model, [site]) == [site]


def test_sampling_softmax_is_no_attention() -> None:
    model, expected = graphs.load("llama_opset18")
    model.graph.append(ir.node("Softmax", [_value(model, "linear_3")], {"axis": -1}))
    assert [_line(each) for each in find_sites(model)] == expected


# ------------------------------------------------------------------------------------- masks


def test_mask_that_hides_the_own_token_is_additive() -> None:
    model, _ = graphs.load("llama_opset18")
    _producer(model, "le_4").op_type = "Less"
    site = _only_site(model)
    assert site.mask.kind == "additive"
    assert site.mask.additive.name == "val_233"
    assert admit(model, [site]) == [site]


def test_mask_that_biases_is_additive() -> None:
    """Visible keys with a bias other than zero (as ALiBi has) must not pass for a plain mask."""
    model, _ = graphs.load("llama_opset18")
    where = _producer(model, "val_233")
    half = ir.Value(name="half", const_value=ir.tensor(np.float32(0.5), name="half"))
    model.graph.register_initializer(half)
    where.replace_input_with(1, half)
    assert _only_site(model).mask.kind == "additive"


def test_mask_that_hides_a_little_is_additive() -> None:
    """Keys pushed back by a small penalty are still seen."""
    model, _ = graphs.load("llama_opset18")
    model.graph.initializers["val_232"].const_value = ir.tensor(np.float32(-5.0), name="val_232")
    site = _only_site(model)
    assert site.mask.kind == "additive"
    assert admit(model, [site]) == [site]


def test_mask_given_as_float_input_is_additive() -> None:
    model, _ = graphs.load("llama_opset18")
    given = ir.Value(name="bias", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 1, "s", "t"]))
    model.graph.inputs.append(given)
    _producer(model, "val_235").replace_input_with(1, given)
    site = _only_site(model)
    assert (site.mask.kind, site.mask.additive) == ("additive", given)
    assert admit(model, [site]) == [site]


def test_no_mask_is_full_attention() -> None:
    model, _ = graphs.load("llama_opset18")
    softmax = _producer(model, "val_236")
    softmax.replace_input_with(0, _value(model, "val_234"))
    site = _only_site(model)
    assert "mask=full" in site.summary()
    assert site.mask.padding is None
    assert admit(model, [site]) == [site]


@pytest.mark.parametrize("window", [1, 2, 7, 33])
def test_window_is_read_off_the_mask(window: int) -> None:
    model, _ = graphs.load("gemma2_opset18")
    model.graph.initializers["val_122"].const_value = ir.tensor(np.array(window), name="val_122")
    site = _only_site(model)
    assert (site.mask.kind, site.mask.window) == ("structured", window)


# ------------------------------------------------------------------------------------- refusals


def test_refuses_unknown_activation_of_the_scores() -> None:
    model, _ = graphs.load("llama_opset18")
    _insert_after(model, "val_234", "Sigmoid")
    assert _refusal(model).expected.startswith("scores as softcap")


def test_refuses_mask_made_from_hidden_states() -> None:
    model, _ = graphs.load("llama_opset18")
    scores, mask = _value(model, "val_234"), _value(model, "val_233")
    broken = ir.node("Mul", [scores, mask])
    model.graph.insert_before(_producer(model, "val_235"), broken)
    _producer(model, "val_235").replace_input_with(1, broken.outputs[0])
    assert "a mask that does not depend on the hidden states" in str(_refusal(model))


def test_refuses_cache_that_is_not_given_back() -> None:
    model, _ = graphs.load("llama_opset18")
    model.graph.outputs.remove(_value(model, "present.0.key"))
    refusal = _refusal(model)
    assert "the extended cache among the graph's outputs" in refusal.expected
    assert "mla-pass export" in refusal.advice


def test_refuses_attention_without_cache() -> None:
    model, _ = graphs.load("llama_opset18")
    for name in ("present.0.key", "present.0.value"):
        concat = _producer(model, name)
        model.graph.outputs.remove(concat.outputs[0])
        concat.outputs[0].replace_all_uses_with(concat.inputs[1])
    assert "keys that pass through the cache" in _refusal(model).expected


def test_refuses_keys_rotated_after_the_cache() -> None:
    model, _ = graphs.load("llama_opset18")
    cache, rotated, plain = _producer(model, "present.0.key"), _value(model, "add_269"), _value(model, "transpose_1")
    cache.replace_input_with(1, plain)  # the cache takes plain keys, and the attention rotated ones
    _producer(model, "unsqueeze_15").replace_input_with(0, rotated)
    assert "keys that pass through the cache" in _refusal(model).expected


def test_refuses_rotation_that_depends_on_the_length() -> None:
    """Dynamic NTK: the angles shrink once the longest position passes a limit."""
    model, _ = graphs.load("llama_opset18")
    angles, positions = _producer(model, "mul_68"), _value(model, "position_ids")
    limit = ir.Value(name="limit", const_value=ir.tensor(np.array(512), name="limit"))
    scales = [ir.Value(name=n, const_value=ir.tensor(np.float32(x), name=n)) for n, x in (("one", 1.0), ("few", 0.5))]
    for value in (limit, *scales):
        model.graph.register_initializer(value)
    longest = ir.node("ReduceMax", [positions], {"keepdims": 0})
    long = ir.node("Greater", [longest.outputs[0], limit])
    scale = ir.node("Where", [long.outputs[0], scales[1], scales[0]])
    slower = ir.node("Mul", [angles.inputs[1], scale.outputs[0]])
    model.graph.insert_before(angles, [longest, long, scale, slower])
    angles.replace_input_with(1, slower.outputs[0])
    refusal = _refusal(model)
    assert "rotation" in refusal.expected
    assert "dynamic NTK" in refusal.advice


def test_refuses_heads_repeated_in_another_order() -> None:
    model, _ = graphs.load("llama_opset18")
    one = model.graph.initializers["val_34"]
    for name in ("unsqueeze_15", "unsqueeze_16"):
        _producer(model, name).replace_input_with(1, one)
    assert "repeated" in _refusal(model).expected


def test_refuses_fused_attention_of_another_dialect() -> None:
    model, _ = graphs.load("llama_opset23")
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.domain, node.op_type = "com.microsoft", "GroupQueryAttention"
    assert "ai.onnx Attention" in _refusal(model).expected


def test_refuses_quantised_projection() -> None:
    model, _ = graphs.load("llama_opset18")
    node = _producer(model, "linear")
    node.domain, node.op_type = "com.microsoft", "MatMulNBits"
    model.opset_imports["com.microsoft"] = 1
    assert "before it is quantised" in _refusal(model).advice


def test_refuses_attention_inside_a_function() -> None:
    model, _ = graphs.load("llama_opset23")
    q, k, v = (ir.Value(name=name) for name in "qkv")
    node = ir.node("Attention", [q, k, v])
    body = ir.Graph([q, k, v], node.outputs, nodes=[node], opset_imports={"": 23})
    model.functions[("local", "attend", "")] = ir.Function("local", "attend", graph=body, attributes=[])
    refused = [found for found in find_sites(model) if isinstance(found, Refusal)]
    assert [refusal.layer for refusal in refused] == ["attend"]


def test_wrong_transpose_is_refused_by_running_it() -> None:
    """Values whose tokens and numbers are mixed up on the way: the axes add up, the numbers do not."""
    model, expected = graphs.load("llama_opset18")
    source = _value(model, "transpose_2")
    swap = {"perm": [0, 1, 3, 2]}
    shape = ir.Value(name="mixed", const_value=ir.tensor(np.array([0, 0, -1, 8]), name="mixed"))
    model.graph.register_initializer(shape)
    first = ir.node("Transpose", [source], swap)
    second = ir.node("Reshape", [first.outputs[0], shape])
    third = ir.node("Transpose", second.outputs, swap)
    fourth = ir.node("Reshape", [third.outputs[0], shape])
    cache = _producer(model, "present.0.value")
    model.graph.insert_before(cache, [first, second, third, fourth])
    cache.replace_input_with(1, fourth.outputs[0])
    found = find_sites(model)
    assert [_line(each) for each in found] == expected  # structure alone is fooled
    (refusal,) = admit(model, found)
    assert isinstance(refusal, Refusal)
    assert "the block to compute what was read from it" in refusal.expected


def test_never_an_exception_for_a_broken_graph() -> None:
    """Any one node of a block replaced by an op nobody knows: a site, a refusal, or no attention, never a crash."""
    model, _ = graphs.load("gemma2_opset18")
    for index in range(len(model.graph)):
        model, _ = graphs.load("gemma2_opset18")
        model.graph[index].domain, model.graph[index].op_type = "nobody", "Mystery"
        for found in admit(model, find_sites(model)):
            assert isinstance(found, Refusal), f"{model.graph[index]} was read as {found}"


# ------------------------------------------------------------------------------------- helpers


class _Counted(ir.Tensor):
    """A tensor that notes every read."""

    def __init__(self, tensor: ir.TensorProtocol, reads: list[str]) -> None:
        super().__init__(tensor.numpy(), name=tensor.name)
        self._reads = reads

    def numpy(self) -> np.ndarray:
        self._reads.append(self.name or "")
        return super().numpy()


def _line(found: AttentionSite | Refusal) -> str:
    return found.summary() if isinstance(found, AttentionSite) else str(found)


def _only_site(model: ir.Model) -> AttentionSite:
    (found,) = find_sites(model)
    assert isinstance(found, AttentionSite), str(found)
    return found


def _refusal(model: ir.Model) -> Refusal:
    (found,) = find_sites(model)
    assert isinstance(found, Refusal), found.summary()
    assert found.layer == "model.layers.0.self_attn"
    return found


def _value(model: ir.Model, name: str) -> ir.Value:
    return ir.convenience.create_value_mapping(model.graph)[name]


def _producer(model: ir.Model, name: str) -> ir.Node:
    node = _value(model, name).producer()
    assert node is not None
    return node


def _insert_after(model: ir.Model, name: str, op: str, attributes: Sequence[ir.Attr] = ()) -> None:
    value = _value(model, name)
    users = [(use.node, use.idx) for use in value.uses()]
    node = ir.Node("", op, [value], attributes)
    model.graph.insert_after(_producer(model, name), node)
    for user, index in users:
        user.replace_input_with(index, node.outputs[0])
