"""The walk: from every softmax and Attention node back to the projections, one concern after another.

    Softmax / Attention -> scores, scale, softcap, mask -> repeat_kv -> cache -> rope -> norm -> projection

No template and no list of architectures: a variant costs its own step, and steps combine freely. What the walk reads is
a claim about the graph; `mla_pass.proof.admit` is what makes it a fact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from mla_pass.patterns.cache import EXPORT, Edge, appended
from mla_pass.patterns.fused import UNREAD, read_fused
from mla_pass.patterns.layout import LAYOUTS, Axes, before
from mla_pass.patterns.mask import MaskReader
from mla_pass.patterns.norm import normed
from mla_pass.patterns.projection import is_projection, read_output, read_projection
from mla_pass.patterns.repeat_kv import repeated
from mla_pass.patterns.rope import NO_ROPE, RopeReader, Rotation, rotation
from mla_pass.patterns.scores import MaskTerm, factor, is_attention, read_scores
from mla_pass.patterns.stop import REPORT, Stop
from mla_pass.site import AttentionSite, Branch, Cache, Handle, Layout, Mask, Norm, Refusal, Rope
from mla_pass.view import EvaluationError, View, view_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

HEADS: Axes = ("B", "H", "S", "D")
Role = Literal["query", "key", "value"]


def find_sites(model: ir.Model | ExportedProgram) -> list[AttentionSite | Refusal]:
    """Every attention block of an ONNX model or an exported program, in order of execution, read or refused.

    The model is left untouched.
    """
    found = read_sites(view_of(model))
    if not isinstance(model, ir.Model):
        return found
    from mla_pass.onnx.view import bodies

    advice = "inline the model's functions and branches first (onnx_ir.passes.common.InlinePass)"
    for name, body in bodies(model):
        inside = set(body.results())
        for anchor in body.results():
            if _is_anchor(body, inside, anchor):
                found.append(Refusal(name, body.node(anchor), "attention in the main graph", advice))
    return found


def read_sites(view: View) -> list[AttentionSite | Refusal]:
    """Every attention block of a graph, in order of execution, read or refused."""
    reader = SiteReader(view)
    return [reader.read(anchor, layer) for layer, anchor in enumerate(reader.anchors())]


@dataclass
class Anchored:
    """What stands at the anchor itself: where the branches start, and all that is done to scores and result."""

    operands: tuple[Handle, Handle, Handle]
    axes: tuple[Axes, Axes, Axes]
    scale: float | None
    softcap: float
    masks: list[MaskTerm]
    causal: bool
    edges: tuple[Edge | None, Edge | None]
    result: Handle
    result_axes: Axes


@dataclass
class Trace:
    """One branch, read from the scores back to its last step before the projection."""

    end: Handle
    end_axes: Axes
    scale: float = 1.0
    edge: Edge | None = None
    rotation: Rotation | None = None
    norm: Norm | None = None
    value: Handle | None = None
    """The value that becomes `Branch.value`: the first one before rope and cache that splits heads in a known way."""
    layout: Layout = "BHSD"


class SiteReader:
    """Reads the sites of one graph; what layers share (masks, rotations) is measured once."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.order = {value: i for i, value in enumerate(view.results())}
        self.carries = carriers(view)
        self.ropes = RopeReader(view)
        self.masks = MaskReader(view)

    def anchors(self) -> Iterator[Handle]:
        """Values computed by a softmax over scores or by a fused attention node."""
        return (value for value in self.order if _is_anchor(self.view, self.carries, value))

    def read(self, anchor: Handle, layer: int) -> AttentionSite | Refusal:
        """One site, or why not."""
        name = self.view.path(anchor) or f"attention_{layer}"
        try:
            return self._site(anchor, name, layer)
        except Stop as stop:
            return Refusal(name, self.view.node(stop.value), stop.expected, stop.advice)
        except EvaluationError as error:
            return Refusal(name, self.view.node(anchor), f"constants that can be computed ({error})", REPORT)

    def _site(self, anchor: Handle, name: str, layer: int) -> AttentionSite:
        view = self.view
        start = self._anchored(anchor)
        query_trace = self._trace(start.operands[0], start.axes[0], "query", None)
        key_trace = self._trace(start.operands[1], start.axes[1], "key", start.edges[0])
        value_trace = self._trace(start.operands[2], start.axes[2], "value", start.edges[1])
        key_edge, value_edge = key_trace.edge, value_trace.edge
        if key_edge is None or value_edge is None:
            raise Stop(anchor, "a cache of keys and values", EXPORT)
        groups, head_dim = _sizes(view, key_edge.past)
        value_groups, value_dim = _sizes(view, value_edge.past)
        query = self._branch(query_trace, None, head_dim)
        key = self._branch(key_trace, groups, head_dim)
        value = self._branch(value_trace, value_groups, value_dim)
        if groups != value_groups or query.heads % groups:
            told = f"{query.heads} query, {groups} key and {value_groups} value heads"
            raise Stop(anchor, f"query heads in equal groups (the graph has {told})")
        if not query.projection.x is key.projection.x is value.projection.x:
            raise Stop(value.projection.x, "queries, keys and values projected from one hidden state")
        rope = self._rope(query_trace, key_trace, query, key)
        context, output = read_output(view, start.result, start.result_axes)
        if output.weight.shape[0] != query.heads * value_dim:
            raise Stop(context, f"an output projection of {query.heads * value_dim} numbers")
        scale = start.scale if start.scale is not None else head_dim**-0.5
        return AttentionSite(
            name=name, layer=layer, query=query, key=key, value=value, rope=rope,
            cache=Cache(key_edge.past, value_edge.past, key_edge.present, value_edge.present),
            mask=self._mask(start, rope, anchor),
            scale=scale * query_trace.scale * key_trace.scale, softcap=start.softcap,
            context=context, output=output, dtype=view.dtype(context) or output.weight.dtype,
        )  # fmt: skip

    def _anchored(self, anchor: Handle) -> Anchored:
        view = self.view
        if view.op(anchor) in UNREAD:
            raise Stop(anchor, "attention spelled out, or ai.onnx Attention", "export with mla-pass export")
        if view.op(anchor) == "attention":
            fused = read_fused(view, anchor)
            return Anchored(
                (fused.query, fused.key, fused.value), fused.axes, fused.scale, fused.softcap, fused.masks,
                fused.causal, (fused.key_edge, fused.value_edge), anchor, fused.result_axes,
            )  # fmt: skip
        scores = read_scores(view, self.carries, anchor)
        result, axes, value = self._weighted_sum(anchor)
        return Anchored(
            (scores.query, scores.key, value), (HEADS, ("B", "H", "D", "S"), axes), scores.scale, scores.softcap,
            scores.masks, False, (None, None), result, axes,
        )  # fmt: skip

    def _weighted_sum(self, probabilities: Handle) -> tuple[Handle, Axes, Handle]:
        """From the softmax forwards to its product with the values: (product, its axes, values)."""
        view, value = self.view, probabilities
        axes: Axes = ("B", "H", "S", "S")
        while True:
            users = [user for user in view.users(value) if view.op(user) not in ("isnan", "shape")]
            if len(users) != 1:
                raise Stop(value, "a softmax that only the product with the values reads")
            user = users[0]
            if view.op(user) == "matmul" and view.inputs(user)[0] is value:
                return user, HEADS if len(axes) == 4 else ("BH", "S", "D"), view.inputs(user)[1]
            cleaned = view.op(user) == "where" and view.inputs(user)[2] is value  # rows of NaN set to zero
            if view.op(user) in ("identity", "cast") or cleaned:
                value = user
            elif view.op(user) == "reshape" and len(view.shape(user) or ()) == 3:
                value, axes = user, ("BH", "S", "S")
            else:
                raise Stop(user, "the product of softmax and values")

    def _trace(self, value: Handle, axes: Axes, role: Role, edge: Edge | None) -> Trace:
        """Walks one branch back to its projection. Raises Stop."""
        trace = Trace(value, axes, edge=edge)
        while True:
            cached = role == "query" or trace.edge is not None
            turned = role == "value" or trace.rotation is not None
            if cached and turned and trace.value is None and axes in LAYOUTS:
                trace.value, trace.layout = value, LAYOUTS[axes]
            step = self._step(trace, value, axes, role, cached, turned)
            if step is None:
                break
            value, axes = step
        trace.end, trace.end_axes = value, axes
        if not cached:
            raise Stop(value, f"{role}s that pass through the cache: Concat(past, new)", EXPORT)
        if not turned:
            raise Stop(value, f"rotary positions on the {role}", NO_ROPE)
        return trace

    def _step(
        self, trace: Trace, value: Handle, axes: Axes, role: Role, cached: bool, turned: bool
    ) -> tuple[Handle, Axes] | None:
        """One concern backwards; None where only the projection is left."""
        view = self.view
        if not cached:
            source = repeated(view, value, axes)
            if source is not None:
                return source, axes
            edge = appended(view, value, axes)
            if edge is not None:
                trace.edge = edge
                return edge.new, axes
        if not turned:
            found = rotation(view, self.carries, self.order, value, axes)
            if found is not None:
                if not cached:
                    expected = "keys that pass through the cache, Concat(past, new), after their rotation"
                    raise Stop(value, expected, EXPORT)
                trace.rotation = found
                return found.x, axes
        norm = normed(view, value, axes) if trace.norm is None else None
        if norm is not None:
            if not turned or not cached:
                raise Stop(value, f"the {role} norm before rotation and cache")
            trace.norm = norm[1]
            return norm[0], axes
        scaled = factor(view, value) if role != "value" else None
        if scaled is not None and trace.norm is None:
            trace.value, trace.scale = None, trace.scale * scaled[1]
            return scaled[0], axes
        return before(view, value, axes) if not is_projection(view, value) else None

    def _branch(self, trace: Trace, heads: int | None, head_dim: int) -> Branch:
        projection = read_projection(self.view, trace.end, trace.end_axes, head_dim)
        width = projection.weight.shape[-1]
        if trace.value is None or width % head_dim or (heads or width // head_dim) * head_dim != width:
            raise Stop(trace.end, f"a projection onto heads of {head_dim} numbers (it has {width} columns)")
        if trace.norm is not None and trace.norm.weight.shape != (head_dim,):
            raise Stop(trace.end, f"a norm weight of {head_dim} numbers")
        return Branch(projection, trace.norm, trace.value, trace.layout, width // head_dim, head_dim)

    def _rope(self, query: Trace, key: Trace, query_branch: Branch, key_branch: Branch) -> Rope:
        """The rotation that queries and keys share."""
        assert query.rotation is not None and key.rotation is not None  # _trace saw to it
        one = self.ropes.read(query.rotation, query_branch.heads, query_branch.head_dim)
        other = self.ropes.read(key.rotation, key_branch.heads, key_branch.head_dim)
        same = (
            np.allclose(one.theta, other.theta, rtol=1e-6, atol=1e-10)  # equal, save where read off tables
            and (one.rotary_dim, one.interleaved) == (other.rotary_dim, other.interleaved)
            and np.isclose(one.attention_scaling, other.attention_scaling, rtol=1e-5)
            and one.positions is other.positions
        )
        if not same:
            raise Stop(key.rotation.out, "one rotation for queries and keys")
        return one

    def _mask(self, start: Anchored, rope: Rope, anchor: Handle) -> Mask:
        mask = self.masks.read(start.masks, rope.positions, anchor)
        if start.causal and mask.kind == "additive":
            raise Stop(anchor, "a mask that includes what is_causal hides")
        return replace(mask, causal=mask.causal or start.causal)


def carriers(view: View) -> set[Handle]:
    """Values whose numbers come out of a projection: hidden states, heads, scores; not tables, masks or sizes."""
    found: set[Handle] = set()
    for value in view.results():
        op = view.op(value)
        own = is_projection(view, value) or "::" in op or op in ("MatMulInteger", "QLinearMatMul", "Einsum")
        if own or (op != "shape" and any(operand in found for operand in view.inputs(value))):
            found.add(value)
    return found


def _is_anchor(view: View, carries: set[Handle], value: Handle) -> bool:
    op = view.op(value)
    return op == "attention" or op in UNREAD or (op == "softmax" and is_attention(view, carries, value))


def _sizes(view: View, past: Handle) -> tuple[int, int]:
    """Heads and head size of a cache input."""
    shape = view.shape(past)
    if shape is None or len(shape) != 4 or shape[1] is None or shape[3] is None:
        raise Stop(past, "a past input [batch, kv_heads, past, head_dim] with fixed kv_heads and head_dim", EXPORT)
    return shape[1], shape[3]
