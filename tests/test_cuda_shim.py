"""The shim that runs CUDA kernels on a CPU: that it computes what a GPU does, and finds what is wrong with a kernel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import cuda_resources
from tests.cuda_build import COMPILER, FLAGS, NATIVE, SHIM, build, needs_compiler
from tests.cuda_build import build_folder as build_folder  # a fixture

NVCC = cuda_resources.nvcc()
RUNTIME = tuple(sorted((SHIM / "shim").glob("*.cc")))
SANITIZED = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "races": ("-fsanitize=thread",),
    "ucontext": ("-DSHIM_UCONTEXT",),  # what other processors than x86-64 switch fibers with
}


def run(program: Path) -> str:
    done = subprocess.run([program], capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expect_all_found(said: str) -> None:
    cases = re.fullmatch(r"(\d+) cases, 0 failures\n", said)
    assert cases is not None and int(cases[1]) > 40


@needs_compiler
def test_numbers_and_fragments(build_folder: Path) -> None:
    assert run(build(build_folder, "test_shim", (*RUNTIME, SHIM / "test_shim.cc"))) == "0 failures\n"


@needs_compiler
def test_planted_faults_are_found(build_folder: Path) -> None:
    expect_all_found(run(build(build_folder, "faults", (*RUNTIME, SHIM / "faults.cc"))))


@needs_compiler
@pytest.mark.parametrize("how", ["address", "races", pytest.param("ucontext", marks=pytest.mark.slow)])
def test_planted_faults_are_found_otherwise(how: str, tmp_path: Path) -> None:
    assert COMPILER is not None
    flags = SANITIZED[how]
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    empty = tmp_path / "empty.cc"
    empty.write_text("int main() {}\n")
    if subprocess.run([COMPILER, *sanitizers, empty, "-o", tmp_path / "empty"], capture_output=True).returncode != 0:
        pytest.skip(f"the compiler cannot link with {' '.join(sanitizers)}")
    program = tmp_path / "faults"
    sources = (*RUNTIME, SHIM / "faults.cc")
    subprocess.run([COMPILER, *FLAGS, "-O1", "-g", *flags, *sources, "-o", program], check=True)
    expect_all_found(run(program))


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_names_become_the_instructions_they_stand_for(architecture: str, tmp_path: Path) -> None:
    assert NVCC is not None
    ptx = tmp_path / "names.ptx"
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-Werror", "all-warnings", f"-I{NATIVE / 'cuda'}", "-ptx"]
    subprocess.run([*command, SHIM / "names.cu", "-o", ptx], check=True)
    text = ptx.read_text()
    for instruction in (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 ",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 ",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 ",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 ",
        "cp.async.cg.shared.global ",
        "cp.async.commit_group;",
        "cp.async.wait_group 0;",
        "cp.async.wait_group 1;",
        "cvt.rn.f16.f32 ",
        "cvt.rn.f16x2.f32 ",
        "cvt.rn.bf16.f32 ",
        "cvt.rn.bf16x2.f32 ",
        "ex2.approx.ftz.f32 ",
        "bar.sync ",
        "bar.warp.sync ",
        "shfl.sync.bfly.b32 ",
        "shfl.sync.idx.b32 ",
    ):
        assert re.search(rf"(?m)\s{re.escape(instruction)}", text), instruction
