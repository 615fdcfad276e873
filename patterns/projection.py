"""Linear maps: from the hidden state to a branch's heads, and from the context back to the hidden state.

    MatMul(x, W [in, out]) -> [Add(bias)] -> [Slice of the columns: packed q, k, v]     or Gemm, transposed or not
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_pass.patterns.layout import Axes, after, axis_of, before, rank
from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle, Projection, Weight
from mla_pass.view import EvaluationError, Slice, View

QUANTISED = "quantised or low-rank projections cannot be folded: convert the model before it is quantised"


@dataclass(frozen=True)
class _Columns:
    """A slice of the columns, counted in `unit` columns (1, or a head's size)."""

    part: Slice
    unit: int


def read_projection(view: View, value: Handle, axes: Axes, head_dim: int) -> Projection:
    """Walks from a branch's heads back to the hidden state. Raises Stop."""
    columns: list[_Columns] = []
    bias: Weight | None = None
    while not is_projection(view, value):
        step = before(view, value, axes)
        added = _constant_term(view, value)
        part = view.attribute(value, "slice") if view.op(value) == "slice" else None
        if step is not None:
            value, axes = step
        elif part is not None and axis_of(value, axes, part.axis) in ("HD", "H") and part.step == 1:
            columns.append(_Columns(part, 1 if "HD" in axes else head_dim))
            value = view.inputs(value)[0]
        elif added is not None and bias is None and axes[-1] == "HD":
            value, bias = added[0], _cut(_vector(view, value, added[1]), columns)
        else:
            raise Stop(value, "a projection: MatMul or Gemm of the hidden state with a constant weight", QUANTISED)
    if axes[-1] != "HD":
        raise Stop(value, "a projection whose result is split into heads afterwards")
    x, weight, own_bias = _linear(view, value)
    if own_bias is not None:
        if bias is not None:
            raise Stop(value, "one bias per projection")
        bias = _cut(own_bias, columns)
    return Projection(x, _cut(weight, columns), bias)


def read_output(view: View, value: Handle, axes: Axes) -> tuple[Handle, Projection]:
    """Walks from the attention's result forwards to its output projection: (context [B, S, H*V], Projection).

    Raises Stop.
    """
    while True:
        users = [user for user in view.users(value) if view.op(user) != "shape"]
        if len(users) != 1 or view.is_output(value):
            raise Stop(value, "an attention result that only the output projection reads")
        user = users[0]
        if is_projection(view, user) and axes[-1] == "HD":
            break
        then = after(view, user, axes)
        if then is None:
            raise Stop(user, "Transpose and Reshape from the attention's result to the output projection")
        value, axes = user, then
    x, weight, bias = _linear(view, user)
    if bias is None:
        bias = _following_bias(view, user)
    return x, Projection(x, weight, bias)


def is_projection(view: View, value: Handle) -> bool:
    """True for a product with a constant matrix."""
    op, operands = view.op(value), view.inputs(value)
    if op not in ("matmul", "gemm") or not view.is_constant(operands[1]) or view.is_constant(operands[0]):
        return False
    shape = view.shape(operands[1])
    return shape is None or (len(shape) == 2 and 1 not in shape)


def _linear(view: View, value: Handle) -> tuple[Handle, Weight, Weight | None]:
    """The hidden state [B, S, in], weight [in, out] and Gemm's own bias."""
    operands = view.inputs(value)
    try:
        weight = view.weight(operands[1])
    except EvaluationError as error:
        raise Stop(value, f"a readable weight ({error})") from error
    bias = None
    if view.op(value) == "gemm":
        if any(view.attribute(value, name) != plain for name, plain in (("alpha", 1), ("beta", 1), ("transA", 0))):
            raise Stop(value, "a Gemm with alpha = beta = 1 and transA = 0")
        weight = _transposed(weight) if view.attribute(value, "transB") else weight
        bias = _vector(view, value, operands[2]) if len(operands) > 2 and operands[2] is not None else None
    x = operands[0]
    if rank(view, x) == 2 or (view.op(value) == "gemm" and rank(view, x) != 3):
        # [B*S, in]: the hidden state lies before the Reshape.
        if view.op(x) != "reshape" or rank(view, view.inputs(x)[0]) != 3:
            raise Stop(value, "a projection of a [batch, tokens, hidden] value")
        x = view.inputs(x)[0]
    return x, weight, bias


def _constant_term(view: View, value: Handle) -> tuple[Handle, Handle] | None:
    """Reads Add(x, constant) in either order as (x, constant)."""
    if view.op(value) != "add":
        return None
    left, right = view.inputs(value)
    if view.is_constant(right):
        return left, right
    return (right, left) if view.is_constant(left) else None


def _following_bias(view: View, product: Handle) -> Weight | None:
    """The bias added to the output projection, maybe after a Reshape."""
    users = view.users(product)
    while len(users) == 1 and view.op(users[0]) in ("reshape", "identity"):
        users = view.users(users[0])
    if len(users) != 1:
        return None
    added = _constant_term(view, users[0])
    return None if added is None else _vector(view, users[0], added[1])


def _vector(view: View, value: Handle, bias: Handle) -> Weight:
    try:
        weight = view.weight(bias)
    except EvaluationError as error:
        raise Stop(value, f"a readable bias ({error})") from error
    size = int(np.prod(weight.shape))
    if weight.shape and size != weight.shape[-1]:
        raise Stop(value, "a bias that is one vector")
    return Weight((size,), weight.dtype, lambda: weight.read().reshape(-1))


def _transposed(weight: Weight) -> Weight:
    return Weight(weight.shape[::-1], weight.dtype, lambda: weight.read().T)


def _cut(weight: Weight, columns: list[_Columns]) -> Weight:
    """The columns that are left after the slices, the outermost first in the list."""
    if not columns:
        return weight
    kept = range(weight.shape[-1])
    for column in reversed(columns):
        bounds = slice(column.part.start, column.part.stop).indices(len(kept) // column.unit)
        kept = kept[bounds[0] * column.unit : bounds[1] * column.unit]
    return Weight(
        (*weight.shape[:-1], len(kept)), weight.dtype, lambda: weight.read()[..., kept.start : kept.stop]
    )  # fmt: skip
