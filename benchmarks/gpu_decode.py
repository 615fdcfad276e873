"""One decoding step of one layer on a CUDA device: the fused LatentAttention against attention over the full cache.

    python -m benchmarks.gpu_decode                                   # what `make gpu-check` runs
    python -m benchmarks.gpu_decode --models LLaMA-3-8B --ranks 256 512 --bands none 1/256 --batches 16 --rows 32768

For each shape (`gpu_plan.Shape`), all on the same number of cached rows in bfloat16 (float16 for ONNX Runtime):

    latent, torch   the operator that converted torch models call
    latent, ORT     the same kernels as ONNX Runtime's custom op, its cache bound in place
    GQA, SDPA       torch's scaled_dot_product_attention with enable_gqa over keys and values of the original
    GQA, ORT        ONNX Runtime's GroupQueryAttention, its caches bound in place
    FlashInfer, FlashMLA   latent attention of 512 + 64 numbers without bands, where they are installed

torch's calls are captured in CUDA graphs and replayed, ONNX Runtime's are queued one behind the other; either way a
time is the median over rounds of a round's time by its calls, with the calls taking turns. Before all, the device's
own ceilings are measured: bytes a second copied, multiply-adds a second of a large product. The column of percents is
the cache's bytes a second by the bytes a second copied. The table is markdown; --markdown writes it to a file, too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_model import add_shapes, bands_name, shapes_of
from benchmarks.gpu_plan import ROPE_DIM, Shape
from mla_pass import native
from mla_pass.native.kernel import Layout, Operand
from mla_pass.onnx.body import INPUTS

Call = Callable[[], Any]
HEADER = (
    "| model | latent + rope | bands | batch | rows | attention | us | cache GB/s | of copy | faster than SDPA |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True)
class Case:
    """A call, ready to run, and the bytes of cache that it has to read."""

    name: str
    call: Call
    cache_bytes: int
    captured: bool
    """Whether it may be captured in a CUDA graph of torch's."""


# ---- latent attention


def tensors_of(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """The operator's inputs by name; the last row is the new token's."""
    made: dict[str, Tensor] = {}
    for name, dims in shape.dims().items():
        if name in ("cos", "sin"):
            half = shape.model.size // 2
            theta = shape.model.theta ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = torch.outer(torch.arange(shape.rows, dtype=torch.float64), theta)
            made[name] = getattr(torch, name)(angle).float().to(device)
        elif name in ("position_ids", "total_length"):
            last = shape.rows - (name == "position_ids")
            made[name] = torch.full(dims, last, dtype=torch.int64, device=device)
        else:
            made[name] = 0.1 * torch.randn(dims, dtype=TYPES[shape.dtype], device=device)
    return made


def check_kernels(shape: Shape, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Raises mla_pass.errors.Unsupported where torch's own operators would compute in the kernels' place."""
    names = {kind: name for name, kind in TYPES.items()}
    operands = [
        Operand(x.data_ptr(), names[x.dtype], tuple(x.shape)) if (x := tensors.get(name)) is not None else None
        for name in INPUTS
    ]
    Layout(shape.attributes()).cuda_scratch(operands, device.index or 0)


def latent_torch(shape: Shape, device: torch.device) -> Case:
    from mla_pass.pytorch.operator import latent_attention

    tensors, attributes = tensors_of(shape, device), json.dumps(shape.attributes())
    if device.type == "cuda":
        check_kernels(shape, tensors, device)
    given = [
        tensors.get(name) for name in (*INPUTS[:8], "mask", "query_map", "key_up", "key_mean", "value_up")
    ]  # fmt: skip
    return Case("latent, torch", lambda: latent_attention(*given, attributes), shape.cache_bytes, True)


def latent_ort(shape: Shape, device: torch.device) -> Case:
    from onnx import TensorProto, helper

    attributes = shape.attributes()
    tensors = tensors_of(replace_dtype(shape), device)
    outputs = ["context", "latent", "rope"]
    given = [name if name in tensors else "" for name in INPUTS]
    node = helper.make_node("LatentAttention", given, outputs, domain="mla_pass")
    kinds = {"rope_index": 7, "band_index": 7, "band_block": 7, "band_a0": 6, "band_a1": 6}  # INTS, FLOATS
    for name, value in attributes.items():
        node.attribute.append(helper.make_attribute(name, value, attr_type=kinds.get(name)))
    shared = {"past_latent": "latent", "past_rope": "rope"}
    ranks = {"context": 3, "latent": 4, "rope": 4}
    call = bound_session(node, tensors, ranks, TensorProto.FLOAT16, shared, device)
    return Case("latent, ORT", call, shape.cache_bytes, False)


def replace_dtype(shape: Shape) -> Shape:
    """The same in float16: onnxruntime's Python side has no other 16-bit numbers of its own."""
    return Shape(**{**vars(shape), "dtype": "float16"})


# ---- attention over the full cache


def grouped_torch(shape: Shape, device: torch.device) -> Case:
    from torch.nn.functional import scaled_dot_product_attention

    model, dtype = shape.model, TYPES[shape.dtype]
    query = torch.randn(shape.batch, model.heads, 1, model.size, dtype=dtype, device=device)
    keys, values = (
        torch.randn(shape.batch, model.groups, shape.rows, model.size, dtype=dtype, device=device) for _ in range(2)
    )
    call = lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)  # noqa: E731
    return Case("GQA, SDPA", call, shape.full_bytes, True)


def grouped_ort(shape: Shape, device: torch.device) -> Case:
    from onnx import TensorProto, helper

    model, rows = shape.model, shape.rows
    half = {"dtype": torch.float16, "device": device}
    tensors = {
        "query": torch.randn(shape.batch, 1, model.heads * model.size, **half),
        "key": torch.randn(shape.batch, 1, model.groups * model.size, **half),
        "value": torch.randn(shape.batch, 1, model.groups * model.size, **half),
        "past_key": torch.randn(shape.batch, model.groups, rows, model.size, **half),
        "past_value": torch.randn(shape.batch, model.groups, rows, model.size, **half),
        "seqlens_k": torch.full((shape.batch,), rows - 1, dtype=torch.int32, device=device),
        "total": torch.full((1,), rows, dtype=torch.int32),  # read by the host
    }
    outputs = ["context", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", list(tensors), outputs, domain="com.microsoft", num_heads=model.heads,
        kv_num_heads=model.groups, scale=model.size**-0.5,
    )  # fmt: skip
    shared = {"past_key": "present_key", "past_value": "present_value"}
    ranks = {"context": 3, "present_key": 4, "present_value": 4}
    call = bound_session(node, tensors, ranks, TensorProto.FLOAT16, shared, device)
    return Case("GQA, ORT", call, shape.full_bytes, False)


# ---- ONNX Runtime


def bound_session(
    node: Any, tensors: dict[str, Tensor], ranks: dict[str, int], kind: int, shared: dict[str, str],
    device: torch.device,
) -> Call:  # fmt: skip
    """A call that queues one run of a one-node model on torch's memory and hands back its binding.

    `ranks` and `kind` are the outputs'; those in `shared`, by the name of an input, are written in its place.
    """
    import onnxruntime as ort
    from onnx import helper

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device.type]
    names = {torch.float16: 10, torch.float32: 1, torch.int64: 7, torch.int32: 6}  # ONNX's numbers
    inputs = [helper.make_tensor_value_info(name, names[x.dtype], x.shape) for name, x in tensors.items()]
    made = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, rank in ranks.items()]
    domains = [helper.make_opsetid(name, 1) for name in ("mla_pass", "com.microsoft")]
    graph = helper.make_graph([node], "decode", inputs, made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), *domains], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(native.library_path())
    if provider.startswith("CUDA"):
        ort.preload_dlls()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    if session.get_providers()[0] != provider:
        sys.exit(f"gpu_decode: ONNX Runtime could not start {provider}; it offers {session.get_providers()}")
    binding = session.io_binding()
    for name, x in tensors.items():
        where = (x.device.type, x.device.index or 0)
        binding.bind_input(name, *where, names[x.dtype], tuple(x.shape), x.data_ptr())
    for name in ranks:
        source = next((tensors[given] for given, output in shared.items() if output == name), None)
        if source is None:
            binding.bind_output(name, device.type, device.index or 0)
        else:
            where = (device.type, device.index or 0)
            binding.bind_output(name, *where, kind, tuple(source.shape), source.data_ptr())
    run = ort.RunOptions()
    run.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def call(held: dict[str, Tensor] = tensors) -> Any:  # the memory has to live as long as the call
        session.run_with_iobinding(binding, run)
        return binding

    return call


# ---- others' latent attention


def flashinfer(shape: Shape, device: torch.device) -> Case:
    wrapped = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper
    model, dtype, page = shape.model, TYPES[shape.dtype], 64
    pages = shape.rows // page
    counts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    wrapper = wrapped(torch.empty(128 << 20, dtype=torch.uint8, device=device), backend="auto")
    wrapper.plan(
        counts, counts * pages, torch.arange(shape.batch * pages, dtype=torch.int32, device=device),
        torch.full((shape.batch,), shape.rows, dtype=torch.int32, device=device), model.heads, shape.rank, ROPE_DIM,
        page, False, model.size**-0.5, dtype, dtype,
    )  # fmt: skip
    query, rope = (torch.randn(shape.batch, model.heads, n, dtype=dtype, device=device) for n in (shape.rank, ROPE_DIM))
    cache = [
        torch.randn(shape.batch * pages, page, n, dtype=dtype, device=device) for n in (shape.rank, ROPE_DIM)
    ]  # fmt: skip
    return Case("FlashInfer", lambda: wrapper.run(query, rope, *cache), shape.cache_bytes, True)


def flashmla(shape: Shape, device: torch.device) -> Case:
    package = importlib.import_module("flash_mla")
    model, dtype, page = shape.model, TYPES[shape.dtype], 64
    pages, width = shape.rows // page, shape.rank + ROPE_DIM
    lengths = torch.full((shape.batch,), shape.rows, dtype=torch.int32, device=device)
    plan, splits = package.get_mla_metadata(lengths, model.heads, 1)
    query = torch.randn(shape.batch, 1, model.heads, width, dtype=dtype, device=device)
    cache = torch.randn(shape.batch * pages, page, 1, width, dtype=dtype, device=device)
    table = torch.arange(shape.batch * pages, dtype=torch.int32, device=device).view(shape.batch, pages)
    call = lambda: package.flash_mla_with_kvcache(  # noqa: E731
        query, cache, table, lengths, shape.rank, plan, splits, model.size**-0.5, True
    )
    return Case("FlashMLA", call, shape.cache_bytes, True)


OURS = (latent_torch, latent_ort, grouped_torch, grouped_ort)
OTHERS = (("flashinfer", flashinfer), ("flash_mla", flashmla))


def cases_of(shape: Shape, device: torch.device) -> Iterator[Case]:
    for make in OURS:
        yield make(shape, device)
    if (shape.rank, shape.finest) == (512, 0):
        for package, make in OTHERS:
            if importlib.util.find_spec(package) is not None:
                yield make(shape, device)


# ---- times


def captured(call: Call) -> Call:
    """A replay of the call's CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()

    def replay(outputs: Any = held) -> None:  # whose memory is the graph's
        graph.replay()

    return replay


def seconds(call: Call, times: int) -> float:
    """Of a call, when `times` of them are queued."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    torch.cuda.synchronize()  # of all streams: ONNX Runtime's is its own
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def medians(calls: dict[str, Call], rounds: int, least: float = 0.02) -> dict[str, float]:
    """Seconds of each; a round of a call takes at least `least` of them, so that its beginning and end do not count."""
    times = {name: max(3, round(least / max(seconds(call, 3), 1e-6))) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call, times[name]))
    return {name: statistics.median(found) for name, found in taken.items()}


def copy_rate(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes a second, read and written."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, 9)["copy"]


def product_rate(device: torch.device, size: int = 8192) -> float:
    """Multiply-adds a second of a bfloat16 product."""
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return size**3 / medians({"product": lambda: left @ right}, 9)["product"]


# ---- the table


def lines(shape: Shape, cases: Sequence[Case], taken: dict[str, float], copied: float) -> list[str]:
    """A row of markdown for each case."""
    found = []
    for case in cases:
        s, rate = taken[case.name], case.cache_bytes / taken[case.name]
        cells = (
            shape.model.name, f"{shape.rank} + {ROPE_DIM}", bands_name(shape), shape.batch, shape.rows, case.name,
            f"{s * 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / copied:.0%}", f"{taken['GQA, SDPA'] / s:.2f}",
        )  # fmt: skip
        found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shapes(parser, models=["LLaMA-3-8B"], ranks=[128, 256, 512], bands=["none", "1/64"], batches=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("gpu_decode: torch finds no CUDA device; expected one")
    device = torch.device("cuda", 0)
    copied = copy_rate(device)
    said = [
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; it copies {copied / 1e9:.0f} GB/s and makes "
        f"{2 * product_rate(device) / 1e12:.0f} TFLOP/s of a large bfloat16 product.",
        "", HEADER,
    ]  # fmt: skip
    print("\n".join(said), flush=True)
    for shape in shapes_of(args):
        cases = list(cases_of(shape, device))
        calls = {case.name: captured(case.call) if case.captured else case.call for case in cases}
        rows = lines(shape, cases, medians(calls, args.rounds), copied)
        print("\n".join(rows), flush=True)
        said += rows
        del cases, calls
        torch.cuda.empty_cache()
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text("\n".join(said) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
