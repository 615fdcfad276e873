"""``mla_pass::LatentAttention`` as an ONNX function of stock operators, so that any runtime can run it.

One node updates the cache, rotates the new row's rope part, attends over the latents and decodes the values.

Dimensions: B batch, S new tokens, T total; H heads, G kv groups, D head size, V value head size; r rank, p rope dims,
C capacity, R rotary dims; n = 2*m + u un-rotated dims: m band pairs and u dims left still. Keys read the first k =
key_rank columns of the latent, values the last w = rank - value_offset.

Inputs
    query [B, S, H*D], or [B, S, H*(n+p)] per head [un-rotated, rope] without query_map; without key_up n = k
    row [B, S, r+p]          new rows [latent, rope real parts, rope imaginary parts], not yet rotated
    past_latent [B, 1, C, r], past_rope [B, 1, C, p]: of the model's type, of 16 bits, or of 8 with four codes behind
        each row (mla_pass.storage). A row [latent, rotated rope part] is cut at column `split`, which is r but where a
        runtime asks for something else: then [B, 1, C, split] and [B, 1, C, r+p-split]
    cos, sin [max, R/2]      float32 table of every frequency of the site's rope
    position_ids [B or 1, S] int64: position of each new token, for the cached rotation
    total_length [1]         int64, T: the new rows are rows T-S..T-1 of the cache
    padding_mask [B, T]      int64, optional: 0 hides a key
    attention_bias [B or 1, 1 or H, S, T]  optional, added to the scores
    query_map [G, D, n+p], key_up [G, n, k], key_mean [G, n], value_up [G, w, V]  each absent when folded away
Outputs
    context [B, S, H*V] (w in place of V without value_up), present_latent, present_rope: the past with the new rows
Attributes, every one written on the node: num_heads, kv_groups, rank, key_rank (all of rank if not said),
    value_offset (0 if not said), rope_dim, nope_dim, split, rope_index [p/2] and band_index [m] (columns of the
    tables), band_block, band_a0, band_a1 [m], scale, softcap (0: none), local_window_size (-1: none), causal,
    shared_buffer.

Scores come in two forms that give the same numbers. Expanded: the keys are decoded, turned by their block's factor and
multiplied with the query; cheaper for many new tokens. Absorbed: for each block the query is turned to the block's
first row and pulled through key_up, once for the constant and once for the slope of the fit; coarse blocks hand their
queries down to the finer ones, and only the finest meet the cache. Pairs in blocks of one row are decoded in either
form: that takes less, as heads share keys. With delta counted from a block's first row the fit
reads A0 + A1 delta, A1 = j a1 exp(j theta (block-1)/2), A0 = (a0 - j a1 (block-1)/2) exp(j theta (block-1)/2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mla_pass.fold.arithmetic import band_flops
from mla_pass.fold.bands import levels_of
from mla_pass.onnx.ops import Ops
from mla_pass.storage import CODED, OCTAVE, SEGMENTS, float8_numbers, segment_length, segment_of

DOMAIN = "mla_pass"
OP_TYPE = "LatentAttention"
INPUTS = (
    "query", "row", "past_latent", "past_rope", "cos", "sin", "position_ids", "total_length",
    "padding_mask", "attention_bias", "query_map", "key_up", "key_mean", "value_up",
)  # fmt: skip
_INT, _INTS, _FLOAT, _FLOATS = (getattr(ir.AttributeType, name) for name in ("INT", "INTS", "FLOAT", "FLOATS"))
ATTRIBUTES = {
    "num_heads": _INT, "kv_groups": _INT, "rank": _INT, "key_rank": _INT, "value_offset": _INT, "rope_dim": _INT,
    "nope_dim": _INT, "split": _INT, "rope_index": _INTS, "band_index": _INTS, "band_block": _INTS, "band_a0": _FLOATS,
    "band_a1": _FLOATS, "scale": _FLOAT, "softcap": _FLOAT, "local_window_size": _INT, "causal": _INT,
    "shared_buffer": _INT,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """All that tells one function body from another; sites with equal variants share a body."""

    num_heads: int
    kv_groups: int
    rank: int
    key_rank: int
    value_offset: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    band_index: tuple[int, ...]
    band_block: tuple[int, ...]
    band_a0: tuple[float, ...]
    band_a1: tuple[float, ...]
    band_theta: tuple[float, ...]
    scale: float
    softcap: float
    window: int
    causal: bool
    padding: bool
    bias: bool
    query_map: bool
    key_up: bool
    value_up: bool
    shared_buffer: bool
    latent_dtype: str
    rope_dtype: str
    """What the two parts of a row are stored as: `same` as the model, float16, bfloat16, int8 or float8."""
    split: int
    """Numbers of a row in the first part: the rank, unless the two tensors do not tell latent from rope."""

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """(block, first pair, end pair) of each run of equal blocks, finest first."""
        return levels_of(np.array(self.band_block))

    @property
    def decoded(self) -> int:
        """Band pairs, the first ones, whose keys are decoded in either form: those in blocks of one row."""
        return sum(block == 1 for block in self.band_block)

    @property
    def order(self) -> int:
        """1 when any band follows the offset within its block."""
        return int(any(self.band_a1))

    @property
    def value_rank(self) -> int:
        """Columns of the latent that the values read."""
        return self.rank - self.value_offset

    @property
    def expand_from(self) -> int:
        """New tokens from which decoding keys and values costs fewer FLOPs than absorbing the queries.

        Multiply-adds per cached row; a map that is folded away is read alike in both forms and takes no part.
        """
        absorbed = expanded = decoding = 0.0
        if self.key_up:
            orders, k, n = 1 + self.order, self.key_rank, self.nope_dim
            absorbed += band_flops(self.levels, orders, k, self.num_heads // self.kv_groups) + orders * k
            expanded += n
            decoding += k * n + 6 * len(self.band_index)
        if self.value_up:
            absorbed += self.value_rank
            expanded += self.value_dim
            decoding += self.value_rank * self.value_dim
        saved = self.num_heads * (absorbed - expanded)
        return int(np.ceil(self.kv_groups * decoding / saved)) if saved > 0 else 1 << 30


def node_attributes(v: Variant, rope_index: np.ndarray) -> list[ir.Attr]:
    """Every attribute of a node, written out: a kernel does not see a function's defaults."""
    integers = {
        "num_heads": v.num_heads, "kv_groups": v.kv_groups, "rank": v.rank, "key_rank": v.key_rank,
        "value_offset": v.value_offset, "rope_dim": v.rope_dim, "nope_dim": v.nope_dim, "split": v.split,
        "local_window_size": v.window if v.window > 0 else -1, "causal": int(v.causal),
        "shared_buffer": int(v.shared_buffer),
    }  # fmt: skip
    # Lists carry their types: an empty one has none to infer.
    lists: dict[str, Iterable[int]] = {"rope_index": rope_index, "band_index": v.band_index, "band_block": v.band_block}
    return [
        *(ir.AttrInt64(name, value) for name, value in integers.items()),
        *(ir.AttrInt64s(name, [int(x) for x in values]) for name, values in lists.items()),
        *(ir.AttrFloat32(name, value) for name, value in (("scale", v.scale), ("softcap", v.softcap))),
        *(ir.AttrFloat32s(name, list(values)) for name, values in (("band_a0", v.band_a0), ("band_a1", v.band_a1))),
    ]


class Body:
    """Writes one variant; each method is one step of the operator and returns the values the next one reads."""

    def __init__(self, variant: Variant) -> None:
        """Declare the function's inputs; nothing is written yet."""
        self.v = variant
        self.o = Ops("")
        self.inputs = {name: ir.Value(name=name) for name in INPUTS}

    def build(self, overload: str, opset: int) -> ir.Function:
        """The function, to be stored in the model under `overload`, written for ai.onnx `opset` (18 or newer)."""
        o, v, inputs = self.o, self.v, self.inputs
        self.count_rows()
        latent, rope, presents = self.write_rows()
        nope, rope_query = self.split_query()
        self.many = o("GreaterOrEqual", self.new, o.ints(v.expand_from))
        parts = []
        if v.rope_dim:
            parts.append(o("MatMul", rope_query, o("Transpose", rope, perm=[0, 1, 3, 2])))  # [B, 1, H*S, T]
        if v.nope_dim:
            parts.append(self.nope_scores(nope, self.columns_between(latent, 0, v.key_rank)))
        scores = o("Add", *parts) if len(parts) == 2 else parts[0]
        context = self.context(self.softmax(scores), self.columns_between(latent, v.value_offset, v.rank))
        outputs = [context, *presents]
        for value, name in zip(outputs, ("context", "present_latent", "present_rope"), strict=True):
            value.name = name
        graph = ir.Graph(list(inputs.values()), outputs, nodes=o.nodes, name=OP_TYPE, opset_imports={"": opset})
        attributes = [ir.Attr(name, kind, None) for name, kind in ATTRIBUTES.items()]
        return ir.Function(DOMAIN, OP_TYPE, overload, graph=graph, attributes=attributes)

    # ---- rows and positions

    def count_rows(self) -> None:
        """Sizes every step needs: new = S [1], total = T [1], `rows` [S] the cache rows of the new tokens."""
        o, i = self.o, self.inputs
        shape = o("Shape", i["query"])
        self.batch, self.new = o.cut(shape, 0, 1, 0), o.cut(shape, 1, 2, 0)
        self.total = i["total_length"]
        self.rows = self.range(o, o("Sub", self.total, self.new), self.total)

    @staticmethod
    def range(o: Ops, start: ir.Value | None, end: ir.Value, step: int = 1) -> ir.Value:
        """start, start + step, ... below end; both int64 [1]."""
        first = o("Squeeze", start) if start is not None else o.scalar(0)
        return o("Range", first, o("Squeeze", end), o.scalar(step))

    def columns(self, o: Ops, table: ir.Value, rows: ir.Value, columns: ir.Value) -> ir.Value:
        """table[rows][..., columns], float32 [*rows, len(columns)]."""
        return o("Gather", o("Gather", table, rows, axis=0), columns, axis=-1)

    def columns_between(self, latent: ir.Value, start: int, end: int) -> ir.Value:
        """The latent's columns from `start` to `end`, the latent itself where these are all."""
        return latent if end - start == self.v.rank else self.o.cut(latent, start, end, 3)

    def turn(self, o: Ops, re: ir.Value, im: ir.Value, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(re + j im) * (cos + j sin)."""
        turned_re = o("Sub", o("Mul", re, cos), o("Mul", im, sin))
        return turned_re, o("Add", o("Mul", re, sin), o("Mul", im, cos))

    def turn_rope(self, x: ir.Value, axes: tuple[int, ...]) -> ir.Value:
        """Rotate x [..., S, p] by its tokens' positions in float32; `axes` are inserted into the angles [B, S, p/2]."""
        o, half = self.o, self.v.rope_dim // 2
        cos, sin = (o.unsqueeze(a, *axes) if axes else a for a in self.angles)
        x32 = o("Cast", x, to=ir.DataType.FLOAT)
        re, im = o.cut(x32, 0, half, -1), o.cut(x32, half, 2 * half, -1)
        return o("CastLike", o("Concat", *self.turn(o, re, im, cos, sin), axis=-1), x)

    # ---- cache

    def write_rows(self) -> tuple[ir.Value, ir.Value, tuple[ir.Value, ir.Value]]:
        """Rotate and store the new rows. Returns latents and rope parts of the T live rows, and both presents."""
        o, v, i = self.o, self.v, self.inputs
        index = ir.Value(name="rope_columns")
        node = ir.Node(
            "", "Constant", [], [ir.RefAttr("value_ints", "rope_index", ir.AttributeType.INTS)], outputs=[index]
        )
        o.nodes.append(node)
        self.angles = [self.columns(o, i[table], i["position_ids"], index) for table in ("cos", "sin")]
        latent = o.cut(i["row"], 0, v.rank, 2)
        rope = o.cut(i["row"], v.rank, v.rank + v.rope_dim, 2)
        rope = self.turn_rope(rope, ()) if v.rope_dim else rope
        live, presents = [], []
        rest = v.rank + v.rope_dim - v.split
        first, second = self.cut_again(latent, rope, v.rank, v.split, 2)
        parts = (("past_latent", first, v.split, v.latent_dtype), ("past_rope", second, rest, v.rope_dtype))
        for name, new, width, dtype in parts:
            past, new = i[name], self.packed(o.unsqueeze(new, 1), i[name], width, dtype)
            if v.shared_buffer:
                # ScatterND, unlike Concat, writes in place when past and present are bound to one buffer.
                present = o("ScatterND", past, self.row_index(), new)
                rows = o.cut(present, o.ints(0), self.total, 2)
            else:
                rows = present = o("Concat", past, new, axis=2)
            live.append(self.unpacked(rows, width, dtype))
            presents.append(present)
        return *self.cut_again(live[0], live[1], v.split, v.rank, 3), (presents[0], presents[1])

    def cut_again(self, a: ir.Value, b: ir.Value, was: int, at: int, axis: int) -> tuple[ir.Value, ir.Value]:
        """Two parts of a row that was cut at column `was`, cut at column `at`."""
        if was == at:
            return a, b
        o, width = self.o, self.v.rank + self.v.rope_dim
        whole = o("Concat", a, b, axis=axis)
        return o.cut(whole, 0, at, axis), o.cut(whole, at, width, axis)

    def packed(self, x: ir.Value, past: ir.Value, width: int, dtype: str) -> ir.Value:
        """Rows [B, 1, S, width] as they are stored in `past`; 8 bits as in `mla_pass.storage.encoded`."""
        o = self.o
        if dtype == "same":
            return x
        if dtype not in CODED:
            return o("CastLike", x, past)
        length, coded = segment_length(width), CODED[dtype]
        x = o("Cast", x, to=ir.DataType.FLOAT)
        padded = o("Pad", x, o.ints(0, SEGMENTS * length - width), None, o.ints(3))
        parts = o.reshape(padded, 0, 0, 0, SEGMENTS, length)
        top = o("ReduceMax", o("Abs", parts), o.ints(4), keepdims=0)  # [B, 1, S, 4]
        # A segment of zeros has the logarithm -inf, and gets the least code.
        code = o("Mul", o("Log", o("Div", top, o.floats(coded.largest))), o.floats(OCTAVE / np.log(2)))
        code = o("Clip", o("Ceil", code), o.floats(-128), o.floats(127))
        q = o("Div", parts, o.unsqueeze(self.step(code), 4))
        q = o("Clip", q, o.floats(-coded.largest), o.floats(coded.largest))
        whole = o.reshape(self.float8_bits(q) if dtype == "float8" else o("Round", q), 0, 0, 0, SEGMENTS * length)
        row = o("Concat", o.cut(whole, 0, width, 3), o("Add", code, o.floats(coded.zero)), axis=3)
        return o("Cast", row, to=ir.DataType.from_numpy(coded.element))

    def float8_bits(self, q: ir.Value) -> ir.Value:
        """The bits, as floats, of the float8 E4M3 nearest to each q of at most 448.

        A number in [2^e, 2^(e + 1)) lies m steps of 2^(e - 3) from zero, m in [8, 16], and has the bits 8 (e + 6) + m;
        so do all below 2^-6, with e = -6. A logarithm that just misses a whole number does no harm: there the steps of
        both sides meet.
        """
        o = self.o
        size = o("Abs", q)
        binade = o("Floor", o("Mul", o("Log", size), o.floats(1 / np.log(2))))
        binade = o("Add", o("Clip", binade, o.floats(-6), o.floats(8)), o.floats(6))  # e + 6, of log 0 too
        steps = o("Gather", o.floats(2.0 ** (9 - np.arange(15))), o("Cast", binade, to=ir.DataType.INT64))
        bits = o("Add", o("Mul", binade, o.floats(8)), o("Round", o("Mul", size, steps)))
        negative = o("Cast", o("Less", q, o.floats(0)), to=ir.DataType.FLOAT)
        return o("Add", bits, o("Mul", negative, o.floats(128)))

    def unpacked(self, rows: ir.Value, width: int, dtype: str) -> ir.Value:
        """The numbers [B, 1, T, width] of stored rows, in the model's type; as `mla_pass.storage.decoded`."""
        o = self.o
        if dtype == "same":
            return rows
        if dtype not in CODED:
            return o("CastLike", rows, self.inputs["query"])
        code = o("Cast", o.cut(rows, width, width + SEGMENTS, 3), to=ir.DataType.FLOAT)
        code = o("Sub", code, o.floats(CODED[dtype].zero))
        scale = o("Gather", self.step(code), o.ints(*segment_of(width).tolist()), axis=3)
        q = o.cut(rows, 0, width, 3)
        if dtype == "float8":
            q = o("Gather", o.floats(float8_numbers()), o("Cast", q, to=ir.DataType.INT32))
        else:
            q = o("Cast", q, to=ir.DataType.FLOAT)
        return o("CastLike", o("Mul", q, scale), self.inputs["query"])

    def step(self, code: ir.Value) -> ir.Value:
        """2^(code / 8), float32."""
        return self.o("Exp", self.o("Mul", code, self.o.floats(np.log(2) / OCTAVE)))

    def row_index(self) -> ir.Value:
        """Where the new rows go: (batch, 0, row) for each, [B, 1, S, 3]."""
        o = self.o
        shape = o("Concat", self.batch, o.ints(1), self.new, o.ints(1), axis=0)
        batch = o.reshape(self.range(o, None, self.batch), -1, 1, 1, 1)
        row = o.reshape(self.rows, 1, 1, -1, 1)
        parts = [o("Expand", part, shape) for part in (batch, o.reshape(o.ints(0), 1, 1, 1, 1), row)]
        return o("Concat", *parts, axis=3)

    # ---- queries

    def split_query(self) -> tuple[ir.Value, ir.Value]:
        """Un-rotated queries [B, G, H/G*S, n] and rotated rope queries [B, 1, H*S, p]."""
        o, v, i = self.o, self.v, self.inputs
        per_group = v.num_heads // v.kv_groups
        query = o.reshape(i["query"], 0, 0, v.kv_groups, per_group, -1)
        query = o("Transpose", query, perm=[0, 2, 3, 1, 4])  # [B, G, H/G, S, .]
        width = v.nope_dim + v.rope_dim
        if v.query_map:
            query = o(
                "Reshape", query, o("Concat", o.ints(0, v.kv_groups, -1), o.cut(o("Shape", query), 4, 5, 0), axis=0)
            )
            query = o("MatMul", query, i["query_map"])
        query = o.reshape(query, 0, v.kv_groups, -1, width)
        nope, rope = o.cut(query, 0, v.nope_dim, 3), o.cut(query, v.nope_dim, width, 3)
        if v.rope_dim:
            rope = self.turn_rope(o.reshape(rope, 0, v.num_heads, -1, v.rope_dim), (1,))
            rope = o.reshape(rope, 0, 1, -1, v.rope_dim)
        return nope, rope

    def nope_scores(self, nope: ir.Value, latent: ir.Value) -> ir.Value:
        """Scores of everything that is not cached rotated, [B, 1, H*S, T]; `latent` holds the keys' columns, k."""
        o, v = self.o, self.v
        if not v.key_up:
            return o("MatMul", o.reshape(nope, 0, 1, -1, v.nope_dim), o("Transpose", latent, perm=[0, 1, 3, 2]))
        m = len(v.band_index)
        tables = self.absorbed_tables(m) if m else None
        expanded, absorbed = o.branch(), o.branch()
        many = self.expanded_scores(expanded, nope, latent, m)
        few = self.absorbed_scores(absorbed, nope, latent, m, tables)
        return o(
            "If", self.many,
            then_branch=expanded.graph([many], "expanded"), else_branch=absorbed.graph([few], "absorbed"),
        )  # fmt: skip

    # ---- expanded form

    def expanded_scores(self, o: Ops, nope: ir.Value, latent: ir.Value, m: int) -> ir.Value:
        """Decode the keys, turn them by their blocks' factors, multiply with the rotated queries."""
        v, i = self.v, self.inputs
        if not m:
            return self.key_products(o, nope, self.decoded_keys(o, latent, i["key_up"], i["key_mean"]))
        return self.turned_scores(o, nope, latent, v.levels, still=v.nope_dim > 2 * m)

    def turned_scores(
        self, o: Ops, nope: ir.Value, latent: ir.Value, levels: list[tuple[int, int, int]], *, still: bool
    ) -> ir.Value:
        """Scores of the pairs of these levels, and of the dims that do not turn if they are asked for, too."""
        v, i, m, end = self.v, self.inputs, len(self.v.band_index), levels[-1][2]

        def dims(x: ir.Value, axis: int) -> list[ir.Value]:
            parts = [o.cut(x, 0, end, axis), o.cut(x, m, m + end, axis)]
            return [*parts, o.cut(x, 2 * m, v.nope_dim, axis)] if still else parts

        query = o.reshape(nope, 0, v.num_heads, -1, v.nope_dim)
        re, im, *rest = dims(query, 3)
        columns = o.ints(*v.band_index[:end])
        angles = [o("CastLike", self.columns(o, i[t], self.rows, columns), nope) for t in ("cos", "sin")]
        query = o("Concat", *self.turn(o, re, im, *angles), *rest, axis=3)
        width = 2 * end + (v.nope_dim - 2 * m if still else 0)
        up, mean = (o("Concat", *dims(i[name], 1), axis=1) for name in ("key_up", "key_mean"))
        keys = self.decoded_keys(o, latent, up, mean)
        factor = [o("CastLike", part, keys) for part in self.band_factor(o, levels)]
        turned = self.turn(o, o.cut(keys, 0, end, 3), o.cut(keys, end, 2 * end, 3), *factor)
        keys = o("Concat", *turned, o.cut(keys, 2 * end, width, 3), axis=3)
        return self.key_products(o, o.reshape(query, 0, v.kv_groups, -1, width), keys)

    @staticmethod
    def decoded_keys(o: Ops, latent: ir.Value, up: ir.Value, mean: ir.Value) -> ir.Value:
        """Keys [B, G, T, d] by `up` [G, d, k] and `mean` [G, d], not yet turned."""
        keys = o("MatMul", latent, o("Transpose", up, perm=[0, 2, 1]))
        return o("Add", keys, o.unsqueeze(mean, 1))

    def key_products(self, o: Ops, query: ir.Value, keys: ir.Value) -> ir.Value:
        """Query [B, G, H/G*S, d] times keys [B, G, T, d]: [B, 1, H*S, T]."""
        scores = o("MatMul", query, o("Transpose", keys, perm=[0, 1, 3, 2]))
        return o("Reshape", scores, o("Concat", o.ints(0, 1, -1), self.total, axis=0))

    def band_factor(self, o: Ops, levels: list[tuple[int, int, int]]) -> tuple[ir.Value, ir.Value]:
        """exp(j theta first_row(block)) * (A0 + A1 delta) for every row and pair of the levels: two float32 [T, .]."""
        rows = self.range(o, None, self.total)
        parts = []
        for block, a, b in levels:
            first = o("Mul", o("Div", rows, o.scalar(block)), o.scalar(block))
            delta = o.unsqueeze(o("Cast", o("Sub", rows, first), to=ir.DataType.FLOAT), 1)
            columns = o.ints(*self.v.band_index[a:b])
            cos, sin = (self.columns(o, self.inputs[t], first, columns) for t in ("cos", "sin"))
            constant, slope = (fit[a:b] for fit in self.fits())
            fit = [
                o("Add", o.floats(part(constant)), o("Mul", delta, o.floats(part(slope))))
                for part in (np.real, np.imag)
            ]
            parts.append(self.turn(o, cos, sin, *fit))
        re, im = zip(*parts, strict=True)
        return o("Concat", *re, axis=1), o("Concat", *im, axis=1)

    def fits(self) -> tuple[np.ndarray, np.ndarray]:
        """A0, A1 [m] complex, for delta counted from the first row of a block."""
        v = self.v
        a0, a1, middle = np.array(v.band_a0), np.array(v.band_a1), (np.array(v.band_block) - 1) / 2
        phase = np.exp(1j * np.array(v.band_theta) * middle)
        return phase * (a0 - 1j * a1 * middle), phase * 1j * a1

    # ---- absorbed form

    def absorbed_tables(self, m: int) -> list[ir.Value]:
        """Per level the matrix that takes a turned query's pairs to latent queries, [G, 2*pairs, orders*(k+1)].

        Columns: A0 * [key_up | key_mean], then A1 * the same. Outside the branches, so that a runtime folds it once.
        """
        o, i = self.o, self.inputs
        up = o("Concat", i["key_up"], o.unsqueeze(i["key_mean"], 2), axis=2)  # [G, n, k+1]
        re, im = o.cut(up, 0, m, 1), o.cut(up, m, 2 * m, 1)
        orders = []
        for fit in self.fits()[: 1 + self.v.order]:
            factor = [o("CastLike", o.floats(part[:, None]), up) for part in (fit.real, fit.imag)]
            orders.append(self.turn(o, re, im, *factor))
        tables = []
        for _, a, b in self.absorbed_levels():
            parts = [o("Concat", *[o.cut(x[k], a, b, 1) for x in orders], axis=2) for k in (0, 1)]
            tables.append(o("Concat", *parts, axis=1))
        return tables

    def absorbed_scores(
        self, o: Ops, nope: ir.Value, latent: ir.Value, m: int, tables: list[ir.Value] | None
    ) -> ir.Value:
        """Pull the queries through key_up, block by block where they turn, and meet the latents."""
        v = self.v
        absorbed = self.absorbed_levels()
        if v.decoded:
            fine = self.turned_scores(o, nope, latent, v.levels[:1], still=False)
            if not absorbed and v.nope_dim == 2 * m:
                return fine
            return o("Add", fine, self.absorbed_sums(o, nope, latent, m, tables))
        return self.absorbed_sums(o, nope, latent, m, tables)

    def absorbed_levels(self) -> list[tuple[int, int, int]]:
        """Those levels whose keys are not decoded."""
        return self.v.levels[1:] if self.v.decoded else self.v.levels

    def absorbed_sums(
        self, o: Ops, nope: ir.Value, latent: ir.Value, m: int, tables: list[ir.Value] | None
    ) -> ir.Value:  # fmt: skip
        """The scores of all pairs but those decoded."""
        v = self.v
        still = self.still_queries(o, nope, m)
        if not tables:
            assert still is not None  # without absorbed bands there are still dims, or nothing to do here
            # One scalar per query stands for the mean; it matters only under a softcap.
            scores = o("MatMul", o.cut(still, 0, v.key_rank, 3), o("Transpose", latent, perm=[0, 1, 3, 2]))
            return o("Add", scores, o.cut(still, v.key_rank, v.key_rank + 1, 3))
        pairs = o.reshape(o.cut(nope, 0, 2 * m, 3), 0, v.num_heads, -1, 2 * m)  # [B, H, S, 2m]
        carried: list[ir.Value] | None = None
        block = first = None
        for (size, a, b), table in zip(reversed(self.absorbed_levels()), reversed(tables), strict=True):
            finer = self.range(o, None, self.total, size)  # first row of each block, [blocks]
            level = self.level_queries(o, pairs, finer, (a, b, m), table)
            if carried is not None:
                level = self.hand_down(o, carried, level, first, finer, block)
            carried, block, first = level, size, finer
        assert carried is not None and block is not None  # tables are there, so there is a level
        if still is not None:
            carried[0] = o("Add", carried[0], o("Transpose", still, perm=[0, 2, 1, 3]))
        return self.meet(o, carried, latent, block)

    def still_queries(self, o: Ops, nope: ir.Value, m: int) -> ir.Value | None:
        """Latent queries of the dims that do not turn, with the mean's scalar last: [B, 1, H*S, k+1]."""
        v, i = self.v, self.inputs
        if v.nope_dim == 2 * m:
            return None
        up = o("Concat", i["key_up"], o.unsqueeze(i["key_mean"], 2), axis=2)
        query = o("MatMul", o.cut(nope, 2 * m, v.nope_dim, 3), o.cut(up, 2 * m, v.nope_dim, 1))
        return o.reshape(query, 0, 1, -1, v.key_rank + 1)

    def level_queries(
        self, o: Ops, pairs: ir.Value, first: ir.Value, span: tuple[int, int, int], table: ir.Value
    ) -> list[ir.Value]:
        """One level's latent queries of each order: [B, H*S, blocks, k+1] from pairs [B, H, S, 2m]."""
        v, (a, b, m) = self.v, span
        columns = o.ints(*v.band_index[a:b])
        distance = o("Sub", o.unsqueeze(self.rows, 1), o.unsqueeze(first, 0))  # [S, blocks]
        angles = self.angles_at(o, distance, columns, pairs)
        re, im = (o.unsqueeze(o.cut(pairs, x + a, x + b, 3), 3) for x in (0, m))
        turned = o("Concat", *self.turn(o, re, im, *angles), axis=-1)  # [B, H, S, blocks, 2*pairs]
        absorbed = o("MatMul", o.reshape(turned, 0, v.kv_groups, -1, 2 * (b - a)), table)
        shape = o("Concat", o.ints(0, -1), o("Shape", first), o.ints((1 + v.order) * (v.key_rank + 1)), axis=0)
        absorbed = o("Reshape", absorbed, shape)
        if not v.order:
            return [absorbed]
        return list(o.outputs("Split", absorbed, count=2, axis=3, num_outputs=2))

    def angles_at(self, o: Ops, distance: ir.Value, columns: ir.Value, like: ir.Value) -> list[ir.Value]:
        """cos and sin [*distance, columns], of any sign where a query may look ahead."""
        cos, sin = (self.inputs[table] for table in ("cos", "sin"))
        if self.v.causal:  # a block ahead is hidden, whatever its angle
            there = o("Max", distance, o.ints(0))
            return [o("CastLike", self.columns(o, table, there, columns), like) for table in (cos, sin)]
        there = o("Abs", distance)
        sign = o.unsqueeze(o("Cast", o("Sign", distance), to=ir.DataType.FLOAT), -1)
        turned = self.columns(o, cos, there, columns), o("Mul", self.columns(o, sin, there, columns), sign)
        return [o("CastLike", x, like) for x in turned]

    def hand_down(
        self,
        o: Ops,
        coarse: list[ir.Value],
        fine: list[ir.Value],
        first: ir.Value | None,
        finer: ir.Value,
        block: int | None,
    ) -> list[ir.Value]:
        """Add the coarse blocks' queries to those of the finer blocks within them, moved to the finer first rows."""
        assert first is not None and block is not None  # a coarser level came before
        parent = o("Div", finer, o.scalar(block))
        inherited = [o("Gather", x, parent, axis=2) for x in coarse]
        sums = [o("Add", x, y) for x, y in zip(inherited, fine, strict=True)]
        if len(sums) == 2:
            moved = o("Sub", finer, o("Gather", first, parent, axis=0))
            moved = o("CastLike", o.unsqueeze(moved, 1), sums[0])
            sums[0] = o("Add", sums[0], o("Mul", inherited[1], moved))
        return sums

    def meet(self, o: Ops, queries: list[ir.Value], latent: ir.Value, block: int) -> ir.Value:
        """Scores [B, 1, H*S, T] of the finest blocks' queries, each [B, H*S, blocks, k+1], with those blocks' rows."""
        v = self.v
        fill = o("Mod", o("Neg", self.total), o.scalar(block))
        padded = o("Pad", latent, o("Concat", o.ints(0), fill, axis=0), None, o.ints(2))
        rows = o.reshape(padded, 0, -1, block, v.key_rank)  # [B, blocks, block, k]
        query = o("Concat", *queries, axis=1) if len(queries) > 1 else queries[0]
        query = o("Transpose", query, perm=[0, 2, 3, 1])  # [B, blocks, k+1, orders*H*S]
        scores = o("MatMul", rows, o.cut(query, 0, v.key_rank, 2))
        scores = o("Add", scores, o.cut(query, v.key_rank, v.key_rank + 1, 2))
        if len(queries) > 1:
            constant, slope = o.outputs("Split", scores, count=2, axis=3, num_outputs=2)
            delta = o("CastLike", o.floats(np.arange(block)[:, None]), scores)
            scores = o("Add", constant, o("Mul", slope, delta))
        scores = o.reshape(o("Transpose", scores, perm=[0, 3, 1, 2]), 0, 0, -1)  # [B, H*S, blocks*block]
        return o.unsqueeze(o.cut(scores, o.ints(0), self.total, 2), 1)

    # ---- softmax and values

    def softmax(self, scores: ir.Value) -> ir.Value:
        """Attention weights [B, H, S, T] from raw scores [B, 1, H*S, T]; rows that see nothing are zero."""
        o, v, i = self.o, self.v, self.inputs
        scores = o("Reshape", scores, o("Concat", o.ints(0, v.num_heads, -1), self.total, axis=0))
        scores = o("Mul", scores, o("CastLike", o.floats(v.scale), scores))
        if v.softcap:
            cap = o("CastLike", o.floats(v.softcap), scores)
            scores = o("Mul", o("Tanh", o("Div", scores, cap)), cap)
        keep = self.keep()
        if keep is None and not v.bias:
            return o("Softmax", scores, axis=-1)
        zero, hidden = (o("CastLike", o.floats(x), scores) for x in (0.0, -np.inf))
        if keep is not None:
            scores = o("Where", keep, scores, hidden)
        if not v.bias:
            return o("Where", keep, o("Softmax", scores, axis=-1), zero)
        scores = o("Add", scores, i["attention_bias"])
        # A row that sees nothing has no largest score; a score that is no number must not pass for that.
        blind = o("Equal", o("ReduceMax", scores, o.ints(-1), keepdims=1), hidden)
        return o("Where", blind, zero, o("Softmax", scores, axis=-1))

    def keep(self) -> ir.Value | None:
        """Which keys each new token sees, boolean, broadcasts to [B, 1, S, T]; None for all."""
        o, v, i = self.o, self.v, self.inputs
        query, key = o.unsqueeze(self.rows, 1), o.unsqueeze(self.range(o, None, self.total), 0)
        tests = []
        if v.causal:
            tests.append(o("LessOrEqual", key, query))
        if v.window > 0:
            tests.append(o("Less", o("Sub", query, key), o.scalar(v.window)))
        if v.padding:
            tests.append(o.unsqueeze(o("Cast", i["padding_mask"], to=ir.DataType.BOOL), 1, 2))
        if not tests:
            return None
        keep = tests[0]
        for test in tests[1:]:
            keep = o("And", keep, test)
        return keep

    def context(self, weights: ir.Value, latent: ir.Value) -> ir.Value:
        """Weighted values, heads side by side: [B, S, H*V]; `latent` holds the values' columns, w."""
        o, v = self.o, self.v
        if v.value_up:
            expanded, absorbed = o.branch(), o.branch()
            many = self.expanded_values(expanded, weights, latent)
            few = self.absorbed_values(absorbed, weights, latent)
            context = o(
                "If", self.many,
                then_branch=expanded.graph([many], "values_expanded"),
                else_branch=absorbed.graph([few], "values_absorbed"),
            )  # fmt: skip
        else:
            context = self.latent_sum(o, weights, latent)
        context = o.reshape(context, 0, v.num_heads, -1, v.value_dim)
        return o.reshape(o("Transpose", context, perm=[0, 2, 1, 3]), 0, 0, v.num_heads * v.value_dim)

    def by_group(self, o: Ops, weights: ir.Value, groups: int) -> ir.Value:
        """[B, H, S, T] -> [B, groups, H/groups*S, T]."""
        return o("Reshape", weights, o("Concat", o.ints(0, groups, -1), self.total, axis=0))

    def latent_sum(self, o: Ops, weights: ir.Value, latent: ir.Value) -> ir.Value:
        """Attention over the latents themselves, [B, 1, H*S, w]."""
        return o("MatMul", self.by_group(o, weights, 1), latent)

    def expanded_values(self, o: Ops, weights: ir.Value, latent: ir.Value) -> ir.Value:
        """Decode the values, then attend: [B, G, H/G*S, V]."""
        values = o("MatMul", latent, self.inputs["value_up"])
        return o("MatMul", self.by_group(o, weights, self.v.kv_groups), values)

    def absorbed_values(self, o: Ops, weights: ir.Value, latent: ir.Value) -> ir.Value:
        """Attend over the latents, then decode: [B, G, H/G*S, V]."""
        mixed = o.reshape(self.latent_sum(o, weights, latent), 0, self.v.kv_groups, -1, self.v.value_rank)
        return o("MatMul", mixed, self.inputs["value_up"])
