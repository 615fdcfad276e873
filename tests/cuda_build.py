"""The CUDA kernels on this machine's memory: a library of the plan and the tests' shim, built once a session."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_pass.native import kernel
from mla_pass.native.kernel import Operand
from mla_pass.onnx.body import INPUTS

ROOT = Path(__file__).parents[1]
NATIVE, SHIM = ROOT / "mla_pass" / "native", ROOT / "tests" / "native" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="there is no C++ compiler to build the CUDA kernels' shim with"
)
PASTS = ("past_latent", "past_rope")
SHIM_SOURCES = (*sorted((SHIM / "shim").glob("*.cc")), SHIM / "host.cc")
PLAN_SOURCES = (
    *(NATIVE / "cuda" / f"{name}.cc" for name in ("launches", "parameters", "plan", "tiling")),
    NATIVE / "contract.cc",
)
FLAGS = (
    "-std=c++20",
    "-O2",
    "-march=native",
    "-fPIC",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Werror",
    f"-I{SHIM}",
    f"-I{NATIVE / 'cuda'}",
)


def build(
    folder: Path, output: str, sources: tuple[Path, ...], *, shared: bool = False, flags: tuple[str, ...] = ()
) -> Path:
    """Compile and link; objects that another target of this folder has, too, with equal `flags`, are made once."""
    assert COMPILER is not None

    def compiled(source: Path) -> Path:
        made = folder / "_".join((source.parent.name, source.stem, *(flag.strip("-") for flag in flags), ".o"))
        if not made.exists():
            subprocess.run([COMPILER, *FLAGS, *flags, "-c", str(source), "-o", str(made)], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    target = folder / output
    mode = ["-shared"] if shared else []
    subprocess.run([COMPILER, *mode, *map(str, objects), "-pthread", "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@dataclass(frozen=True)
class ShimDevice:
    """What a plan is made for, and how threads take turns. The default has little of everything: many launches."""

    form: str = "absorbed"
    """"absorbed", "expanded", or "" for the cheaper one."""
    exact: bool = True
    """Whether T counts as told by a shape where one tells it."""
    processors: int = 3
    shared_bytes: int = 163 * 1024
    cache_bytes: int = 1 << 20
    query_bytes: int = 1 << 28
    key_bytes: int = 1 << 28
    eager: bool = False
    """Copies to shared memory take place at once; otherwise not before they are waited for."""
    backward: bool = False
    """Of threads that can go on it is always the last that does."""


class _Device(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("cache_bytes", "query_bytes", "key_bytes")),
        *((name, ctypes.c_int32) for name in ("processors", "shared_bytes", "form", "exact", "eager", "backward")),
    )


class Operator:
    """LatentAttention as a CUDA device would compute it."""

    def __init__(self, path: Path) -> None:
        self._call = ctypes.CDLL(str(path)).mla_pass_test_operator
        self._call.restype = ctypes.c_int

    def __call__(
        self,
        attributes: dict[str, Any],
        feeds: dict[str, np.ndarray],
        device: ShimDevice,
        value_dim: int,
        *,
        apart: bool = False,
    ) -> list[np.ndarray]:
        """Context [B, S, H * value_dim] and both presents; a past that is a shared buffer is written in place, unless
        presents are to lie `apart`.

        Raises RuntimeError with what the plan refuses or a kernel does wrong.
        """
        given, message = kernel._Attributes(), ctypes.create_string_buffer(2048)
        lists = [kernel._fill(given, name, kind, attributes) for name, kind in kernel._FIELDS]
        batch, tokens, _ = feeds["query"].shape
        context = np.full((batch, tokens, attributes["num_heads"] * value_dim), np.nan, feeds["query"].dtype)
        outputs = [context, *(present(feeds[name], tokens, attributes, apart) for name in PASTS)]
        form = ("", "absorbed", "expanded").index(device.form)
        on = _Device(**{**vars(device), "form": form})
        operands = [operand(feeds[name]) if name in feeds else None for name in INPUTS]
        failed = self._call(
            ctypes.byref(given), kernel._packed(operands), kernel._packed([operand(x) for x in outputs]),
            ctypes.byref(on), message, len(message),
        )  # fmt: skip
        del lists
        if failed:
            raise RuntimeError(message.value.decode())
        return outputs


def present(past: np.ndarray, tokens: int, attributes: dict[str, Any], apart: bool) -> np.ndarray:
    """Where a present goes: the past itself where that is a shared buffer, otherwise memory of bytes 0xff."""
    shared = bool(attributes["shared_buffer"])
    if shared and not apart:
        return past
    shape = (*past.shape[:2], past.shape[2] + (0 if shared else tokens), past.shape[3])
    return np.full(int(np.prod(shape)) * past.itemsize, 0xFF, np.uint8).view(past.dtype).reshape(shape)


def operand(array: np.ndarray) -> Operand:
    return Operand(array.ctypes.data, array.dtype.name, array.shape)


@pytest.fixture(scope="session")
def operator(build_folder: Path) -> Operator:
    sources = (*SHIM_SOURCES, SHIM / "operator.cc", *PLAN_SOURCES)
    return Operator(build(build_folder, "liboperator.so", sources, shared=True))
