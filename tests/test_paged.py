"""ONNX Runtime's own latent attention: whole models lowered to PagedAttention, run by a server of numpy."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import mla_pass
from mla_pass import MlaConfig, MlaPassError, cli
from mla_pass.budget import layer_curve
from mla_pass.convert import Result
from mla_pass.fold import Recipe, fold, prepare, without_key_mean
from mla_pass.onnx.emit import Emitter
from mla_pass.onnx.io import load_model, save_model
from mla_pass.onnx.paged import PagedEmitter, paged_site, require_accepted
from mla_pass.onnx.session import Decoder
from mla_pass.patterns import find_sites
from mla_pass.reference import attend, rows
from mla_pass.site import AttentionSite, Refusal
from mla_pass.storage import RowFormat
from tests.families import VOCAB, exported
from tests.test_fold import ROPES, Case

ort = pytest.importorskip("onnxruntime")

SMALL = {"calibrate_tokens": 512, "calibrate_context": 64, "metric": "output", "metric_mix": 0.1}
PAGED: dict[str, Any] = {"target": "ort-latent", "rope_mode": "extend", **SMALL}
# Largest difference of logits of size 1..10 that rounding explains.
ROUNDING = {"float32": 2e-4, "float16": 0.06}
PAGE_ROWS = 16
PROMPTS = (23, 1, 16)
"""Tokens of three prompts: more than a page, less, and one to the row."""


class PagedAttention(OpRun):
    """The operator as ONNX Runtime's schema documents its latent layout, in float64, one token at a time."""

    op_domain = "com.microsoft"

    def _run(
        self, query, key, value, key_cache, value_cache, cumulative, past, table, cos=None, sin=None, *,
        num_heads, kv_num_heads, kv_cache_layout, v_head_size, scale, do_rotary=0, rotary_offset=0,
        local_window_size=-1, softcap=0.0,
    ):  # fmt: skip
        assert value is None and value_cache is None and kv_num_heads == 1 and kv_cache_layout == "LATENT"
        assert do_rotary and {a.dtype for a in (key, key_cache, cos, sin)} == {query.dtype}
        width, cache = key.shape[1], key_cache.copy()
        assert query.shape == (len(key), num_heads * width) and cache.shape[2:] == (1, width)
        assert 1 <= cumulative[-1] == len(key) and len(past) == len(table) == len(cumulative) - 1
        size, output = cache.shape[1], np.zeros((len(key), num_heads, v_head_size))

        def turned(x: np.ndarray, position: int) -> np.ndarray:
            out, half = x.astype(np.float64), cos.shape[1]
            a = slice(rotary_offset, rotary_offset + half)
            b = slice(rotary_offset + half, rotary_offset + 2 * half)
            c, s = cos[position].astype(np.float64), sin[position].astype(np.float64)
            out[..., a], out[..., b] = out[..., a] * c - out[..., b] * s, out[..., b] * c + out[..., a] * s
            return out

        heads = query.reshape(len(key), num_heads, width)
        for sequence, (first, end) in enumerate(itertools.pairwise(cumulative)):
            positions = past[sequence] + np.arange(end - first)
            for token, position in zip(range(first, end), positions, strict=True):
                cache[table[sequence, position // size], position % size, 0] = turned(key[token], position)
            for token, position in zip(range(first, end), positions, strict=True):
                seen = np.arange(max(0, position + 1 - local_window_size) if local_window_size > 0 else 0, position + 1)
                row = cache[table[sequence, seen // size], seen % size, 0].astype(np.float64)
                scores = turned(heads[token], position) @ row.T * scale
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                weights = np.exp(scores - scores.max(1, keepdims=True))
                output[token] = weights / weights.sum(1, keepdims=True) @ row[:, :v_head_size]
        return output.reshape(len(key), -1).astype(query.dtype), cache


class Server:
    """Serves sequences of unequal lengths from shared pages, which it hands out in no order."""

    def __init__(self, model: ir.Model, pages: int = 24) -> None:
        whole = ir.external_data.load_to_model(model)
        self.evaluator = ReferenceEvaluator(ir.to_proto(whole), new_ops=[PagedAttention])
        # What was never written must never be read.
        self.caches = {
            value.name: np.full((pages, PAGE_ROWS, 1, value.shape[3]), np.nan, value.dtype.numpy())
            for value in model.graph.inputs
            if value.name.endswith(".pages")
        }
        self.free = list(np.random.default_rng(3).permutation(pages))
        self.table: dict[int, list[int]] = {}
        self.length: dict[int, int] = {}

    def step(self, work: dict[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """New tokens of some sequences, in this order; the logits [new, V] of each."""
        past = [self.length.get(name, 0) for name in work]
        for name, tokens in work.items():
            self.length[name] = self.length.get(name, 0) + len(tokens)
            pages = self.table.setdefault(name, [])
            while len(pages) * PAGE_ROWS < self.length[name]:
                pages.append(int(self.free.pop()))
        most = max(len(self.table[name]) for name in work)
        table = [self.table[name] + [-1] * (most - len(self.table[name])) for name in work]
        ends = np.cumsum([0, *(len(tokens) for tokens in work.values())])
        schedule = {"cumulative_sequence_lengths": ends, "past_sequence_lengths": past, "block_table": table}
        feeds = {name: np.array(value, np.int32) for name, value in schedule.items()}
        ids = np.concatenate([np.array(tokens) for tokens in work.values()])[None]
        logits, *caches = self.evaluator.run(None, {"input_ids": ids, **feeds, **self.caches})
        self.caches = dict(zip(self.caches, caches, strict=True))
        return {name: logits[0, a:b] for name, a, b in zip(work, ends[:-1], ends[1:], strict=True)}


@functools.cache
def ids() -> np.ndarray:
    return np.random.default_rng(7).integers(3, VOCAB, 1200)


@functools.cache
def lowered(family: str, dtype: str = "float32", **config: object) -> Result:
    """A conversion, its rows of float16 where the graph is of float32."""
    rows_of = {"cache_dtype": "float16"} if dtype == "float32" else {}
    settings = MlaConfig(**{**PAGED, **rows_of, **config})
    return mla_pass.convert(load_model(exported(family, 18, dtype)), settings, calibrate=ids())


def emitted(family: str, result: Result, emitter: str) -> ir.Model:
    """The weights of a conversion in another copy of the model, rows in float32: no rounding hides a mistake."""
    model = load_model(exported(family))
    sites = {site.name: site for site in find_sites(model) if isinstance(site, AttentionSite)}
    conversions = [
        replace(c, site=sites[c.site.name], row=replace(c.row, latent="float32", rope="float32"))
        for c in result.conversions
    ]
    if emitter == "paged":
        PagedEmitter(model, max_positions=256).emit(conversions)
    else:
        Emitter(model, max_positions=256, shared_buffer=False).emit(conversions)
    return model


def prompts() -> dict[int, np.ndarray]:
    return {name: ids()[100 * name :][:length] for name, length in enumerate(PROMPTS)}


def serve(model: ir.Model) -> dict[int, np.ndarray]:
    """All logits of three sequences, ragged: two start together, a third joins when one is at its second token."""
    server, given = Server(model), prompts()
    tails = {name: ids()[600 + 50 * name :][:4] for name in given}
    work: list[dict[int, Sequence[int]]] = [{1: given[1], 0: given[0]}, {1: tails[1][:1], 2: given[2]}]
    work += [{2: tails[2][:2], 0: tails[0][:1], 1: tails[1][1:2]}, {0: tails[0][1:], 1: tails[1][2:], 2: tails[2][2:]}]
    parts: dict[int, list[np.ndarray]] = {name: [] for name in given}
    for step in work:
        for name, logits in server.step(step).items():
            parts[name].append(logits)
    return {name: np.concatenate(found) for name, found in parts.items()}


def alone(folder: Path) -> dict[int, np.ndarray]:
    """The same logits by a model with a cache of its own for each sequence, all tokens at once."""
    session = mla_pass.session(folder, threads=1)
    texts = {name: np.concatenate([prompt, ids()[600 + 50 * name :][:4]]) for name, prompt in prompts().items()}
    return {name: Decoder(session, 1, len(text)).forward(text[None])[0] for name, text in texts.items()}


def check_equal(got: dict[int, np.ndarray], want: dict[int, np.ndarray], limit: float) -> None:
    for name, logits in want.items():
        assert np.abs(got[name] - logits).max() < limit * np.abs(logits).max(), name


# ---- numbers


@pytest.mark.parametrize("family", ["llama_yarn", "gemma2", "gemma3"])
def test_full_size_is_the_original(family: str) -> None:
    model = emitted(family, lowered(family, budget=1.0), "paged")
    check_equal(serve(model), alone(exported(family)), ROUNDING["float32"])


@pytest.mark.parametrize(
    "config",
    [{"budget": 0.25}, {"budget": 0.375, "rope_mode": "repeat"}, {"rank": 32, "rope_dims": 16, "absorb": "always"},
     {"rank": 16, "rope_dims": 32, "absorb": "never", "layers": "even"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama_yarn", "gemma2"])
def test_the_same_weights_in_our_operator_give_the_same(family: str, config: dict, tmp_path: Path) -> None:
    result = lowered(family, **config)
    got = serve(emitted(family, result, "paged"))
    save_model(emitted(family, result, "latent"), tmp_path)
    check_equal(got, alone(tmp_path), ROUNDING["float32"])
    away = alone(exported(family))
    assert max(np.abs(got[name] - away[name]).max() / np.abs(away[name]).max() for name in away) > 0.05  # not trivial


def test_one_token_at_a_time_is_the_prefill() -> None:
    model = emitted("gemma3", lowered("gemma3", budget=0.25), "paged")
    whole = Server(model).step(prompts())
    server = Server(model)
    steps = [server.step({0: prompts()[0][i : i + 1]})[0] for i in range(PROMPTS[0])]
    check_equal({0: np.concatenate(steps)}, {0: whole[0]}, 1e-5)


def test_half_precision() -> None:
    check_equal(
        serve(lowered("llama", "float16", budget=1.0).model), alone(exported("llama", 18, "float16")),
        ROUNDING["float16"],
    )  # fmt: skip


def test_rows_of_sixteen_bits_in_a_float32_model() -> None:
    result = lowered("llama_yarn", budget=1.0)
    assert {node.op_type for node in result.model.graph} >= {"PagedAttention", "Cast"}
    want = alone(exported("llama_yarn"))
    got = serve(result.model)
    check_equal(got, want, 1e-2)
    assert any(np.abs(got[name] - want[name]).max() > ROUNDING["float32"] for name in want)  # they are in 16 bits


def test_keys_without_a_mean_are_the_same_at_full_size_and_near_it_below() -> None:
    case = Case(ROPES["half"])
    geometry = replace(case.geometry, softcap=True)
    p = prepare(geometry, case.statistics, Recipe(rope_mode="extend"))
    random = np.random.default_rng(0)
    y = random.normal(size=(9, geometry.width)) + case.statistics.mean
    query = random.normal(size=(9, geometry.groups * geometry.per_group, geometry.head_dim))
    position, keep = np.arange(9), np.tril(np.ones((9, 9), bool))

    def context(w: Any) -> np.ndarray:
        cache = rows(w, geometry.rope.theta, y, position)
        return attend(w, geometry.rope.theta, query, cache, position, keep, scale=0.3, softcap=2.0)

    half = geometry.rotary_width // 2
    for rope, rank in ((geometry.rotary_width, geometry.width - geometry.rotary_width), (half, geometry.width - half)):
        weights = fold(p, rank, rope)
        assert weights.key_mean.any() == (weights.nope_dim > 0)
        moved = without_key_mean(weights)
        assert not moved.key_mean.any()
        np.testing.assert_allclose(context(moved), context(weights), rtol=0, atol=1e-9)
    cut = fold(p, 6, 4)
    dropped = replace(cut, key_mean=np.zeros_like(cut.key_mean))
    want = context(cut)
    errors = [np.linalg.norm(context(w) - want) for w in (without_key_mean(cut), dropped)]
    assert errors[0] < errors[1]


# ---- what ONNX Runtime makes of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered("llama", "float16", budget=0.5).save(tmp_path_factory.mktemp("paged") / "out")


def test_onnx_runtime_takes_the_graph_up_to_the_kernel(folder: Path) -> None:
    path = folder / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    with pytest.raises(Exception, match=r"Could not find an implementation for PagedAttention\(1\) node with name"):
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    require_accepted(path)


@pytest.mark.parametrize(
    ("attribute", "told"),
    [(ir.AttrString("kv_cache_layout", "LATENTS"), "kv_cache_layout must be"), (ir.AttrInt64("v", 3), "attribute: v")],
)
def test_a_graph_that_onnx_runtime_refuses_is_not_saved(attribute: ir.Attr, told: str, tmp_path: Path) -> None:
    result = lowered("llama", "float16", budget=0.5)
    model = result.model.clone()
    node = next(node for node in model.graph if node.op_type == "PagedAttention")
    node.attributes[attribute.name] = attribute
    with pytest.raises(MlaPassError, match=f"refuses the graph of .*{told}"):
        replace(result, model=model).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_node_keeps_to_the_schema_and_the_kernels_limits(folder: Path) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    (schema,) = [s for s in state.get_all_operator_schema() if s.name == "PagedAttention"]
    names = [put.name for put in schema.inputs]
    model = load_model(folder)
    nodes = [node for node in model.graph if node.op_type == "PagedAttention"]
    assert len(nodes) == 2 and model.graph.opset_imports["com.microsoft"] == schema.since_version
    for node in nodes:
        given = {name: value for name, value in zip(names, node.inputs, strict=False) if value is not None}
        assert set(given) == {
            "query", "key", "key_cache", "cumulative_sequence_length", "past_seqlens", "block_table", "cos_cache",
            "sin_cache",
        }  # fmt: skip
        assert set(node.attributes) <= set(schema.attributes)
        width, rank = given["key_cache"].shape[3], node.attributes["v_head_size"].as_int()
        turned = 2 * given["cos_cache"].shape[1]
        assert node.attributes["rotary_offset"].as_int() == rank == width - turned
        assert width % 16 == turned % 16 == rank % 8 == 0 and width <= 1024


def test_a_session_of_its_own_is_refused_with_the_way_out(folder: Path) -> None:
    with pytest.raises(MlaPassError, match="PagedAttention.*convert it without --target, which is for CUDA servers"):
        mla_pass.session(folder)


def test_the_folder_tells_how_it_is_fed(folder: Path) -> None:
    told = json.loads((folder / "mla_pass.json").read_text())
    assert told["config"]["target"] == "ort-latent"
    interface = told["interface"]
    assert interface["operator"].startswith("com.microsoft::PagedAttention")
    assert list(interface["inputs"]) == [
        "input_ids", "past.0.pages", "past.1.pages", "cumulative_sequence_lengths", "past_sequence_lengths",
        "block_table",
    ]  # fmt: skip
    assert interface["positions"] == 256
    assert list(interface["outputs"]) == ["logits", "present.0.pages", "present.1.pages"]
    assert interface["inputs"]["past.1.pages"]["shape"] == ["pages", "page_rows", 1, 32]
    assert "present.1.pages" in interface["inputs"]["past.1.pages"]["meaning"]
    assert interface["inputs"]["block_table"]["type"] == "int32"
    ports = [*interface["inputs"].values(), *interface["outputs"].values()]
    assert all(port["meaning"] for port in ports)
    notes = " ".join(told["report"]["notes"])
    assert "for CUDA alone" in notes and "left off, which loses more" in notes


# ---- sizes


def test_rows_come_in_tiles_and_no_wider_than_allowed() -> None:
    case = Case(ROPES["half"])
    p = prepare(case.geometry, case.statistics, Recipe(rope_mode="extend"))
    config = MlaConfig(**PAGED)
    for tile, widest in ((4, None), (4, 20), (8, 24)):
        curve = layer_curve(p, RowFormat("float16", "float16", "float16", tile=tile, widest=widest), config)
        assert len(curve.sizes) > 1
        assert all(rank % tile == rope % tile == 0 for rank, rope in curve.sizes)
        assert max(rank + rope for rank, rope in curve.sizes) <= (widest or case.geometry.width)


def test_sizes_by_hand_must_fit() -> None:
    for rank, rope in ((24, 16), (16, 8)):
        with pytest.raises(MlaPassError, match=f"row of rank {rank} with {rope} rope dims .* multiples of 16, and at"):
            lowered("llama", "float16", rank=rank, rope_dims=rope)


# ---- refusals


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"rope_mode": "block"}, "choose rope_mode 'extend'"),
        ({"cache_dtype": "int8"}, "one tensor of 16 bits; got cache_dtype int8"),
        ({"cache_dtype": "float16", "rope_dtype": "bfloat16"}, "got cache_dtype float16 and rope_dtype bfloat16"),
        ({"layout": "genai"}, "leave layout genai out"),
        ({"partial": True}, "leave partial out"),
        ({"target": "cuda"}, "target must be one of mla-pass, ort-latent; got 'cuda'"),
    ],
    ids=str,
)
def test_requests_that_it_cannot_serve(config: dict, told: str) -> None:
    with pytest.raises(MlaPassError, match=told):
        MlaConfig(**{**PAGED, **config})


def test_a_float32_model_is_refused() -> None:
    with pytest.raises(MlaPassError, match="computes in float32, and PagedAttention in .*: export it with --dtype"):
        mla_pass.convert(load_model(exported("llama_yarn")), MlaConfig(**PAGED), calibrate=ids())


def test_what_is_no_onnx_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from mla_pass.pytorch.convert import convert_checkpoint
    from mla_pass.pytorch.deepseek import check_request

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MlaPassError, match="target ort-latent is for ONNX models; run mla-pass export"):
        convert_checkpoint(tmp_path, MlaConfig(**PAGED))
    with pytest.raises(MlaPassError, match="needs target='mla-pass'; got 'ort-latent'"):
        check_request(MlaConfig(**PAGED))
    with pytest.raises(MlaPassError, match="needs no op library; leave bundle out"):
        lowered("llama", "float16", budget=0.5).save(tmp_path / "out", bundle=True)


def test_sites_that_it_cannot_express() -> None:
    site = next(s for s in find_sites(load_model(exported("llama_yarn"))) if isinstance(s, AttentionSite))
    assert paged_site(site) is site
    narrow = replace(site.rope, rotary_dim=4)
    for other, told in (
        (replace(site, mask=replace(site.mask, kind="additive")), "nothing can be added to a score"),
        (replace(site, mask=replace(site.mask, causal=False)), "causal attention"),
        (replace(site, rope=narrow), "at least 16 numbers a token that turn"),
    ):
        refusal = paged_site(other)
        assert isinstance(refusal, Refusal) and told in str(refusal)


def read_elsewhere(model: ir.Model, name: str, shape: dict[str, int]) -> None:
    """Let the first output depend on the shape of an input."""
    source = next(value for value in model.graph.inputs if value.name == name)
    node = ir.node("Shape", [source], attributes=shape, name="reader")
    one = ir.node("ReduceMin", [node.outputs[0]], attributes={"keepdims": 0})
    cast = ir.node("CastLike", [one.outputs[0], model.graph.outputs[0]])
    total = ir.node("Add", [model.graph.outputs[0], cast.outputs[0]])
    for made in (node, one, cast, total):
        model.graph.append(made)
    total.outputs[0].shape, total.outputs[0].type = model.graph.outputs[0].shape, model.graph.outputs[0].type
    model.graph.outputs[0] = total.outputs[0]


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("past_key_values.0.key", {}, "'reader' reads how many rows the caches hold"),
        ("past_key_values.0.value", {"start": -2}, "'reader' reads how many rows the caches hold"),
        ("attention_mask", {}, "'reader' still reads 'attention_mask'"),
    ],
)
def test_what_else_depends_on_the_caches_is_refused(name: str, shape: dict[str, int], told: str) -> None:
    model = load_model(exported("llama", 18, "float16"))
    read_elsewhere(model, name, shape)
    config, known = MlaConfig(**PAGED), lowered("llama", "float16", budget=0.5).calibration
    with pytest.raises(MlaPassError, match=told):
        mla_pass.convert(model, config, calibration=known)


def test_sizes_that_packed_tokens_have_may_be_read() -> None:
    model = load_model(exported("llama", 18, "float16"))
    read_elsewhere(model, "past_key_values.0.key", {"start": 0, "end": 2})
    known = lowered("llama", "float16", budget=0.5)
    result = mla_pass.convert(model, MlaConfig(**PAGED), calibration=known.calibration)
    got = Server(result.model).step({0: prompts()[0]})
    want = Server(known.model).step({0: prompts()[0]})
    np.testing.assert_allclose(got[0] - want[0], 1, atol=0.02)  # one of [batch 1, heads 2]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", ids())
    source = str(exported("llama", 18, "float16"))
    options = ["--target", "ort-latent", "--calibrate", str(tmp_path / "ids.npy"), "--calibrate-tokens", "512"]
    options += ["--metric", "output", "--calibrate-self", "0"]
    assert cli.main(["convert", source, str(tmp_path / "out"), *options]) == 0
    assert "PagedAttention for CUDA alone" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "mla_pass.json").read_text())
    assert record["config"]["rope_mode"] == "extend" and "interface" in record
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", source, str(tmp_path / "other"), *options, "--bundle"])
    assert stop.value.code == 2 and "goes without --bundle" in capsys.readouterr().err
