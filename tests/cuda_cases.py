"""What children of tests/cuda_machine.py do with the op library; arguments and results are plain data."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from mla_pass import native
from mla_pass.errors import MlaPassError
from mla_pass.native.kernel import TYPES, Layout
from mla_pass.onnx.body import INPUTS
from tests.fake_ort import CustomOp, Failed, Runtime
from tests.native_cases import FLOAT32_ERROR, ROUNDING, Case, Drawn, check, environment, float32_isa
from tests.test_native_entry import Node, operand

SMALL: dict[str, Any] = {"dtype": "float16", "batch": 2, "past": 90, "blocks": (4, 16)}
_APART = 256


class DeviceNode(Node):
    """A node whose operands, in this machine's memory, are taken for a device's."""

    def scratch(self, size: int) -> int:
        """Address of so many bytes that are no numbers, at the alignment that is asked for."""
        self.room = np.full(size + _APART, 0xFF, np.uint8)
        return -(-self.room.ctypes.data // _APART) * _APART

    def queue(self, layout: Layout, device: int = 0, stream: int = 0) -> dict[str, int]:
        """One call; where the library was told that things lie."""
        size = layout.cuda_scratch(self.inputs(), device)
        scratch = self.scratch(size)
        layout.attend_cuda(
            self.inputs(), operand(self.context), device=device, stream=stream, scratch=scratch, scratch_bytes=size
        )
        addresses = {name: array.ctypes.data for name, array in self.feeds.items()}
        return addresses | {"context": self.context.ctypes.data, "scratch": scratch, "scratch_bytes": size}


def told(work: Callable[[], Any]) -> dict[str, Any]:
    """What `work` gives, or the error that it raises."""
    try:
        return {"value": work()}
    except MlaPassError as error:
        return {"error": str(error), "kind": type(error).__name__}


def one_call(case: dict[str, Any] | None = None, device: int = 0, stream: int = 0) -> dict[str, Any]:
    """One call of one node, or why there was none."""
    node = DeviceNode(Drawn(Case(**(SMALL | (case or {})))))
    return told(lambda: node.queue(Layout(node.attributes), device, stream))


def scratch_alone(case: dict[str, Any] | None = None, shapes: dict[str, list[int]] | None = None) -> dict[str, Any]:
    """The bytes a call would take, without a call; inputs are told to be of other `shapes` than they are."""
    node = DeviceNode(Drawn(Case(**(SMALL | (case or {})))))
    inputs = node.inputs()
    for name, shape in (shapes or {}).items():
        given = inputs[INPUTS.index(name)]
        assert given is not None
        inputs[INPUTS.index(name)] = given._replace(shape=tuple(shape))
    return told(lambda: Layout(node.attributes).cuda_scratch(inputs, 0))


def scratch_of_each(shapes: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """The same for each of several."""
    return [scratch_alone(shapes=given) for given in shapes]


def calls_on(devices: list[int]) -> int:
    """One call after the other."""
    node = DeviceNode(Drawn(Case(**SMALL)))
    layout = Layout(node.attributes)
    for device in devices:
        node.queue(layout, device)
    return len(devices)


def another_context() -> list[int]:
    """Calls in no context of the thread's own, in one that is not its device's primary, in one of another device."""
    driver = ctypes.CDLL("libcuda.so.1")
    node = DeviceNode(Drawn(Case(**SMALL)))
    layout = Layout(node.attributes)
    node.queue(layout, 1)
    driver.fake_cuda_enter(1)
    node.queue(layout, 1)
    current = []
    driver.fake_cuda_enter(0)
    for device in (1, 0):
        node.queue(layout, device)
        ordinal = ctypes.c_int()
        driver.cuCtxGetDevice(ctypes.byref(ordinal))
        current.append(ordinal.value - 10)
    return current


def many_threads(count: int) -> list[dict[str, Any]]:
    """Calls of as many threads at once, each on a stream of its own."""
    drawn = Drawn(Case(**SMALL))
    layout = Layout(DeviceNode(drawn).attributes)
    start = threading.Barrier(count)
    results: list[dict[str, Any]] = []

    def work(stream: int) -> None:
        node = DeviceNode(drawn)
        start.wait()
        results.append(told(lambda: node.queue(layout, 0, stream)))

    workers = [threading.Thread(target=work, args=(1000 + i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def twice() -> list[dict[str, Any]]:
    """The same call again, after whatever came of the first."""
    return [one_call(), one_call()]


def driver() -> dict[str, Any]:
    """The driver as the library sees it."""

    def found() -> dict[str, Any]:
        here = native.cuda_driver()
        return {"version": here.version, "devices": here.devices}

    return told(found)


def too_little_scratch() -> dict[str, Any]:
    """A call that is given less than it asked for."""
    node = DeviceNode(Drawn(Case(**SMALL)))
    layout = Layout(node.attributes)
    size = layout.cuda_scratch(node.inputs(), 0)
    at = node.scratch(size)
    return told(lambda: layout.attend_cuda(node.inputs(), operand(node.context), 0, 0, at, size - 1))


def misaligned() -> dict[str, Any]:
    """A query that lies between two numbers of 16 bytes."""
    node = DeviceNode(Drawn(Case(**SMALL)))
    layout, inputs = Layout(node.attributes), node.inputs()
    assert inputs[0] is not None
    inputs[0] = inputs[0]._replace(pointer=inputs[0].pointer + 2)
    size = layout.cuda_scratch(inputs, 0)
    return told(lambda: layout.attend_cuda(inputs, operand(node.context), 0, 0, node.scratch(size), size))


def numbers(case: dict[str, Any], form: str) -> float:
    """The kernels' context against the float64 reference; returns how far it is from the CPU kernel's at the most."""
    drawn = Drawn(Case(**case))
    with environment(float32_isa(), form):
        layout = Layout(Node(drawn).attributes)
    ours, theirs = DeviceNode(drawn), Node(drawn)
    ours.queue(layout)
    theirs.call(layout)
    # Probabilities are rounded to the model's type before they meet the values, and so are latent queries.
    check(drawn, ours.outputs(), 8 * ROUNDING[drawn.case.dtype] + FLOAT32_ERROR)
    for mine, cpu in zip(ours.outputs()[1:], theirs.outputs()[1:], strict=True):
        np.testing.assert_array_equal(mine.view(np.uint8), cpu.view(np.uint8))
    scale = max(np.abs(theirs.context.astype(np.float64)).max(), 1e-3)
    return float(np.abs(ours.context.astype(np.float64) - theirs.context.astype(np.float64)).max() / scale)


def contradiction(name: str, value: int) -> bool:
    """Whether the context is no number all over once `name` holds `value`."""
    node = DeviceNode(Drawn(Case(**SMALL)))
    node.feeds[name][:] = value
    node.queue(Layout(node.attributes))
    return bool(np.isnan(node.context.astype(np.float64)).all())


# ---- through ONNX Runtime's API, see tests/fake_ort.py


def _registered(drawn: Drawn, version: int = 18) -> tuple[Runtime, DeviceNode]:
    node = DeviceNode(drawn)
    runtime = Runtime(node.attributes, [node.feeds.get(name) for name in INPUTS], version)
    if drawn.case.shared:
        runtime.in_place = {1: node.feeds["past_latent"], 2: node.feeds["past_rope"]}
    runtime.register(ctypes.CDLL(native.library_path()))
    return runtime, node


def _op_for(runtime: Runtime, provider: bytes | None, types: list[int]) -> CustomOp:
    def fits(op: CustomOp) -> bool:
        at = ctypes.addressof(op)
        found = [op.GetInputType(at, index) for index in (0, 2, 3)]
        return op.GetExecutionProviderType(at) == provider and found == types

    (op,) = filter(fits, runtime.ops)
    return op


def operators() -> list[dict[str, Any]]:
    """All that the library registers."""
    runtime, _ = _registered(Drawn(Case(**SMALL)))
    described = []
    for op in runtime.ops:
        at = ctypes.addressof(op)
        provider = op.GetExecutionProviderType(at)
        described.append({
            "provider": provider and provider.decode(), "name": op.GetName(at).decode(),
            "types": [op.GetInputType(at, i) for i in (0, 2, 3)],
            "outputs": [op.GetOutputType(at, i) for i in range(op.GetOutputTypeCount(at))],
            "memory": [op.GetInputMemoryType(at, i) for i in range(op.GetInputTypeCount(at))],
        })  # fmt: skip
    return described


def run_by_runtime(case: dict[str, Any]) -> dict[str, Any]:
    """The node on a CUDA device; whether its outputs are the reference's, and what the runtime was asked for."""
    drawn = Drawn(Case(**case))
    runtime, _ = _registered(drawn)
    stored = [TYPES[{"float8": "uint8"}.get(name, name)] for name in drawn.case.stored]
    kernel = runtime.kernel(_op_for(runtime, b"CUDAExecutionProvider", [TYPES[drawn.case.dtype], *stored]))
    outputs = kernel.compute()
    kernel.destroy()
    check(drawn, outputs, 8 * ROUNDING[drawn.case.dtype] + FLOAT32_ERROR)
    return {"log": runtime.log, "left": len(runtime.blocks)}


def refused_by_runtime(changed: dict[str, Any], version: int = 18) -> dict[str, Any]:
    """What is said of a node with `changed` attributes, or by an ONNX Runtime of that API version."""
    runtime, _ = _registered(Drawn(Case(**SMALL)), version)
    runtime.attributes |= changed
    half = TYPES["float16"]
    try:
        runtime.kernel(_op_for(runtime, b"CUDAExecutionProvider", [half, half, half])).compute()
    except Failed as error:
        return {"error": str(error), "log": runtime.log, "left": len(runtime.blocks)}
    return {"log": runtime.log}
