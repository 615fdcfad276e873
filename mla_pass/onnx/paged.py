"""Lowering to ONNX Runtime's own latent attention: ``com.microsoft::PagedAttention`` with kv_cache_layout="LATENT".

For CUDA servers that page their cache. The node keeps one row a token, [latent, rope part], in pages that all sequences
share; queries come absorbed, [latent part, rope part] a head; every head's value is the latent itself:

    query [tokens, H * (r + p)]     the graph's own query times [query_map up to n @ key_up, query_map from n on]
    key [tokens, r + p]             the new rows; of both the node turns columns r..r+p, halves against each other
    key_cache [pages, page_rows, 1, r + p]      updated in place; the output aliases it
    output [tokens, H * r]          attention over the latents; value_up follows in the graph, or in the projection

Tokens are packed: those of all sequences in a row, no padding. The graph around the attention stays [B, S]; rows
b * S + s are the packed order, so that a server feeds [1, tokens]. A token's position is past_sequence_lengths of its
sequence plus its place among the new ones: the node turns by it, and attention_mask and position_ids go where nothing
else reads them. The names of the three new inputs are those of onnxruntime-genai's engine.

What the schema cannot say is refused: no block rotation of un-cached keys (rope_mode `block`), no bias added to scores,
no attention ahead, no head sinks. Checked against ONNX Runtime 1.32: its schema, and the limits its CUDA kernel states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import MAX_POSITION_KEY
from mla_pass.onnx.emit import Conversion, Emitter, shape_span
from mla_pass.onnx.ops import Ops
from mla_pass.onnx.session import ort_errors
from mla_pass.site import AttentionSite, Branch, Refusal
from mla_pass.storage import PAGED_TILE, STORED, row_format

DOMAIN = "com.microsoft"
OP_TYPE = "PagedAttention"
SIXTEEN_BITS = ("float16", "bfloat16")
CUMULATIVE, PAST, TABLE = "cumulative_sequence_lengths", "past_sequence_lengths", "block_table"
SCHEDULE = {CUMULATIVE: ("sequences_and_one",), PAST: ("sequences",), TABLE: ("sequences", "pages_per_sequence")}
"""The inputs that tell whose each token is and where its rows lie, all int32, with their shapes."""
MEANING = {
    "input_ids": "the new tokens of all sequences, one after another without padding: [1, tokens]",
    "logits": "one row for each token of input_ids",
    "position_ids": "position of each token in its sequence, in the order of input_ids",
    CUMULATIVE: "0, then the end of each sequence's tokens in input_ids",
    PAST: "rows that each sequence has in its pages already",
    TABLE: "page number of each sequence's rows 0.., page_rows.., 2 * page_rows.., ...; -1 where there is none",
}
PAGES_MEANING = "rows of one layer, all sequences' pages; bind the same buffer to {other}: it is updated in place"


# ---- what can be lowered


def require_sixteen_bits(sites: Sequence[AttentionSite], config: MlaConfig, dtype: str | None) -> None:
    """Raises MlaPassError when rows would be of a type that PagedAttention does not compute in.

    `dtype`: of the model's own cache, where that is not what its graph computes in.
    """
    for site in sites:
        if row_format(dtype or site.dtype, config).latent not in SIXTEEN_BITS:
            raise MlaPassError(
                f"the model computes in {site.dtype}, and {OP_TYPE} in {' or '.join(SIXTEEN_BITS)}: export it with "
                "--dtype float16, or give --cache-dtype float16 for the attention alone"
            )


def paged_site(site: AttentionSite) -> AttentionSite | Refusal:
    """The site, or why it has no form in PagedAttention's schema."""

    def refused(expected: str, advice: str) -> Refusal:
        return Refusal(site.name, f"the lowering to {OP_TYPE}", expected, advice)

    ours = "convert it for target mla-pass"
    if site.mask.kind == "additive":
        return refused("a mask of causality and a window alone, as nothing can be added to a score", ours)
    if not site.mask.causal:
        return refused("causal attention, which its latent layout has alone", ours)
    if site.kv_groups * site.rope.rotary_dim < PAGED_TILE:
        return refused(f"keys of at least {PAGED_TILE} numbers a token that turn", ours)
    return site


# ---- emission


class PagedEmitter(Emitter):
    """Rewrites one model in place: every site's caches, rotation and attention give way to one PagedAttention node."""

    def __init__(self, model: ir.Model, *, max_positions: int) -> None:
        """Nothing is changed before :meth:`emit`."""
        super().__init__(model, max_positions=max_positions, shared_buffer=True)
        self.turns: dict[tuple[str, bytes], tuple[ir.Value, ir.Value]] = {}
        self.schedule = [typed(name, dims, ir.DataType.INT32) for name, dims in SCHEDULE.items()]

    def emit(self, conversions: Sequence[Conversion]) -> None:
        """Rewrite all sites.

        Raises MlaPassError when anything beside the attention depends on the caches or the attention mask.
        """
        read = [value for value in self.graph.inputs if value.uses()]
        front = Ops("mla_pass/")
        self.hidden = conversions[0].site.query.projection.x  # [B, S, E], to read B and S off
        self.unpacked = front("Concat", *self.sizes(front), front.ints(-1), axis=0)  # [B, S, .]
        for conversion in conversions:
            self.rewrite(conversion, front)
        self.insert(front)
        sites = [conversion.site for conversion in conversions]
        self.drop_old_caches(sites)
        self.drop_unread(read, sites)
        self.graph.inputs.extend(self.schedule)
        self.graph.opset_imports[DOMAIN] = 1
        self.graph.sort()
        RemoveUnusedFunctionsPass()(self.model)

    def rewrite(self, conversion: Conversion, front: Ops) -> None:
        """Build the new nodes of a site and hand its context over."""
        site, w = conversion.site, conversion.weights
        ops = Ops(f"/{site.name.replace('.', '/')}/{OP_TYPE}/")
        pages = self.pages(conversion)
        query = self.convert(ops, self.absorbed_query(ops, conversion), conversion.row.latent, site.dtype)
        row = ops.reshape(self.row(ops, conversion), -1, w.rank + w.rope_dim)
        row = self.convert(ops, row, conversion.row.latent, site.dtype)
        context, written = self.paged_node(ops, conversion, query, row, pages)
        self.give_back(site, pages, written)
        context = self.values(ops, conversion, self.convert(ops, context, site.dtype, conversion.row.latent))
        replaced, result = self.result(ops, conversion, ops("Reshape", context, self.unpacked))
        self.insert(ops)
        ir.convenience.replace_all_uses_with(replaced, result)

    def paged_node(
        self, ops: Ops, conversion: Conversion, query: ir.Value, row: ir.Value, pages: ir.Value
    ) -> Sequence[ir.Value]:
        """The node itself, named after its layer: context [tokens, H * r] and the pages."""
        site, w = conversion.site, conversion.weights
        cos, sin = self.turning(conversion)
        # With no explicit scale the node would take one of the row's width. The other attributes are the defaults.
        attributes: dict[str, Any] = {"softcap": site.softcap} if site.softcap else {}
        if site.mask.window:
            attributes["local_window_size"] = site.mask.window
        outputs = ops.outputs(
            OP_TYPE, query, row, None, pages, None, *self.schedule, cos, sin, count=2, domain=DOMAIN,
            num_heads=site.heads, kv_num_heads=1, kv_cache_layout="LATENT", v_head_size=w.rank, do_rotary=1,
            rotary_offset=w.rank, scale=site.scale, **attributes,
        )  # fmt: skip
        ops.nodes[-1].name = f"/{site.name.replace('.', '/')}/{OP_TYPE}"
        return outputs

    def absorbed_query(self, ops: Ops, conversion: Conversion) -> ir.Value:
        """The query [tokens, H * (r + p)] that meets the rows as they are cached."""
        site, w, plan = conversion.site, conversion.weights, conversion.absorption
        query = ops.reshape(self.query(ops, conversion), -1, site.heads * self.query_width(conversion))
        if plan.query_map:
            return query
        maps = self.constant(f"{site.name}.query_map", plan.query_maps(w), site.dtype)
        return self.by_group(ops, site, query, maps, (site.head_dim, w.rank + w.rope_dim))

    def query_width(self, conversion: Conversion) -> int:
        """Numbers of a query head as :meth:`query` gives it."""
        w = conversion.weights
        return w.rank + w.rope_dim if conversion.absorption.query_map else conversion.site.head_dim

    def values(self, ops: Ops, conversion: Conversion, context: ir.Value) -> ir.Value:
        """Context [tokens, H * V] from attention over the latents, which it stays where value_up is folded away."""
        site, w = conversion.site, conversion.weights
        if conversion.absorption.value_up:
            return context
        maps = self.constant(f"{site.name}.value_up", w.value_up, site.dtype)
        return self.by_group(ops, site, context, maps, (w.rank, site.value_dim))

    def by_group(self, ops: Ops, site: AttentionSite, x: ir.Value, maps: ir.Value, widths: tuple[int, int]) -> ir.Value:
        """x [tokens, H * a] with every head times its group's map, maps [G, a, b]: [tokens, H * b]; `widths` (a, b)."""
        groups, heads, (before, after) = site.kv_groups, site.heads // site.kv_groups, widths
        # One product a group over all tokens' heads, where [tokens, G] products would broadcast the maps.
        x = ops("Transpose", ops.reshape(x, -1, groups, heads, before), perm=[1, 0, 2, 3])
        x = ops("MatMul", ops.reshape(x, groups, -1, before), maps)
        x = ops("Transpose", ops.reshape(x, groups, -1, heads, after), perm=[1, 0, 2, 3])
        return ops.reshape(x, -1, groups * heads * after)

    def convert(self, ops: Ops, x: ir.Value, wanted: str, given: str) -> ir.Value:
        """x in another type, where rows are cached in one that the graph does not compute in."""
        return x if wanted == given else ops("Cast", x, to=ir.DataType.from_numpy(STORED[wanted]))

    def turning(self, conversion: Conversion) -> tuple[ir.Value, ir.Value]:
        """cos and sin [max_positions, p/2] of a site's rope part, one pair of tables for all sites that turn alike."""
        theta = conversion.site.rope.theta[conversion.weights.rope_index].astype(np.float32)
        key = conversion.row.latent, theta.tobytes()
        if key not in self.turns:
            # The angle is rounded to float32 before the cosine is taken, as the models do.
            angle = np.outer(np.arange(self.max_positions, dtype=np.float32), theta).astype(np.float64)
            name, dtype = f"mla_pass.turn_{len(self.turns)}", conversion.row.latent
            tables = {kind: f(angle) for kind, f in (("cos", np.cos), ("sin", np.sin))}
            cos, sin = (self.constant(f"{name}.{kind}", table, dtype) for kind, table in tables.items())
            self.turns[key] = cos, sin
        return self.turns[key]

    # ---- caches

    def pages(self, conversion: Conversion) -> ir.Value:
        """A new graph input past.{layer}.pages before past keys."""
        site, w = conversion.site, conversion.weights
        dtype = ir.DataType.from_numpy(STORED[conversion.row.latent])
        pages = typed(f"past.{site.layer}.pages", ("pages", "page_rows", 1, w.rank + w.rope_dim), dtype)
        inputs = self.graph.inputs
        inputs.insert(inputs.index(site.cache.past_key), pages)
        return pages

    def give_back(self, site: AttentionSite, pages: ir.Value, written: ir.Value) -> None:
        """A new graph output present.{layer}.pages in place of present keys and values."""
        assert pages.name is not None  # made by pages()
        written.name = pages.name.replace("past", "present", 1)
        written.shape, written.type = pages.shape, pages.type
        outputs = self.graph.outputs
        outputs[outputs.index(site.cache.present_key)] = written
        outputs.remove(site.cache.present_value)

    def past(self, ops: Ops, new: ir.Value) -> ir.Value:
        """Stands for a number that :meth:`replace_shape` lets nobody read."""
        return ops.ints(0)

    def replace_shape(self, node: ir.Node, branch: Branch) -> None:
        """Raises MlaPassError when the node reads how many rows are cached, which differs from sequence to sequence."""
        if 2 in range(4)[slice(*shape_span(node))]:
            raise MlaPassError(
                f"{node.op_type} node {node.name!r} reads how many rows the caches hold, which is no one number where "
                "sequences are packed; expected the attention alone to depend on it"
            )
        super().replace_shape(node, branch)

    def drop_unread(self, read: Sequence[ir.Value], sites: Sequence[AttentionSite]) -> None:
        """Remove those of the inputs once `read` that nothing reads any longer: old caches, mask, positions.

        Raises MlaPassError when the attention mask is still read: packed tokens have none.
        """
        for value in read:
            if not value.uses():
                self.graph.inputs.remove(value)
        for mask in (site.mask.padding for site in sites):
            if mask is not None and mask in self.graph.inputs:
                node, _ = next(iter(mask.uses()))
                raise MlaPassError(
                    f"{node.op_type} node {node.name!r} still reads {mask.name!r}, which packed tokens do not have; "
                    "expected the attention alone to read it"
                )

    # ---- words

    def notes(self, conversions: Sequence[Conversion]) -> list[str]:
        """What the user should know, a sentence each."""
        tables = [value.const_value for pair in self.turns.values() for value in pair]
        size = sum(table.nbytes for table in tables if table is not None)
        told = [
            "ONNX Runtime has PagedAttention for CUDA alone: this machine checked the graph's operators and types; "
            "losses and errors are those of the same weights in LatentAttention.",
            f"The tables that turn the rope parts take {size / 1e6:,.1f} MB for {self.max_positions} positions; "
            "max_positions sets how many.",
        ]
        if any(c.weights.rope_dim < c.site.kv_groups * c.site.rope.rotary_dim for c in conversions):
            told.append(
                "PagedAttention turns only what a row keeps rotated; the rotation of all other key components is left "
                "off, which loses more than the block rotation of target mla-pass does with rows of the same size."
            )
        return told


def typed(name: str, dims: Sequence[int | str], dtype: ir.DataType) -> ir.Value:
    """A value for a graph's interface."""
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


# ---- what a server has to know


def interface(model: ir.Model) -> dict[str, Any]:
    """How a converted model is fed, as plain data: every input and output with its type, shape and meaning."""
    ports = {"inputs": model.graph.inputs, "outputs": model.graph.outputs}
    return {
        "operator": f"{DOMAIN}::{OP_TYPE}, kv_cache_layout LATENT",
        "provider": "CUDAExecutionProvider",
        "page_rows": "a power of two, at least 16",
        "positions": int(model.metadata_props[MAX_POSITION_KEY]),  # the node looks its tables up unchecked
        **{kind: {str(value.name): port(value) for value in values} for kind, values in ports.items()},
    }


def port(value: ir.Value) -> dict[str, Any]:
    """One input or output: its type, shape and meaning."""
    assert value.name is not None and value.dtype is not None and value.shape is not None  # an interface has them
    meaning = MEANING.get(value.name)
    if value.name.endswith(".pages"):
        swapped = ("past", "present") if value.is_graph_input() else ("present", "past")
        meaning = PAGES_MEANING.format(other=value.name.replace(*swapped, 1))
    told = {} if meaning is None else {"meaning": meaning}
    dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return {"type": value.dtype.name.lower(), "shape": dims, **told}


def require_accepted(path: Path) -> None:
    """Open a saved model as far as ONNX Runtime can without CUDA: operators, types and shapes, all but the kernels.

    Raises MlaPassError when it refuses the graph.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with ort_errors(f"ONNX Runtime {onnxruntime.__version__} refuses the graph of {path}"):
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except state.NotImplemented as error:
            # Kernels are looked for once the whole graph is resolved against its operators' schemas.
            if "Could not find an implementation for" not in str(error):
                raise
