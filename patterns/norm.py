"""RMS norm of each query or key head.

    RMSNormalization(x, weight), or  Mul(weight, [Cast] Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), epsilon)))))
"""

from __future__ import annotations

import numpy as np

from mla_pass.patterns.layout import Axes, axis_of
from mla_pass.patterns.scores import scalar
from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle, Norm, Weight
from mla_pass.view import View


def normed(view: View, value: Handle, axes: Axes) -> tuple[Handle, Norm] | None:
    """Reads an RMS norm as (x, Norm); None if `value` is none. Raises Stop if it spans more than one head."""
    found = _fused(view, value) if view.op(value) == "rmsnorm" else _spelled(view, value)
    if found is None:
        return None
    x, weight, epsilon, over = found
    spans = axis_of(value, axes, over)
    if spans != "D" or over % len(axes) != len(axes) - 1:
        advice = "norms over all heads together cannot be folded: leave this layer unconverted (--partial)"
        raise Stop(value, "a norm over the numbers of one head", advice)
    return x, Norm(_flat(view.weight(weight)), epsilon)


def _fused(view: View, value: Handle) -> tuple[Handle, Handle, float, int]:
    x, weight = view.inputs(value)[:2]
    return _uncast(view, x) or x, weight, float(view.attribute(value, "epsilon")), int(view.attribute(value, "axis"))


def _spelled(view: View, value: Handle) -> tuple[Handle, Handle, float, int] | None:
    for weight, scaled in _orders(view, value, "mul"):
        if not view.is_constant(weight):
            continue
        found = _unweighted(view, _uncast(view, scaled))
        if found is not None:
            return found[0], weight, *found[1:]
    return None


def _unweighted(view: View, value: Handle) -> tuple[Handle, float, int] | None:
    """x / sqrt(mean(x^2) + epsilon) in any of its spellings, as (x, epsilon, axis)."""
    candidates = [(x, root) for x, root in _orders(view, value, "mul") if view.op(root) in ("reciprocal", "rsqrt")]
    candidates += [(x, root) for x, root in _orders(view, value, "div")[:1] if view.op(root) == "sqrt"]
    for x, root in candidates:
        inner = view.inputs(root)[0]
        if view.op(root) == "reciprocal":
            if view.op(inner) != "sqrt":
                continue
            inner = view.inputs(inner)[0]
        for mean, epsilon in _orders(view, inner, "add"):
            number = scalar(view, epsilon)
            over = view.attribute(mean, "axes") if view.op(mean) == "mean" else None
            if number is None or over is None or len(over) != 1:
                continue
            if _uncast(view, _squared(view, view.inputs(mean)[0])) is _uncast(view, x):
                return _uncast(view, x), number, int(over[0])
    return None


def _squared(view: View, value: Handle) -> Handle | None:
    operands = view.inputs(value)
    if view.op(value) == "pow" and scalar(view, operands[1]) == 2.0:
        return operands[0]
    return operands[0] if view.op(value) == "mul" and operands[0] is operands[1] else None


def _orders(view: View, value: Handle, op: str) -> list[tuple[Handle, Handle]]:
    if view.op(value) != op:
        return []
    left, right = view.inputs(value)
    return [(left, right), (right, left)]


def _uncast(view: View, value: Handle | None) -> Handle | None:
    while value is not None and view.op(value) in ("cast", "identity"):
        value = view.inputs(value)[0]
    return value


def _flat(weight: Weight) -> Weight:
    """A norm weight as a vector, also when stored as [1, 1, D]."""

    def read() -> np.ndarray:
        return weight.read().reshape(-1)

    return Weight((int(np.prod(weight.shape)),), weight.dtype, read)
