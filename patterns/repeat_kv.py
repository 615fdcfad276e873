"""Each key/value head serves H/G query heads in a row.

    [B, G, S, D] -> Unsqueeze(2) -> Expand [B, G, H/G, S, D] -> Reshape [B, H, S, D]
"""

from __future__ import annotations

from mla_pass.patterns.layout import Axes, rank
from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle
from mla_pass.view import View


def repeated(view: View, value: Handle, axes: Axes) -> Handle | None:
    """The value before the repetition, [B, G, S, D]; None if `value` is no repetition. Raises Stop on another order."""
    if axes != ("B", "H", "S", "D") or view.op(value) != "reshape":
        return None
    inner = view.inputs(value)[0]
    while view.op(inner) in ("identity", "cast"):
        inner = view.inputs(inner)[0]
    if view.op(inner) != "expand" or rank(view, value) != 4:
        return None
    source = view.inputs(inner)[0]
    if view.op(source) != "unsqueeze" or view.attribute(source, "axes") not in ((2,), (-3,)):
        raise Stop(source, "key/value heads repeated one after the other: Unsqueeze on axis 2, Expand, Reshape")
    return view.inputs(source)[0]
