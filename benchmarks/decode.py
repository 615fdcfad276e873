"""Decoding one token: the fused LatentAttention against ONNX Runtime's GroupQueryAttention, in one run.

    python benchmarks/decode.py                       # every rank, S = 4096, one thread
    python benchmarks/decode.py --rows 4096 32768 --threads 1 2 --dtypes float32 float16 --stored same int8

H = 32 query heads, G = 8 kv heads of D = 128; latents of r numbers and 64 rope dims, stored in the model's type or in
fewer bits. Both attend over the same number of cached rows in a shared buffer bound in place, which lies as ONNX
Runtime lays it. "GQA by hand" is a loop over a float32 cache (`grouped.cc`) that reads it once: what a better
GroupQueryAttention could be. Times are medians; with one thread of the process's CPU time, which other programs on the
machine do not lengthen, with more of the wall clock. Beside them stand what this machine can do, measured here:
multiply-adds in registers, in turns with the calls, and reading memory. `--blocks 16 64 256 1024` adds rotary bands,
whose arithmetic is counted in: what they cost beyond it shows as fewer GFLOP/s than without them.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from mla_pass import MlaConfig, native
from mla_pass.fold.arithmetic import attention_flops
from mla_pass.fold.bands import Bands
from mla_pass.fold.staggered import stagger
from mla_pass.onnx.body import INPUTS
from mla_pass.storage import CODED, STORED, encoded, row_format

H, G, D, ROPE, NOPE = 32, 8, 128, 64, 64
STILL = Bands(*(np.zeros(0, int),) * 2, *(np.zeros(0),) * 2, np.zeros(0, int))
"""No bands."""
TYPES = {"float32": (TensorProto.FLOAT, np.float32), "float16": (TensorProto.FLOAT16, np.float16)}


def clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def bound_session(model: onnx.ModelProto, feeds: dict[str, np.ndarray], shared: dict[str, str], threads: int):
    """A call that runs the model once, caches (output name by input name) in place."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Threads that wait by spinning would take the cores from the calls that they take turns with.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(native.library_path())
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {i.name: own_value(feeds[i.name]) for i in session.get_inputs()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    outputs = {output: values[name] for name, output in shared.items()}
    for output in session.get_outputs():
        if output.name in outputs:
            binding.bind_ortvalue_output(output.name, outputs[output.name])
        else:
            binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def own_value(array: np.ndarray) -> ort.OrtValue:
    """A copy in memory that ONNX Runtime allocated: its vectors do not straddle cache lines, as numpy's may."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), kind, "cpu")
    ctypes.memmove(value.data_ptr(), np.ascontiguousarray(array).ctypes.data, array.nbytes)
    return value


def node_model(node: onnx.NodeProto, feeds: dict[str, np.ndarray], outputs: dict[str, tuple[int, int]]):
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in feeds.items()
    ]
    made = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in outputs.items()]
    graph = helper.make_graph([node], "decode", inputs, made)
    domains = [helper.make_opsetid(name, 1) for name in ("mla_pass", "com.microsoft")]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), *domains], ir_version=10)


def latent(rank: int, rows: int, dtype: str, stored: str, threads: int, bands: Bands = STILL) -> Callable[[], None]:
    """Absorbed latent attention; without bands the up-projections are folded away, as absorb='auto' does it."""
    kind, numpy = TYPES[dtype]
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.1 * rng.standard_normal(shape, dtype=np.float32)).astype(numpy)  # noqa: E731
    angle = np.outer(np.arange(rows), 1e4 ** (-np.arange(D // 2) / (D // 2))).astype(np.float32)
    turned = len(bands.index) > 0
    width = NOPE if turned else rank
    feeds = {
        "query": draw(1, 1, H * (width + ROPE)), "row": draw(1, 1, rank + ROPE),
        "cos": np.cos(angle), "sin": np.sin(angle),
        "position_ids": np.array([[rows - 1]]), "total_length": np.array([rows]),
    }  # fmt: skip
    if turned:
        _, key_up = stagger(rng.standard_normal((G, NOPE, rank)), len(bands.index))
        feeds |= {"key_up": (0.1 * key_up).astype(numpy), "key_mean": draw(G, NOPE)}
    row = row_format(dtype, MlaConfig(cache_dtype=stored))
    for name, numbers, as_stored in (("past_latent", rank, row.latent), ("past_rope", ROPE, row.rope)):
        past = draw(1, 1, rows, numbers)
        feeds[name] = encoded(past, as_stored) if as_stored in CODED else past.astype(STORED[as_stored])
    attributes = {
        "num_heads": H, "kv_groups": G, "rank": rank, "key_rank": rank, "value_offset": 0, "rope_dim": ROPE,
        "nope_dim": width, "split": rank, "rope_index": list(range(ROPE // 2)), "scale": D**-0.5, "softcap": 0.0,
        "local_window_size": -1, "causal": 1, "shared_buffer": 1,
    }  # fmt: skip
    given = [name if name in feeds else "" for name in INPUTS]
    outputs = ["context", "latent", "rope"]
    node = helper.make_node("LatentAttention", given, outputs, domain="mla_pass", **attributes)
    kinds = onnx.AttributeProto
    for name, values, list_type in [
        ("band_index", bands.index, kinds.INTS), ("band_block", bands.block, kinds.INTS),
        ("band_a0", bands.a0, kinds.FLOATS), ("band_a1", bands.a1, kinds.FLOATS),
    ]:  # fmt: skip
        node.attribute.append(helper.make_attribute(name, values.tolist(), attr_type=list_type))
    kinds_of = [helper.np_dtype_to_tensor_dtype(feeds[f"past_{name}"].dtype) for name in outputs[1:]]
    shapes = {"context": (kind, 3), "latent": (kinds_of[0], 4), "rope": (kinds_of[1], 4)}
    model = node_model(node, feeds, shapes)
    return bound_session(model, feeds, {"past_latent": "latent", "past_rope": "rope"}, threads)


def grouped(rows: int, dtype: str, threads: int) -> Callable[[], None]:
    """GroupQueryAttention of the original, its caches in a shared buffer."""
    kind, numpy = TYPES[dtype]
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.1 * rng.standard_normal(shape, dtype=np.float32)).astype(numpy)  # noqa: E731
    feeds = {
        "query": draw(1, 1, H * D), "key": draw(1, 1, G * D), "value": draw(1, 1, G * D),
        "past_key": draw(1, G, rows, D), "past_value": draw(1, G, rows, D),
        "seqlens_k": np.array([rows - 1], np.int32), "total": np.array([rows], np.int32),
    }  # fmt: skip
    node = helper.make_node(
        "GroupQueryAttention", list(feeds), ["context", "present_key", "present_value"], domain="com.microsoft",
        num_heads=H, kv_num_heads=G, scale=D**-0.5,
    )  # fmt: skip
    model = node_model(node, feeds, {"context": (kind, 3), "present_key": (kind, 4), "present_value": (kind, 4)})
    return bound_session(model, feeds, {"past_key": "present_key", "past_value": "present_value"}, threads)


def medians(
    calls: dict[str, Callable[[], None]], ceiling: Callable[[], float], threads: int, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """Seconds a call, the calls taking turns, and the multiply-adds a second that `ceiling` finds beside each."""
    now = clock(threads)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    most: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = now()
            call()
            taken[name].append(now() - start)
            most[name].append(ceiling())
    return tuple({name: statistics.median(found) for name, found in each.items()} for each in (taken, most))


def compiled(name: str, *flags: str) -> ctypes.CDLL:
    """A C++ file of this folder as a library for this very processor."""
    source = Path(__file__).with_name(name)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "compiled.so")
        command = ["c++", "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", *flags, source, "-o", library]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def ceilings() -> ctypes.CDLL:
    """Compiled loops that tell multiply-adds a second in registers and bytes a second read from memory, one thread."""
    loaded = compiled("ceilings.cc")
    for loop in (loaded.multiply_adds, loaded.pair_multiply_adds, loaded.bytes_read):
        loop.restype = ctypes.c_double
    return loaded


def by_hand(library: ctypes.CDLL, rows: int, threads: int) -> Callable[[], None]:
    """The loop over keys and values, held against numpy before it is timed."""
    rng = np.random.default_rng(0)
    query, keys, values = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((G, H // G, D), (G, rows, D), (G, rows, D))
    )
    context = np.empty_like(query)
    sizes = ctypes.c_long(G), ctypes.c_long(rows), ctypes.c_float(D**-0.5), ctypes.c_int(threads)

    def call() -> None:
        query_at, keys_at, values_at, context_at = (
            ctypes.c_void_p(x.ctypes.data) for x in (query, keys, values, context)
        )
        library.grouped_query(query_at, keys_at, values_at, *sizes, context_at)

    call()
    scores = query.astype(np.float64) @ keys.transpose(0, 2, 1) * D**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights @ values.astype(np.float64) / weights.sum(-1, keepdims=True)
    if np.abs(context - want).max() > 1e-5:
        sys.exit(f"decode: the loop by hand is off by {np.abs(context - want).max():.1e} and not worth a comparison")
    return call


def bands_of(blocks: Sequence[int]) -> Bands:
    """Order 1; the half of the pairs that is not cached rotated, evenly over blocks of these rows, finest first."""
    block = np.sort(np.resize(np.array(blocks, int), NOPE // 2))
    return Bands(np.arange(ROPE // 2, D // 2), block, np.ones(len(block)), 0.1 / block, np.zeros(0, int))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=["float32"])
    parser.add_argument(
        "--stored", nargs="+", choices=("same", "float16", "bfloat16", "int8", "float8"), default=["same"]
    )
    parser.add_argument(
        "--blocks", type=int, nargs="*", help="also with bands in blocks of these rows, whose products are counted"
    )
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(arguments)
    if any(rows % 64 for rows in args.rows):
        parser.error("--rows must be multiples of 64")
    os.environ["OMP_WAIT_POLICY"] = "passive"  # as above, for the loop by hand
    loops, hand = ceilings(), compiled("grouped.cc", "-ffast-math", "-fopenmp")
    isa = os.environ.get("MLA_PASS_ISA") or native.instruction_sets()[0]
    print(f"{platform.processor() or platform.machine()}, {isa}, onnxruntime {ort.__version__}")
    print(f"one thread reads {loops.bytes_read() / 1e9:.1f} GB/s from memory")
    pairs = loops.pair_multiply_adds() / loops.multiply_adds()
    print(f"its bfloat16 pairs do {pairs:.2f} times the multiply-adds of float32's FMA\n" if pairs else "")
    print("| rows | threads | type | attention | ms | faster than GQA | GFLOP/s | of FMA ceiling | cache GB/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rows, threads, dtype in itertools.product(args.rows, args.threads, args.dtypes):
        full = row_format(dtype, MlaConfig()).full_bytes(2 * G * D)
        cases = {"GQA": (grouped(rows, dtype, threads), 2 * D, full)}
        if dtype == "float32":
            cases["GQA by hand"] = by_hand(hand, rows, threads), 2 * D, full
        layouts = [None, args.blocks] if args.blocks else [None]
        for rank, stored, blocks in itertools.product(args.ranks, args.stored, layouts):
            bands = bands_of(blocks) if blocks else STILL
            name = f"r = {rank}" + ("" if stored == "same" else f", {stored}") + (", bands" if blocks else "")
            fmas = attention_flops(rank, rank, rank, ROPE, bands, H // G, G)
            size = row_format(dtype, MlaConfig(cache_dtype=stored)).bytes(rank, ROPE)
            cases[name] = latent(rank, rows, dtype, stored, threads, bands), fmas, size
        calls = {name: call for name, (call, _, _) in cases.items()}
        times, most = medians(calls, loops.multiply_adds, threads, args.repeats)
        for name, seconds in times.items():
            _, fmas, size = cases[name]
            speed = rows * H * fmas / seconds
            print(
                f"| {rows} | {threads} | {dtype} | {name} | {seconds * 1e3:.2f} | {times['GQA'] / seconds:.2f} | "
                f"{2 * speed / 1e9:.1f} | {speed / (most[name] * threads):.0%} | {rows * size / seconds / 1e9:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
