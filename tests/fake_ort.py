"""ONNX Runtime's C API as far as a custom operator meets it, over numpy arrays: for kernels that need a device.

The numbers of the table's slots are written down here once more, apart from mla_pass/native/ort_api.h; whatever else of
the table is called gives an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mla_pass.native.kernel import TYPES

_P, _I, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_OUT = ctypes.POINTER(ctypes.c_void_p)
_SLOTS = 300
STREAM, DEVICE = 0x5EA, 1


def _of_op(result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, _P, *arguments)


class CustomOp(ctypes.Structure):
    """OrtCustomOp of version 17."""

    _fields_ = (
        ("version", ctypes.c_uint32), ("CreateKernel", _P), ("GetName", _of_op(ctypes.c_char_p)),
        ("GetExecutionProviderType", _of_op(ctypes.c_char_p)), ("GetInputType", _of_op(_I, _S)),
        ("GetInputTypeCount", _of_op(_S)), ("GetOutputType", _of_op(_I, _S)), ("GetOutputTypeCount", _of_op(_S)),
        ("KernelCompute", _P), ("KernelDestroy", _of_op(None)), ("GetInputCharacteristic", _of_op(_I, _S)),
        ("GetOutputCharacteristic", _of_op(_I, _S)), ("GetInputMemoryType", _of_op(_I, _S)),
        ("GetVariadicInputMinArity", _P), ("GetVariadicInputHomogeneity", _P), ("GetVariadicOutputMinArity", _P),
        ("GetVariadicOutputHomogeneity", _P), ("CreateKernelV2", _of_op(_P, _P, _P, _OUT)),
        ("KernelComputeV2", _of_op(_P, _P)), ("InferOutputShapeFn", _P), ("GetStartVersion", _of_op(_I)),
        ("GetEndVersion", _of_op(_I)), ("later", _P * 4),
    )  # fmt: skip


class _Base(ctypes.Structure):
    _fields_ = (
        ("GetApi", ctypes.CFUNCTYPE(_P, ctypes.c_uint32)), ("GetVersionString", ctypes.CFUNCTYPE(ctypes.c_char_p)),
    )  # fmt: skip


class Failed(Exception):
    """A status that the library returned."""


@dataclass
class Runtime:
    """Attributes of the one node, its inputs (None: absent) and what `outputs` were made of it."""

    attributes: dict[str, Any]
    inputs: list[np.ndarray | None]
    version: int = 18
    in_place: dict[int, np.ndarray] = field(default_factory=dict)
    """Outputs that are bound to memory of ours."""
    outputs: dict[int, np.ndarray] = field(default_factory=dict)
    ops: list[CustomOp] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """What was asked of the stream and of the allocator, in order."""
    blocks: dict[int, np.ndarray] = field(default_factory=dict)
    """Scratch that was not given back."""

    def __post_init__(self) -> None:
        self._things: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._table = (_P * _SLOTS)()
        for number in range(_SLOTS):
            self._set(number, lambda number=number, *_: self._status(f"slot {number} is not for operators"), _P)
        self._fill()
        self._api = ctypes.cast(self._table, _P).value
        get_api = _Base._fields_[0][1](lambda version: self._api if version <= self.version else None)
        name = _Base._fields_[1][1](lambda: b"1.17.3")
        self._base = _Base(get_api, name)

    # ---- what a session does

    def register(self, library: ctypes.CDLL) -> None:
        """As register_custom_ops_library."""
        function = library.RegisterCustomOps
        function.argtypes, function.restype = [_P, ctypes.POINTER(_Base)], _P
        self._check(function(1, ctypes.byref(self._base)))

    def kernel(self, op: CustomOp) -> Kernel:
        """A kernel of the node. Raises Failed where it is refused."""
        made = _P()
        self._check(op.CreateKernelV2(ctypes.addressof(op), self._api, self._thing("info"), ctypes.byref(made)))
        return Kernel(self, op, made)

    def compute(self, op: CustomOp, kernel: _P) -> None:
        """One run of it."""
        self._check(op.KernelComputeV2(kernel, self._thing("context")))

    # ---- what the table's functions share

    def _thing(self, thing: Any) -> int:
        handle = 0x1000 + len(self._things)
        self._things[handle] = thing
        return handle

    def _status(self, message: str) -> int:
        return self._thing(message.encode())

    def _check(self, status: int | None) -> None:
        if status is not None:
            raise Failed(self._things.pop(status).decode())

    def _set(self, number: int, function: Callable[..., Any], result: Any, *arguments: Any) -> None:
        made = ctypes.CFUNCTYPE(result, *arguments)(function)
        self._kept.append(made)
        self._table[number] = ctypes.cast(made, _P).value

    def _slot(self, number: int, *arguments: Any) -> Callable[[Callable[..., Any]], None]:
        """A function that gives no status, as those do that succeed, or an error's text."""

        def add(function: Callable[..., Any]) -> None:
            def call(*given: Any) -> int | None:
                error = function(*given)
                return self._status(error) if error else None

            self._set(number, call, _P, *arguments)

        return add

    def _fill(self) -> None:
        things = self._things
        self._set(0, lambda code, text: self._thing(text), _P, _I, ctypes.c_char_p)
        self._set(2, lambda status: things[status], ctypes.c_char_p, _P)
        self._set(93, lambda status: things.pop(status), None, _P)
        self._slot(26, ctypes.c_char_p, _OUT)(lambda name, out: _give(out, self._thing(name)))
        self._slot(27, _P, ctypes.POINTER(CustomOp))(lambda domain, op: self.ops.append(op.contents))
        self._slot(28, _P, _P)(lambda options, domain: None)
        self._fill_attributes()
        self._fill_tensors()
        self._fill_device()

    def _fill_attributes(self) -> None:
        def scalar(info: int, name: bytes, out: Any) -> str | None:
            if name.decode() not in self.attributes:
                return f"no attribute {name.decode()}"
            out[0] = self.attributes[name.decode()]
            return None

        def values(info: int, name: bytes, out: Any, count: Any) -> None:
            given = self.attributes[name.decode()]
            for i, value in enumerate(given if out else ()):
                out[i] = value
            count[0] = len(given)

        size = ctypes.POINTER(_S)
        for number, kind in ((85, ctypes.c_float), (86, ctypes.c_int64)):
            self._slot(number, _P, ctypes.c_char_p, ctypes.POINTER(kind))(scalar)
        for number, kind in ((162, ctypes.c_float), (163, ctypes.c_int64)):
            self._slot(number, _P, ctypes.c_char_p, ctypes.POINTER(kind), size)(values)

    def _fill_tensors(self) -> None:
        things = self._things

        def output(context: int, index: int, dims: Any, count: int, out: Any) -> None:
            shape = tuple(dims[:count])
            given = (self.inputs[0], self.inputs[2], self.inputs[3])[index]
            assert given is not None
            made = self.in_place.get(index)
            if made is None:
                made = np.zeros(shape, given.dtype)
            assert made.shape == shape
            self.outputs[index] = made
            _give(out, self._thing(made))

        def fill_dims(shape: int, out: Any, count: int) -> None:
            for i, size in enumerate(things[shape].shape):
                out[i] = size

        def put(out: Any, value: int) -> None:
            out[0] = value

        size, ints = ctypes.POINTER(_S), ctypes.POINTER(ctypes.c_int64)
        self._slot(88, _P, size)(lambda context, out: put(out, len(self.inputs)))
        self._slot(90, _P, _S, _OUT)(lambda context, i, out: _give(out, self._value(self.inputs[i])))
        self._slot(91, _P, _S, ints, _S, _OUT)(output)
        self._slot(51, _P, _OUT)(lambda value, out: _give(out, things[value].ctypes.data))
        self._slot(65, _P, _OUT)(lambda value, out: _give(out, self._thing(things[value])))
        self._slot(60, _P, ctypes.POINTER(_I))(lambda shape, out: put(out, TYPES[things[shape].dtype.name]))
        self._slot(61, _P, size)(lambda shape, out: put(out, things[shape].ndim))
        self._slot(62, _P, ints, _S)(fill_dims)
        self._set(99, lambda shape: things.pop(shape), None, _P)

    def _value(self, array: np.ndarray | None) -> int | None:
        return None if array is None else self._thing(array)

    def _fill_device(self) -> None:
        things = self._things

        def scratch(context: int, memory: int, size: int, out: Any) -> str | None:
            assert things[memory] == "memory"
            if size > 1 << 32:
                return "out of memory"
            self.log.append("scratch")
            room = np.full(size + 256, 0xFF, np.uint8)
            at = -(-room.ctypes.data // 256) * 256
            self.blocks[at] = room
            _give(out, at)
            return None

        def free(allocator: int, block: int) -> None:
            assert things[allocator] == "allocator"
            self.log.append("free")
            del self.blocks[block]

        def allocator(context: int, memory: int, out: Any) -> None:
            assert things[memory] == "memory"
            self.log.append("allocator")
            _give(out, self._thing("allocator"))

        def release(allocator: int) -> None:
            assert things.pop(allocator) == "allocator"
            self.log.append("release")

        def stream(context: int, out: Any) -> None:
            self.log.append("stream")
            _give(out, STREAM)

        def device(memory: int, out: Any) -> None:
            assert things[memory] == "memory"
            out[0] = DEVICE

        self._slot(72, _P, ctypes.POINTER(_I))(device)
        self._slot(76, _P, _P)(free)
        self._set(132, release, None, _P)
        self._slot(193, _P, _OUT)(stream)
        self._slot(194, _P, _OUT)(lambda value, out: _give(out, self._thing("memory")))
        self._slot(253, _P, _P, _OUT)(allocator)
        self._slot(277, _P, _P, _S, _OUT)(scratch)


@dataclass
class Kernel:
    """A kernel that `runtime` made."""

    runtime: Runtime
    op: CustomOp
    handle: _P

    def compute(self) -> list[np.ndarray]:
        """Outputs of a run. Raises Failed where there are none."""
        self.runtime.compute(self.op, self.handle)
        return [self.runtime.outputs[i] for i in range(3)]

    def destroy(self) -> None:
        self.op.KernelDestroy(self.handle)


def _give(out: Any, handle: int | None) -> None:
    out[0] = handle
