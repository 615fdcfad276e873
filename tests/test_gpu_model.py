"""The computed speeds: what kernels are said to do against what they do on the CPU, times against sums by hand."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_counts, gpu_model, gpu_plan
from benchmarks.cuda_resources import Resources
from benchmarks.gpu_counts import MMA, Attend, Load, expected, resident, rounds
from benchmarks.gpu_machines import (
    LAUNCH_SECONDS,
    MACHINES,
    MEMORY_LATENCY,
    MEMORY_SHARE,
    PORT_RATE,
    SHARED_RATE,
    Machine,
)
from benchmarks.gpu_plan import MODELS, Launch, Model, Shape, launches
from mla_pass.errors import MlaPassError
from mla_pass.native import kernel
from mla_pass.native.kernel import Operand
from mla_pass.onnx.body import INPUTS
from tests.cuda_build import COMPILER, PLAN_SOURCES, SHIM, needs_compiler

A100, L40S, H100 = MACHINES[:3]
SMALL = Machine("small", (8, 0), 4, 1e9, 1e12, 1 << 20, 4e12, 163 << 10, 164 << 10, 1024)

pytestmark = needs_compiler


# ---- what attend does


class _Counts(ctypes.Structure):
    _fields_ = (("products", ctypes.c_int64), ("matrices", ctypes.c_int64), ("copied_bytes", ctypes.c_int64))


Count = Callable[[Shape, Machine], tuple[int, int, int]]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Count:
    """counted(shape, machine): of all attends the warps' mma and ldmatrix instructions, and bytes of copies."""
    target = tmp_path_factory.mktemp("counted") / "libcounted.so"
    folders = [f"-I{folder}" for folder in (SHIM / "counted", SHIM, gpu_plan.NATIVE / "cuda")]
    sources = [SHIM / "counted" / "counted.cc", *sorted((SHIM / "shim").glob("*.cc")), *PLAN_SOURCES]
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([str(COMPILER), *flags, *folders, *map(str, sources), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))

    def count(shape: Shape, machine: Machine) -> tuple[int, int, int]:
        types = {"cos": np.float32, "sin": np.float32, "position_ids": np.int64, "total_length": np.int64}
        arrays = {name: np.zeros(dims, types.get(name, np.uint16)) for name, dims in shape.dims().items()}
        names = {np.uint16: "bfloat16", np.float32: "float32", np.int64: "int64"}
        operands = [
            Operand(arrays[n].ctypes.data, names[arrays[n].dtype.type], arrays[n].shape) if n in arrays else None
            for n in INPUTS
        ]
        given, attributes, message = kernel._Attributes(), shape.attributes(), ctypes.create_string_buffer(1024)
        lists = [kernel._fill(given, name, kind, attributes) for name, kind in kernel._FIELDS]
        device = gpu_plan._Device(machine.cache_bytes, *machine.capability, machine.processors, machine.shared_cta)
        found = _Counts()
        failed = library.mla_pass_test_counts(
            ctypes.byref(given), kernel._packed(operands), ctypes.byref(device), ctypes.byref(found), message,
            ctypes.c_size_t(len(message)),
        )  # fmt: skip
        del lists
        assert not failed, message.value.decode()
        return found.products // 32, found.matrices // 32, found.copied_bytes

    return count


TINY = Model("tiny", 8, 2, 32, 1e4)
COUNTED = {
    "plain": Shape(TINY, 128, 1, 512),
    "batch": Shape(TINY, 96, 3, 320),
    "more rows than a tile": Shape(Model("wide", 40, 40, 32, 1e4), 128, 1, 256),
    "bands": Shape(TINY, 128, 2, 640, 1, 64),
    "order 0": Shape(TINY, 160, 1, 512, 0, 128),
    "decoded": Shape(TINY, 128, 1, 512, 1, 16),
    "fewer key columns": Shape(TINY, 128, 1, 512, 1, 64, key_rank=80),
}


@pytest.mark.parametrize("machine", [SMALL, A100], ids=lambda machine: machine.name)
@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_the_kernel(name: str, machine: Machine, counted: Count) -> None:
    shape = COUNTED[name]
    attends = [Attend(x) for x in launches(shape, machine) if x.kernel.startswith("attend")]
    products, matrices, copied = counted(shape, machine)
    want_products = want_matrices = rows = queries = starts = 0.0
    for a in attends:
        across, problems, _ = a.launch.grid
        tiles = across * problems * (-(-a.end // a.tile) - a.begin // a.tile)
        want_products += tiles * a.multiply_adds() / MMA
        want_matrices += tiles * a.matrices()
        rows += across * problems * (a.end - a.begin) * a.row_bytes
        queries += tiles * a.tile_rows * 2 * a.orders * a.key_width * a.varying_share()
        starts += a.launch.ctas * a.tile_rows * 2 * (a.orders * a.key_width + a.fixed_width)
    assert products == want_products
    assert matrices == want_matrices
    # Beside rows and the queries of their blocks a CTA copies what it begins with.
    assert 0 < copied - rows <= queries + starts
    if any(a.blocks > 1 for a in attends):
        assert copied - rows >= 0.9 * queries


# ---- how long that takes


def test_ctas_on_an_sm() -> None:
    launch = Launch("attend_bf16_512_32", (1, 1, 1), 256, 100 << 10, {})
    for resources, machine, fit in (
        (Resources(128, 0, 0, 0), A100, 1),  # 101 KB of 164
        (Resources(128, 0, 0, 0), H100, 2),  # of 228; registers: 2
        (Resources(136, 0, 0, 0), H100, 1),  # 8 warps of 4352 registers: one of 65536
        (Resources(128, 0, 0, 20 << 10), H100, 1),
    ):
        assert resident(launch, resources, machine) == fit
    small = Launch("map_f16", (1, 1, 1), 128, 0, {})
    assert resident(small, Resources(32, 0, 0, 0), A100) == 16  # 64 warps
    assert resident(small, Resources(32, 0, 0, 0), L40S) == 12  # 48


@pytest.mark.parametrize(
    ("load", "resource", "seconds"),
    [
        # 10 CTAs on 4 SMs of 2 places: one full round of 8, and 2 more.
        (Load(1e6, 0, 0, 0, 0), "memory", (8 + 2) * 1e6 / (1e12 * MEMORY_SHARE)),
        (Load(0, 1e6, 0, 0, 0), "cache", 8 * 1e6 / (8 * PORT_RATE * 1e9) + 2 * 1e6 / (2 * PORT_RATE * 1e9)),
        (Load(0, 0, 128e3, 0, 0), "shared memory", (2 + 1) * 128e3 / SHARED_RATE / 1e9),
        (Load(0, 0, 0, 1024e3, 0), "tensor cores", (2 + 1) * 1e3 / 1e9),
        (Load(0, 0, 0, 0, 5000), "latency", 2 * 5000 / 1e9),
    ],
)
def test_rounds(load: Load, resource: str, seconds: float) -> None:
    taken = rounds(10, 3, load, 2, SMALL)
    assert set(taken) == {resource}
    assert taken[resource] == pytest.approx(3 * seconds)


def test_a_round_takes_as_long_as_its_scarcest_resource() -> None:
    # A full round waits for memory, the last CTA for its own way.
    taken = rounds(9, 1, Load(1e6, 0, 0, 0, 2000), 2, SMALL)
    assert taken == pytest.approx({"memory": 8e6 / (1e12 * MEMORY_SHARE), "latency": 2e-6})


def test_a_large_step_without_bands_is_bound_by_memory() -> None:
    found = gpu_counts.estimate(Shape(MODELS[0], 256, 64, 131072), H100, {})
    read = found.shape.cache_bytes / (H100.memory_rate * MEMORY_SHARE)
    assert found.time.bound() == "attend: memory"
    assert read < found.time.of("attend") < 1.3 * read
    assert found.call < found.attend <= MEMORY_SHARE


def test_a_small_step_is_bound_by_launches() -> None:
    found = gpu_counts.estimate(Shape(MODELS[3], 128, 1, 1024), H100, {})
    assert found.time.bound() == "launches"
    assert found.time.total > found.launches * LAUNCH_SECONDS


def test_more_than_the_cache_holds_goes_through_memory() -> None:
    def attend(blocks: int) -> Attend:
        work = {
            "rows": 32, "tile_rows": 32, "tile": 64, "stages": 2, "splits": 4, "begin": 0, "end": 64 * blocks,
            "block": 64, "blocks": blocks, "orders": 2, "key_width": 256, "key_rank": 256, "rope_width": 64,
            "fine_width": 0, "decoded": 0, "value_dim": 256, "sum_width": 256, "resume": 0, "has_mean": 1,
            "row_bytes": 640, "direct": 1, "columns": 320, "fixed_width": 64, "fine_column": 320,
        }  # fmt: skip
        return Attend(Launch("attend_bf16_256_32", (1, 1, 4), 256, 160000, work))

    few, many = attend(64), attend(4096)  # of 32 KB each
    loads = [a.load(gpu_counts.LAUNCH_BOUND, H100) for a in (few, many)]
    assert loads[0].memory == 64 * 640 and loads[1].memory == 64 * 640 + 32768
    assert loads[0].cache == loads[1].cache == 64 * 640 + 32768


def test_a_single_stage_waits_for_its_copies() -> None:
    (launch,) = (x for x in launches(Shape(MODELS[0], 256, 16, 8192), H100) if x.kernel.startswith("attend"))
    one, two = (Attend(Launch(**{**vars(launch), "work": {**launch.work, "stages": n}})) for n in (1, 2))
    copy = MEMORY_LATENCY + one.tile * one.row_bytes / PORT_RATE
    assert one.cycles(H100) - two.cycles(H100) == pytest.approx(min(copy, one.cycles(H100) - copy))


def test_other_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="expand_f16 is not counted"):
        expected([Launch("expand_f16", (1, 1, 1), 128, 0, {})], {}, H100)


def test_what_the_library_refuses_is_told() -> None:
    with pytest.raises(MlaPassError, match="values of 640 columns"):
        launches(Shape(MODELS[0], 640, 1, 4096), H100)


# ---- tables


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """What the command prints, without a compiler."""
    monkeypatch.setattr(gpu_model, "registers_of", lambda architecture: {})

    def run(options: str) -> str:
        gpu_model.main(options.split())
        return capsys.readouterr().out

    return run


SIZES = "--models SmolLM2-135M --ranks 128 --bands none 1/64 --batches 1 16 --rows 4096"


def test_the_table_of_one_gpu(said: Callable[[str], str]) -> None:
    text = said(f"{SIZES} --detail --machines L40S")
    assert "never measured" in text and text.count("| SmolLM2-135M | 128 + 64 |") == 4
    assert text.count("| order 1, 64 |") == 2 and text.count("    setup    launches") == 4
    assert "L40S: of 2 shapes of batch 16 and more attend reaches 80% of the bandwidth in" in text
    assert "FlashMLA on H800: 3000 GB/s, 90% of the data sheet's" in text


def test_the_table_of_several(said: Callable[[str], str]) -> None:
    text = said(f"{SIZES} --machines H200 B200")
    rows = [line for line in text.splitlines() if line.startswith("| SmolLM2-135M")]
    assert len(rows) == 4 and all(row.count(" / ") == 4 for row in rows)
    assert "| rows | H200 | B200 |" in text


def test_shares_and_gain() -> None:
    found = gpu_counts.estimate(Shape(MODELS[0], 256, 16, 8192), H100, {})
    read = 16 * 8192 * 640 / 3.35e12
    assert found.call == pytest.approx(read / found.time.total)
    assert found.attend == pytest.approx(read / found.time.of("attend"))
    assert found.gain == pytest.approx(found.call * 4096 / 640 / MEMORY_SHARE)


def test_registers_are_kept_until_a_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def compile_kernels(compiler: Path, architecture: int, cubin: Path) -> dict[str, Resources]:
        made.append(architecture)
        return {"map_f16": Resources(40, 0, 0, 0)}

    source = tmp_path / "kernels.cu"
    source.write_text("one")
    monkeypatch.setattr(gpu_model, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(gpu_model, "SOURCES", [source])
    monkeypatch.setattr(gpu_model.cuda_resources, "nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(gpu_model.cuda_resources, "compile_kernels", compile_kernels)
    for text, compiled in (("one", [80]), ("one", [80]), ("another", [80, 80])):
        source.write_text(text)
        assert gpu_model.registers_of(80) == {"map_f16": Resources(40, 0, 0, 0)}
        assert made == compiled
