"""What a node of a torch graph says, in the words of `mla_pass.view`: its op, its operands and its attributes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mla_pass.view import NEUTRAL, Slice

HAND_ON = {"aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.detach_", "aten.lift_fresh",
           "aten.lift_fresh_copy"}  # fmt: skip
"""Operators that change no number and no size."""
_LESS_COMMON = {"alpha": 1, "rounding_mode": None, "dropout_p": 0.0, "beta": 1}
"""Arguments with which an operator is no longer the neutral one, unless they have these values."""
_END = 1 << 62
"""A slice's end from here on is the axis's own."""


@dataclass(frozen=True)
class Number:
    """An operand that is written into the node itself, such as the 2 of x * 2."""

    value: bool | int | float
    kind: str
    """Name of its Python type: 2 and 2.0 are not one operand."""


def name_of(node: fx.Node) -> str:
    """``aten.op``, ``namespace::op`` for other operators, the name of a function."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    namespace, _, op = node.target._schema.name.partition("::")
    return f"aten.{op}" if namespace == "aten" else f"{namespace}::{op}"


def neutral_name(node: fx.Node) -> str:
    """The neutral op, where the node does what that op does; else its own name."""
    name, given = name_of(node), arguments(node)
    neutral = NEUTRAL.get(name, name)
    changed = any(name in given and given[name] != usual for name, usual in _LESS_COMMON.items())
    if neutral == "gather" and "indices" in given and isinstance(given["indices"], (list, tuple)):
        changed |= len(given["indices"]) != 1
    changed |= neutral == "reshape" and "dtype" in given  # the same bits, read as another type
    return name if changed else neutral


def computing(value: fx.Node) -> tuple[fx.Node, int]:
    """The node that computes a value, and which of its results the value is."""
    if value.target is operator.getitem and isinstance(value.args[0], fx.Node):
        return value.args[0], int(value.args[1])  # type: ignore[arg-type]
    return value, 0


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults included; by place where the target has no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(place): each for place, each in enumerate(node.args)}, **node.kwargs}
    schema = node.target._schema.arguments
    given = {each.name: each.default_value for each in schema if each.has_default_value()}
    return given | dict(zip((each.name for each in schema), node.args, strict=False)) | node.kwargs


def operands(value: fx.Node) -> list[Any]:
    """Operands in the order of the neutral op's: tensors, numbers in place of tensors, then sizes."""
    node, _ = computing(value)
    given = arguments(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return [each if isinstance(each, fx.Node) else Number(each, type(each).__name__) for each in given.values()]
    found: list[Any] = []
    sizes: list[Any] = []
    for argument in node.target._schema.arguments:
        each = given.get(argument.name)
        if "Tensor" in str(argument.type) or argument.name in ("other", "exponent", "self"):
            found += [_operand(x) for x in (each if isinstance(each, (list, tuple)) else [each])]
        else:
            sizes += [x for x in (each if isinstance(each, (list, tuple)) else [each]) if isinstance(x, fx.Node)]
    if name_of(node) == "aten.addmm":  # the bias comes first there
        found = [*found[1:], found[0]]
    if name_of(node) == "aten.cat":
        found = [each for each in found if not is_empty(each)] or found
    return found + sizes


def _operand(x: Any) -> Any:
    return x if x is None or isinstance(x, fx.Node) else Number(x, type(x).__name__)


def hands_on(node: fx.Node) -> fx.Node | None:
    """The operand that the node hands on as it is; None if it computes something."""
    name, given, inner = name_of(node), arguments(node), operands(node)
    first = inner[0] if inner and isinstance(inner[0], fx.Node) else None
    if first is None:
        return None
    if name == "aten.slice":
        step = given["step"] == 1 and given["start"] in (None, 0)
        whole = step and (given["end"] is None or (isinstance(given["end"], int) and given["end"] >= _END))
    elif NEUTRAL.get(name) == "cast":
        whole = first.meta["val"].dtype == node.meta["val"].dtype
    else:
        whole = name in HAND_ON or (name == "aten.cat" and len(inner) == 1)
        whole |= name == "aten.expand" and sizes_of(first) == sizes_of(node)
        whole |= name == "aten.dropout" and not given["train"]
    return first if whole else None


def sizes_of(node: fx.Node) -> list[str]:
    """Sizes as they are written; to compare symbols would add to what the program demands."""
    return [str(size) for size in node.meta["val"].shape]


def is_empty(value: Any) -> bool:
    """True for the tensor without numbers that may stand for a cache before its first token."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(found, Tensor) and [str(size) for size in found.shape] == ["0"]


# ---- attributes


def attribute(value: fx.Node, name: str) -> Any:
    """See `mla_pass.view.View.attribute`."""
    node, index = computing(value)
    given, op = arguments(node), name_of(node)
    if name == "slice":
        return slice_of(op, given, index)
    if name == "shape":
        return tuple(n if isinstance(n, int) else None for n in value.meta["val"].shape)
    if name == "perm":
        return permutation(op, given, len(value.meta["val"].shape))
    if name == "axes":
        axes = given.get("dim")
        return (axes,) if isinstance(axes, int) else None if axes is None else tuple(axes)
    if name == "axis":
        return -len(given["normalized_shape"]) if op == "aten.rms_norm" else given.get("dim", 0)
    if name in ("transA", "transB"):
        return int(name == "transB" and op == "aten.linear")
    if name == "epsilon":
        return torch.finfo(value.meta["val"].dtype).eps if given["eps"] is None else given["eps"]
    return given.get(name, {"alpha": 1.0, "beta": 1.0, "softcap": 0.0}.get(name))


def slice_of(op: str, given: Mapping[str, Any], index: int) -> Slice | None:
    """The part that a slice, or one result of a split, is; None when its bounds are computed."""
    axis = given["dim"]
    if op == "aten.slice":
        start, end, step = given["start"] or 0, given["end"], given["step"]
        end = _END if end is None else end
        return Slice(axis, start, end, step) if all(isinstance(n, int) for n in (start, end, step)) else None
    sizes = given.get("split_sizes", given.get("split_size"))
    if isinstance(sizes, (list, tuple)) and all(isinstance(n, int) for n in sizes):
        return Slice(axis, sum(sizes[:index]), sum(sizes[: index + 1]), 1)
    return Slice(axis, index * sizes, (index + 1) * sizes, 1) if isinstance(sizes, int) else None


def permutation(op: str, given: Mapping[str, Any], rank: int) -> tuple[int, ...]:
    """Where each axis of the result comes from."""
    if op == "aten.permute":
        return tuple(int(axis) % rank for axis in given["dims"])
    order = list(range(rank))
    one, other = (0, 1) if op == "aten.t" else (given["dim0"] % rank, given["dim1"] % rank)
    if rank > 1:
        order[one], order[other] = order[other], order[one]
    return tuple(order)


def bare(given: Any) -> str:
    """An argument as text, values of the graph left out."""
    if isinstance(given, fx.Node):
        return "."
    if isinstance(given, Sequence) and not isinstance(given, str):
        return f"[{', '.join(bare(each) for each in given)}]"
    return repr(given)
