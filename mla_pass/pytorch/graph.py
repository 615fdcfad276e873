"""An ONNX graph as a differentiable torch function of token ids.

The nodes run one after the other, each as one torch function (see `mla_pass.pytorch.ops`), sizes and indices included:
they are small int64 tensors on the CPU. Everything that is a floating-point number in the graph, of whatever
precision, is one of a single type here, so that a gradient is that of the function, not of its rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mla_pass.errors import MlaPassError
from mla_pass.onnx.cut import constant_tensor
from mla_pass.onnx.emit import OLDEST_OPSET
from mla_pass.onnx.ports import graph_ports
from mla_pass.pytorch.ops import Attributes, Operator, operator
from mla_pass.storage import CODED

_TYPE_ATTRIBUTES = {"to", "dtype"}


@dataclass(frozen=True)
class Step:
    """One node, ready to run."""

    node: ir.Node
    function: Operator
    attributes: Attributes


@dataclass(frozen=True)
class Plan:
    """The steps that some values need, and after each step the values that nobody needs any more."""

    steps: tuple[Step, ...]
    dead: tuple[tuple[ir.Value, ...], ...]


class TorchGraph:
    """A model's main graph over an empty cache, differentiable in its weights and in any of its values."""

    def __init__(
        self, model: ir.Model, *, outputs: Sequence[ir.Value] | None = None, dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        """Keep what `outputs` (by default the graph's own) need of `model` and read its weights, once, as `dtype`.

        Weights lie on `device`, where token ids have to be given as well; sizes and indices stay on the CPU.
        The model is left as it is, and later changes to its weights are not seen here.
        Raises MlaPassError for an operator that torch does not compute here, for an opset before 18, and for a graph
        whose inputs and outputs are not those of a language model.
        """
        opset = model.graph.opset_imports.get("", 0)
        if opset < OLDEST_OPSET:
            raise MlaPassError(
                f"the model uses ai.onnx opset {opset}; the torch backend reads {OLDEST_OPSET} and newer: export the "
                "model again at that opset"
            )
        self.dtype, self.device = dtype, device
        self.cache, _, self.logits = graph_ports(model.graph)
        needed = _needed(model.graph, model.graph.outputs if outputs is None else outputs)
        operators = {node: operator(node) for node in needed}
        self.parameters: dict[str, Tensor] = {}
        """Floating-point weights by the names of their initializers. Train them in place, or put others there."""
        self._names: dict[ir.Value, str] = {}
        self._constants: dict[ir.Value, Tensor] = {}
        self._read(needed, (*model.graph.outputs, *(outputs or ())))
        self._inputs = tuple(model.graph.inputs)
        self._steps = tuple(Step(node, found, _attributes(node, dtype)) for node, found in operators.items())
        self._plans: dict[tuple[tuple[ir.Value, ...], frozenset[ir.Value]], Plan] = {}

    def run(
        self, ids: Tensor, *, wanted: Sequence[ir.Value], require_grad: Sequence[ir.Value] = (),
        given: Mapping[ir.Value, Tensor] | None = None,
    ) -> dict[ir.Value, Tensor]:  # fmt: skip
        """The values `wanted` and `require_grad` for token ids [B, S] (integers), all attended, at positions 0..S-1.

        Gradients are kept for trainable `parameters` and for the values in `require_grad`:
        ``torch.autograd.grad(loss, [result[v] for v in require_grad])`` is the gradient at these values, by all ways
        on which they enter the loss, through each other too. Values in `given` are taken as they are there, and what
        only they follow from is not computed.
        Raises MlaPassError when a value is not among what the graph was made to compute.
        """
        returned = tuple(dict.fromkeys((*wanted, *require_grad)))
        given = given or {}
        plan, marked = self._plan(returned, frozenset(given)), set(require_grad)
        values = {**self._feeds(ids), **given}

        def read(value: ir.Value) -> Tensor:
            if value in self._names:
                return self.parameters[self._names[value]]
            return values[value] if value in values else self._constants[value]

        for step, dead in zip(plan.steps, plan.dead, strict=True):
            operands = [None if value is None else read(value) for value in step.node.inputs]
            if self.device != "cpu":
                operands = together(step.node.op_type, operands)
            results = step.function(step.attributes, operands)
            results = (results,) if isinstance(results, Tensor) else results
            for value, result in zip(step.node.outputs, results, strict=False):
                # One that an earlier leaf reaches is left in the chain: cutting it would lose that leaf's gradient.
                if value in marked and not result.requires_grad:
                    result = result.detach().requires_grad_(True)
                values[value] = result
            for value in dead:
                values.pop(value, None)
        return {value: read(value) for value in returned}

    def _read(self, nodes: Iterable[ir.Node], outputs: Iterable[ir.Value]) -> None:
        """Read every weight and constant the nodes use; values that share their data share a tensor."""
        seen: dict[int, Tensor] = {}
        for value in dict.fromkeys((*(x for node in nodes for x in node.inputs if x is not None), *outputs)):
            tensor = constant_tensor(value)
            if tensor is None:
                continue
            if id(tensor) not in seen:
                read = as_tensor(tensor, self.dtype)
                seen[id(tensor)] = read.to(self.device) if read.is_floating_point() else read
            read = seen[id(tensor)]
            if read.is_floating_point() and value.producer() is None:
                self._names[value] = str(value.name)
                self.parameters[str(value.name)] = read
            else:
                self._constants[value] = read

    def _plan(self, returned: tuple[ir.Value, ...], given: frozenset[ir.Value]) -> Plan:
        if (returned, given) in self._plans:
            return self._plans[returned, given]
        computed = {value for step in self._steps for value in step.node.outputs}
        for value in returned:
            if value not in computed | given and value not in self._names and value not in self._constants:
                raise MlaPassError(
                    f"the value {value.name!r} is not computed here; give it among the outputs of the TorchGraph"
                )
        todo, steps = set(returned) - given, []
        for step in reversed(self._steps):
            if todo.intersection(step.node.outputs):
                steps.append(step)
                todo.update(value for value in step.node.inputs if value is not None and value not in given)
        kept, dead = set(returned), []
        for step in steps:  # last first: the first time a value shows is its last use
            touched = [*step.node.inputs, *step.node.outputs]
            gone = tuple(dict.fromkeys(value for value in touched if value is not None and value not in kept))
            kept.update(gone)
            dead.append(gone)
        plan = self._plans[returned, given] = Plan(tuple(reversed(steps)), tuple(reversed(dead)))
        return plan

    def _feeds(self, ids: Tensor) -> dict[ir.Value, Tensor]:
        """What each graph input gets: tokens, all attended, and an empty cache (S rows to fill where it is shared)."""
        ids = ids.to(torch.int64)
        batch, length = ids.shape
        tokens = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(length, device=ids.device).expand(batch, length),
        }  # fmt: skip
        pasts = {
            tensor.past: torch.zeros(
                (batch, tensor.heads, length if tensor.kind == "shared" else 0, tensor.width),
                dtype=_EIGHT_BITS.get(tensor.dtype, self.dtype), device=ids.device,
            )
            for tensor in self.cache.tensors
        }  # fmt: skip
        return {
            value: tokens[str(value.name)] if value.name in tokens else pasts[str(value.name)] for value in self._inputs
        }


_EIGHT_BITS = {coded.element: getattr(torch, coded.element.name) for coded in CODED.values()}
"""Element types of a cache that do not follow the view's own."""
_FIRST_ONLY = {"Reshape", "Expand", "Slice", "Split", "Squeeze", "Unsqueeze", "TopK", "CumSum"}
"""Operators whose operands beyond the first are sizes and places, which Python reads."""


def together(op_type: str, operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """All operands on the device that any of them lies on; those that Python reads as numbers stay where they are."""
    there = next((x.device for x in operands if x is not None and x.device.type != "cpu"), None)
    if there is None or op_type in _FIRST_ONLY or op_type.startswith("Reduce"):
        return list(operands)
    return [x if x is None else x.to(there) for x in operands]


def as_tensor(tensor: ir.TensorProtocol, dtype: torch.dtype) -> Tensor:
    """A copy of an ONNX tensor, every floating-point type as `dtype`. Raises MlaPassError when it cannot be read."""
    try:
        array = tensor.numpy()
    except (OSError, ValueError, TypeError) as error:
        raise MlaPassError(f"the data of {tensor.name!r} cannot be read ({error}); export the model again") from error
    if tensor.dtype.is_floating_point():
        if array.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            return torch.from_numpy(array.astype(np.float32)).to(dtype)
        return torch.tensor(array, dtype=dtype)
    return torch.from_numpy(np.array(array))


def _needed(graph: ir.Graph, outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that `outputs` follow from, in the graph's order."""
    todo, found = list(outputs), set()
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo.extend(value for value in node.inputs if value is not None)
    return [node for node in graph if node in found and node.op_type != "Constant"]


def _attributes(node: ir.Node, dtype: torch.dtype) -> Mapping[str, Any]:
    """A node's attributes as plain values: element types as torch's, tensors as torch's."""
    found: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        if name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT:
            value = _torch_type(ir.DataType(value), dtype)
        elif attribute.type == ir.AttributeType.TENSOR:
            value = as_tensor(value, dtype)
        found[name] = value
    return found


def _torch_type(kind: ir.DataType, dtype: torch.dtype) -> torch.dtype:
    return dtype if kind.is_floating_point() else torch.from_numpy(np.zeros((), kind.numpy())).dtype
