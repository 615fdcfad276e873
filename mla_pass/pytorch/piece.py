"""Cutting a few values' computation out of a torch graph and running it alone, on numpy's arrays or torch's tensors.

Half precision is computed in float32, weights keep their exact values. Weights are widened when the piece runs, and
what has been read for the last time is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from mla_pass.view import EvaluationError

_HALF = (torch.float16, torch.bfloat16)


class Piece:
    """The nodes between `given` and `outputs`; inputs of the graph that are met on the way are its `needs`."""

    def __init__(
        self, graph: fx.Graph, outputs: Sequence[fx.Node], given: Sequence[fx.Node], weights: Mapping[fx.Node, Tensor],
        *, stopped: Collection[fx.Node] = (), device: str = "cpu",
    ) -> None:  # fmt: skip
        """`weights` are the placeholders that the piece knows by itself, `stopped` the nodes that no gradient passes;
        all is computed on `device`."""
        self.device, self.stopped = torch.device(device), stopped
        self.outputs, self.given, self.weights = tuple(outputs), tuple(given), weights
        needed = reached(outputs, set(given))
        self.nodes = [node for node in graph.nodes if node in needed]
        open_ends = set(weights) | set(given)
        self.needs = [node for node in self.nodes if node.op == "placeholder" and node not in open_ends]
        last = {operand: node for node in self.nodes for operand in node.all_input_nodes}
        kept = set(outputs)
        self._dead: dict[fx.Node, list[fx.Node]] = {}
        for operand, node in last.items():
            if operand not in kept:
                self._dead.setdefault(node, []).append(operand)

    def run(self, values: Mapping[fx.Node, np.ndarray]) -> list[np.ndarray]:
        """The outputs, from a value of everything that is given or needed. Raises EvaluationError."""
        with torch.no_grad():
            found = self.compute({node: to_torch(value) for node, value in values.items()})
        return [to_numpy(value) for value in found]

    def compute(self, values: Mapping[fx.Node, Tensor]) -> list[Any]:
        """The same with tensors; differentiable in what is given and in the weights. Raises EvaluationError."""
        known = (*self.given, *self.needs)
        missing = [node.name for node in known if node not in values]
        if missing:
            raise EvaluationError(f"it also depends on the graph inputs {', '.join(missing)}")
        found: dict[fx.Node, Any] = {node: self._wide(values[node]) for node in known}
        for node in self.nodes:
            if node not in found:
                found[node] = self._computed(node, found)
            for operand in self._dead.get(node, ()):
                found.pop(operand, None)
        return [found[node] for node in self.outputs]

    def _computed(self, node: fx.Node, found: Mapping[fx.Node, Any]) -> Any:
        if node in self.weights:
            return self._wide(self.weights[node])
        if node.op != "call_function":
            raise EvaluationError(f"{node.name!r} ({node.op}) cannot be run by itself")
        args, kwargs = (map_aggregate(given, lambda x: self._operand(x, found)) for given in (node.args, node.kwargs))
        try:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EvaluationError(f"torch cannot run {node.name!r} ({node.target}): {first}") from error
        return value.detach() if node in self.stopped else value

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float32 if tensor.dtype in _HALF else tensor.dtype)

    def _operand(self, value: Any, found: Mapping[fx.Node, Any]) -> Any:
        """One argument as the piece's own run has it."""
        if isinstance(value, fx.Node):
            return found[value]
        if isinstance(value, torch.device):
            return self.device
        return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value


def to_torch(array: np.ndarray) -> Tensor:
    """A tensor of an array's numbers; what is broadcast stays so, as a long cache of zeros takes no memory then."""
    once = array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]
    return torch.from_numpy(once.copy()).expand(array.shape)


def to_numpy(value: Any) -> np.ndarray:
    """A tensor, or a size, as an array; bfloat16 as float32."""
    if not isinstance(value, Tensor):
        return np.array(value)
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()


def reached(outputs: Sequence[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """Everything from which the outputs follow, the given values included."""
    seen: set[fx.Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(() if node in given else node.all_input_nodes)
    return seen
