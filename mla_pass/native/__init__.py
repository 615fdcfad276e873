"""The op library: LatentAttention as a fused kernel that ONNX Runtime loads.

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(mla_pass.native.library_path())
    session = onnxruntime.InferenceSession("latent/model.onnx", options)

A model carries the operator as a function of stock ONNX operators, too. With the library registered ONNX Runtime finds
a kernel and leaves the function alone; without it the function runs. `mla_pass.session` registers it where it is built.

Environment variables, read when a session or a `kernel.Layout` is made: ``MLA_PASS_ISA`` names the instruction set to
use in place of the best one (see :func:`instruction_sets`), ``MLA_PASS_FORM`` is ``absorbed`` or ``expanded`` to
compute every call in that form in place of the one that takes less arithmetic.

Where it was built with CUDA's compiler the library has kernels for CUDA, too, of float16 and bfloat16; they are loaded
through the machine's driver when they are first needed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import mla_pass
from mla_pass.errors import MlaPassError

_NAME = "libmla_pass.so"


def find_library() -> str | None:
    """Path of the op library, None when it is not built."""
    # An editable install keeps the package's sources in one folder and what was built in another.
    for folder in mla_pass.__path__:
        path = Path(folder, "lib", _NAME)
        if path.is_file():
            return str(path)
    return None


def library_path() -> str:
    """Path of the op library. Raises MlaPassError when it is not built."""
    path = find_library()
    if path is None:
        raise MlaPassError(
            f"the op library {_NAME} is not built; expected it in mla_pass/lib: install a C++ compiler (g++ or "
            "clang++) and install mla_pass again. Models run without it, on stock ONNX operators"
        )
    return path


def instruction_sets() -> tuple[str, ...]:
    """Names of the instruction sets that the library has kernels for and this processor runs, best first."""
    isa = _library().mla_pass_isa
    isa.restype, isa.argtypes = ctypes.c_char_p, [ctypes.c_size_t]
    names: list[str] = []
    while (name := isa(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def cuda_capabilities() -> tuple[str, ...]:
    """Compute capabilities, e.g. "8.0", that the library has CUDA kernels for; none where it was built without.

    Devices of others compile the kernels when they first load them, if they are of 8.0 or newer.
    """
    capabilities = _library().mla_pass_cuda_capabilities
    capabilities.restype, capabilities.argtypes = ctypes.c_char_p, []
    return tuple(filter(None, capabilities().decode().split(", ")))


@dataclass(frozen=True)
class CudaDriver:
    """The CUDA driver of this machine."""

    version: str
    """The newest CUDA that it serves, e.g. "13.0"."""
    devices: tuple[str, ...]
    """Names, by number."""


def cuda_driver() -> CudaDriver:
    """What driver and devices this machine has. Raises MlaPassError saying why where there is none that works."""
    library, message = _library(), ctypes.create_string_buffer(1024)
    count, version = ctypes.c_int32(), ctypes.c_int32()
    told = (message, ctypes.c_size_t(len(message)))

    def text() -> str:
        return message.value.decode(errors="replace").removeprefix("LatentAttention: ")

    if library.mla_pass_cuda_devices(ctypes.byref(count), ctypes.byref(version), *told):
        raise MlaPassError(text())
    names: list[str] = []
    for device in range(count.value):
        if library.mla_pass_cuda_device_name(ctypes.c_int32(device), *told):
            raise MlaPassError(text())
        names.append(text())
    return CudaDriver(f"{version.value // 1000}.{version.value % 1000 // 10}", tuple(names))


@dataclass(frozen=True)
class Counters:
    """What the library did in this process so far."""

    scratch_growths: int
    """How often working memory had to be asked for; a decoding step of a size seen before asks for none."""
    copied_bytes: int
    """Bytes of cache copied because a present was not bound to its past's own memory."""


def counters() -> Counters:
    """The library's counters."""
    library = _library()
    values = []
    for name in ("mla_pass_scratch_growths", "mla_pass_copied_bytes"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_uint64, []
        values.append(function())
    return Counters(*values)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(library_path())
