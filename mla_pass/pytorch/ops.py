"""ONNX operators as torch functions: one table, and for each operator the few lines that its text in the standard says.

Every function takes the node's attributes as plain Python values (element types as ``torch.dtype``) and its operands,
None where one is left out. All floating-point numbers are of one type, that of the run. Written for opset 18 and newer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from mla_pass.errors import MlaPassError
from mla_pass.onnx.body import DOMAIN, OP_TYPE
from mla_pass.pytorch.attention import attend
from mla_pass.pytorch.latent import latent_attention

Attributes = Mapping[str, Any]
Operands = Sequence[Tensor | None]
Operator = Callable[[Attributes, Sequence[Any]], Tensor | tuple[Tensor, ...]]


# ---- arithmetic


def each(function: Callable[..., Tensor]) -> Operator:
    """An operator without attributes: its operands, one by one."""
    return lambda attributes, x: function(*x)


def folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of any number of operands, taken pair by pair."""

    def run(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
        result = x[0]
        for other in x[1:]:
            result = function(result, other)
        return result

    return run


def divide(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    """Integers are cut towards zero."""
    return x[0] / x[1] if x[0].is_floating_point() else torch.div(x[0], x[1], rounding_mode="trunc")


def power(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    """A lone exponent goes in as a number: torch squares and takes roots by shortcuts then."""
    return torch.pow(x[0], x[1].item() if x[1].numel() == 1 else x[1])


def matmul(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    return torch.matmul(x[0], x[1])


def gemm(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    a = x[0].t() if attributes.get("transA", 0) else x[0]
    b = x[1].t() if attributes.get("transB", 0) else x[1]
    product = a @ b
    if (alpha := attributes.get("alpha", 1.0)) != 1.0:
        product = product * alpha
    return product if len(x) < 3 or x[2] is None else product + attributes.get("beta", 1.0) * x[2]


def cast(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    return x[0].to(attributes["to"])


def gelu(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    return functional.gelu(x[0], approximate=attributes.get("approximate", "none"))


def softmax(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    return torch.softmax(x[0], attributes.get("axis", -1))


def reduced(function: Callable[..., Tensor]) -> Operator:
    """A reduction over the axes of the second operand; over all when it is left out or empty."""

    def run(attributes: Attributes, x: Sequence[Any]) -> Tensor:
        axes = [] if len(x) < 2 or x[1] is None else x[1].tolist()
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return x[0]
        return function(x[0], axes or list(range(x[0].ndim)), keepdim=bool(attributes.get("keepdims", 1)))

    return run


def rms_norm(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    axis = attributes.get("axis", -1) % x[0].ndim
    return functional.rms_norm(x[0], x[0].shape[axis:], eps=attributes.get("epsilon", 1e-5)) * x[1]


def layer_norm(attributes: Attributes, x: Sequence[Any]) -> Tensor:
    axis = attributes.get("axis", -1) % x[0].ndim
    scaled = functional.layer_norm(x[0], x[0].shape[axis:], eps=attributes.get("epsilon", 1e-5)) * x[1]
    return scaled if len(x) < 3 or x[2] is None else scaled + x[2]


def top_k(attributes: Attributes, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
    largest, ordered = bool(attributes.get("largest", 1)), bool(attributes.get("sorted", 1))
    return tuple(torch.topk(x[0], int(x[1]), attributes.get("axis", -1), largest, ordered))


# ---- shapes and places


def shape(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    return torch.tensor(x[0].shape[attributes.get("start", 0) : attributes.get("end")], dtype=torch.int64)


def reshape(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    sizes = x[1].tolist()
    if not attributes.get("allowzero", 0):
        sizes = [n or x[0].shape[axis] for axis, n in enumerate(sizes)]
    return x[0].reshape(sizes)


def transpose(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    return x[0].permute(attributes.get("perm", tuple(reversed(range(x[0].ndim)))))


def unsqueeze(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    rank = x[0].ndim + x[1].numel()
    result = x[0]
    for axis in sorted(axis % rank for axis in x[1].tolist()):
        result = result.unsqueeze(axis)
    return result


def squeeze(attributes: Attributes, x: Sequence[Any]) -> Tensor:
    return x[0].squeeze() if len(x) < 2 or x[1] is None else x[0].squeeze(tuple(x[1].tolist()))


def expand(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    return x[0].expand(torch.broadcast_shapes(x[0].shape, x[1].tolist()))


def concat(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(x), attributes["axis"])


def split(attributes: Attributes, x: Sequence[Any]) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    if len(x) > 1 and x[1] is not None:
        return tuple(torch.split(x[0], x[1].tolist(), axis))
    return tuple(torch.split(x[0], -(-x[0].shape[axis] // attributes["num_outputs"]), axis))


def cut(attributes: Attributes, x: Sequence[Any]) -> Tensor:
    """Slice; bounds beyond the ends are clamped, as Python's own slices do."""
    data, (starts, ends) = x[0], (bound.tolist() for bound in x[1:3])
    axes = x[3].tolist() if len(x) > 3 and x[3] is not None else range(len(starts))
    steps = x[4].tolist() if len(x) > 4 and x[4] is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        places = range(*slice(start, end, step).indices(data.shape[axis]))
        if step == 1:
            data = data.narrow(axis, places.start, len(places))
        else:
            data = data.index_select(axis, torch.tensor(places, dtype=torch.int64, device=data.device))
    return data


def gather(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    data, index = x
    axis = attributes.get("axis", 0) % data.ndim
    index = torch.where(index < 0, index + data.shape[axis], index)
    taken = data.index_select(axis, index.reshape(-1))
    return taken.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])


def gather_nd(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    data, index = x
    batched = attributes.get("batch_dims", 0)
    places = []
    for axis in range(batched):
        sizes = [-1 if other == axis else 1 for other in range(index.ndim - 1)]
        places.append(torch.arange(data.shape[axis], device=data.device).reshape(sizes))
    return data[(*places, *index.unbind(-1))]


def spread(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    """Range."""
    start, end, step = (bound.item() for bound in x)
    return torch.arange(start, end, step, dtype=x[0].dtype)


def cumulative_sum(attributes: Attributes, x: Sequence[Tensor]) -> Tensor:
    axis = int(x[1])
    data = x[0].flip(axis) if attributes.get("reverse", 0) else x[0]
    sums = data.cumsum(axis, dtype=data.dtype)
    if attributes.get("exclusive", 0):
        sums = sums - data
    return sums.flip(axis) if attributes.get("reverse", 0) else sums


# ---- attention and its rotation as single nodes


def rotary_embedding(attributes: Attributes, x: Sequence[Any]) -> Tensor:
    """x [B, H, S, D] or [B, S, H*D]; cos and sin [B, S, R/2], or tables [max, R/2] with positions [B, S]."""
    data, cos, sin = x[:3]
    if len(x) > 3 and x[3] is not None:
        cos, sin = cos[x[3]], sin[x[3]]
    packed = data.ndim == 3
    heads = data.unflatten(-1, (attributes["num_heads"], -1)) if packed else data.transpose(1, 2)  # [B, S, H, D]
    rotary = attributes.get("rotary_embedding_dim", 0) or heads.shape[-1]
    moved, still = heads[..., :rotary], heads[..., rotary:]
    interleaved = bool(attributes.get("interleaved", 0))
    re, im = (moved[..., 0::2], moved[..., 1::2]) if interleaved else moved.chunk(2, -1)
    cos, sin = cos[:, :, None, : rotary // 2], sin[:, :, None, : rotary // 2]
    parts = (re * cos - im * sin, re * sin + im * cos)
    moved = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    result = torch.cat([moved, still], -1)
    return result.flatten(-2) if packed else result.transpose(1, 2)


def attention(attributes: Attributes, x: Sequence[Any]) -> tuple[Tensor, ...]:
    """query, key, value [B, H, S, D] or [B, S, H*D], mask, past key and value; the result, present key and value."""
    given = [*x, *[None] * (6 - len(x))]
    query, key, value, mask = given[:4]
    pasts = given[4:6]
    packed = query.ndim == 3
    if packed:
        counts = (attributes["q_num_heads"], *[attributes["kv_num_heads"]] * 2)
        query, key, value = (
            y.unflatten(-1, (count, -1)).transpose(1, 2) for y, count in zip((query, key, value), counts, strict=True)
        )
    if pasts[0] is not None:
        key, value = (torch.cat([past, y], 2) for past, y in zip(pasts, (key, value), strict=True))
    scale = attributes.get("scale", 1 / math.sqrt(query.shape[-1]))
    result = attend(query, key, value, scale=scale, mask=mask, causal=bool(attributes.get("is_causal", 0)))
    return result.transpose(1, 2).flatten(-2) if packed else result, key, value


OPERATORS: dict[tuple[str, str], Operator] = {
    **{
        ("", name): each(function)
        for name, function in {
            "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Neg": torch.neg,
            "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal, "Erf": torch.erf,
            "Tanh": torch.tanh, "Sigmoid": torch.sigmoid, "Cos": torch.cos, "Sin": torch.sin,
            "IsNaN": torch.isnan, "Where": torch.where, "Identity": lambda x: x, "CastLike": lambda x, y: x.to(y.dtype),
            "And": torch.logical_and, "Or": torch.logical_or, "Not": torch.logical_not, "Equal": torch.eq,
            "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
        }.items()
    },
    ("", "Max"): folded(torch.maximum), ("", "Min"): folded(torch.minimum),
    ("", "Div"): divide, ("", "Pow"): power, ("", "MatMul"): matmul, ("", "Gemm"): gemm, ("", "Cast"): cast,
    ("", "Gelu"): gelu, ("", "Softmax"): softmax, ("", "ReduceMean"): reduced(torch.mean),
    ("", "ReduceSum"): reduced(torch.sum), ("", "RMSNormalization"): rms_norm,
    ("", "SimplifiedLayerNormalization"): rms_norm, ("", "LayerNormalization"): layer_norm, ("", "TopK"): top_k,
    ("", "Shape"): shape, ("", "Reshape"): reshape, ("", "Transpose"): transpose,
    ("", "Unsqueeze"): unsqueeze, ("", "Squeeze"): squeeze, ("", "Expand"): expand, ("", "Concat"): concat,
    ("", "Split"): split, ("", "Slice"): cut, ("", "Gather"): gather, ("", "GatherND"): gather_nd,
    ("", "Range"): spread, ("", "CumSum"): cumulative_sum,
    ("", "RotaryEmbedding"): rotary_embedding, ("", "Attention"): attention,
    (DOMAIN, OP_TYPE): latent_attention,
}  # fmt: skip
"""(domain, op type) -> what computes it. The domain ``ai.onnx`` is written as the empty string."""


def operator(node: ir.Node) -> Operator:
    """What computes a node. Raises MlaPassError naming it when nothing here does."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    found = OPERATORS.get((domain, node.op_type))
    if found is None:
        kind = f"{domain}::{node.op_type}" if domain else node.op_type
        raise MlaPassError(f"node {node.name!r} is a {kind}, which the torch backend does not compute; {ADVICE}")
    if found is attention:
        _refuse_variants(node)
    return found


ADVICE = "use the 'output' metric, which runs on ONNX Runtime"


def _refuse_variants(node: ir.Node) -> None:
    """Versions of Attention differ in where they cap scores and in what the further operands and results mean."""
    softcap = node.attributes.get("softcap")
    capped = softcap is not None and softcap.as_float() != 0.0
    if capped or any(x is not None for x in node.inputs[6:]) or len(node.outputs) > 3:
        raise MlaPassError(
            f"node {node.name!r} is an Attention with capped scores, key lengths or scores as a result; the torch "
            f"backend computes it without any of these; {ADVICE}"
        )
