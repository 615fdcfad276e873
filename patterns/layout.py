"""Steps over ops that only move, split or merge axes, keeping track of what each axis means.

Axes are letters as in `mla_pass.site`: B, S (tokens, cached ones included), H (heads, query or key/value), D (one
head's numbers). Merged axes are written together: "HD" is the last axis of [B, S, H*D], "BH" and "BS" likewise.
Walking backwards from the scores, [B, H, S, D] meets for example

    Reshape [B, S, H*D] -> [B, S, H, D]     Transpose (0, 2, 1, 3)     Reshape [B*H, S, D] <- [B, H, S, D]
"""

from __future__ import annotations

import numpy as np

from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle, Layout
from mla_pass.view import View

Axes = tuple[str, ...]

LAYOUTS: dict[Axes, Layout] = {("B", "S", "HD"): "BSE", ("B", "S", "H", "D"): "BSHD", ("B", "H", "S", "D"): "BHSD"}

# (axes after the reshape, rank before it) -> axes before it. Equal ranks leave the axes as they are.
_BEFORE_RESHAPE: dict[tuple[Axes, int], Axes] = {
    (("B", "S", "H", "D"), 3): ("B", "S", "HD"),
    (("B", "S", "H", "D"), 2): ("BS", "HD"),
    (("B", "S", "HD"), 4): ("B", "S", "H", "D"),
    (("B", "S", "HD"), 2): ("BS", "HD"),
    (("BS", "HD"), 4): ("B", "S", "H", "D"),
    (("BS", "HD"), 3): ("B", "S", "HD"),
    (("B", "H", "S", "D"), 3): ("BH", "S", "D"),
    (("B", "H", "D", "S"), 3): ("BH", "D", "S"),
    (("BH", "S", "D"), 4): ("B", "H", "S", "D"),
    (("BH", "D", "S"), 4): ("B", "H", "D", "S"),
}


def rank(view: View, value: Handle) -> int | None:
    """Number of axes, as far as the graph tells."""
    shape = view.shape(value)
    return None if shape is None else len(shape)


def before(view: View, value: Handle, axes: Axes) -> tuple[Handle, Axes] | None:
    """One layout op backwards: its operand and what that one's axes mean; None if `value` is no layout op."""
    op = view.op(value)
    if op not in ("identity", "cast", "transpose", "reshape"):
        return None
    operand = view.inputs(value)[0]
    if op in ("identity", "cast"):
        return operand, axes
    if op == "transpose":
        perm = view.attribute(value, "perm") or tuple(reversed(range(len(axes))))
        return operand, tuple(axes[list(perm).index(i)] for i in range(len(axes)))
    inner = rank(view, operand)
    if inner == len(axes):
        return operand, axes
    inner_axes = _BEFORE_RESHAPE.get((axes, inner or 0))
    return None if inner_axes is None else (operand, inner_axes)


def after(view: View, value: Handle, axes: Axes) -> Axes | None:
    """What the axes mean after the layout op that computes `value`; None if it is no layout op."""
    op = view.op(value)
    if op in ("identity", "cast"):
        return axes
    if op == "transpose":
        perm = view.attribute(value, "perm") or tuple(reversed(range(len(axes))))
        return tuple(axes[i] for i in perm)
    if op == "reshape":
        outer = rank(view, value)
        if outer == len(axes):
            return axes
        for (then, inner), now in _BEFORE_RESHAPE.items():
            if now == axes and len(then) == outer and inner == len(axes):
                return then
    return None


def axis_of(value: Handle, axes: Axes, index: int) -> str:
    """The meaning of an axis given by a maybe negative index."""
    if not -len(axes) <= index < len(axes):
        raise Stop(value, f"an axis among {', '.join(axes)}", "this shape is not read yet: report the graph")
    return axes[index]


def arrange(array: np.ndarray, axes: Axes) -> np.ndarray:
    """Lays out [B, H, S, D] as `axes` says."""
    b, h, s, d = array.shape
    if axes == ("BH", "S", "D"):
        return array.reshape(b * h, s, d)
    if axes == ("B", "H", "S", "D"):
        return array
    if axes == ("B", "H", "D", "S"):
        return array.transpose(0, 1, 3, 2)
    array = array.transpose(0, 2, 1, 3)
    sizes = {"B": b, "S": s, "H": h, "D": d, "HD": h * d, "BS": b * s}
    return array.reshape([sizes[axis] for axis in axes])


def to_heads(array: np.ndarray, axes: Axes, shape: tuple[int, int, int, int]) -> np.ndarray:
    """The inverse of `arrange`: back to [B, H, S, D] of the given shape."""
    b, h, s, d = shape
    if axes == ("B", "H", "D", "S"):
        return array.transpose(0, 1, 3, 2)
    if axes[0] == "BH" or axes == ("B", "H", "S", "D"):
        return array.reshape(shape)
    return array.reshape(b, s, h, d).transpose(0, 2, 1, 3)
