"""The op library's kernel on memory of anybody's, without ONNX Runtime: what entry.h declares.

    layout = Layout(attributes)                      # by the names of mla_pass.onnx.body.ATTRIBUTES
    layout.attend(inputs, context, threads=4)        # in the order of mla_pass.onnx.body.INPUTS

    size = layout.cuda_scratch(inputs, device=0)     # the same in the memory of a CUDA device
    layout.attend_cuda(inputs, context, device=0, stream=0, scratch=address, scratch_bytes=size)

The cache is a shared buffer: new rows are written into the memory of past_latent and past_rope. The environment
variables of `mla_pass.native` are read when a Layout is made.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import weakref
from array import array
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from mla_pass.errors import MlaPassError, Unsupported
from mla_pass.native import library_path

INPUTS = 14
# ONNX's numbers. What the operator never takes is here for the library to name the input that has it.
TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11,
    "bfloat16": 16,
}  # fmt: skip
MOST_DIMS = 8
_MESSAGE = ctypes.c_char * 1024
_UNSUPPORTED = 2
"""What functions of CUDA return where there is no kernel for what they were given."""


class Operand(NamedTuple):
    """A contiguous row-major tensor in memory; whoever calls keeps it alive."""

    pointer: int
    dtype: str
    """By numpy's name; bfloat16, and uint8 for float8 rows, too."""
    shape: tuple[int, ...]


class Layout:
    """A node: its attributes, checked once, and all that follows from them. Any number of threads may share it."""

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        """Other names in `attributes` are left alone. Raises MlaPassError naming the attribute that is not right."""
        self._attributes = dict(attributes)
        given, message = _Attributes(), _MESSAGE()
        lists = [_fill(given, name, kind, attributes) for name, kind in _FIELDS]
        self._library = _library(library_path())
        self._handle = self._library.mla_pass_layout(ctypes.byref(given), message, len(message))
        del lists  # the library has copied them
        if self._handle is None:
            raise _refusal(message)
        # Not at exit: a thread may still be at work, and the process gives all back.
        weakref.finalize(self, self._library.mla_pass_layout_free, self._handle).atexit = False

    def __reduce__(self) -> tuple[type[Layout], tuple[dict[str, Any]]]:
        """A copy has a handle of its own."""
        return Layout, (self._attributes,)

    def attend(self, inputs: Sequence[Operand | None], context: Operand, threads: int) -> None:
        """Write the new rows and the context [B, S, H*V], on at most `threads` threads.

        `inputs` in the operator's order, None where one is absent; all that come after the last may be left out.
        Raises MlaPassError naming the input that is not as it should be; nothing is written then.
        """
        message = _MESSAGE()
        failed = self._library.mla_pass_attend(
            self._handle, _packed(inputs), _packed((context,)), threads, message, len(message)
        )
        if failed:
            raise _refusal(message)

    def cuda_scratch(self, inputs: Sequence[Operand | None], device: int) -> int:
        """Bytes of working memory that :meth:`attend_cuda` needs for inputs of these types and shapes.

        Raises Unsupported where no CUDA kernel takes them: the library was built without, there is no driver, or the
        device or a size is one they are not made for; MlaPassError naming the input that is not as it should be.
        """
        message, size = _MESSAGE(), ctypes.c_uint64()
        failed = _cuda(self._library).mla_pass_cuda_scratch(
            self._handle, _packed(inputs), device, ctypes.byref(size), message, len(message)
        )
        if failed:
            raise _refusal(message, failed)
        return size.value

    def attend_cuda(
        self,
        inputs: Sequence[Operand | None],
        context: Operand,
        device: int,
        stream: int,
        scratch: int,
        scratch_bytes: int,
    ) -> None:
        """As :meth:`attend`, with all operands in the memory of CUDA device number `device`, queued on its `stream`.

        `stream` is a CUstream (0: the default one), `scratch` the address, a multiple of 256, of `scratch_bytes` on
        the device, free again once the stream got there. The host reads none of it: total_length and positions may
        change between the replays of a captured graph, and where they are not right the context is NaN. Without a
        padding_mask an attention_bias may have columns behind the filled rows, too.
        Raises as :meth:`cuda_scratch`, and MlaPassError where the driver fails.
        """
        message = _MESSAGE()
        failed = _cuda(self._library).mla_pass_cuda_attend(
            self._handle, _packed(inputs), _packed((context,)), device, stream, scratch, scratch_bytes, message,
            len(message),
        )  # fmt: skip
        if failed:
            raise _refusal(message, failed)


# ---- what crosses the boundary


class _List(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Ints(_List):
    """std::int64_t, as array calls them."""

    code = "q"


class _Floats(_List):
    code = "f"


_FIELDS: tuple[tuple[str, type], ...] = (
    *((name, ctypes.c_int64) for name in (
        "num_heads", "kv_groups", "rank", "key_rank", "value_offset", "rope_dim", "nope_dim", "split",
        "local_window_size", "causal", "shared_buffer",
    )),
    *((name, _Ints) for name in ("rope_index", "band_index", "band_block")),
    *((name, _Floats) for name in ("band_a0", "band_a1")),
    *((name, ctypes.c_float) for name in ("scale", "softcap")),
)  # fmt: skip


class _Attributes(ctypes.Structure):
    _fields_ = _FIELDS


def _fill(to: _Attributes, name: str, kind: type, attributes: Mapping[str, Any]) -> array[Any] | None:
    """Set one attribute; returns the memory that it points to."""
    if name not in attributes:
        raise MlaPassError(f"LatentAttention: attribute {name} is absent; expected every attribute of the operator")
    value = attributes[name]
    try:
        if issubclass(kind, (_Ints, _Floats)):
            values = array(kind.code, value)
            setattr(to, name, kind(*values.buffer_info()))
            return values
        (number,) = array("q" if kind is ctypes.c_int64 else "f", (value,))
        setattr(to, name, number)
    except (TypeError, ValueError, OverflowError):
        wanted = {_Ints: "a list of ints", _Floats: "a list of floats", ctypes.c_int64: "an int"}.get(kind, "a float")
        raise MlaPassError(f"LatentAttention: attribute {name} is {value!r}; expected {wanted}") from None
    return None


def _packed(operands: Sequence[Operand | None]) -> bytes:
    """MlaPassTensor of each, and where they are inputs the absent ones behind them.

    Made anew for every call, which takes no longer than filling a structure that threads would have to share.
    """
    if len(operands) > INPUTS:
        raise MlaPassError(f"LatentAttention: {len(operands)} inputs; expected at most {INPUTS}")
    parts: list[bytes] = []
    for operand in operands:
        if operand is None:
            parts.append(_ABSENT)
            continue
        pointer, dtype, shape = operand
        parts += pointer.to_bytes(8, sys.byteorder), _described(dtype, shape)
    return b"".join(parts).ljust(INPUTS * _SIZE, b"\0")


@lru_cache(maxsize=4096)
def _described(dtype: str, shape: tuple[int, ...]) -> bytes:
    """An MlaPassTensor behind its data."""
    if dtype not in TYPES:
        raise MlaPassError(f"LatentAttention: a tensor is of type {dtype}; expected one of {', '.join(TYPES)}")
    dims = (*shape, *(0,) * MOST_DIMS)[:MOST_DIMS]
    return struct.pack(f"=ii{MOST_DIMS}q", TYPES[dtype], len(shape), *dims)


_SIZE = 8 + len(_described("float32", ()))
_ABSENT = bytes(_SIZE)


def _refusal(message: ctypes.Array[ctypes.c_char], code: int = 1) -> MlaPassError:
    return (Unsupported if code == _UNSUPPORTED else MlaPassError)(message.value.decode(errors="replace"))


_TOLD = (ctypes.c_char_p, ctypes.c_size_t)


def _other_version(path: str, error: AttributeError) -> MlaPassError:
    return MlaPassError(f"the op library {path} is of another version ({error}); install mla_pass again")


@cache
def _library(path: str) -> ctypes.CDLL:
    """The library with its functions declared; calls let other Python threads run."""
    library = ctypes.CDLL(path)
    try:
        make, free, attend = library.mla_pass_layout, library.mla_pass_layout_free, library.mla_pass_attend
    except AttributeError as error:
        raise _other_version(path, error) from None
    make.argtypes, make.restype = [ctypes.POINTER(_Attributes), *_TOLD], ctypes.c_void_p
    free.argtypes, free.restype = [ctypes.c_void_p], None
    # bytes go by their own address: nothing is copied.
    attend.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, *_TOLD]
    attend.restype = ctypes.c_int
    return library


@cache
def _cuda(library: ctypes.CDLL) -> ctypes.CDLL:
    """The same library with its functions of CUDA declared."""
    try:
        scratch, attend = library.mla_pass_cuda_scratch, library.mla_pass_cuda_attend
    except AttributeError as error:
        raise _other_version(library._name, error) from None
    scratch.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_uint64), *_TOLD,
    ]  # fmt: skip
    attend.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_uint64, *_TOLD,
    ]  # fmt: skip
    scratch.restype = attend.restype = ctypes.c_int
    return library
