"""The ONNX implementation of `mla_pass.view.View`. Handles are ``onnx_ir.Value``s."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mla_pass.onnx.cut import Cut, RuntimeCut, constant_array, constant_tensor, cut, inferred, run_reference
from mla_pass.site import Weight
from mla_pass.view import NEUTRAL, SMALL, Slice, follows_from_constants

_DEFAULTS: dict[tuple[str, str], Any] = {
    ("softmax", "axis"): -1, ("gather", "axis"): 0,
    ("rmsnorm", "axis"): -1, ("rmsnorm", "epsilon"): 1e-5,
    ("gemm", "alpha"): 1.0, ("gemm", "beta"): 1.0, ("gemm", "transA"): 0, ("gemm", "transB"): 0,
    ("attention", "softcap"): 0.0, ("attention", "is_causal"): 0,
}  # fmt: skip


def _name(dtype: ir.DataType) -> str:
    """numpy's name of an element type."""
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


class OnnxView:
    """Reads one graph of an ONNX model; `opsets` are the model's imports."""

    def __init__(self, graph: ir.Graph, opsets: Mapping[str, int], max_position: int | None = None) -> None:
        self.graph = graph
        self.opsets = dict(opsets)
        self.max_position = max_position
        self._cuts: dict[tuple[tuple[ir.Value, ...], frozenset[ir.Value]], Cut] = {}
        self._constant: dict[ir.Value, bool] = {}
        self._inferred: dict[ir.Value, tuple[tuple[int | None, ...] | None, str]] | None = None

    @classmethod
    def of(cls, model: ir.Model) -> OnnxView:
        """The view of a model's main graph."""
        told = model.metadata_props.get("mla_pass.max_position", "")
        return cls(model.graph, model.opset_imports, int(told) if told.isdigit() else None)

    def results(self) -> Iterator[ir.Value]:
        """See `View.results`."""
        return (value for node in self.graph for value in node.outputs)

    def op(self, value: ir.Value) -> str:
        """See `View.op`."""
        node = value.producer()
        if node is None:
            return "constant" if constant_tensor(value) is not None else "input"
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        neutral = NEUTRAL.get(name, name)
        first_only = neutral in ("attention", "identity")  # present_key is no attention result, a mask no identity
        return f"{name}#{value.index()}" if first_only and value.index() else neutral

    def inputs(self, value: ir.Value) -> list[ir.Value | None]:
        """See `View.inputs`."""
        node = value.producer()
        return [] if node is None else list(node.inputs)

    def attribute(self, value: ir.Value, name: str) -> Any:
        """See `View.attribute`."""
        node, op = value.producer(), self.op(value)
        if node is None:
            return None
        if name in ("slice", "shape"):
            return self._slice(value, node) if name == "slice" else self._target(node)
        if name in node.attributes:
            return node.attributes[name].value
        if name == "axes":  # an operand since opset 13 (18 for the reductions)
            axes = self._operand(node, 1)
            return None if axes is None else tuple(int(axis) for axis in axes.ravel())
        return _DEFAULTS.get((op, name))

    def settings(self, value: ir.Value) -> tuple[Any, ...]:
        """See `View.settings`."""
        node = value.producer()
        return (
            () if node is None else (value.index(), *sorted((a.name, str(a.value)) for a in node.attributes.values()))
        )

    def users(self, value: ir.Value) -> list[ir.Value]:
        """See `View.users`."""
        return [output for node in dict.fromkeys(use.node for use in value.uses()) for output in node.outputs]

    def siblings(self, value: ir.Value) -> list[ir.Value]:
        """See `View.siblings`."""
        node = value.producer()
        return [] if node is None else list(node.outputs)

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """See `View.constant`."""
        if not self.is_constant(value):
            return None
        tensor = constant_tensor(value)
        if tensor is not None:
            return constant_array(value) if tensor.size <= SMALL else None
        array = self.evaluate([value], {})[0]
        return array if array.size <= SMALL else None

    def is_constant(self, value: ir.Value) -> bool:
        """See `View.is_constant`."""

        def leaf(x: ir.Value) -> bool | None:
            constant = constant_tensor(x) is not None
            return constant if constant or not any(operand is not None for operand in self.inputs(x)) else None

        return follows_from_constants(self, value, self._constant, leaf)

    def weight(self, value: ir.Value) -> Weight:
        """See `View.weight`. Raises EvaluationError when neither the graph nor the data tells the shape."""
        tensor = constant_tensor(value)
        if tensor is not None:
            return Weight(
                tuple(tensor.shape.numpy()), _name(tensor.dtype),
                lambda: constant_array(value).astype(np.float64),
            )  # fmt: skip

        def compute() -> np.ndarray:
            return self.evaluate([value], {})[0].astype(np.float64)

        shape = self.shape(value)
        known = tuple(n for n in shape if n is not None) if shape is not None else ()
        if shape is None or len(known) != len(shape):
            known = compute().shape
        return Weight(known, self.dtype(value) or "float32", compute)

    def shape(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """See `View.shape`."""
        tensor = constant_tensor(value)
        declared = tensor.shape if tensor is not None else value.shape
        if declared is not None:
            return tuple(n if isinstance(n, int) else None for n in declared)
        return self._undeclared().get(value, (None, ""))[0]

    def dtype(self, value: ir.Value) -> str:
        """See `View.dtype`."""
        tensor = constant_tensor(value)
        declared = tensor.dtype if tensor is not None else value.dtype
        return self._undeclared().get(value, (None, ""))[1] if declared is None else _name(declared)

    def _undeclared(self) -> dict[ir.Value, tuple[tuple[int | None, ...] | None, str]]:
        """Shapes and element types that the graph leaves undeclared, as ONNX infers them; once, and without weights."""
        if self._inferred is None:
            self._inferred = {}
            if any(value.shape is None or value.dtype is None for value in self.results()):
                self._inferred = inferred(self.graph, self.opsets)
        return self._inferred

    def is_output(self, value: ir.Value) -> bool:
        """See `View.is_output`."""
        return value.is_graph_output()

    def name(self, value: ir.Value) -> str:
        """See `View.name`."""
        return value.name or ""

    def node(self, value: ir.Value) -> str:
        """See `View.node`."""
        node = value.producer()
        return f"input {value.name!r}" if node is None else f"{node.name or value.name!r} ({node.op_type})"

    def path(self, value: ir.Value) -> str:
        """See `View.path`: the torch exporter's scopes, else a node name such as /model/layers.0/self_attn/Softmax."""
        node = value.producer()
        if node is None:
            return ""
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        if re.fullmatch(r"\[('[^']*'(, )?)*\]", scopes):
            listed = ast.literal_eval(scopes)
            return listed[-2] if len(listed) > 1 else ""  # the last is the op itself
        return ".".join((node.name or "").strip("/").split("/")[:-1])

    def needs(self, outputs: Sequence[ir.Value], given: Sequence[ir.Value]) -> list[ir.Value]:
        """See `View.needs`."""
        return list(self._cut(outputs, given).open)

    def evaluate(self, outputs: Sequence[ir.Value], feeds: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray]:
        """See `View.evaluate`: runs in the ONNX reference evaluator."""
        return run_reference(self._cut(outputs, tuple(feeds)), feeds)

    def block(self, outputs: Sequence[ir.Value], given: Sequence[ir.Value]) -> RuntimeCut:
        """See `View.block`: runs in ONNX Runtime."""
        return RuntimeCut(cut(outputs, given, self.opsets, dtypes=self._dtypes(given)))

    def _cut(self, outputs: Sequence[ir.Value], given: Sequence[ir.Value]) -> Cut:
        key = (tuple(outputs), frozenset(given))
        if key not in self._cuts:
            self._cuts[key] = cut(outputs, given, self.opsets, dtypes=self._dtypes(given))
        return self._cuts[key]

    def _dtypes(self, given: Sequence[ir.Value]) -> dict[ir.Value, str]:
        return {value: self.dtype(value) for value in given if value.dtype is None}

    def _operand(self, node: ir.Node, index: int) -> np.ndarray | None:
        """A small constant operand."""
        operand = node.inputs[index] if index < len(node.inputs) else None
        return None if operand is None else self.constant(operand)

    def _slice(self, value: ir.Value, node: ir.Node) -> Slice | None:
        return self._part(value, node) if node.op_type == "Split" else self._range(node)

    def _range(self, node: ir.Node) -> Slice | None:
        starts, stops, axes, steps = (self._operand(node, i) for i in range(1, 5))
        if starts is None or stops is None or axes is None or starts.size != 1 or axes.size != 1:
            return None
        if len(node.inputs) > 4 and node.inputs[4] is not None and steps is None:
            return None
        axis, start, stop = (int(array.ravel()[0]) for array in (axes, starts, stops))
        return Slice(axis, start, stop, 1 if steps is None else int(steps.ravel()[0]))

    def _part(self, value: ir.Value, node: ir.Node) -> Slice | None:
        sizes = self._operand(node, 1)
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if sizes is None:
            shape = self.shape(node.inputs[0])  # type: ignore[arg-type]
            if shape is None or shape[axis] is None or len(node.inputs) > 1:
                return None
            each = -(-shape[axis] // len(node.outputs))  # type: ignore[operator]
            sizes = np.full(len(node.outputs), each)
        index = value.index() or 0
        return Slice(axis, int(sizes[:index].sum()), int(sizes[: index + 1].sum()), 1)

    def _target(self, node: ir.Node) -> tuple[int | None, ...] | None:
        """A Reshape's target sizes: a constant, or a Concat of constants and computed sizes."""
        target = node.inputs[1] if len(node.inputs) > 1 else None
        if target is None:
            return None
        known = self.constant(target)
        if known is None and self.op(target) != "concat":
            length = (self.shape(target) or (None,))[0]
            return None if length is None else (None,) * length
        parts: list[int | None] = []
        for operand in [target] if known is not None else self.inputs(target):
            array = self.constant(operand) if operand is not None else None
            if array is None:
                length = (self.shape(operand) or (None,))[0] if operand is not None else None
                if length is None:
                    return None
                parts += [None] * length
            else:
                parts += [int(n) if n > 0 else None for n in array.ravel()]
        return tuple(parts)


def bodies(model: ir.Model) -> Iterator[tuple[str, OnnxView]]:
    """Graphs inside the model other than the main one: functions, and branches and loops of the main graph."""
    for function in model.functions.values():
        yield function.name, OnnxView(function.graph, {**model.opset_imports, **function.opset_imports})
    for node in model.graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield node.name or node.op_type, OnnxView(attribute.as_graph(), model.opset_imports)
