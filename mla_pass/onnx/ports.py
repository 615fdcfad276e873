"""What a language model's graph takes and gives. Original and converted models are read the same way.

From the graph's inputs and outputs alone:

- integer inputs are tokens: ``input_ids`` [B, S], ``attention_mask`` [B, T], ``position_ids`` [B, S];
- inputs of rank 4, [B, heads, rows, width], of floats or 8 bits, are the cache; so are the outputs of that kind;
- the output left over is the logits [B, S, vocab].

Cache inputs pair with cache outputs by what follows the first dot of their names where that is one to one
(``past.3.latent``, ``present.3.latent``), by order otherwise; heads, width and element type of a pair must agree.
A pair whose two row dimensions carry one symbol is *shared*: a buffer of `capacity` rows, of which the graph writes
rows P..T-1. Any other pair is *growing*: present = past followed by the new rows. A model may hold both kinds, as one
that was converted in part does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mla_pass.errors import MlaPassError
from mla_pass.storage import CODED

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")

FLOATS: dict[str, np.dtype] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(double)": np.dtype(np.float64),
}
CACHED = FLOATS | {f"tensor({coded.element.name})": coded.element for coded in CODED.values()}
INTEGERS: dict[str, np.dtype] = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}
_PORT_TYPES = {
    ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "double", ir.DataType.INT64: "int64", ir.DataType.INT32: "int32",
    ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor of the graph, [B, heads, rows, width]."""

    past: str
    """Name of the graph input."""
    present: str
    """Name of the graph output."""
    heads: int
    width: int
    dtype: np.dtype
    kind: Literal["growing", "shared"]

    @property
    def bytes_per_token(self) -> int:
        """Bytes one row of one sequence takes."""
        return self.heads * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class CacheSpec:
    """All cache tensors of a model, in the order of its inputs."""

    tensors: tuple[CacheTensor, ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token of one sequence takes over all layers."""
        return sum(tensor.bytes_per_token for tensor in self.tensors)


def read_ports(inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[CacheSpec, dict[str, np.dtype], Any]:
    """Sort a graph's inputs and outputs (objects with name, shape and type) as the module's docstring says.

    Returns the cache, the token inputs with their types, and the output that is the logits.
    """
    pasts = [port for port in inputs if port.type in CACHED and len(port.shape) == 4]
    presents = [port for port in outputs if port.type in CACHED and len(port.shape) == 4]
    rest = [port for port in inputs if port not in pasts]
    for port in rest:
        if port.name not in TOKEN_INPUTS or port.type not in INTEGERS:
            raise MlaPassError(
                f"graph input {port.name} is {port.type} {port.shape}; expected integers named one of "
                f"{', '.join(TOKEN_INPUTS)} or a cache of floats or 8 bits [batch, heads, rows, width]; export the "
                "model with mla-pass export"
            )
    logits = [port for port in outputs if port not in presents]
    if len(logits) != 1 or logits[0].type not in FLOATS or len(logits[0].shape) != 3:
        found = ", ".join(f"{port.name} {port.type} {port.shape}" for port in logits) or "none"
        raise MlaPassError(f"beside the cache the graph's outputs are: {found}; expected logits [batch, tokens, vocab]")
    if "input_ids" not in {port.name for port in rest}:
        raise MlaPassError("the graph has no input input_ids; expected a model that reads token ids")
    tokens = {port.name: INTEGERS[port.type] for port in rest}
    return CacheSpec(tuple(_pair(past, present) for past, present in _pairs(pasts, presents))), tokens, logits[0]


def _pairs(pasts: list[Any], presents: list[Any]) -> list[tuple[Any, Any]]:
    if len(pasts) != len(presents):
        raise MlaPassError(
            f"the graph has {len(pasts)} cache inputs and {len(presents)} cache outputs; expected one output an input"
        )
    by_tail = {port.name.partition(".")[2]: port for port in presents}
    tails = [port.name.partition(".")[2] for port in pasts]
    if len(by_tail) == len(presents) and set(tails) == set(by_tail):
        return [(past, by_tail[tail]) for past, tail in zip(pasts, tails, strict=True)]
    return list(zip(pasts, presents, strict=True))


def _pair(past: Any, present: Any) -> CacheTensor:
    heads, rows, width = past.shape[1:]
    if not (isinstance(heads, int) and isinstance(width, int)) or isinstance(rows, int):
        raise MlaPassError(
            f"cache input {past.name} has shape {past.shape}; expected fixed heads and width and a dynamic number of "
            "rows, [batch, heads, rows, width]"
        )
    if present.type != past.type or present.shape[1] != heads or present.shape[3] != width:
        raise MlaPassError(
            f"cache input {past.name} {past.type} {past.shape} meets output {present.name} {present.type} "
            f"{present.shape}; expected equal types, heads and widths"
        )
    shared = rows is not None and rows == present.shape[2]
    return CacheTensor(past.name, present.name, heads, width, CACHED[past.type], "shared" if shared else "growing")


@dataclass(frozen=True)
class _Port:
    """A graph input or output as ONNX Runtime would describe it."""

    name: str
    type: str
    shape: list[int | str | None]


def graph_ports(graph: ir.Graph) -> tuple[CacheSpec, dict[str, np.dtype], ir.Value]:
    """`read_ports` of a graph that no runtime has opened: its cache, its token inputs, and its logits.

    Raises MlaPassError when it is no language model's.
    """

    def port(value: ir.Value) -> _Port:
        sizes = [] if value.shape is None else [n if isinstance(n, int) else n.value for n in value.shape.dims]
        kind = "?" if value.dtype is None else _PORT_TYPES.get(value.dtype, value.dtype.name.lower())
        return _Port(str(value.name), f"tensor({kind})", sizes)

    ports = [[port(value) for value in values] for values in (graph.inputs, graph.outputs)]
    cache, tokens, logits = read_ports(*ports)
    return cache, tokens, next(value for value in graph.outputs if value.name == logits.name)
