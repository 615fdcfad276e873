"""The torch.export implementation of `mla_pass.view.View`. Handles are ``fx.Node``s, and `Number`s for bare operands.

Weights are placeholders that the program's signature lifts: they count as constants. What only hands its operand on
(clone, alias, a slice of everything, a concatenation with nothing) is no value of its own: whoever asks for it is given
what it hands on. A split's results are values, the split itself is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mla_pass.errors import MlaPassError
from mla_pass.export.layout import MAX_POSITION_KEY
from mla_pass.pytorch import aten
from mla_pass.pytorch.aten import Number, computing
from mla_pass.pytorch.piece import Piece
from mla_pass.site import Weight
from mla_pass.view import SMALL, follows_from_constants


class FxView:
    """Reads the graph of an exported program."""

    def __init__(self, program: ExportedProgram) -> None:
        """Raises MlaPassError when the program writes in place, which a reading of values cannot see."""
        require_functional(program)
        self.program = program
        stated = str(program.graph_module.meta.get(MAX_POSITION_KEY, ""))
        self.max_position = int(stated) if stated.isdigit() else None
        self.weights = lifted(program)
        self._constant: dict[Any, bool] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._inputs: dict[fx.Node, list[Any]] = {}
        self._users: dict[Any, list[fx.Node]] = {}
        self._outputs: set[Any] = set()
        for node in program.graph.nodes:
            self._enter(node)

    @classmethod
    def of(cls, program: Any) -> FxView:
        """The view of a program. Raises MlaPassError for anything else."""
        if not isinstance(program, ExportedProgram):
            raise MlaPassError(
                f"a {type(program).__name__} is no exported program: give what torch.export.export, or "
                "mla_pass.export.fx.export_fx, returns"
            )
        return cls(program)

    def _enter(self, node: fx.Node) -> None:
        """Note a node and its operands, or what it hands on."""
        if node.op == "output":
            self._outputs = {self.resolved(each) for each in node.all_input_nodes}
            return
        value = node.meta.get("val")
        if value is None or isinstance(value, (tuple, list)):  # an assertion, or several results at once
            return
        if node.op == "placeholder":
            self._inputs[node] = []
            return
        source = aten.hands_on(node)
        if source is not None:
            self._same[node] = self.resolved(source)
            return
        self._inputs[node] = [self.resolved(operand) for operand in aten.operands(node)]
        for operand in dict.fromkeys(self._inputs[node]):
            self._users.setdefault(operand, []).append(node)

    def resolved(self, node: Any) -> Any:
        """The value that a node of the graph stands for."""
        return self._same.get(node, node) if isinstance(node, fx.Node) else node

    def results(self) -> Iterator[fx.Node]:
        """See `View.results`."""
        return (node for node in self._inputs if node.op != "placeholder")

    def op(self, value: Any) -> str:
        """See `View.op`."""
        if isinstance(value, Number) or value in self.weights:
            return "constant"
        if value.op == "placeholder":
            return "input"
        node, index = computing(value)
        neutral = aten.neutral_name(node)
        return f"{neutral}#{index}" if index and neutral != "slice" else neutral

    def inputs(self, value: Any) -> list[Any]:
        """See `View.inputs`."""
        return [] if isinstance(value, Number) else list(self._inputs.get(value, ()))

    def attribute(self, value: Any, name: str) -> Any:
        """See `View.attribute`."""
        return None if isinstance(value, Number) or value.op == "placeholder" else aten.attribute(value, name)

    def settings(self, value: Any) -> tuple[Any, ...]:
        """See `View.settings`."""
        if isinstance(value, Number) or value.op == "placeholder":
            return ()
        node, index = computing(value)
        return (index, *(f"{name}={aten.bare(given)}" for name, given in aten.arguments(node).items()))

    def users(self, value: Any) -> list[fx.Node]:
        """See `View.users`."""
        return list(self._users.get(value, ()))

    def siblings(self, value: Any) -> list[Any]:
        """See `View.siblings`."""
        node, _ = computing(value)
        return [value] if node is value else [user for user in node.users if user in self._inputs]

    def constant(self, value: Any) -> np.ndarray | None:
        """See `View.constant`."""
        if isinstance(value, Number):
            return np.array(value.value)
        if not self.is_constant(value) or math.prod(n or 1 for n in self.shape(value) or ()) > SMALL:
            return None
        return self.evaluate([value], {})[0]

    def is_constant(self, value: Any) -> bool:
        """See `View.is_constant`."""

        def leaf(x: Any) -> bool | None:
            op = self.op(x)
            return op == "constant" if op in ("constant", "input") else None

        return follows_from_constants(self, value, self._constant, leaf)

    def weight(self, value: Any) -> Weight:
        """See `View.weight`."""
        shape = tuple(n for n in self.shape(value) or () if n is not None)
        return Weight(shape, self.dtype(value), lambda: self.evaluate([value], {})[0].astype(np.float64))

    def shape(self, value: Any) -> tuple[int | None, ...] | None:
        """See `View.shape`."""
        found = None if isinstance(value, Number) else value.meta["val"]
        return tuple(n if isinstance(n, int) else None for n in found.shape) if isinstance(found, Tensor) else ()

    def dtype(self, value: Any) -> str:
        """See `View.dtype`."""
        if isinstance(value, Number):
            return {"bool": "bool", "int": "int64"}.get(value.kind, "float32")
        found = value.meta["val"]
        return str(found.dtype).removeprefix("torch.") if isinstance(found, Tensor) else "int64"

    def is_output(self, value: Any) -> bool:
        """See `View.is_output`."""
        return value in self._outputs

    def name(self, value: Any) -> str:
        """See `View.name`."""
        return str(value.value) if isinstance(value, Number) else value.name

    def node(self, value: Any) -> str:
        """See `View.node`."""
        if isinstance(value, Number) or value.op == "placeholder":
            return f"input {self.name(value)!r}"
        return f"{value.name!r} ({aten.name_of(computing(value)[0])})"

    def path(self, value: Any) -> str:
        """See `View.path`: the innermost module that was running when the value was traced."""
        stack = {} if isinstance(value, Number) else value.meta.get("nn_module_stack") or {}
        path = next(reversed(stack.values()))[0] if stack else ""
        return re.sub(r"^L\['self'\]\.?", "", path)

    def needs(self, outputs: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """See `View.needs`."""
        return self.block(outputs, given).needs

    def evaluate(self, outputs: Sequence[Any], feeds: Mapping[Any, np.ndarray]) -> list[np.ndarray]:
        """See `View.evaluate`: runs in torch."""
        return self.block(outputs, tuple(feeds)).run(feeds)

    def block(self, outputs: Sequence[Any], given: Sequence[Any]) -> Piece:
        """See `View.block`: runs in torch."""
        return Piece(self.program.graph, outputs, given, self.weights)


def lifted(program: ExportedProgram) -> dict[fx.Node, Tensor]:
    """The program's parameters, buffers and constants, by the placeholders that stand for them."""
    tensors = {**program.constants, **program.state_dict}
    return {node: tensors[name] for node, name in lifted_names(program).items()}


def lifted_names(program: ExportedProgram) -> dict[fx.Node, str]:
    """Their names."""
    signature = program.graph_signature
    targets = {
        **signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants,
    }  # fmt: skip
    return {node: targets[node.name] for node in program.graph.find_nodes(op="placeholder") if node.name in targets}


def writing(program: ExportedProgram) -> list[str]:
    """The nodes that write in place, and the buffers and inputs that are written to."""
    signature = program.graph_signature
    nodes = [
        node.name
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and aten.name_of(node) not in aten.HAND_ON
    ]
    return [*nodes, *signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]


def require_functional(program: ExportedProgram) -> None:
    """Raises MlaPassError for a program that writes in place."""
    found = writing(program)
    if found:
        raise MlaPassError(
            f"the exported program writes in place ({found[0]}): expected a program without side effects; call its "
            "run_decompositions() first, and pass the cache in and out instead of keeping it in buffers"
        )
