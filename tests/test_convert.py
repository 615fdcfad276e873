"""Whole models: at full size they are the original; at any size they are the same model in every form."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import mla_pass
from mla_pass import MlaConfig, MlaPassError
from mla_pass.fold import fold
from mla_pass.onnx.emit import Emitter
from mla_pass.onnx.session import Decoder, ModelSession
from mla_pass.storage import CODED
from tests.families import FAMILIES, VOCAB, exported
from tests.limits import file_size_limit
from tests.native_cases import needs_library

SHAPES = [(1, 1, 7), (3, 4, 11), (2, 6, 0), (1, 2, 40)]
# One metric and one mix: what is tried out on held-out text is tested in test_choose.
SMALL = {"calibrate_tokens": 512, "calibrate_context": 64, "metric": "output", "metric_mix": 0.1}
# Largest difference of logits of size 1..10 that rounding explains: float32 keeps 24 bits, float16 11.
ROUNDING = {"float32": 2e-4, "float16": 0.06}


@functools.cache
def ids() -> np.ndarray:
    return np.random.default_rng(7).integers(3, VOCAB, 2000)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """converted(family, opset=, dtype=, **config): folder of a converted model, made once."""
    root = tmp_path_factory.mktemp("converted")

    @functools.cache
    def make(family: str, opset: int = 18, dtype: str = "float32", **config: object) -> Path:
        out = root / f"{len(list(root.iterdir()))}"
        source = exported(family, opset, dtype)
        return mla_pass.convert(source, MlaConfig(**{**SMALL, **config}), calibrate=ids_file(root.parent)).save(out)

    yield make
    shutil.rmtree(root)


def ids_file(folder: Path) -> Path:
    path = folder / "ids.npy"
    if not path.exists():
        np.save(path, ids())
    return path


def run(session: ModelSession, tokens: np.ndarray, new: int, mask: np.ndarray | None = None, chunk: int | None = None):
    """Logits of the last `new` tokens, after the rest was cached in one go (or in chunks)."""
    decoder = Decoder(session, len(tokens), tokens.shape[1])
    past = tokens.shape[1] - new
    for first in range(0, past, chunk or max(past, 1)):
        end = min(first + (chunk or past), past)
        decoder.forward(tokens[:, first:end], None if mask is None else mask[:, :end])
    return decoder.forward(tokens[:, past:], mask)


def tokens_of(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (batch, length))


def check_equal(original: Path, latent: Path, dtype: str = "float32") -> None:
    before, after = mla_pass.session(original, threads=1), mla_pass.session(latent, threads=1)
    for batch, new, past in SHAPES:
        tokens = tokens_of(batch, past + new)
        want, got = run(before, tokens, new), run(after, tokens, new)
        assert np.abs(want - got).max() < ROUNDING[dtype] * np.abs(want).max(), (batch, new, past)
    tokens, mask = tokens_of(3, 15), np.ones((3, 15), np.int64)
    mask[1, :5], mask[2, :9] = 0, 0
    want, got = run(before, tokens, 4, mask), run(after, tokens, 4, mask)
    assert np.abs(want - got).max() < ROUNDING[dtype] * np.abs(want).max(), "left padding"


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_is_the_original(family: str, converted) -> None:
    check_equal(exported(family), converted(family, budget=1.0))


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_newer_opsets(family: str, opset: int, converted) -> None:
    check_equal(exported(family, opset), converted(family, opset=opset, budget=1.0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_half_precision(family: str, converted) -> None:
    check_equal(exported(family, 18, "float16"), converted(family, dtype="float16", budget=1.0), "float16")


@pytest.mark.parametrize("config", [{"cache": "growing"}, {"absorb": "always"}, {"absorb": "never"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_full_size_in_every_form(family: str, config: dict, converted) -> None:
    check_equal(exported(family), converted(family, budget=1.0, **config))


# Of the largest logit: random models spread 8 bits of every row, half a step of which is 1/232 of its largest number,
# or 1/16 of each, over few channels.
STORED = {"float16": 3e-3, "bfloat16": 2e-2, "int8": 3e-2, "float8": 1e-1}


@needs_library
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("cache", ["shared", "growing"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_full_size_in_fewer_bits(family: str, cache: str, dtype: str, converted) -> None:
    folder = converted(family, budget=1.0, cache_dtype=dtype, cache=cache)
    tokens = tokens_of(2, 40)
    want = run(mla_pass.session(exported(family), threads=1), tokens, 40)
    error = {}
    for fused in (True, False):
        session = mla_pass.session(folder, threads=1, fused=fused)
        types = {tensor.dtype.name for tensor in session.cache.tensors}
        assert types == ({CODED[dtype].element.name, "float16"} if dtype in CODED else {dtype})
        got = run(session, tokens, 5)
        error[fused] = np.abs(got - want[:, -5:]).max() / np.abs(want).max()
    assert 0 < max(error.values()) < STORED[dtype]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "phi3_partial"])
@pytest.mark.parametrize("config", [{"budget": 0.5}, {"budget": 0.5, "rope_mode": "extend"}], ids=str)
def test_forms_agree_at_half_size(family: str, config: dict, converted) -> None:
    # One token at a time runs absorbed, a long chunk expanded; batch rows must not see each other either.
    session = mla_pass.session(converted(family, **config), threads=1)
    tokens = tokens_of(2, 70)
    whole = run(session, tokens, 70)
    steps = Decoder(session, 2, 70)
    stepped = np.concatenate([steps.forward(tokens[:, i : i + 1]) for i in range(70)], axis=1)
    np.testing.assert_allclose(stepped, whole, rtol=0, atol=5e-4 * np.abs(whole).max())
    np.testing.assert_allclose(run(session, tokens, 7, chunk=9), whole[:, -7:], rtol=0, atol=5e-4 * np.abs(whole).max())
    np.testing.assert_allclose(run(session, tokens[1:], 70), whole[1:], rtol=0, atol=5e-4 * np.abs(whole).max())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_absorbing_changes_no_number(family: str, converted) -> None:
    tokens = tokens_of(2, 30)
    plain, folded = (
        run(mla_pass.session(converted(family, budget=0.5, rope_mode="extend", absorb=mode)), tokens, 30)
        for mode in ("never", "always")
    )
    np.testing.assert_allclose(folded, plain, rtol=0, atol=5e-4 * np.abs(plain).max())


def ordered(family: str, key_rank: int, out: Path, monkeypatch: pytest.MonkeyPatch, **config: object) -> ModelSession:
    """A converted model whose keys read `key_rank` columns, loaded."""
    monkeypatch.setattr("mla_pass.onnx.choose.folded", lambda s: fold(s.prepared, s.rank, s.rope_dims, key_rank))
    made = mla_pass.convert(exported(family), MlaConfig(**{**SMALL, **config}), calibrate=ids_file(out.parent))
    return mla_pass.session(made.save(out), threads=1)


@pytest.mark.parametrize("config", [{}, {"rope_mode": "extend"}, {"cache": "growing"}], ids=str)
@pytest.mark.parametrize("absorb", ["never", "always"])
def test_columns_that_keys_do_not_need_change_no_number(
    config: dict, absorb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 32 key numbers a token lie in 32 of the latent's 56 columns at most.
    config = {"rank": 56, "rope_dims": 8, "absorb": absorb, **config}
    whole, less = (ordered("llama", k, tmp_path / str(k), monkeypatch, **config) for k in (56, 32))
    node = next(n for n in ir.load(less.folder / "model.onnx").graph if n.op_type == "LatentAttention")
    assert (node.attributes["key_rank"].as_int(), node.attributes["value_offset"].as_int()) == (32, 0)
    for batch, new, past in SHAPES:
        tokens = tokens_of(batch, past + new)
        want, got = run(whole, tokens, new), run(less, tokens, new)
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-4 * np.abs(want).max())


def test_forms_agree_where_keys_read_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, made = tokens_of(2, 30), []
    for absorb in ("never", "always"):
        config = {"rank": 24, "rope_dims": 8, "rope_mode": "extend", "absorb": absorb}
        made.append(run(ordered("llama", 7, tmp_path / absorb, monkeypatch, **config), tokens, 30))
    np.testing.assert_allclose(made[1], made[0], rtol=0, atol=5e-4 * np.abs(made[0]).max())


def test_bands_come_closer_than_no_rotation(converted) -> None:
    # Random weights have no low rank to find, so nothing is compressed here but the rotation.
    tokens = tokens_of(2, 60)
    want = run(mla_pass.session(exported("llama")), tokens, 60)

    def error(**config: object) -> float:
        return float(np.abs(run(mla_pass.session(converted("llama", **config)), tokens, 60) - want).mean())

    sizes = {"rank": 56, "rope_dims": 8, "attention_flops": 1000.0}
    exact = error(**sizes, finest_block=1, band_angle=1e-6)
    order1, order0, extend = (
        error(**sizes, finest_block=4, block_order=1),
        error(**sizes, finest_block=4, block_order=0),
        error(**sizes, rope_mode="extend"),
    )
    assert exact < order1 < order0 < extend


def test_padding_costs_no_more_than_the_approximation(converted) -> None:
    # Blocks are counted from the buffer's start: padding shifts them, so padded logits differ, but only by as much.
    session, original = (mla_pass.session(p) for p in (converted("llama", budget=0.75), exported("llama")))
    tokens, mask = tokens_of(1, 40), np.ones((1, 53), np.int64)
    mask[:, :13] = 0
    padded = np.concatenate([np.full((1, 13), 3), tokens], axis=1)
    want = run(original, tokens, 40)
    plain, shifted = run(session, tokens, 40), run(session, padded, 53, mask)[:, 13:]
    assert np.abs(shifted - want).mean() < 1.5 * np.abs(plain - want).mean()


def test_cache_is_as_small_as_asked(converted) -> None:
    original = mla_pass.session(exported("llama"))
    for budget in (0.75, 0.5, 0.25):
        small = mla_pass.session(converted("llama", budget=budget))
        assert small.bytes_per_token <= budget * original.bytes_per_token
    names = [t.past for t in small.cache.tensors]
    assert names == ["past.0.latent", "past.0.rope", "past.1.latent", "past.1.rope"]
    assert {t.kind for t in small.cache.tensors} == {"shared"}


def test_everything_else_is_untouched(converted) -> None:
    before = ir.load(exported("llama") / "model.onnx").graph.initializers
    after = ir.load(converted("llama", budget=0.5) / "model.onnx").graph.initializers
    kept = [name for name in after if name in before]
    gone = [name for name in before if name not in after]
    assert len(kept) > 10
    for name in kept:
        assert after[name].const_value.tobytes() == before[name].const_value.tobytes()
    sizes = sorted(before[name].const_value.shape.numpy() for name in gone if len(before[name].const_value.shape) == 2)
    assert sizes.count((64, 32)) == 4  # k and v of two layers; q and o stay


def test_converted_models_pass_the_checker(converted) -> None:
    for family in ("llama", "gemma3"):
        onnx.checker.check_model(str(converted(family, budget=0.5) / "model.onnx"), full_check=True)


def test_pass_leaves_a_model_in_memory_alone() -> None:
    model = ir.load(exported("llama") / "model.onnx")
    nodes = len(list(model.graph))
    result = mla_pass.convert(model, MlaConfig(**SMALL), calibrate=ids())
    assert len(list(model.graph)) == nodes
    assert sum(node.op_type == "LatentAttention" for node in result.model.graph) == 2


# ---- bad input


def refuse(match: str, source: Path | str, out: Path, calibrate=None, **config: object) -> None:
    with pytest.raises(MlaPassError, match=match) as caught:
        mla_pass.convert(source, MlaConfig(**{**SMALL, **config}), calibrate=calibrate or ids_file(out.parent)).save(
            out
        )
    assert "\n" not in str(caught.value) or "cannot be converted" in str(caught.value)
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if "partial" in p.name]


def test_not_an_onnx_file(tmp_path: Path) -> None:
    bad = tmp_path / "model.onnx"
    bad.write_bytes(b"no model" * 100)
    refuse("cannot be read as an ONNX model|holds no graph", bad, tmp_path / "out")
    refuse("does not exist", tmp_path / "missing", tmp_path / "out")


def copy_of(family: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported(family), tmp_path / "copy"))


def test_truncated_external_data(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path)
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    refuse("cut short", folder, tmp_path / "out")
    data.unlink()
    refuse("does not exist", folder, tmp_path / "out")


def test_opset_too_old() -> None:
    model = ir.load(exported("llama") / "model.onnx")
    model.graph.opset_imports[""] = 17
    with pytest.raises(MlaPassError, match="opset 17.*18 and newer"):
        Emitter(model, max_positions=8, shared_buffer=True).emit([])


def test_no_attention(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("input_ids", 7, ["b", "s"])
    y = onnx.helper.make_tensor_value_info("logits", 7, ["b", "s"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["input_ids"], ["logits"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "model.onnx")
    refuse("no attention found", tmp_path / "model.onnx", tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_weights(tmp_path: Path, value: float) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    # The second [64, 32] weight of the second layer's block is its value projection, the first its keys'.
    products = [node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value is not None]
    weight = [node.inputs[1] for node in products if node.inputs[1].shape.numpy() == (64, 32)][2]
    array = weight.const_value.numpy().copy()
    array[3, 4] = value
    weight.const_value = ir.tensor(array, name=weight.name)
    (tmp_path / "bad").mkdir()
    ir.save(model, tmp_path / "bad" / "model.onnx", external_data="model.onnx.data")
    refuse("(key|value) projection holds NaN or infinite", tmp_path / "bad", tmp_path / "out")


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(MlaPassError, match="auto compares types at equal bytes"):
        MlaConfig(cache_dtype="auto", rank=24)
    for budget in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(MlaPassError, match="budget must lie in"):
            MlaConfig(budget=budget)
    refuse("larger than the full size", exported("llama"), tmp_path / "out", rank=100, rope_dims=8)
    refuse("the budget leaves 4 bytes", exported("llama"), tmp_path / "out", budget=0.01)
    refuse("at least 272 are needed", exported("llama"), tmp_path / "out", budget=0.5, rope_mode="repeat")


def test_calibration_text(tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", ids()[:50])
    refuse(
        "too short.*has 50 tokens.*needs at least",
        exported("llama"),
        tmp_path / "out",
        calibrate=tmp_path / "short.npy",
    )
    refuse("does not exist", exported("llama"), tmp_path / "out", calibrate=tmp_path / "none.txt")
    np.save(tmp_path / "float.npy", np.zeros(5000))
    refuse("expected integers", exported("llama"), tmp_path / "out", calibrate=tmp_path / "float.npy")
    (tmp_path / "broken.npy").write_bytes(b"x" * 100)
    refuse("cannot be read as a .npy", exported("llama"), tmp_path / "out", calibrate=tmp_path / "broken.npy")


def test_output_folder(tmp_path: Path) -> None:
    result = mla_pass.convert(exported("llama"), MlaConfig(**SMALL), calibrate=ids_file(tmp_path))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(MlaPassError, match="already holds files"):
        result.save(taken)
    assert [p.name for p in taken.iterdir()] == ["file"]
    with pytest.raises(MlaPassError, match="cannot write"):
        result.save("/proc/none/out")


def test_one_unreadable_block_refuses_all(tmp_path: Path) -> None:
    # Block 1's softmax runs over the wrong axis: structure alone might pass it, the numbers do not.
    model = ir.load(exported("llama") / "model.onnx")
    softmax = [node for node in model.graph if node.op_type == "Softmax"][1]
    softmax.attributes["axis"] = ir.AttrInt64("axis", -2)
    (tmp_path / "bad").mkdir()
    ir.save(model, tmp_path / "bad" / "model.onnx", external_data="model.onnx.data")
    refuse(r"1 of 2 attention blocks cannot be converted(.|\n)*layers\.1", tmp_path / "bad", tmp_path / "out")
    partial = mla_pass.convert(
        tmp_path / "bad", MlaConfig(**SMALL, partial=True, budget=1.0), calibrate=ids_file(tmp_path)
    )
    out = partial.save(tmp_path / "partial")
    assert len(partial.report.refusals) == 1
    tokens = tokens_of(2, 12)
    want, got = (run(mla_pass.session(folder), tokens, 5) for folder in (tmp_path / "bad", out))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())


# What a machine without mla_pass does: three lines of ONNX Runtime, on the files of the folder alone.
ELSEWHERE = """
import sys
import numpy as np, onnxruntime
sys.modules["mla_pass"] = None
folder = sys.argv[1]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(folder + "/libmla_pass.so")
options.enable_profiling = True
options.profile_file_prefix = folder + "/profile"
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
feeds = {"input_ids": np.arange(3, 9)[None], "attention_mask": np.ones((1, 6), np.int64)}
feeds["position_ids"] = np.arange(6)[None]
for port in session.get_inputs():
    if port.name.startswith("past"):
        feeds[port.name] = np.zeros((1, 1, 6, port.shape[3]), np.float32)
given = {port.name: feeds[port.name] for port in session.get_inputs()}
np.save(folder + "/logits.npy", session.run(["logits"], given)[0])
print(session.end_profiling())
"""


def test_the_report_tells_what_fewer_bits_cost(tmp_path: Path) -> None:
    errors = {}
    for dtype in ("same", "float16", "int8", "float8"):
        config = MlaConfig(**SMALL, budget=1.0, cache_dtype=dtype)
        report = mla_pass.convert(exported("llama"), config, calibrate=ids_file(tmp_path)).report
        errors[dtype] = max(layer.output_error for layer in report.layers)
    assert errors["same"] < 1e-9 < errors["float16"] < 1e-3 < errors["int8"] < 3e-2
    assert errors["int8"] < errors["float8"] < 1e-1


@needs_library
def test_a_bundle_runs_without_mla_pass(tmp_path: Path) -> None:
    config = MlaConfig(**SMALL, budget=0.5)
    made = mla_pass.convert(exported("llama"), config, calibrate=ids_file(tmp_path))
    folder = made.save(tmp_path / "out", bundle=True)
    command = [sys.executable, "-c", ELSEWHERE, str(folder)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert '"op_name" : "LatentAttention"' in Path(ran.stdout.strip()).read_text()
    want = mla_pass.session(folder, fused=False).logits([np.arange(3, 9)])
    np.testing.assert_allclose(np.load(folder / "logits.npy"), want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_no_library_to_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MlaConfig(**SMALL, budget=0.5)
    made = mla_pass.convert(exported("llama"), config, calibrate=ids_file(tmp_path))
    monkeypatch.setattr("mla_pass.native.find_library", lambda: None)
    with pytest.raises(MlaPassError, match="the op library .* is not built"):
        made.save(tmp_path / "out", bundle=True)
    assert not (tmp_path / "out").exists()


def test_full_disk(tmp_path: Path) -> None:
    result = mla_pass.convert(exported("llama"), MlaConfig(**SMALL), calibrate=ids_file(tmp_path))
    with file_size_limit(20_000), pytest.raises(MlaPassError, match="cannot write|File too large"):
        result.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["ids.npy"]


# ---- a mask that is neither causal, nor a window, nor padding


def test_arbitrary_mask_is_passed_on(tmp_path: Path) -> None:
    # Attended tokens get a bonus that grows with their place: no pattern of hidden and seen keys describes it.
    model = ir.load(exported("llama") / "model.onnx")
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    bonus = ir.tape.Tape()
    counted = bonus.op("CumSum", [mask, bonus.op("Constant", [], {"value": ir.tensor(np.array(1))})])
    scaled = bonus.op("Mul", [bonus.op("Cast", [counted], {"to": 1}), bonus.op("Constant", [], {"value_float": 0.07})])
    spread = bonus.op("Unsqueeze", [scaled, bonus.op("Constant", [], {"value_ints": [1, 2]})])
    adders = [n.inputs[0].producer() for n in model.graph if n.op_type == "Softmax"]
    sums = [bonus.op("Add", [adder.inputs[1], spread]) for adder in adders]
    for adder, total in zip(adders, sums, strict=True):
        adder.replace_input_with(1, total)
    for node in bonus.nodes:
        model.graph.append(node)
    model.graph.sort()
    (tmp_path / "bias").mkdir()
    ir.save(model, tmp_path / "bias" / "model.onnx", external_data="model.onnx.data")
    assert {site.mask.kind for site in mla_pass.explain(tmp_path / "bias")} == {"additive"}
    result = mla_pass.convert(tmp_path / "bias", MlaConfig(**SMALL, budget=1.0), calibrate=ids_file(tmp_path))
    check_equal(tmp_path / "bias", result.save(tmp_path / "out"))


# ---- bfloat16, which ONNX Runtime's CPU cannot run


def evaluate(folder: Path, tokens: np.ndarray, capacity: int) -> np.ndarray:
    """Logits of one cacheless forward on the ONNX reference evaluator, in the model's own precision."""
    import ml_dtypes
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(folder / "model.onnx")
    batch, length = tokens.shape
    feeds = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
    }
    for port in model.graph.input:
        if port.name not in feeds:
            dims = port.type.tensor_type.shape.dim
            rows = capacity if port.name.endswith(("latent", "rope")) else 0
            feeds[port.name] = np.zeros((batch, dims[1].dim_value, rows, dims[3].dim_value), ml_dtypes.bfloat16)
    return ReferenceEvaluator(model).run(["logits"], feeds)[0].astype(np.float32)


def test_bfloat16_full_size(converted) -> None:
    tokens = tokens_of(2, 9)
    want = evaluate(exported("llama", 18, "bfloat16"), tokens, 9)
    got = evaluate(converted("llama", dtype="bfloat16", budget=1.0), tokens, 9)
    exact = mla_pass.session(exported("llama")).logits(tokens)
    # Both round to 8 bits at other places: the converted model is as near to the exact one as the original is.
    assert np.abs(got - exact).mean() < 1.5 * np.abs(want - exact).mean()


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(MlaPassError, match="cannot convert a dict; give a folder"):
        mla_pass.convert({})  # type: ignore[call-overload]
