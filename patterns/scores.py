"""From the softmax back to queries and keys: scale, softcap and masks.

    MatMul(query, key^T) -> [Mul | Div]* -> [Tanh -> Mul] -> [Add(mask) | Where(mask, ., hidden)]* -> Softmax

`is_attention` asks the looser question first: a softmax over a product of two values that are no weights is attention,
whatever stands between, and must then be read or refused. A router's or a sampler's softmax is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mla_pass.patterns.layout import before
from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle
from mla_pass.view import View

HIDDEN = -1e4
"""A score at or under this counts as hidden (exporters write -10000, the type's minimum, or -inf)."""


@dataclass(frozen=True)
class MaskTerm:
    """One value that hides scores. `form`: added, or boolean naming what it keeps or what it hides."""

    value: Handle
    form: str
    """add, keep or hide"""


@dataclass
class Scores:
    """What lies between the product of queries and keys and the softmax."""

    query: Handle
    key: Handle
    product: Handle
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[MaskTerm] = field(default_factory=list)


def scalar(view: View, value: Handle | None) -> float | None:
    """The number in a constant that holds one number only (once or repeated)."""
    array = view.constant(value) if value is not None else None
    if array is None or array.size == 0 or array.dtype.kind not in "fiuV" or (array != array.flat[0]).any():
        return None
    return float(array.flat[0])


def factor(view: View, value: Handle) -> tuple[Handle, float] | None:
    """Reads ``x * c``, ``c * x`` or ``x / c`` as (x, factor)."""
    op = view.op(value)
    if op not in ("mul", "div"):
        return None
    left, right = view.inputs(value)
    number = scalar(view, right)
    if number is not None and not view.is_constant(left):
        return left, number if op == "mul" else 1.0 / number
    number = scalar(view, left)
    return (right, number) if op == "mul" and number is not None and not view.is_constant(right) else None


def is_attention(view: View, carries: set[Handle], softmax: Handle) -> bool:
    """True if the softmax's operand comes from a product of two values that both carry projected data."""
    todo = [view.inputs(softmax)[0]]
    seen: set[Handle] = set()
    while todo and len(seen) < 64:
        value = todo.pop()
        if value is None or value in seen or value not in carries:
            continue
        seen.add(value)
        op = view.op(value)
        if op in ("matmul", "fused_matmul", "Einsum"):
            operands = [operand for operand in view.inputs(value) if operand in carries]
            if len(operands) == 2 and not any(_is_probability(view, operand) for operand in operands):
                return True
        elif op not in ("softmax", "gemm", "gather", "mean", "rmsnorm", "attention"):
            todo += view.inputs(value)
    return False


def read_scores(view: View, carries: set[Handle], softmax: Handle) -> Scores:
    """Walks from a Softmax back to the product of queries and keys. Raises Stop."""
    value = view.inputs(softmax)[0]
    axis = view.attribute(softmax, "axis")
    if axis not in (-1, 3):
        raise Stop(softmax, "a softmax over the keys, the last axis")
    outer, cap, masks = 1.0, None, []
    while view.op(value) != "matmul":
        op, operands = view.op(value), view.inputs(value)
        step = factor(view, value)
        if op in ("identity", "cast", "reshape"):
            value = operands[0]
        elif step is not None:
            value, number = step
            outer *= number
        elif op == "tanh" and cap is None:
            cap, outer, value = outer, 1.0, operands[0]
        elif op in ("add", "where") and cap is None and outer == 1.0:
            value, mask = _mask_of(view, carries, value)
            masks.append(mask)
        else:
            raise Stop(value, "scores as softcap(scale * query . key) + mask, read from the softmax backwards")
    query, key = view.inputs(value)
    if query not in carries or key not in carries:
        raise Stop(value, "a product of queries and keys")
    return Scores(query, key, value, outer if cap is None else outer * cap, cap or 0.0, masks)


def _mask_of(view: View, carries: set[Handle], value: Handle) -> tuple[Handle, MaskTerm]:
    """Splits Add(scores, mask) or Where(keep, scores, hidden) into scores and mask."""
    operands = view.inputs(value)
    if view.op(value) == "add":
        data = [operand for operand in operands if operand in carries]
        rest = [operand for operand in operands if operand not in carries]
        if len(data) == 1 and len(rest) == 1:
            return data[0], MaskTerm(rest[0], "add")
    else:
        condition, yes, no = operands
        for scores, other, form in ((yes, no, "keep"), (no, yes, "hide")):
            number = scalar(view, other)
            if scores in carries and condition not in carries and number is not None and number <= HIDDEN:
                return scores, MaskTerm(condition, form)
    raise Stop(value, "a mask that does not depend on the hidden states")


def _is_probability(view: View, value: Handle) -> bool:
    """True if the value is a softmax's result, up to layout and the cleaning of NaN rows."""
    while True:
        if view.op(value) == "softmax":
            return True
        if view.op(value) == "where":
            value = view.inputs(value)[2]
            continue
        step = before(view, value, ("B", "H", "S", "D"))
        if step is None:
            return False
        value = step[0]
