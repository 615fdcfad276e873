"""The operator and whole converted models on ONNX Runtime's CUDA provider, against the reference and the CPU's kernel.

All of it needs a CUDA device: ``pytest -m gpu``, or ``make gpu-check``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import mla_pass
from mla_pass import MlaConfig, native
from mla_pass.onnx.session import CPU, CUDA, Decoder
from tests.families import VOCAB, exported
from tests.native_cases import (
    ROUNDING,
    Case,
    Drawn,
    check,
    environment,
    needs_library,
    open_model,
    replace,
    run_session,
)

pytestmark = [pytest.mark.gpu, needs_library]
HALVES = ("float16", "bfloat16")
ERROR = {dtype: 8 * ROUNDING[dtype] for dtype in HALVES}
"""Keys, weights and sums between products are rounded to 16 bits, too."""
DEVICE = 0

SIMPLE = Case(dtype="float16", past=200, rank=64, key_rank=64, rope_dim=16, padding=False)
CASES = {
    "one_token": SIMPLE,
    "batch_and_padding": replace(SIMPLE, batch=3, padding=True, hide_inside=True),
    "bands_of_blocks": replace(SIMPLE, past=700, blocks=(64, 64, 128, 256, 256), batch=2),
    "bands_of_rows": replace(SIMPLE, blocks=(1, 1, 16, 64, 128), new=3),
    "order_0": replace(SIMPLE, blocks=(16, 64, 64), order=0),
    "prompt": replace(SIMPLE, past=0, new=150, blocks=(16, 64)),
    "prompt_behind_rows": replace(SIMPLE, past=100, new=70, batch=2, padding=True),
    "window": replace(SIMPLE, window=70, new=3),
    "softcap": replace(SIMPLE, softcap=2.0),
    "bias": replace(SIMPLE, bias="bh", new=5, batch=2),
    "seven_heads_a_group": replace(SIMPLE, groups=4, per_group=7, rank=96, key_rank=80, value_offset=16),
    "odd_rank": replace(SIMPLE, rank=35, key_rank=33, value_offset=3, rope_dim=6),
    "no_maps": replace(SIMPLE, query_map=False, key_up=False, value_up=False),
    "growing": replace(SIMPLE, shared=False, new=2),
    "int8": replace(SIMPLE, latent="int8", rope="int8"),
    "float8": replace(SIMPLE, latent="float8"),
    "two_halves": replace(SIMPLE, cut=0.5),
    "long": replace(SIMPLE, past=9000, rank=512, key_rank=512, rope_dim=64, groups=2, per_group=8),
}


@pytest.fixture(scope="module", autouse=True)
def cuda_libraries() -> None:
    """Those of the Python environment, where the system has none."""
    ort.preload_dlls()


def gpu_session(model: onnx.ModelProto, form: str = "", **provider: str) -> ort.InferenceSession:
    """A session whose every node is on the device, or none."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(native.library_path())
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {"device_id": str(DEVICE), **provider}
    with environment(form=form):
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[(CUDA, settings)])
    assert session.get_providers()[0] == CUDA, "ONNX Runtime could not start on CUDA"
    return session


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_a_node_equals_the_reference_and_the_cpu(name: str, dtype: str, form: str) -> None:
    drawn = Drawn(replace(CASES[name], dtype=dtype))
    model, feeds = drawn.model(), drawn.feeds()
    outputs = run_session(gpu_session(model, form), feeds)
    check(drawn, outputs, ERROR[dtype])
    context, right = outputs[0].astype(np.float64), run_session(open_model(model), feeds)[0].astype(np.float64)
    np.testing.assert_allclose(context, right, rtol=0, atol=2 * ERROR[dtype] * max(np.abs(right).max(), 1e-3))


# ---- caches and graphs


class Bound:
    """A node of float16 with all inputs and outputs at addresses on the device that stay the same."""

    def __init__(
        self, session: ort.InferenceSession, feeds: Mapping[str, np.ndarray], context: tuple[int, ...]
    ) -> None:
        self.session = session
        self.values = {name: self.on_device(array) for name, array in feeds.items()}
        names = [output.name for output in session.get_outputs()]
        pasts = (self.values["past_latent"], self.values["past_rope"])
        self.context = self.on_device(np.zeros(context, np.float16))
        self.binding = session.io_binding()
        for given in session.get_inputs():
            self.binding.bind_ortvalue_input(given.name, self.values[given.name])
        for name, value in zip(names, (self.context, *pasts), strict=True):
            self.binding.bind_ortvalue_output(name, value)

    @staticmethod
    def on_device(array: np.ndarray) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.array(array, order="C"), "cuda", DEVICE)

    def run(self, **changed: np.ndarray) -> np.ndarray:
        """The context after some inputs got other numbers in their old memory."""
        for name, array in changed.items():
            self.values[name].update_inplace(np.ascontiguousarray(array))
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return self.context.numpy()


def bound(drawn: Drawn, **provider: str) -> Bound:
    c = drawn.case
    shape = (c.batch, c.new, c.heads * drawn.weights.value_up.shape[2])
    return Bound(gpu_session(drawn.model(), **provider), drawn.feeds(), shape)


def test_a_shared_cache_is_written_where_it_lies() -> None:
    drawn = Drawn(replace(CASES["bands_of_blocks"], spare=9))
    call = bound(drawn)
    pasts = [call.values[name] for name in ("past_latent", "past_rope")]
    before = [value.data_ptr() for value in pasts]
    context = call.run()
    assert [value.data_ptr() for value in call.binding.get_outputs()[1:]] == before
    check(drawn, [context, *(value.numpy() for value in pasts)], ERROR["float16"])


def step_of(drawn: Drawn, number: int) -> dict[str, Any]:
    """Another token, `number` rows further on."""
    c, rng = drawn.case, np.random.default_rng(number)
    feeds = drawn.feeds()
    return {
        "query": rng.standard_normal(feeds["query"].shape).astype(np.float16),
        "row": rng.standard_normal(feeds["row"].shape).astype(np.float16),
        "position_ids": feeds["position_ids"] + number,
        "total_length": np.array([c.total + number]),
    }


def longer_tables(drawn: Drawn, rows: int) -> dict[str, np.ndarray]:
    angle = np.outer(np.arange(rows), drawn.theta)
    return {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}


@pytest.mark.parametrize("name", ["one_token", "bands_of_blocks", "bands_of_rows", "window", "int8"])
def test_a_captured_step_is_replayed_while_the_cache_grows(name: str) -> None:
    steps = 70  # over the end of a block, and of a tile
    drawn = Drawn(replace(CASES[name], spare=steps, hide_inside=False))
    shape = (drawn.case.batch, drawn.case.new, drawn.case.heads * drawn.case.value_dim)
    feeds = drawn.feeds() | longer_tables(drawn, drawn.case.total + steps)
    there = Bound(gpu_session(drawn.model(), enable_cuda_graph="1"), feeds, shape)
    session = open_model(drawn.model())
    for number in range(steps):
        changed = step_of(drawn, number)
        found = there.run(**changed)
        right, *pasts = run_session(session, feeds | changed)
        feeds |= dict(zip(("past_latent", "past_rope"), pasts, strict=True))
        want = right.astype(np.float64)
        np.testing.assert_allclose(
            found.astype(np.float64), want, rtol=0, atol=2 * ERROR["float16"] * np.abs(want).max(), err_msg=str(number)
        )


def test_a_replay_past_the_end_of_the_buffer_is_no_number() -> None:
    drawn = Drawn(replace(SIMPLE, spare=4))
    call = bound(drawn, enable_cuda_graph="1")
    for _ in range(3):
        assert np.isfinite(call.run()).all()
    for total in (drawn.case.total + 5, 0, -1, 2**40):
        assert np.isnan(call.run(total_length=np.array([total]))).all()
    assert np.isfinite(call.run(total_length=np.array([drawn.case.total]))).all()


# ---- whole models


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    ids = folder / "ids.npy"
    np.save(ids, np.random.default_rng(7).integers(3, VOCAB, 2000))
    config = MlaConfig(
        budget=0.75, calibrate_tokens=512, calibrate_context=64, metric="output", metric_mix=0.1, finest_block=16
    )
    return mla_pass.convert(exported("llama", 18, "float16"), config, calibrate=ids).save(folder / "model")


def test_a_converted_model_decodes_as_on_the_cpu(converted: Path) -> None:
    here, there = mla_pass.session(converted, threads=1), mla_pass.session(converted, providers=[CUDA, CPU])
    assert there.fused and there.device == "cuda"
    tokens = np.random.default_rng(0).integers(3, VOCAB, (2, 90))
    logits = []
    for session in (here, there):
        decoder = Decoder(session, 2, 90)
        pieces = [decoder.forward(tokens[:, :70]), *(decoder.forward(tokens[:, i : i + 1]) for i in range(70, 90))]
        logits.append(np.concatenate(pieces, axis=1))
    # Of logits of size 1..10, as much as float16's eleven bits explain in either.
    assert np.abs(logits[0] - logits[1]).max() < 0.06 * np.abs(logits[0]).max()


def test_kernels_are_those_of_the_device(converted: Path) -> None:
    """No node computes attention on the CPU."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(native.library_path())
    options.enable_profiling = True
    session = ort.InferenceSession(str(converted / "model.onnx"), options, providers=[CUDA, CPU])
    decoder = Decoder(replace(mla_pass.session(converted, providers=[CUDA, CPU]), ort=session), 1, 8)
    decoder.forward(np.full((1, 8), 5))
    path = Path(session.end_profiling())
    events = [event["args"] for event in json.loads(path.read_text()) if event.get("cat") == "Node"]
    path.unlink()
    ran_on = {args.get("provider") for args in events if args.get("op_name") == "LatentAttention"}
    assert ran_on == {CUDA}
