"""The cache: what the graph was given of the past, and what it gives back.

    past [B, G, P, D] (graph input) -> Concat(past, new) over the tokens -> present [B, G, T, D] (graph output)
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_pass.patterns.layout import Axes, axis_of
from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle
from mla_pass.view import View

EXPORT = "export the model with a flat key/value cache (use_cache, past_key_values as inputs): mla-pass export does"


@dataclass(frozen=True)
class Edge:
    """One side of the cache, keys or values; `new` is what this step appends."""

    past: Handle
    present: Handle
    new: Handle


def appended(view: View, value: Handle, axes: Axes) -> Edge | None:
    """Reads Concat(past, new) over the tokens; None if `value` is no such Concat. Raises Stop on a half-open cache."""
    if view.op(value) != "concat" or axis_of(value, axes, view.attribute(value, "axis")) != "S":
        return None
    operands = view.inputs(value)
    if len(operands) != 2:
        raise Stop(value, "a cache of two parts, past and new")
    past, new = operands
    if view.op(past) != "input":
        raise Stop(value, "a cache whose past is an input of the graph, before the new tokens", EXPORT)
    if axes != ("B", "H", "S", "D"):
        raise Stop(value, "a cache of shape [batch, kv_heads, tokens, head_dim]", EXPORT)
    outputs = [result for result in (value, *_copies(view, value)) if view.is_output(result)]
    if not outputs:
        raise Stop(value, "the extended cache among the graph's outputs", EXPORT)
    return Edge(past, outputs[0], new)


def _copies(view: View, value: Handle) -> list[Handle]:
    return [user for user in view.users(value) if view.op(user) == "identity"]
