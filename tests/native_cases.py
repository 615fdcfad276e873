"""Random LatentAttention nodes with their inputs, and what the float64 reference makes of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import strategies as st

from mla_pass import native
from mla_pass.fold import LatentWeights
from mla_pass.fold.bands import Bands
from mla_pass.onnx.body import Variant
from mla_pass.onnx.session import host_view
from mla_pass.reference import attend, rows
from mla_pass.storage import CODED, decoded, encoded
from tests.test_body import build, variant_of

STORED = {name: coded.element for name, coded in CODED.items()}
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
IR_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# One rounding of the result; kernels compute in float32, whose own errors add 1e-5 at the most.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Of a stored row, which was rounded before it was rotated and is again.
STORING = {name: 2 * error for name, error in ROUNDING.items()}
FLOAT32_ERROR = 1e-5
# Some instruction sets round all that meets narrow rows in the absorbed form to bfloat16, 2^-9 of a number, and a
# score's error, that of its number, is one of its weight. Of 832 random nodes the worst was off by 7 roundings;
# where a single latent number makes large scores it has been 27. test_narrow_rows_meet_exact_queries is the sharp test.
NARROW = ("bfloat16", *CODED)
ROUNDED_ERROR = {"avx512bf16": 64 * 2.0**-9}
# The function body computes in the model's type throughout.
BODY_ERROR = {"float32": 1e-4, "float16": 4e-2}
INTEGERS = ("position_ids", "padding_mask", "total_length")
TABLES = ("cos", "sin")

# Where a compiler is at hand the library is built, and its absence is a failure.
needs_library = pytest.mark.skipif(
    native.find_library() is None and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="the op library is not built and there is no C++ compiler to build it with",
)


@dataclass(frozen=True)
class Case:
    """One node and the sizes of its inputs; all numbers follow from `seed`."""

    seed: int = 0
    dtype: str = "float32"
    batch: int = 1
    past: int = 20
    new: int = 1
    spare: int = 3
    """Rows of the cache behind the filled ones."""
    groups: int = 2
    per_group: int = 2
    head_dim: int = 16
    rank: int = 32
    key_rank: int = 32
    value_offset: int = 0
    rope_dim: int = 8
    still: int = 4
    """Un-rotated dims that no band turns."""
    blocks: tuple[int, ...] = ()
    """Block size of every band pair, finest first."""
    staggered: bool = False
    """Whether the pairs of the finest blocks read few columns of the latent: the rest of their key_up is zero."""
    order: int = 1
    value_dim: int = 16
    softcap: float = 0.0
    window: int = 0
    causal: bool = True
    padding: bool = True
    hide_inside: bool = False
    """Hide a key in the middle, too, and now and then all of them."""
    bias: str = ""
    """"", or which dims of the bias are full: a combination of "b" and "h", or "-" for none."""
    query_map: bool = True
    key_up: bool = True
    value_up: bool = True
    shared: bool = True
    latent: str = "same"
    rope: str = "same"
    """What the two parts of a row are stored as."""
    cut: float = -1.0
    """Where a row is cut in two, as a share of it; negative: behind the latent."""

    @property
    def stored(self) -> tuple[str, str]:
        """The same, by name."""
        latent, rope = (self.dtype if x == "same" else x for x in (self.latent, self.rope))
        return latent, rope

    @property
    def narrow(self) -> bool:
        """Whether all latents are stored in a type of `NARROW`."""
        latent, rope = (stored in NARROW for stored in self.stored)
        return (latent or self.split == 0) and (rope or self.split >= self.rank)

    @property
    def split(self) -> int:
        return self.rank if self.cut < 0 else round(self.cut * (self.rank + self.rope_dim))

    @property
    def heads(self) -> int:
        return self.groups * self.per_group

    @property
    def total(self) -> int:
        return self.past + self.new

    @property
    def nope_dim(self) -> int:
        return 2 * len(self.blocks) + self.still if self.key_up else self.key_rank

    @property
    def body_agrees(self) -> bool:
        """Whether ONNX Runtime can run the function body: its CPU has no bfloat16 arithmetic."""
        return self.dtype in BODY_ERROR


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every shape, mask and map that the contract allows, small."""

    def pick(*values):
        return draw(st.sampled_from(values))

    key_up = pick(True, True, True, False)
    blocks: tuple[int, ...] = ()
    if key_up and pick(True, True, True, False):
        size = pick(4, 2, 16, 1, 64)
        for _ in range(pick(2, 3, 1, 4)):
            blocks += (size,) * pick(1, 2, 5)
            size *= pick(4, 2)
    rank = pick(16, 32, 48, 18, 22, 7)
    new = pick(1, 1, 1, 2, 3, 5, 17, 40)
    return Case(
        seed=draw(st.integers(0, 2**20)), dtype=pick(*DTYPES), batch=draw(st.integers(1, 3)),
        past=pick(130, 300, 65, 64, 63, 31, 5, 1, 0), new=new, spare=draw(st.integers(0, 5)),
        groups=pick(1, 2, 3), per_group=pick(1, 2, 3, 4, 7, 33), head_dim=pick(8, 10, 16),
        rank=rank, key_rank=draw(st.integers(1, rank)), value_offset=draw(st.integers(0, rank - 1)),
        rope_dim=pick(0, 2, 6, 8, 16), still=pick(4, 0, 1, 9) if blocks else pick(4, 1, 9), blocks=blocks,
        staggered=pick(False, True), order=pick(1, 1, 0), value_dim=pick(5, 8, 16), softcap=pick(0.0, 0.0, 2.0),
        window=pick(0, 0, 1, 9, 100),
        causal=pick(True, True, True, False), padding=pick(True, False), hide_inside=pick(False, False, True),
        bias=pick("", "", "-", "b", "h", "bh"), query_map=pick(True, False), key_up=key_up,
        value_up=pick(True, True, False), shared=pick(True, False),
        latent=pick("same", "same", "int8", "float8", "float16", "bfloat16"),
        rope=pick("same", "same", "int8", "float8", "float16"),
        cut=pick(-1.0, -1.0, -1.0, 0.5, 0.0, 0.2, 0.9, 1.0),
    )  # fmt: skip


class Drawn:
    """The numbers of a case, each rounded to its dtype."""

    def __init__(self, case: Case) -> None:
        self.case, self.rng = case, np.random.default_rng(case.seed)
        c, rng = case, self.rng
        pairs, half = len(c.blocks), c.rope_dim // 2
        self.theta = rng.uniform(1e-3, 1.0, pairs + half + 3)
        columns = rng.permutation(len(self.theta))
        # A block spans at most one turn, as everywhere bands are chosen: the tables hold theta to float32's precision.
        self.theta[columns[:pairs]] /= np.maximum(np.array(c.blocks) / 6, 1)
        self.weights = self.draw_weights(columns[:pairs], columns[pairs : pairs + half])
        width = c.nope_dim + c.rope_dim
        self.query = self.draw(c.batch, c.new, c.heads, c.head_dim if c.query_map else width)
        self.row = self.draw(c.batch, c.total, c.rank + c.rope_dim)
        self.mask = np.ones((c.batch, c.total), np.int64)
        self.pads = np.zeros(c.batch, np.int64)
        if c.padding:
            self.pads = rng.integers(0, c.total // 2 + 1, c.batch)
            for b, pad in enumerate(self.pads):
                self.mask[b, :pad] = 0
            if c.hide_inside:
                self.mask[rng.integers(0, c.batch), rng.integers(0, c.total)] = 0
                self.mask[rng.integers(0, 3 * c.batch) :][:1] = 0
        self.position = np.maximum(np.arange(c.total)[None] - self.pads[:, None], 0)
        self.bias = self.draw_bias()

    def draw(self, *shape: int) -> np.ndarray:
        return self.rounded(self.rng.standard_normal(shape))

    def rounded(self, x: np.ndarray) -> np.ndarray:
        return x.astype(DTYPES[self.case.dtype]).astype(np.float64)

    def draw_weights(self, band_index: np.ndarray, rope_index: np.ndarray) -> LatentWeights:
        """Maps that are absent from the node are identities here."""
        c, rng = self.case, self.rng
        n, k, w = c.nope_dim, c.key_rank, c.rank - c.value_offset
        width = n + c.rope_dim

        def maps(there: bool, a: int, b: int) -> np.ndarray:
            if not there:
                return np.broadcast_to(np.eye(a, b), (c.groups, a, b))
            return self.rounded(rng.standard_normal((c.groups, a, b)) / np.sqrt(a))

        block = np.array(c.blocks, np.int64)
        a1 = rng.uniform(-1, 1, len(block)) / np.maximum(block, 1) * c.order
        fit = [x.astype(np.float32).astype(np.float64) for x in (rng.uniform(-1, 1, len(block)), a1)]
        bands = Bands(band_index, block, *fit, np.zeros(0, np.int64))
        key_up = maps(c.key_up, k, n).transpose(0, 2, 1).copy()
        if c.staggered:
            for pair, part, group in np.ndindex(len(block), 2, c.groups):
                key_up[group, part * len(block) + pair, (2 * pair + part) * c.groups + group + 1 :] = 0
        key_mean = self.rounded(rng.standard_normal((c.groups, n))) * c.key_up
        return LatentWeights(
            rank=c.rank, rope_dim=c.rope_dim, encode=np.eye(c.rank + c.rope_dim),
            encode_bias=np.zeros(c.rank + c.rope_dim),
            query_map=maps(c.query_map, c.head_dim if c.query_map else width, width), key_up=key_up, key_mean=key_mean,
            value_up=maps(c.value_up, w, c.value_dim if c.value_up else w),
            value_mean=np.zeros((c.groups, c.value_dim if c.value_up else w)),
            rope_index=rope_index, bands=bands, kept=1.0, predicted=0.0,
        )  # fmt: skip

    def draw_bias(self) -> np.ndarray | None:
        c = self.case
        if not c.bias:
            return None
        shape = (c.batch if "b" in c.bias else 1, c.heads if "h" in c.bias else 1, c.new, c.total)
        bias = self.draw(*shape)
        bias[self.rng.random(shape) < 0.2] = -np.inf
        return bias

    @property
    def scale(self) -> float:
        """Scores with a standard deviation of about 2."""
        return 2 / np.sqrt(self.case.nope_dim + self.case.rope_dim)

    @property
    def variant(self) -> Variant:
        c = self.case
        return variant_of(
            self.weights, self.theta, num_heads=c.heads, kv_groups=c.groups, nope_dim=c.nope_dim,
            value_dim=self.weights.value_up.shape[2], scale=float(np.float32(self.scale)), softcap=c.softcap,
            window=c.window, causal=c.causal, padding=c.padding, bias=bool(c.bias), query_map=c.query_map,
            key_up=c.key_up, value_up=c.value_up, shared_buffer=c.shared,
            latent_dtype="same" if c.stored[0] == c.dtype else c.latent,
            rope_dtype="same" if c.stored[1] == c.dtype else c.rope, split=c.split,
        )  # fmt: skip

    def model(self) -> onnx.ModelProto:
        return build(self.variant, self.weights, kind=IR_TYPES[self.case.dtype])

    def cache(self) -> np.ndarray:
        """[B, T, r + p], rounded."""
        pairs = zip(self.row, self.position, strict=True)
        return self.rounded(np.stack([rows(self.weights, self.theta, y, p) for y, p in pairs]))

    def feeds(self) -> dict[str, np.ndarray]:
        """Every input of the node; cache rows that are not filled hold what nothing may read."""
        c, w = self.case, self.weights
        past = self.cache()[:, None, : c.past]
        spare = ((0, 0), (0, 0), (0, c.new + c.spare if c.shared else 0), (0, 0))
        pasts = [
            np.pad(as_stored(part, dtype), spare, constant_values=unwritten(dtype))
            for part, dtype in zip((past[..., : c.split], past[..., c.split :]), c.stored, strict=True)
        ]
        angle = np.outer(np.arange(max(c.total, 2)), self.theta)
        floats = {
            "query": self.query.reshape(c.batch, c.new, -1), "row": self.row[:, c.past :],
            "query_map": w.query_map, "key_up": w.key_up, "key_mean": w.key_mean, "value_up": w.value_up,
        }  # fmt: skip
        if self.bias is not None:
            floats["attention_bias"] = self.bias
        feeds = {name: np.ascontiguousarray(x.astype(DTYPES[c.dtype])) for name, x in floats.items()}
        feeds |= {"past_latent": pasts[0], "past_rope": pasts[1]}
        feeds |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
        return feeds | {
            "position_ids": self.position[:, c.past :], "padding_mask": self.mask, "total_length": np.array([c.total])
        }  # fmt: skip

    def keep(self, b: int, h: int) -> np.ndarray:
        """[S, T] to add to the scores."""
        c = self.case
        key, query = np.arange(c.total)[None], np.arange(c.past, c.total)[:, None]
        keep = np.broadcast_to(self.mask[b] > 0, (c.new, c.total))
        if c.causal:
            keep = keep & (key <= query)
        if c.window:
            keep = keep & (query - key < c.window)
        if self.bias is None:
            return keep
        bias = np.broadcast_to(self.bias, (c.batch, c.heads, c.new, c.total))[b, h]
        return np.where(keep, bias, -np.inf)

    def slack(self) -> float:
        """What the context's largest number is as a rule, over what it is here, where values may happen to cancel; at
        least 1. Errors of what the context is the mean of do not cancel with them.

        Scores of a standard deviation of 2, as a case has them, leave the weight to about a tenth of the keys.
        """
        case, cache = self.case, self.cache()
        values = cache[..., None, :, case.value_offset : case.rank] @ self.weights.value_up
        usual = np.sqrt(np.square(values).mean() / max(1, case.total / 10))
        return max(1.0, usual / max(np.abs(self.want(cache)).max(), 1e-3))

    def kernel_error(self, isa: str = "") -> float:
        """Of the context, relative to its largest number: one rounding of the result, and the arithmetic's."""
        rounded = ROUNDED_ERROR.get(isa or native.instruction_sets()[0], 0.0) if self.case.narrow else 0.0
        return ROUNDING[self.case.dtype] + FLOAT32_ERROR + (rounded * self.slack() if rounded else 0.0)

    def want(self, cache: np.ndarray) -> np.ndarray:
        """Context [B, S, H*V] over the rows `cache` [B, T, r + p], which may carry a backend's own rounding."""
        c, w = self.case, self.weights
        out = np.zeros((c.batch, c.new, c.heads, w.value_up.shape[2]))
        for b in range(c.batch):
            for h in range(0, c.heads, c.per_group if "h" not in c.bias else 1):
                heads = slice(h, h + (c.per_group if "h" not in c.bias else 1))
                group = slice(h // c.per_group, h // c.per_group + 1)
                maps = {name: getattr(w, name)[group] for name in ("query_map", "key_up", "key_mean", "value_up")}
                own = replace(w, **maps, value_mean=w.value_mean[group])
                out[b][:, heads] = attend(
                    own, self.theta, self.query[b][:, heads], cache[b], self.position[b, c.past :], self.keep(b, h),
                    scale=float(np.float32(self.scale)), softcap=c.softcap,
                )  # fmt: skip
        return out.reshape(c.batch, c.new, -1)


def as_stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers [..., n] as the cache keeps them."""
    return encoded(x, dtype) if dtype in CODED else x.astype(DTYPES[dtype])


def as_numbers(x: np.ndarray) -> np.ndarray:
    """The opposite, float64."""
    return decoded(x) if x.dtype in STORED.values() else x.astype(np.float64)


def unwritten(dtype: str) -> float:
    """What fills rows that nothing wrote: no number, or a byte that no row's number is."""
    return {"int8": -128, "float8": 0x7F}.get(dtype, np.nan)


@contextmanager
def environment(isa: str = "", form: str = "") -> Iterator[None]:
    """What the library reads when a session is made."""
    names = {"MLA_PASS_ISA": isa, "MLA_PASS_FORM": form}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def float32_isa() -> str:
    """The best instruction set that rounds nothing, whatever rows are stored as."""
    return next(isa for isa in native.instruction_sets() if isa not in ROUNDED_ERROR)


def open_model(model: onnx.ModelProto, *, library: bool = True, isa: str = "", form: str = "", threads: int = 1):
    """A plain session of one node, with the kernel or with the function body."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with environment(isa, form):
        if library:
            options.register_custom_ops_library(native.library_path())
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """numpy has no bfloat16 that ONNX Runtime knows: it goes as what it is, 16 bits with a type."""
    if array.dtype == DTYPES["bfloat16"]:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def run_session(session, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs, of any element type."""
    binding = session.io_binding()
    values = {i.name: ort_value(feeds[i.name]) for i in session.get_inputs()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    types = {f"tensor({dtype.name})": dtype for dtype in (DTYPES | STORED).values()}
    types["tensor(float)"] = DTYPES["float32"]
    return [host_view(value, types[value.data_type()]).copy() for value in binding.get_outputs()]


def check_codes(rows: np.ndarray, want: np.ndarray, dtype: str, error: float) -> None:
    """Every segment at its own scale, every number within half a step of it, beside an `error` of what was rounded."""
    count, coded, numbers = want.shape[-1], CODED[dtype], decoded(rows)
    length = max(1, -(-count // 4))
    for segment in range(4):
        mine = slice(segment * length, min((segment + 1) * length, count))
        scale = 2.0 ** ((rows[..., count + segment, None].astype(np.float64) - coded.zero) / 8)
        # The least scale that will do, or one an eighth of an octave away where rounding decides.
        least = np.abs(want[..., mine]).max(-1, initial=0.0, keepdims=True) / coded.largest
        seen = least > 2.0**-16
        assert (scale >= least * 2 ** (-1 / 8) - error)[seen].all()
        assert (scale <= least * 2 ** (2 / 8) + error)[seen].all()
        half = scale / 2 if dtype == "int8" else np.maximum(np.abs(want[..., mine]) / 16, scale * 2.0**-10)
        assert (np.abs(numbers[..., mine] - want[..., mine]) <= half * 1.0002 + error).all()


def check(drawn: Drawn, outputs: list[np.ndarray], error: float) -> None:
    """Cache rows against the reference's, rows beyond them untouched, context within `error` of the largest number."""
    c = drawn.case
    context, latent, rope = outputs
    assert context.dtype == DTYPES[c.dtype]
    live = []
    cache = drawn.cache()
    for part, want, dtype in zip((latent, rope), np.split(cache, [c.split], 2), c.stored, strict=True):
        assert part.dtype == (DTYPES | STORED)[dtype]
        assert part.shape[2] == c.total + (c.spare if c.shared else 0)
        left = part[:, :, c.total :].astype(np.float64)
        assert ((left == unwritten(dtype)) | (np.isnan(left) & (dtype not in CODED))).all()
        live.append(as_numbers(part[:, 0, : c.total]))
        error_of = (STORING[c.dtype] + FLOAT32_ERROR) * np.abs(want).max(initial=1)
        if dtype in CODED:
            check_codes(part[:, 0, : c.total], want, dtype, error_of)
        else:
            atol = STORING[dtype] * np.abs(want).max(initial=1) + error_of
            np.testing.assert_allclose(live[-1], want, rtol=0, atol=atol)
    stored = np.concatenate(live, axis=2)
    want = drawn.want(stored)
    np.testing.assert_allclose(context.astype(np.float64), want, rtol=0, atol=error * max(np.abs(want).max(), 1e-3))


def profile_of(session) -> dict[str, int]:
    """How many nodes of each type ran in a session opened with profiling."""
    path = Path(session.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    counts: dict[str, int] = {}
    for event in events:
        name = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and name and event["name"].endswith("_kernel_time"):
            counts[name] = counts.get(name, 0) + 1
    return counts


__all__ = ["Case", "Drawn", "cases", "check", "open_model", "replace", "run_session"]
