"""Cutting a few values' computation out of an ONNX graph and running it alone.

A cut computes in float32 what the graph computes in float16 or bfloat16: weights keep their exact values, and what the
block computes is judged to float32 rounding, also where a runtime lacks bfloat16 on this machine. Weights become
inputs of the cut, read when it runs and dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import onnx
import onnx_ir as ir

from mla_pass.errors import MlaPassError
from mla_pass.view import EvaluationError

_HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "softmax_precision"}
_INLINE = 64
"""Constants of at most this many numbers stay inside the cut: they are shapes, axes and scalars."""


@dataclass(frozen=True)
class Cut:
    """A small model: `given` and `open` are values of the whole graph, `weights` its constants, all inputs here."""

    model: ir.Model
    given: tuple[ir.Value, ...]
    open: tuple[ir.Value, ...]
    weights: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]

    def proto(self) -> onnx.ModelProto:
        """The cut as an ONNX model."""
        return ir.to_proto(self.model)

    def feeds(self, values: Mapping[ir.Value, np.ndarray]) -> dict[str, np.ndarray]:
        """Names and arrays of every input: the caller's for the values, the graph's own for the weights."""
        missing = [value.name for value in (*self.given, *self.open) if value not in values]
        if missing:
            raise EvaluationError(f"it also depends on the graph inputs {', '.join(map(str, missing))}")
        fed = {str(value.name): _promoted(values[value]) for value in (*self.given, *self.open)}
        return fed | {str(value.name): _promoted(constant_array(value)) for value in self.weights}


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant node, unread; None for any other value."""
    if value.producer() is None:
        return None if value.is_graph_input() else value.const_value
    return ir.convenience.get_const_tensor(value) if value.producer().op_type == "Constant" else None  # type: ignore[union-attr]


def constant_array(value: ir.Value) -> np.ndarray:
    """Reads an initializer or Constant node. Raises EvaluationError when its data cannot be read."""
    tensor = constant_tensor(value)
    if tensor is None:
        raise EvaluationError(f"{value.name!r} has no data")
    try:
        return tensor.numpy()
    except (OSError, ValueError, TypeError) as error:
        raise EvaluationError(f"the data of {value.name!r} cannot be read ({error})") from error


def cut(
    outputs: Sequence[ir.Value],
    given: Sequence[ir.Value],
    opsets: Mapping[str, int],
    *,
    widen: bool = True,
    dtypes: Mapping[ir.Value, str] | None = None,
) -> Cut:
    """Cuts out the nodes between `given` and `outputs`; graph inputs met on the way become `Cut.open`.

    `widen` computes half precision in float32; `dtypes` are the element types of `given` where the graph
    tells none. Raises EvaluationError when a node on the way has a body (If, Loop).
    """
    widened = _widened if widen else lambda dtype: dtype
    promoted = _promoted if widen else lambda array: array
    nodes = _between(outputs, given)
    copies: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    inline: list[ir.Value] = []
    opened: list[ir.Value] = []
    weights: list[ir.Value] = []

    def copy(value: ir.Value) -> ir.Value:
        if value in copies:
            return copies[value]
        tensor = constant_tensor(value) if value not in given else None
        if tensor is not None and tensor.size <= _INLINE and tensor.dtype != ir.DataType.STRING:
            array = promoted(constant_array(value))
            made = ir.Value(name=value.name, const_value=ir.tensor(array, name=value.name))
            made.dtype, made.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
            inline.append(made)
        else:
            dtype = tensor.dtype if tensor is not None else value.dtype
            if dtype is None and dtypes and dtypes.get(value):
                dtype = ir.DataType.from_numpy(np.dtype(dtypes[value]))
            made = ir.Value(name=value.name, type=ir.TensorType(widened(dtype or ir.DataType.FLOAT)))
            shape = tensor.shape if tensor is not None else value.shape
            made.shape = None if shape is None else ir.Shape([n if isinstance(n, int) else None for n in shape])
            inputs.append(made)
            if tensor is not None:
                weights.append(value)
            elif value not in given:
                opened.append(value)
        copies[value] = made
        return made

    for value in given:
        copy(value)
    made_nodes = []
    for node in nodes:
        operands = [None if operand is None else copy(operand) for operand in node.inputs]
        made_node = ir.Node(
            node.domain, node.op_type, operands,
            [_widened_attribute(a) if widen else a for a in node.attributes.values()],
            overload=node.overload, num_outputs=len(node.outputs), name=node.name,
        )  # fmt: skip
        for old, new in zip(node.outputs, made_node.outputs, strict=True):
            new.name = old.name
            copies.setdefault(old, new)
        made_nodes.append(made_node)
    results = [copies[value] if value in copies else copy(value) for value in outputs]
    for value, made in zip(outputs, results, strict=True):
        if made.dtype is None and value.dtype is not None:
            made.dtype = widened(value.dtype)
    graph = ir.Graph(inputs, results, nodes=made_nodes, initializers=inline, opset_imports=dict(opsets), name="cut")
    return Cut(ir.Model(graph, ir_version=10), tuple(given), tuple(opened), tuple(weights), tuple(outputs))


def inferred(graph: ir.Graph, opsets: Mapping[str, int]) -> dict[ir.Value, tuple[tuple[int | None, ...] | None, str]]:
    """Shapes and element types of all values, as ONNX infers them. Weights are not read. Empty if it cannot."""
    try:
        proto = cut(graph.outputs, (), opsets, widen=False).proto()
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (EvaluationError, onnx.shape_inference.InferenceError):
        return {}
    found: dict[str, tuple[tuple[int | None, ...] | None, str]] = {}
    for info in (*proto.graph.value_info, *proto.graph.output):
        tensor = info.type.tensor_type
        sizes = tuple(n.dim_value if n.HasField("dim_value") else None for n in tensor.shape.dim)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name if tensor.elem_type else ""
        found[info.name] = (sizes if tensor.HasField("shape") else None, dtype)
    return {value: found[value.name] for node in graph for value in node.outputs if value.name in found}


def run_reference(piece: Cut, values: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray]:
    """Runs a cut in the ONNX reference evaluator. Raises EvaluationError."""
    from onnx.reference import ReferenceEvaluator

    feeds = piece.feeds(values)
    try:
        with np.errstate(all="ignore"):
            return [np.asarray(array) for array in ReferenceEvaluator(piece.proto()).run(None, feeds)]
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError) as error:
        raise EvaluationError(_first_line(error)) from error


def _between(outputs: Sequence[ir.Value], given: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes needed for `outputs`, operands before users."""
    order: dict[ir.Node, None] = {}
    known = set(given)
    todo: list[tuple[ir.Value, bool]] = [(value, False) for value in outputs]
    while todo:
        value, ready = todo.pop()
        node = value.producer()
        if node is None or node in order or value in known or constant_tensor(value) is not None:
            continue
        if ready:
            order[node] = None
            continue
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise EvaluationError(f"node {node.name!r} ({node.op_type}) has a body of its own")
        todo.append((value, True))
        todo.extend((operand, False) for operand in node.inputs if operand is not None)
    return list(order)


def _widened(dtype: ir.DataType) -> ir.DataType:
    return ir.DataType.FLOAT if dtype in _HALF else dtype


def _promoted(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def _widened_attribute(attribute: ir.Attr) -> ir.Attr:
    value: Any = attribute.value
    if (
        attribute.type == ir.AttributeType.INT
        and attribute.name in _TYPE_ATTRIBUTES
        and value in {int(t) for t in _HALF}
    ):
        return ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    if attribute.type == ir.AttributeType.TENSOR and value.dtype in _HALF:
        return ir.AttrTensor(attribute.name, ir.tensor(value.numpy().astype(np.float32)))
    return attribute


class RuntimeCut:
    """A cut opened once in ONNX Runtime, to be run with several inputs."""

    def __init__(self, piece: Cut) -> None:
        """Raises MlaPassError without ONNX Runtime, EvaluationError when it cannot run the cut."""
        try:
            import onnxruntime as ort
            from onnxruntime.capi import onnxruntime_pybind11_state as state
        except ImportError as error:
            raise MlaPassError("checking a model needs ONNX Runtime: pip install 'mla-pass[cpu]'") from error
        self.piece = piece
        self.needs = piece.open
        names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
        self._errors = tuple(getattr(state, name) for name in names)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            serialized = piece.proto().SerializeToString()
            self._session = ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise EvaluationError(_first_line(error)) from error

    def run(self, values: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray]:
        """The cut's outputs. Raises EvaluationError."""
        feeds = self.piece.feeds(values)
        try:
            return list(self._session.run(None, feeds))
        except (*self._errors, ValueError) as error:
            raise EvaluationError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
