"""A neutral reading of a graph: what the walk in `mla_pass.patterns` asks for, whoever wrote the graph.

A handle names one value of the graph (``onnx_ir.Value``, ``torch.fx.Node``). Its *neutral op* is the operation that
computes it, named by the one table below; an op outside the table keeps its own name, so that a refusal can say it.

Neutral ops, their operands in order and their attributes (see `View.attribute`):

    input, constant            no operands
    matmul(a, b)               gemm(a, b, bias): attributes alpha, beta, transA, transB
    add sub mul div pow neg    element by element, broadcasting
    tanh cos sin sqrt rsqrt reciprocal isnan identity cast
    where(condition, a, b)
    softmax(x)                 axis
    mean(x)                    axes
    concat(*parts)             axis
    slice(x)                   slice -> Slice, one slice of one axis (a Split's result is one, too)
    reshape(x)                 shape -> tuple, None where unknown
    transpose(x)               perm
    unsqueeze(x), squeeze(x)   axes
    expand(x)
    gather(table, indices)     axis
    shape(x)                   its result depends on the operand's sizes, not on its numbers
    rmsnorm(x, weight)         epsilon, axis
    rope(x, cos, sin, positions)
    attention(query, key, value, mask, past_key, past_value, lengths)
                               scale, softcap, is_causal, q_num_heads, kv_num_heads
    group_query_attention, multi_head_attention, fused_matmul: recognised, not read yet
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mla_pass.errors import MlaPassError
from mla_pass.site import Handle, Weight

NEUTRAL = {
    "MatMul": "matmul", "Gemm": "gemm",
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Neg": "neg",
    "Tanh": "tanh", "Cos": "cos", "Sin": "sin", "Sqrt": "sqrt", "Reciprocal": "reciprocal",
    "IsNaN": "isnan", "Identity": "identity", "Cast": "cast", "CastLike": "cast", "Dropout": "identity",
    "Where": "where", "Softmax": "softmax", "ReduceMean": "mean",
    "Concat": "concat", "Slice": "slice", "Split": "slice", "Reshape": "reshape", "Transpose": "transpose",
    "Unsqueeze": "unsqueeze", "Squeeze": "squeeze", "Expand": "expand", "Gather": "gather",
    "Shape": "shape", "Size": "shape", "Constant": "constant",
    "RMSNormalization": "rmsnorm", "SimplifiedLayerNormalization": "rmsnorm",
    "RotaryEmbedding": "rope", "Attention": "attention",
    "com.microsoft::FusedMatMul": "fused_matmul",
    "com.microsoft::GroupQueryAttention": "group_query_attention",
    "com.microsoft::MultiHeadAttention": "multi_head_attention",
    "aten.matmul": "matmul", "aten.mm": "matmul", "aten.bmm": "matmul", "aten.linear": "gemm", "aten.addmm": "gemm",
    "aten.add": "add", "aten.sub": "sub", "aten.mul": "mul", "aten.div": "div", "aten.pow": "pow", "aten.neg": "neg",
    "aten.tanh": "tanh", "aten.cos": "cos", "aten.sin": "sin", "aten.sqrt": "sqrt", "aten.rsqrt": "rsqrt",
    "aten.reciprocal": "reciprocal", "aten.isnan": "isnan", "aten._to_copy": "cast", "aten.to": "cast",
    "aten.type_as": "cast", "aten.flatten": "reshape", "aten.unflatten": "reshape",
    "aten.where": "where", "aten.softmax": "softmax", "aten._softmax": "softmax", "aten.mean": "mean",
    "aten.cat": "concat", "aten.slice": "slice", "aten.split": "slice", "aten.split_with_sizes": "slice",
    "aten.chunk": "slice", "aten.view": "reshape", "aten._unsafe_view": "reshape", "aten.reshape": "reshape",
    "aten.permute": "transpose", "aten.transpose": "transpose", "aten.t": "transpose",
    "aten.unsqueeze": "unsqueeze", "aten.squeeze": "squeeze", "aten.expand": "expand", "aten.embedding": "gather",
    "aten.index": "gather", "aten.sym_size": "shape", "aten.full_like": "shape", "aten.rms_norm": "rmsnorm",
    "aten.scaled_dot_product_attention": "attention",
}  # fmt: skip
"""Op as its own library names it -> neutral op. Ops of other domains are written ``domain::Op``, those of torch
``aten.op``."""


@dataclass(frozen=True)
class Slice:
    """``x[..., start:stop:step, ...]`` along `axis`; axis and bounds as the graph says them, so maybe negative."""

    axis: int
    start: int
    stop: int
    step: int


class EvaluationError(Exception):
    """A piece of the graph could not be computed; the message is one line saying why."""


class Block(Protocol):
    """A piece of the graph in its own runtime, computed in float32 where the graph computes in half precision."""

    @property
    def needs(self) -> Sequence[Handle]:
        """The graph's inputs that it reads beside the values it is given."""

    def run(self, values: Mapping[Handle, np.ndarray]) -> list[np.ndarray]:
        """Its outputs. Raises EvaluationError."""


class View(Protocol):
    """One graph, read-only."""

    max_position: int | None
    """Longest sequence the model was made for, when the graph says so."""

    def results(self) -> Iterator[Handle]:
        """Every value a node computes, in order of execution."""

    def op(self, value: Handle) -> str:
        """Neutral op that computes the value."""

    def inputs(self, value: Handle) -> list[Handle | None]:
        """Its operands in the order of the table, None where one is left out."""

    def attribute(self, value: Handle, name: str) -> Any:
        """An attribute of the table above, with the op's default filled in; None when it is no constant."""

    def settings(self, value: Handle) -> tuple[Any, ...]:
        """All attributes of the computing node, comparable."""

    def users(self, value: Handle) -> list[Handle]:
        """Values computed from this one by one node."""

    def siblings(self, value: Handle) -> list[Handle]:
        """All results of the node that computes the value."""

    def constant(self, value: Handle) -> np.ndarray | None:
        """The value's numbers if they follow from constants alone and are few (at most `SMALL`); else None."""

    def is_constant(self, value: Handle) -> bool:
        """True if the value follows from constants alone."""

    def weight(self, value: Handle) -> Weight:
        """A constant value of any size as a lazy array."""

    def shape(self, value: Handle) -> tuple[int | None, ...] | None:
        """Sizes, None where unknown or symbolic; None when not even the rank is known."""

    def dtype(self, value: Handle) -> str:
        """float32, int64, bool ...; the empty string when unknown."""

    def is_output(self, value: Handle) -> bool:
        """True if the graph returns the value."""

    def name(self, value: Handle) -> str:
        """The value's own name."""

    def node(self, value: Handle) -> str:
        """The computing node's name and op, for people."""

    def path(self, value: Handle) -> str:
        """Path of the module that computes the value, e.g. model.layers.0.self_attn; empty when unknown."""

    def needs(self, outputs: Sequence[Handle], given: Sequence[Handle]) -> list[Handle]:
        """The graph's inputs on which `outputs` depend, be it by their sizes alone, once `given` are known."""

    def evaluate(self, outputs: Sequence[Handle], feeds: Mapping[Handle, np.ndarray]) -> list[np.ndarray]:
        """Computes values from others. Half precision is computed in float32: the question is what, not how well.

        Raises EvaluationError.
        """

    def block(self, outputs: Sequence[Handle], given: Sequence[Handle]) -> Block:
        """The computation from `given` and the graph's inputs to `outputs`, opened in the graph's own runtime."""


def view_of(model: Any) -> View:
    """The view of an ONNX model or an exported program. Raises MlaPassError for anything else."""
    import onnx_ir

    if isinstance(model, onnx_ir.Model):
        from mla_pass.onnx.view import OnnxView

        return OnnxView.of(model)
    if type(model).__module__.partition(".")[0] == "torch":
        from mla_pass.pytorch.view import FxView

        return FxView.of(model)
    raise MlaPassError(
        f"a {type(model).__name__} is no graph that can be read; give an onnx_ir.Model or a "
        "torch.export.ExportedProgram"
    )


def follows_from_constants(
    view: View, value: Handle, known: dict[Handle, bool], leaf: Callable[[Handle], bool | None]
) -> bool:
    """Whether a value follows from constants alone; `known` keeps what was found, `leaf` says it of a value where no
    operands have to be asked, else None."""
    todo = [value]
    while todo:
        top = todo[-1]
        end = leaf(top)
        operands = [operand for operand in view.inputs(top) if operand is not None] if end is None else []
        unknown = [operand for operand in operands if operand not in known]
        if top in known or not unknown:
            todo.pop()
            known.setdefault(top, all(known[operand] for operand in operands) if end is None else end)
        else:
            todo.extend(unknown)
    return known[value]


SMALL = 1 << 16
"""Most numbers that `View.constant` returns."""


def ancestors(view: View, values: Sequence[Handle], *, through_shape: bool = True) -> list[Handle]:
    """The values from which `values` follow, themselves included; without `through_shape`, only where numbers flow."""
    seen: dict[Handle, None] = {}
    todo = list(values)
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen[value] = None
        if through_shape or view.op(value) != "shape":
            todo.extend(operand for operand in view.inputs(value) if operand is not None)
    return list(seen)
