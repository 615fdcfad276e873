"""Anchors that hold the whole attention in one node.

    Attention(query, key, value, mask, past_key, past_value)   ai.onnx, opset 23 and later; [B, H, S, D] or [B, S, H*D]
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_pass.patterns.cache import Edge
from mla_pass.patterns.layout import Axes
from mla_pass.patterns.scores import MaskTerm
from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle
from mla_pass.view import View

UNREAD = {"group_query_attention", "multi_head_attention"}
"""Fused attention of other dialects: recognised, so that it is refused and never passed over."""


@dataclass(frozen=True)
class Fused:
    """What an Attention node says."""

    query: Handle
    key: Handle
    value: Handle
    axes: tuple[Axes, Axes, Axes]
    """How query, key and value are laid out."""
    result_axes: Axes
    scale: float | None
    """None: 1 / sqrt(D)."""
    softcap: float
    masks: list[MaskTerm]
    causal: bool
    """Hides later tokens, whatever the masks say."""
    key_edge: Edge | None
    value_edge: Edge | None


def read_fused(view: View, node: Handle) -> Fused:
    """Reads an ai.onnx Attention node. Raises Stop."""
    query, key, value, mask, past_key, past_value, lengths = [*view.inputs(node), *[None] * 6][:7]
    if lengths is not None:
        raise Stop(node, "attention without a separate count of valid keys (nonpad_kv_seqlen)")
    heads = [view.attribute(node, name) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    axes: list[Axes] = [("B", "S", "HD") if count else ("B", "H", "S", "D") for count in heads]
    causal = bool(view.attribute(node, "is_causal"))
    edges: list[Edge | None] = [None, None]
    if past_key is not None and past_value is not None:
        edges = [_edge(view, node, past_key, key, 1), _edge(view, node, past_value, value, 2)]
    elif causal:
        advice = "pass the mask as an operand, or the past as past_key and past_value"
        raise Stop(node, "an is_causal that counts the cached tokens, too", advice)
    terms = [] if mask is None else [MaskTerm(mask, "keep" if view.dtype(mask) == "bool" else "add")]
    scale = view.attribute(node, "scale")
    return Fused(
        query, key, value, (axes[0], axes[1], axes[2]), axes[0], None if not scale else float(scale),
        float(view.attribute(node, "softcap")), terms, causal, edges[0], edges[1],
    )  # fmt: skip


def _edge(view: View, node: Handle, past: Handle, new: Handle, index: int) -> Edge:
    present = next((v for v in view.siblings(node) if view.op(v).endswith(f"#{index}")), None)
    if present is None or view.op(past) != "input" or not view.is_output(present):
        raise Stop(node, "past keys and values that are inputs of the graph, present ones among its outputs")
    return Edge(past, present, new)
