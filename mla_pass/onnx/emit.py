"""Rewriting the graph: every site's caches, rotation and attention give way to one LatentAttention node.

For each site, in the order of the functions below:
1. the row: one product from the hidden state (or, behind a key norm, from the graph's own keys and values);
2. the query: the graph's own, or a folded projection;
3. the LatentAttention node, with its caches as new graph inputs and outputs in place of the old ones;
4. the context, plus the mean of the values, goes where the old context went.
What only the old attention needed is then dead and removed; everything else stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from mla_pass.errors import MlaPassError
from mla_pass.fold import LatentWeights
from mla_pass.onnx.absorb import Absorption
from mla_pass.onnx.body import DOMAIN, OP_TYPE, Body, Variant, node_attributes
from mla_pass.onnx.ops import Ops
from mla_pass.site import AttentionSite, Branch, Rope
from mla_pass.storage import STORED, RowFormat, stored_width

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
OVERLOADS_SINCE_IR = 10
OLDEST_OPSET = 18
HALVES = ("row_0", "row_1")
"""Ends of the names of a layer's caches that hold half a row each."""


@dataclass(frozen=True)
class Conversion:
    """One site, what it was folded to, where its up-projections go, and how its rows are stored."""

    site: AttentionSite
    weights: LatentWeights
    absorption: Absorption
    row: RowFormat

    @property
    def behind_norm(self) -> bool:
        """Whether keys or values are no linear function of the hidden state, so that rows are encoded from them."""
        site = self.site
        return bool(site.key.norm or site.value.norm) or site.key.projection.x is not site.value.projection.x

    def row_projection(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows from the hidden state: weight [E, r + p] and bias, of a site that is not `behind_norm`."""
        site, w = self.site, self.weights
        weight, bias, split = np.zeros(()), w.encode_bias, site.kv_groups * site.head_dim
        for branch, encode in ((site.key, w.encode[:, :split]), (site.value, w.encode[:, split:])):
            weight = weight + branch.projection.weight.read() @ encode.T
            if branch.projection.bias is not None:
                bias = bias + encode @ branch.projection.bias.read()
        return weight, bias

    def output_projection(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The output from the operator's context: weight [H*V (or H*w), E] and bias, means of values included."""
        site, mean = self.site, self.weights.value_mean
        if self.absorption.value_up:
            return self.absorption.fold_output(site, self.weights)
        weight, bias = site.output.weight.read(), None if site.output.bias is None else site.output.bias.read()
        if mean.any():
            moved = np.repeat(mean, site.heads // site.kv_groups, axis=0).reshape(-1) @ weight
            bias = moved if bias is None else bias + moved
        return weight, bias


class Emitter:
    """Rewrites one model in place. With `shared_buffer` present has the shape of past, else it is longer by S rows."""

    def __init__(self, model: ir.Model, *, max_positions: int, shared_buffer: bool) -> None:
        """Nothing is changed before :meth:`emit`."""
        self.model, self.graph = model, model.graph
        self.max_positions, self.shared_buffer = max_positions, shared_buffer
        self.functions: dict[Variant, ir.Function] = {}
        self.tables: list[tuple[Rope, tuple[ir.Value, ir.Value]]] = []
        self.opset = self.graph.opset_imports[""]
        self.total: ir.Value | None = None

    def emit(self, conversions: Sequence[Conversion]) -> None:
        """Rewrite all sites.

        Raises MlaPassError when the model's opset is too old, or its caches are used in a way that cannot be replaced.
        """
        if self.opset < OLDEST_OPSET:
            raise MlaPassError(
                f"the model uses ai.onnx opset {self.opset}; LatentAttention is written for {OLDEST_OPSET} and newer: "
                "export the model again at that opset"
            )
        front = Ops("mla_pass/")
        self.hidden = conversions[0].site.query.projection.x  # [B, S, E], to read B and S off
        for conversion in conversions:
            self.rewrite(conversion, front)
        self.insert(front)
        self.drop_old_caches([c.site for c in conversions])
        self.graph.opset_imports[DOMAIN] = 1
        if len(self.functions) > 1:
            self.model.ir_version = max(self.model.ir_version or 0, OVERLOADS_SINCE_IR)
        for function in self.functions.values():
            self.model.functions[function.identifier()] = function
        self.graph.sort()
        RemoveUnusedFunctionsPass()(self.model)

    def insert(self, ops: Ops) -> None:
        """Move collected nodes into the graph (sorted at the end)."""
        self.graph.extend(ops.nodes)
        ops.nodes = []

    # ---- one site

    def rewrite(self, conversion: Conversion, front: Ops) -> None:
        """Build the new nodes of a site and hand its context over."""
        site, weights = conversion.site, conversion.weights
        ops = Ops(f"/{site.name.replace('.', '/')}/LatentAttention/")
        latent, rope = self.cache_inputs(conversion)
        total = self.total_length(site, latent, front)
        variant = self.variant(conversion)
        inputs = [
            self.query(ops, conversion), self.row(ops, conversion), latent, rope, *self.rope_tables(site.rope),
            site.rope.positions, total,
            site.mask.padding if variant.padding else None, self.bias(ops, site) if variant.bias else None,
            *self.up_projections(conversion),
        ]  # fmt: skip
        context, *presents = self.attention_node(ops, site, weights, variant, inputs)
        self.cache_outputs(site, presents, latent, rope)
        replaced, result = self.result(ops, conversion, context)
        self.insert(ops)
        ir.convenience.replace_all_uses_with(replaced, result)

    def constant(self, name: str, array: np.ndarray, dtype: str) -> ir.Value:
        """A new initializer of the model, cast once from float64."""
        cast = np.ascontiguousarray(array.astype(DTYPES[dtype]))
        value = ir.val(name, const_value=ir.tensor(cast, name=name))
        self.graph.register_initializer(value)
        return value

    def row(self, ops: Ops, conversion: Conversion) -> ir.Value:
        """The new cached row [B, S, r + p], its rope part not yet rotated."""
        site, w = conversion.site, conversion.weights
        prefix = f"{site.name}.latent_proj"
        if conversion.behind_norm:
            x = ops("Concat", flat(ops, site.key), flat(ops, site.value), axis=2)
            weight, bias = w.encode.T, w.encode_bias
        else:
            x = site.key.projection.x
            weight, bias = conversion.row_projection()
        product = ops("MatMul", x, self.constant(f"{prefix}.weight", weight, site.dtype))
        return ops("Add", product, self.constant(f"{prefix}.bias", bias, site.dtype))

    def query(self, ops: Ops, conversion: Conversion) -> ir.Value:
        """The query [B, S, H * width] as the node reads it."""
        site, plan = conversion.site, conversion.absorption
        if not plan.query_map:
            return flat(ops, site.query)
        projection, prefix = site.query.projection, f"{site.name}.q_proj_latent"
        weight, bias = plan.fold_query(site, conversion.weights)
        query = ops("MatMul", projection.x, self.constant(f"{prefix}.weight", weight, site.dtype))
        if bias is None:
            return query
        return ops("Add", query, self.constant(f"{prefix}.bias", bias, site.dtype))

    def up_projections(self, conversion: Conversion) -> list[ir.Value | None]:
        """query_map, key_up, key_mean, value_up: an initializer each, None where it is folded away or empty."""
        site, w, plan = conversion.site, conversion.weights, conversion.absorption
        keys = not plan.key_up and w.nope_dim > 0
        present = {
            "query_map": (w.query_map, not plan.query_map), "key_up": (w.key_up, keys),
            "key_mean": (w.key_mean, keys), "value_up": (w.value_up, not plan.value_up),
        }  # fmt: skip
        return [
            self.constant(f"{site.name}.{name}", array, site.dtype) if there else None
            for name, (array, there) in present.items()
        ]

    def result(self, ops: Ops, conversion: Conversion, context: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Which old value gives way to which new one: the context, or the output projection's product."""
        site, w = conversion.site, conversion.weights
        per_group = site.heads // site.kv_groups
        if not conversion.absorption.value_up:
            if w.value_mean.any():
                mean = np.repeat(w.value_mean, per_group, axis=0).reshape(-1)
                context = ops("Add", context, self.constant(f"{site.name}.value_mean", mean, site.dtype))
            return site.context, context
        weight, bias = conversion.absorption.fold_output(site, w)
        prefix = f"{site.name}.o_proj_latent"
        product = ops("MatMul", context, self.constant(f"{prefix}.weight", weight, site.dtype))
        return output_product(site), ops("Add", product, self.constant(f"{prefix}.bias", bias, site.dtype))

    def bias(self, ops: Ops, site: AttentionSite) -> ir.Value:
        """The graph's own mask as something to add to the scores."""
        mask = site.mask.additive
        assert mask is not None  # a mask of kind "additive" has its value
        if mask.dtype == ir.DataType.BOOL:
            zero, hidden = (ops("CastLike", ops.floats(x), site.query.value) for x in (0.0, -np.inf))
            return ops("Where", mask, zero, hidden)
        return mask

    def attention_node(
        self, ops: Ops, site: AttentionSite, w: LatentWeights, v: Variant, inputs: list[ir.Value | None]
    ) -> Sequence[ir.Value]:
        """The node itself, named after its layer."""
        while inputs[-1] is None:
            inputs.pop()
        function = self.function(v)
        outputs = ops.outputs(OP_TYPE, *inputs, count=3, domain=DOMAIN, overload=function.overload)
        node = ops.nodes[-1]
        node.name = f"/{site.name.replace('.', '/')}/LatentAttention"
        node.attributes.update({attribute.name: attribute for attribute in node_attributes(v, w.rope_index)})
        return outputs

    def variant(self, conversion: Conversion) -> Variant:
        """The function body this site needs."""
        site, w, plan = conversion.site, conversion.weights, conversion.absorption
        bands = w.bands
        return Variant(
            num_heads=site.heads, kv_groups=site.kv_groups, rank=w.rank, key_rank=w.key_rank,
            value_offset=w.value_offset, rope_dim=w.rope_dim,
            nope_dim=w.key_rank if plan.key_up else w.nope_dim,
            value_dim=w.value_rank if plan.value_up else site.value_dim,
            band_index=tuple(bands.index.tolist()), band_block=tuple(bands.block.tolist()),
            band_a0=tuple(bands.a0.tolist()), band_a1=tuple(bands.a1.tolist()),
            band_theta=tuple(site.rope.theta[bands.index].tolist()),
            scale=site.scale, softcap=site.softcap, window=site.mask.window,
            causal=site.mask.causal and site.mask.kind == "structured",
            padding=site.mask.kind == "structured" and site.mask.padding is not None,
            bias=site.mask.kind == "additive", query_map=not plan.query_map,
            key_up=not plan.key_up and w.nope_dim > 0, value_up=not plan.value_up, shared_buffer=self.shared_buffer,
            latent_dtype="same" if conversion.row.latent == site.dtype else conversion.row.latent,
            rope_dtype="same" if conversion.row.rope == site.dtype else conversion.row.rope,
            split=conversion.row.split(w.rank, w.rope_dim),
        )  # fmt: skip

    def function(self, variant: Variant) -> ir.Function:
        """The body of a variant; the first goes without an overload name."""
        if variant not in self.functions:
            overload = f"v{len(self.functions)}" if self.functions else ""
            self.functions[variant] = Body(variant).build(overload, self.opset)
        return self.functions[variant]

    def rope_tables(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """cos and sin of every frequency at every position, float32 [max_positions, R/2], shared by equal ropes."""
        for known, values in self.tables:
            if np.array_equal(known.theta, rope.theta):
                return values
        # The angle is rounded to float32 before the cosine is taken, as the models do.
        angle = np.outer(np.arange(self.max_positions, dtype=np.float32), rope.theta.astype(np.float32))
        name = f"mla_pass.rope_{len(self.tables)}"
        cos, sin = (
            self.constant(f"{name}.{kind}", f(angle.astype(np.float64)), "float32")
            for kind, f in (("cos", np.cos), ("sin", np.sin))
        )
        self.tables.append((rope, (cos, sin)))
        return cos, sin

    # ---- caches

    def sizes(self, ops: Ops) -> tuple[ir.Value, ir.Value]:
        """B and S, int64 [1] each."""
        shape = ops("Shape", self.hidden)
        return ops.cut(shape, 0, 1, 0), ops.cut(shape, 1, 2, 0)

    def total_length(self, site: AttentionSite, latent: ir.Value, front: Ops) -> ir.Value:
        """T, int64 [1]: from the attention mask, or, in a growing cache, the past itself.

        Not from an additive mask: its size may have been read off the old caches.
        """
        if self.total is None:
            if site.mask.padding is not None:
                self.total = front.cut(front("Shape", site.mask.padding), -1, np.iinfo(np.int64).max, 0)
            elif not self.shared_buffer:
                self.total = front("Add", front.cut(front("Shape", latent), 2, 3, 0), self.sizes(front)[1])
            else:
                raise MlaPassError(
                    f"{site.name}: the graph reads no attention mask, so nothing tells how many rows of a shared cache "
                    "are filled; convert with cache='growing'"
                )
        return self.total

    def cache_inputs(self, conversion: Conversion) -> tuple[ir.Value, ir.Value]:
        """New graph inputs past.{layer}.latent and .rope, or .row_0 and .row_1, in place of past keys and values."""
        site, w, row, inputs = conversion.site, conversion.weights, conversion.row, self.graph.inputs
        rows = "capacity" if self.shared_buffer else "past"
        split = row.split(w.rank, w.rope_dim)
        names = HALVES if row.halves else ("latent", "rope")
        sizes = (split, w.rank + w.rope_dim - split)
        batch = site.cache.past_key.shape[0]
        made = [
            ir.Value(
                name=f"past.{site.layer}.{kind}",
                shape=ir.Shape([batch, 1, rows, stored_width(numbers, dtype)]),
                type=ir.TensorType(ir.DataType.from_numpy(STORED[dtype])),
            )
            for kind, numbers, dtype in zip(names, sizes, (row.latent, row.rope), strict=True)
        ]
        for old, new in zip((site.cache.past_key, site.cache.past_value), made, strict=True):
            inputs[inputs.index(old)] = new
        return made[0], made[1]

    def cache_outputs(
        self, site: AttentionSite, presents: Sequence[ir.Value], latent: ir.Value, rope: ir.Value
    ) -> None:
        """New graph outputs, named and sized as the inputs, in place of present keys and values."""
        outputs = self.graph.outputs
        olds = (site.cache.present_key, site.cache.present_value)
        for old, new, past in zip(olds, presents, (latent, rope), strict=True):
            assert past.name is not None and past.shape is not None  # made by cache_inputs
            batch, one, rows, width = past.shape.dims
            dims = [batch, one, rows if self.shared_buffer else "total", width]
            new.name, new.shape, new.type = past.name.replace("past", "present", 1), ir.Shape(dims), past.type
            outputs[outputs.index(old)] = new

    def drop_old_caches(self, sites: Sequence[AttentionSite]) -> None:
        """Remove what only the old attention needed; sizes once read off the old caches come from the new inputs."""
        RemoveUnusedNodesPass()(self.model)
        for site in sites:
            for past, branch in ((site.cache.past_key, site.key), (site.cache.past_value, site.value)):
                for node, _ in list(past.uses()):
                    if node.op_type != "Shape" or node.domain not in ("", "ai.onnx"):
                        raise MlaPassError(
                            f"{site.name}: {node.op_type} node {node.name!r} still reads {past.name!r}, which the "
                            "conversion removes; expected only the attention and Shape nodes to read a cache"
                        )
                    self.replace_shape(node, branch)
        RemoveUnusedNodesPass()(self.model)

    def past(self, ops: Ops, new: ir.Value) -> ir.Value:
        """Rows that the caches hold before this run, int64 [1]."""
        assert self.total is not None  # set with the first site
        return ops("Sub", self.total, new)

    def replace_shape(self, node: ir.Node, branch: Branch) -> None:
        """Shape(past) -> [batch, kv heads, total - new, head size], cut as the node cuts it."""
        ops = Ops(f"{node.name or node.outputs[0].name}/")
        batch, new = self.sizes(ops)
        shape = ops("Concat", batch, ops.ints(branch.heads), self.past(ops, new), ops.ints(branch.head_dim), axis=0)
        result = ops.cut(shape, *shape_span(node), 0)
        self.insert(ops)
        ir.convenience.replace_all_uses_with(node.outputs[0], result)
        self.graph.remove(node, safe=True)


def shape_span(node: ir.Node) -> tuple[int, int]:
    """Start and end of the dims of four that a Shape node gives."""
    start, end = (node.attributes[k].as_int() if k in node.attributes else d for k, d in (("start", 0), ("end", 4)))
    return start, end


def flat(ops: Ops, branch: Branch) -> ir.Value:
    """A branch's value as [B, S, heads * size]."""
    value = branch.value
    if branch.layout == "BSE":
        return value
    if branch.layout == "BHSD":
        value = ops("Transpose", value, perm=[0, 2, 1, 3])
    return ops.reshape(value, 0, 0, branch.heads * branch.head_dim)


def output_product(site: AttentionSite) -> ir.Value:
    """The value behind the output projection and its bias, when it is projected in the graph's usual way."""
    readers = [node for node, _ in site.context.uses()]
    if len(readers) != 1 or readers[0].op_type not in ("MatMul", "Gemm"):
        raise MlaPassError(
            f"{site.name}: absorb='always' folds value_up into the output projection, but the context is read by "
            f"{', '.join(node.op_type for node in readers)}; use absorb='auto'"
        )
    product = readers[0].outputs[0]
    if site.output.bias is None or readers[0].op_type == "Gemm":
        return product
    (adder, _), *more = product.uses()
    if more or adder.op_type != "Add":
        raise MlaPassError(f"{site.name}: the output projection's bias is not a single Add; use absorb='auto'")
    return adder.outputs[0]
