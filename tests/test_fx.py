"""Exported programs: the same sites as in ONNX, exact at full size, and at any size the numbers of the ONNX conversion.

Sites are looked for in what torch.export gives before anything is decomposed, conversions made of `export_fx`'s
programs, so that both dialects are read.
"""

from __future__ import annotations

import functools
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import mla_pass
from mla_pass import MlaConfig, MlaPassError
from mla_pass.calibrate import calibrate
from mla_pass.export import tracing
from mla_pass.export.fx import WHOLE, any_size, core_aten, export_fx, traced
from mla_pass.onnx.instrument import instrument as onnx_run
from mla_pass.onnx.io import load_model
from mla_pass.patterns import find_sites
from mla_pass.proof import admit
from mla_pass.pytorch.fx_convert import convert_exported, instrument
from mla_pass.pytorch.view import FxView, writing
from mla_pass.site import AttentionSite, Refusal
from tests.families import FAMILIES, VOCAB, exported
from tests.test_patterns import EXPECTED

SMALL: dict[str, Any] = {
    "calibrate_tokens": 512, "calibrate_context": 64, "metric": "output", "metric_mix": 0.1, "cache": "growing",
    "max_positions": 256,
}  # fmt: skip
ROUNDING = 1e-5
"""Largest relative difference that the order of float32 sums explains."""
QUICK = ("llama", "gemma3", "phi3_partial")
"""Families that have most things between them: norms, windows, two ropes, packed and partial."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    logging.getLogger("torch.__trace").propagate = False  # a test's log is no place for every step of a trace
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)


def families() -> list[Any]:
    return [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES]


@functools.cache
def model_of(family: str) -> Any:
    return tracing.prepared(FAMILIES[family](), "float32")


@functools.cache
def raw(family: str) -> ExportedProgram:
    return traced(model_of(family))


@functools.cache
def llama() -> ExportedProgram:
    return export_fx(FAMILIES["llama"]())


def ids_of(count: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, count)


def rows_of(program: ExportedProgram) -> list[Tensor]:
    names = program.graph_signature.user_inputs
    return [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in names][3:]


class Running:
    """A program, or its ONNX form, over texts in steps."""

    def __init__(self, program: ExportedProgram) -> None:
        self.module, self.rows = program.module(), rows_of(program)

    def logits(self, ids: Tensor, mask: Tensor, steps: list[int]) -> Tensor:
        """[B, T, vocab]; the first step over an empty cache, every further one over what the last handed back."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        past = [torch.zeros(len(ids), row.shape[1], 0, row.shape[3], dtype=row.dtype) for row in self.rows]
        found, start = [], 0
        for step in steps:
            end = start + step
            tokens = (ids[:, start:end], mask[:, :end], positions[:, start:end])
            with torch.no_grad():
                logits, *past = self.module(*(x.contiguous() for x in tokens), past)
            found.append(logits)
            start = end
        for x, row in zip(past, self.rows, strict=True):
            assert x.shape == (len(ids), row.shape[1], end, row.shape[3])
        return torch.cat(found, 1)


def text(batch: int, total: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, T], the first row padded on its left."""
    return tracing.padded_text(model_of("llama"), batch, total)


def original(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits


def check(found: Tensor, want: Tensor, mask: Tensor, tolerance: float = ROUNDING) -> None:
    seen = mask.bool()
    difference = (found[seen].double() - want[seen].double()).abs().max() / want[seen].double().abs().max()
    assert difference <= tolerance


# ---- finding and proving


@pytest.mark.parametrize("family", families())
def test_sites_are_those_of_onnx(family: str) -> None:
    program = core_aten(raw(family)) if writing(raw(family)) else raw(family)
    found = find_sites(program)
    lines = [site.summary() if isinstance(site, AttentionSite) else str(site) for site in found]
    expected = [f"model.layers.{i}.self_attn: {line} float32" for i, line in enumerate(EXPECTED[family])]
    assert lines == expected
    assert admit(program, found) == found


def test_weights_and_angles_are_the_models() -> None:
    model, site = model_of("phi3_partial"), find_sites(raw("phi3_partial"))[1]
    assert isinstance(site, AttentionSite)
    packed = model.model.layers[1].self_attn.qkv_proj.weight.double().numpy().T
    parts = [branch.projection.weight.read() for branch in (site.query, site.key, site.value)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), packed)
    np.testing.assert_array_equal(site.rope.theta, model.model.rotary_emb.inv_freq.double().numpy())


def test_export_is_core_aten_with_the_models_names() -> None:
    program = llama()
    assert program.dialect == "ATEN" and program._guards_code is not None
    assert set(program.state_dict) == set(model_of("llama").state_dict())
    sites = find_sites(program)
    assert [getattr(site, "name", "") for site in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    called = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    whole = {op for op in called if op in torch.export.default_decompositions() and "sym_size" not in str(op)}
    assert whole == {getattr(torch.ops.aten, name).default for name in WHOLE} - {torch.ops.aten.matmul.default}
    assert FxView.of(program).max_position == 256
    inputs = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    with any_size(inputs[0].fake_mode):
        assert all(x.is_contiguous() for x in inputs)  # compilers take an input's strides from the trace


def test_wrong_reading_is_refused() -> None:
    """The proof, not the walk, is what makes a reading a fact."""
    site = find_sites(llama())[0]
    assert isinstance(site, AttentionSite)
    wrong = replace(site, scale=site.scale * 1.01)
    (refusal,) = admit(llama(), [wrong])
    assert isinstance(refusal, Refusal) and "the block to compute what was read from it" in refusal.expected


# ---- converting


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("llama", "block"),
        pytest.param("gemma2", "repeat", marks=pytest.mark.slow),
        *(pytest.param(f, "repeat", marks=pytest.mark.slow) for f in ("qwen2", "qwen3", "gemma3", "phi3_partial")),
        *(pytest.param(f, "block", marks=pytest.mark.slow) for f in ("mistral", "mixtral", "llama_yarn")),
    ],
)
def test_full_size_is_the_original(family: str, mode: str) -> None:
    program = llama() if family == "llama" else raw(family)
    before, weights = str(program.graph), dict(program.state_dict)
    config = MlaConfig(**SMALL, budget=1.0, rope_mode=mode)
    new = convert_exported(program, config, calibrate=ids_of(2000))
    assert (str(program.graph), program.state_dict) == (before, weights)
    ids, mask = text(2, 15)
    assert not any("!=" in guard for guard in new._guards_code)  # no size is left out
    running, want = Running(new), original(model_of(family), ids, mask)
    check(running.logits(ids, mask, [15]), want, mask)
    check(running.logits(ids, mask, [9, 3, 1, 1, 1]), want, mask)
    one = torch.ones(1, 4, dtype=torch.int64)
    check(running.logits(ids[1:, :4], one, [1] * 4), original(model_of(family), ids[1:, :4], one), one)


CASES = {
    "bands": ("llama", {"budget": 0.6}, ROUNDING),
    "still, absorbed": ("llama", {"budget": 0.6, "rope_mode": "extend", "absorb": "always"}, ROUNDING),
    "behind norms, windows": ("gemma3", {"budget": 0.6}, ROUNDING),
    "capped, by hand": ("gemma2", {"rank": 24, "rope_dims": 8}, ROUNDING),
    # A number on the edge between two may be rounded either way: a step is 1/116 of a segment's largest.
    "eight bits": ("llama", {"budget": 0.3, "cache_dtype": "int8", "rope_dtype": "int8"}, 2e-3),
}


@functools.cache
def twice(case: str) -> tuple[mla_pass.Result, ExportedProgram]:
    """One fold, as an ONNX model and as an exported program."""
    family, changes, _ = CASES[case]
    config = MlaConfig(**{**SMALL, **changes})
    result = mla_pass.convert(load_model(exported(family)), config, calibrate=ids_of(2000))
    program = llama() if family == "llama" else raw(family)
    return result, convert_exported(program, config, conversions=result.conversions)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "bands" else pytest.mark.slow) for case in CASES]
)
def test_lossy_is_the_onnx_conversion(case: str, tmp_path: Path) -> None:
    family, _, tolerance = CASES[case]
    result, program = twice(case)
    ids, mask = text(2, 13)
    mask[:] = 1
    want = torch.from_numpy(mla_pass.session(result.save(tmp_path / "out"), threads=1).logits(ids.numpy()))
    check(Running(program).logits(ids, mask, [13]), want, mask, tolerance)
    check(Running(program).logits(ids, mask, [6, 1, 6]), want, mask, tolerance)
    before = original(model_of(family), ids, mask)
    assert (want - before).abs().max() > 1e-2 * before.abs().max()  # something was lost


@pytest.mark.slow
def test_one_block_after_another() -> None:
    """A program that keeps keys and values in one layer and rows in another runs, and can be converted further."""
    result, program = twice("bands")
    config = MlaConfig(**SMALL, budget=0.6, partial=True)
    first = convert_exported(llama(), config, conversions=result.conversions[1:])
    assert [row.shape[1] for row in rows_of(first)] == [2, 2, 1, 1]
    both = convert_exported(first, config, conversions=result.conversions[:1])
    ids, mask = text(2, 13)
    want = Running(program).logits(ids, mask, [13])
    check(Running(both).logits(ids, mask, [9, 3, 1]), want, mask)
    assert (Running(first).logits(ids, mask, [9, 4]) - want).abs().max() > 1e-2 * want.abs().max()


def test_moments_are_those_of_onnx() -> None:
    """The same text through the program and through ONNX Runtime."""
    windows = ids_of(6 * 32).reshape(6, 32)
    model, view = load_model(exported("llama")), FxView.of(llama())
    theirs = [site for site in find_sites(model) if isinstance(site, AttentionSite)]
    ours = [site for site in find_sites(llama()) if isinstance(site, AttentionSite)]
    want = calibrate(theirs, onnx_run(model, theirs), windows)
    found = calibrate(ours, instrument(view, ours), windows)
    for one, other in zip(found.sites, want.sites, strict=True):
        for name in ("mean", "covariance", "metric", "distance"):
            expected = getattr(other, name)
            np.testing.assert_allclose(getattr(one, name), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_goes_on_to_disk_and_to_onnx(tmp_path: Path) -> None:
    import onnxruntime

    _, program = twice("bands")
    torch.export.save(program, tmp_path / "program.pt2")
    ids, mask = text(2, 13)
    want = Running(program).logits(ids, mask, [12, 1])
    assert torch.equal(Running(torch.export.load(tmp_path / "program.pt2")).logits(ids, mask, [12, 1]), want)

    caches = [f"past.{layer}.{kind}" for layer in range(2) for kind in ("latent", "rope")]
    names = ["input_ids", "attention_mask", "position_ids", *caches]
    torch.onnx.export(
        program, f=tmp_path / "model.onnx", dynamo=True, opset_version=18, input_names=names, verbose=False,
        output_names=["logits", *(name.replace("past", "present") for name in caches)],
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = [np.zeros((2, 1, 0, row.shape[3]), np.float32) for row in rows_of(program)]
    for start, end in ((0, 12), (12, 13)):
        tokens = (ids[:, start:end], mask[:, :end], positions[:, start:end])
        feeds = dict(zip(names, [*(x.numpy() for x in tokens), *past], strict=True))
        logits, *past = session.run(None, feeds)
        check(torch.from_numpy(logits), want[:, start:end], mask[:, start:end])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_goes_on_to_a_compiled_package(tmp_path: Path) -> None:
    _, program = twice("bands")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
    running = Running(program)
    ids, mask = text(2, 13)
    want = running.logits(ids, mask, [9, 3, 1])
    running.module = torch._inductor.aoti_load_package(package)
    check(running.logits(ids, mask, [9, 3, 1]), want, mask)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    program = export_fx(FAMILIES["qwen3"](), dtype=dtype)
    config = MlaConfig(**SMALL, budget=1.0, rope_mode="repeat")
    running = Running(convert_exported(program, config, calibrate=ids_of(2000)))
    assert {row.dtype for row in running.rows} == {getattr(torch, dtype)}
    model = tracing.prepared(FAMILIES["qwen3"](), dtype)
    ids, mask = text(2, 13)
    check(running.logits(ids, mask, [9, 1, 3]), original(model, ids, mask), mask, tracing.TOLERANCE[dtype])


# ---- refusals


def test_refuses_attention_without_cache() -> None:
    class Uncached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of("llama")

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    tokens = torch.arange(4)[None]
    program = torch.export.export(Uncached(), (tokens, tokens), strict=False)
    with pytest.raises(MlaPassError, match="2 of 2 attention blocks cannot be converted") as caught:
        convert_exported(program, calibrate=ids_of(2000))
    assert str(caught.value).count("pass through the cache") == 2


def test_refuses_what_holds_no_attention() -> None:
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
    with pytest.raises(MlaPassError, match="no attention found in this graph"):
        convert_exported(program, calibrate=ids_of(2000))


def test_refuses_what_writes_in_place() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(x)
            return x * self.seen

    with pytest.raises(MlaPassError, match="writes in place .*; call its run_decompositions"):
        convert_exported(torch.export.export(Counting(), (torch.ones(4),)), calibrate=ids_of(2000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "genai"}, "layout genai is not offered for exported programs"),
        ({"metric": "fisher"}, "metric fisher is not offered"),
        ({"max_loss": 0.1}, "max_loss is not offered"),
        ({"cache_dtype": "auto"}, "cache_dtype auto is not offered"),
    ],
)
def test_refuses_what_only_onnx_has(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MlaPassError, match=message):
        convert_exported(llama(), MlaConfig(**changes), calibrate=ids_of(2000))


def test_refuses_without_text_or_with_conversions_of_another_model() -> None:
    with pytest.raises(MlaPassError, match="give calibrate an array of token ids"):
        convert_exported(llama())
    with pytest.raises(MlaPassError, match="the conversions given are of another model"):
        convert_exported(raw("phi3_partial"), conversions=twice("bands")[0].conversions)


def test_refuses_what_is_no_graph() -> None:
    for other in (torch.nn.Linear(2, 2), "model"):
        with pytest.raises(MlaPassError, match=r"is no (exported program|graph that can be read)"):
            find_sites(other)


def test_refuses_a_dtype_and_a_model_that_is_none() -> None:
    with pytest.raises(MlaPassError, match="dtype 'int8' is not offered"):
        export_fx(FAMILIES["llama"](), dtype="int8")
    with pytest.raises(MlaPassError, match="Linear is not a causal language model"):
        export_fx(torch.nn.Linear(2, 2))
