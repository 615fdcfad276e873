"""A few lines that make writing nodes by hand readable: named values, constants on demand, branches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Ops:
    """Collects nodes in order. Names are unique within one `prefix`, branches included."""

    def __init__(self, prefix: str, counter: list[int] | None = None) -> None:
        """Start an empty list of nodes whose values are named after `prefix`."""
        self.nodes: list[ir.Node] = []
        self.prefix = prefix
        self.counter = counter if counter is not None else [0]

    def branch(self) -> Ops:
        """Nodes for a branch of an If, with names that clash with nothing outside."""
        return Ops(self.prefix, self.counter)

    def outputs(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        count: int,
        domain: str = "",
        overload: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node with `count` outputs."""
        values = []
        for _ in range(count):
            self.counter[0] += 1
            values.append(ir.Value(name=f"{self.prefix}{op_type}_{self.counter[0]}"))
        attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
        node = ir.Node(domain, op_type, inputs, attrs, outputs=values, overload=overload, name=f"{values[0].name}_node")
        self.nodes.append(node)
        return values

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.outputs(op_type, *inputs, count=1, **attributes)[0]

    def ints(self, *values: int) -> ir.Value:
        """Constant int64 [len(values)]."""
        return self("Constant", value=ir.tensor(np.array(values, np.int64)))

    def scalar(self, value: int) -> ir.Value:
        """Constant int64 scalar."""
        return self("Constant", value=ir.tensor(np.array(value, np.int64)))

    def floats(self, values: np.ndarray | float) -> ir.Value:
        """Constant float32 of any shape."""
        return self("Constant", value=ir.tensor(np.asarray(values, np.float32)))

    def cut(self, x: ir.Value, start: int | ir.Value, end: int | ir.Value, axis: int) -> ir.Value:
        """x[start:end] along one axis."""
        bounds = [self.ints(b) if isinstance(b, int) else b for b in (start, end)]
        return self("Slice", x, *bounds, self.ints(axis))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape to a shape known up to 0 (copy the dim) and -1 (what is left)."""
        return self("Reshape", x, self.ints(*shape))

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        """Insert dims of size 1."""
        return self("Unsqueeze", x, self.ints(*axes))

    def graph(self, outputs: Iterable[ir.Value], name: str) -> ir.Graph:
        """The nodes so far as the graph of a branch."""
        return ir.Graph([], list(outputs), nodes=self.nodes, name=name)
