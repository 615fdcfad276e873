"""What nvcc makes of the CUDA kernels: registers, spills, memory of every kernel, and its instructions.

Needs no GPU. The compiler is that of CUDACXX or the PATH, else the one of the package nvidia-cuda-nvcc beside this
Python; the disassembler, which not every toolkit has, that of nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "mla_pass" / "native" / "cuda" / "kernels.cu"
FLAGS = ("-std=c++17", "-O3")
"""As kernels.cmake has them."""
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '\w+'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_FUNCTION = re.compile(r"^\s+Function : (\w+)$", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture."""

    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread's local memory."""
    spill_bytes: int
    """Stored to and loaded from it for want of registers."""
    shared_bytes: int
    """Of a CTA, beside what a launch asks for."""


def tool(name: str, variable: str = "") -> Path | None:
    """A program of the CUDA toolkit; None where there is none."""
    named = shutil.which(os.environ.get(variable, "")) or shutil.which(name)
    if named:
        return Path(named)
    packages = Path(sysconfig.get_paths()["purelib"])
    return next(iter(sorted(packages.glob(f"nvidia/*/bin/{name}"))), None)


def nvcc() -> Path | None:
    return tool("nvcc", "CUDACXX")


def compile_kernels(compiler: Path, architecture: int, cubin: Path, source: Path = SOURCE) -> dict[str, Resources]:
    """Machine code for sm_`architecture`, written to `cubin`; what each kernel takes, by name.

    Raises subprocess.CalledProcessError, with what the compiler said printed, where it fails.
    """
    target = ["-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command = [str(compiler), *FLAGS, *target, str(source), "-o", str(cubin)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        print(ran.stdout, ran.stderr, file=sys.stderr)
        ran.check_returncode()
    return resources_of(ran.stdout + ran.stderr)


def resources_of(said: str) -> dict[str, Resources]:
    """What ptxas -v said, kernel by kernel. Raises ValueError where it said less than all of it."""
    parts = _ENTRY.split(said)[1:]
    found: dict[str, Resources] = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        stack, used = _STACK.search(text), _USED.search(text)
        if stack is None or used is None:
            raise ValueError(f"ptxas does not tell registers and stack of {name}: {text.strip()!r}")
        shared = _SHARED.search(text)
        frame, stored, loaded = map(int, stack.groups())
        found[name] = Resources(int(used[1]), frame, stored + loaded, int(shared[1]) if shared else 0)
    return found


def instructions(disassembler: Path, cubin: Path) -> dict[str, Counter[str]]:
    """How often each kernel has each instruction, by opcode and modifiers, as `cuobjdump -sass` writes them."""
    environment = os.environ | {"PATH": f"{disassembler.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    said = subprocess.run(
        [str(disassembler), "-sass", str(cubin)], check=True, capture_output=True, text=True, env=environment
    ).stdout
    parts = _FUNCTION.split(said)[1:]
    return {name: Counter(_INSTRUCTION.findall(text)) for name, text in zip(parts[::2], parts[1::2], strict=True)}
