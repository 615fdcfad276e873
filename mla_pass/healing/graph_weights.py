"""The weights of a converted model that healing may change: those that each latent attention reads its query and row
by, decodes by, and gives its result on by. They are found by walking the graph from the LatentAttention nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from mla_pass.errors import MlaPassError
from mla_pass.healing.subject import Trainable
from mla_pass.onnx.body import DOMAIN, INPUTS, OP_TYPE
from mla_pass.onnx.cut import constant_tensor

PRODUCTS = {"MatMul", "Gemm"}
MAPS = ("query_map", "key_up", "key_mean", "value_up")
_SIZES = {"Shape", "Size"}
_LAYOUT = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast"}


def find_trainable(model: ir.Model) -> Trainable:
    """The initializers around every LatentAttention node that nothing else reads: matrices, biases and means.

    Raises MlaPassError when the model has no such node, or nothing that may be trained.
    """
    nodes = latent_nodes(model)
    if not nodes:
        raise MlaPassError("the model to heal has no LatentAttention node; give a folder that mla-pass convert wrote")
    walk = _Walk(model.graph)
    found = dict.fromkeys(value for node in nodes for value in walk.around(node))
    shared = Counter(id(value.const_value) for value in model.graph.initializers.values())
    reasons = {value: _reason(value, shared) for value in found}
    names = tuple(str(value.name) for value, reason in reasons.items() if not reason)
    if not names:
        raise MlaPassError(
            "every matrix around the latent attention is read elsewhere, too, so none can be healed; export the model "
            "with weights of its own for each layer"
        )
    left_out = tuple(f"{value.name} {reason}" for value, reason in reasons.items() if reason)
    decoders = (dict(zip(INPUTS, node.inputs, strict=False)).get("key_up") for node in nodes)
    return Trainable(names, left_out, frozenset(str(value.name) for value in decoders if value is not None))


def latent_nodes(model: ir.Model) -> list[ir.Node]:
    """The LatentAttention nodes of the main graph, in its order."""
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]


def constants(graph: ir.Graph) -> set[ir.Value]:
    """Every value that follows from weights alone."""
    found = {value for value in graph.initializers.values() if constant_tensor(value) is not None}
    for node in graph:
        if node.op_type == "Constant" or (node.inputs and all(x is None or x in found for x in node.inputs)):
            found.update(node.outputs)
    return found


class _Walk:
    """Steps through one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.constant = constants(graph)

    def around(self, node: ir.Node) -> Iterator[ir.Value]:
        """The weights of one site: towards query and row, the node's own maps, towards the block's output."""
        given = dict(zip(INPUTS, node.inputs, strict=False))
        yield from self.behind(given["query"])
        yield from self.behind(given["row"])
        for name in MAPS:
            yield from self.weights(given.get(name))
        yield from self.ahead(node.outputs[0])

    def behind(self, start: ir.Value | None) -> Iterator[ir.Value]:
        """Backwards to the nearest products with a constant: their matrices, and what is added on the way."""
        todo, seen = [start], set()
        while todo:
            value = todo.pop()
            node = None if value is None else value.producer()
            if node is None or node in seen or node.op_type in _SIZES:
                continue
            seen.add(node)
            if node.op_type in PRODUCTS or node.op_type == "Add":
                yield from self.operands(node)
            if node.op_type not in PRODUCTS:
                todo.extend(node.inputs)

    def ahead(self, start: ir.Value) -> Iterator[ir.Value]:
        """Forwards through the output projection: its matrix, and the constants added just before and after it."""
        todo = [(start, False)]
        while todo:
            value, projected = todo.pop()
            for node, _ in value.uses():
                product = node.op_type in PRODUCTS and not projected
                added = node.op_type == "Add" and any(x in self.constant for x in node.inputs)
                if product or added:
                    yield from self.operands(node)
                if product or node.op_type in _LAYOUT or (added and not projected):
                    todo.append((node.outputs[0], projected or product))

    def operands(self, node: ir.Node) -> Iterator[ir.Value]:
        """The weights among and behind a node's operands."""
        for value in node.inputs:
            yield from self.weights(value)

    def weights(self, value: ir.Value | None) -> Iterator[ir.Value]:
        """What a constant value is computed from: floating-point tensors, lone numbers (an epsilon) left out."""
        todo: list[ir.Value | None] = [value] if value in self.constant else []
        while todo:
            value = todo.pop()
            tensor = None if value is None else constant_tensor(value)
            if tensor is not None:
                if tensor.dtype.is_floating_point() and tensor.size > 1:
                    yield value  # type: ignore[misc]
            elif value is not None and (node := value.producer()) is not None:
                todo.extend(node.inputs)


def _reason(value: ir.Value, shared: Counter[int]) -> str:
    """Why a weight must stay as it is; empty when it may be trained."""
    readers = [str(node.name) for node, _ in value.uses()]
    if value.producer() is not None:
        return "is written into the graph as a Constant node"
    if value.is_graph_output():
        return "is an output of the graph"
    if len(readers) > 1:
        return f"is read by {len(readers)} nodes, {readers[0]} and {readers[1]} among them"
    if shared[id(value.const_value)] > 1:
        return "shares its data with another weight"
    return ""
