"""What nvcc makes of the CUDA kernels, held against what GPUs have. Nothing here runs on one."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from benchmarks import cuda_resources
from benchmarks.cuda_resources import Resources
from benchmarks.gpu_machines import MACHINES, Machine
from benchmarks.gpu_plan import MODELS, Shape, launches

ROOT = Path(__file__).parents[1]
NVCC, CUOBJDUMP = cuda_resources.nvcc(), cuda_resources.tool("cuobjdump")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
USUAL = (80,)
"""Those that are compiled in the ordinary run: a minute each."""
# CUDA C++ Programming Guide, table of technical specifications per compute capability.
REGISTERS_THREAD, REGISTERS_SM = 255, 65536
SHARED_CTA_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
RESIDENT, RESIDENT_WIDE = 512, 384
"""Threads on an SM by the launch bounds; of attend's kernels of 384 columns and more, which sum in more registers."""

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc: install a CUDA toolkit or nvidia-cuda-nvcc")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump: install nvidia-cuda-cuobjdump")
each_architecture = pytest.mark.parametrize(
    "architecture", [pytest.param(x, marks=[] if x in USUAL else [pytest.mark.slow]) for x in ARCHITECTURES]
)
Compiled = tuple[dict[str, Resources], Path]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Compiled]:
    """What the kernels take on an architecture, and their machine code; compiled once."""
    folder = tmp_path_factory.mktemp("cubins")

    @cache
    def of(architecture: int) -> Compiled:
        assert NVCC is not None
        cubin = folder / f"{architecture}.cubin"
        return cuda_resources.compile_kernels(NVCC, architecture, cubin), cubin

    return of


def threads(kernel: str) -> int:
    """Of a CTA, by kernels.def: eight a query row for attend."""
    if kernel.startswith("attend_"):
        return 8 * int(kernel.rsplit("_", 1)[1])
    return 256 if kernel == "carry" else 128


@needs_nvcc
@pytest.mark.timeout(900)
@each_architecture
class TestResources:
    @pytest.fixture
    def resources(self, compiled: Callable[[int], Compiled], architecture: int) -> dict[str, Resources]:
        return compiled(architecture)[0]

    def test_every_kernel_is_there(self, resources: dict[str, Resources]) -> None:
        attends = {
            f"attend_{kind}_{columns}_{rows}"
            for kind in ("f16", "bf16")
            for rows, widths in ((16, (128, 256, 384, 512)), (32, (128, 256, 384, 512)), (64, (128, 256)))
            for columns in widths
        }
        assert {name for name in resources if name.startswith("attend")} == attends
        others = {f"{name}_f16" for name in ("append", "map", "fix", "absorb", "expand", "combine", "decode")}
        assert {"setup", "carry"} | others <= resources.keys()

    def test_nothing_spills(self, resources: dict[str, Resources]) -> None:
        assert {name: r.spill_bytes for name, r in resources.items() if r.spill_bytes} == {}

    def test_attend_keeps_all_in_registers(self, resources: dict[str, Resources]) -> None:
        stacks = {name: r.stack_bytes for name, r in resources.items() if name.startswith("attend") and r.stack_bytes}
        assert stacks == {}

    def test_registers_allow_the_threads_of_a_cta(self, resources: dict[str, Resources]) -> None:
        for name, r in resources.items():
            wide = re.match(r"attend_b?f16_(384|512)_", name)
            warps = (RESIDENT_WIDE if wide else RESIDENT) // threads(name) * threads(name) // 32
            assert r.registers <= REGISTERS_THREAD and warps > 0
            # A warp gets registers by 256.
            assert warps * -(-r.registers * 32 // 256) * 256 <= REGISTERS_SM, name

    def test_shared_memory_is_what_a_launch_asks_for(self, resources: dict[str, Resources]) -> None:
        assert {name: r.shared_bytes for name, r in resources.items() if r.shared_bytes} == {}


RECOMMENDED = [
    Shape(model, rank, 4, 4096, order, finest)
    for model in MODELS
    for rank in range(128, 513, 64)
    for order, finest in ((0, 0), (0, 64), (1, 64), (1, 256))
]


class TestPlannedMemory:
    @pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
    def test_recommended_shapes_fit_every_gpu(self, machine: Machine) -> None:
        limit = SHARED_CTA_KB[machine.architecture] * 1024
        assert machine.shared_cta == limit
        for shape in RECOMMENDED:
            planned = launches(shape, machine)
            assert max(launch.shared_bytes for launch in planned) <= limit
            assert all(launch.work["direct"] for launch in planned if launch.kernel.startswith("attend"))


def uses(found: Counter[str], prefix: str, *parts: str) -> bool:
    return any(name.startswith(prefix) and all(part in name for part in parts) for name in found)


@pytest.fixture(scope="module")
def read(compiled: Callable[[int], Compiled]) -> Callable[[int], dict[str, Counter[str]]]:
    assert CUOBJDUMP is not None
    return cache(lambda architecture: cuda_resources.instructions(CUOBJDUMP, compiled(architecture)[1]))


@needs_nvcc
@needs_cuobjdump
@pytest.mark.timeout(900)
@each_architecture
class TestInstructions:
    @pytest.fixture
    def found(
        self, read: Callable[[int], dict[str, Counter[str]]], architecture: int
    ) -> dict[str, Counter[str]]:  # fmt: skip
        return read(architecture)

    def test_products_are_on_tensor_cores(self, found: dict[str, Counter[str]]) -> None:
        for name, counts in found.items():
            if not name.startswith(("attend", "map", "absorb", "expand", "decode")):
                continue
            bfloat = "bf16" in name
            assert uses(counts, "HMMA.16816.F32", *(["BF16"] if bfloat else [])), name
            assert bfloat or not uses(counts, "HMMA", "BF16"), name
            assert uses(counts, "LDSM", ".M88.4"), name

    def test_attend_loads_values_transposed(self, found: dict[str, Counter[str]]) -> None:
        assert all(uses(c, "LDSM", ".MT88.4") for name, c in found.items() if name.startswith("attend"))

    def test_attend_copies_past_the_registers_16_bytes_at_a_time(self, found: dict[str, Counter[str]]) -> None:
        attends = {name: c for name, c in found.items() if name.startswith("attend")}
        assert attends and all(uses(c, "LDGSTS", ".128") for c in attends.values())

    def test_attend_uses_no_local_memory(self, found: dict[str, Counter[str]]) -> None:
        assert not any(uses(c, "LDL") or uses(c, "STL") for name, c in found.items() if name.startswith("attend"))


@needs_nvcc
class TestPtx:
    """Where there is no disassembler, and for devices that compile it themselves."""

    @pytest.mark.slow
    def test_instructions(self, tmp_path: Path) -> None:
        ptx = tmp_path / "kernels.ptx"
        flags = [*cuda_resources.FLAGS, "-ptx", "-arch=compute_80"]
        subprocess.run([str(NVCC), *flags, str(cuda_resources.SOURCE), "-o", str(ptx)], check=True)
        text = ptx.read_text()
        assert ".target sm_80" in text
        parts = re.split(r"\.visible \.entry (\w+)\(", text)[1:]
        bodies = dict(zip(parts[::2], parts[1::2], strict=True))
        assert len(bodies) > 30
        for name, body in bodies.items():
            if name.startswith("attend"):
                kind = "bf16" if "bf16" in name else "f16"
                assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in body
                assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in body
                assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in body
                assert "cp.async.cg.shared.global" in body


@needs_nvcc
@pytest.mark.slow
def test_two_builds_give_the_same_fatbin(tmp_path: Path) -> None:
    """In folders of different names, at different times, by the project's own CMake files."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("the kernels are built by cmake and ninja")
    digests = []
    for folder in (tmp_path / "one", tmp_path / "another" / "deeper"):
        options = ["-G", "Ninja", "-DMLA_PASS_NATIVE=ON", "-DMLA_PASS_CUDA=ON", "-DMLA_PASS_CUDA_ARCHITECTURES=80"]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, capture_output=True)
        target = "mla_pass/native/kernels.fatbin"
        subprocess.run(["cmake", "--build", str(folder), "--target", target], check=True, capture_output=True)
        fatbin = (folder / target).read_bytes()
        assert fatbin[:4] == b"\x50\xed\x55\xba"
        digests.append(hashlib.sha256(fatbin).hexdigest())
    assert digests[0] == digests[1]


SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    56 bytes stack frame, 128 bytes spill stores, 196 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 56 bytes cumulative stack size, 4096 bytes smem, 1768 bytes cmem[0]
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 384 bytes cmem[0]
"""


class TestReading:
    def test_what_ptxas_says(self) -> None:
        assert cuda_resources.resources_of(SAID) == {"one": Resources(80, 56, 324, 4096), "two": Resources(32, 0, 0, 0)}

    def test_half_a_report_is_refused(self) -> None:
        with pytest.raises(ValueError, match="does not tell registers and stack of two"):
            cuda_resources.resources_of(SAID.replace("Used 32 registers", ""))
