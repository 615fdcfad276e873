"""``torch.compile(model, backend="mla_pass")``: attention over a LatentCache without the keys and values.

A model that is given a `LatentCache` calls ``mla_pass::latent_update`` in every layer: decode all rows to keys and
values, over which it attends. In its graph that operator and the attention behind it are found together,

    k, v = latent_update(key, value, cache ...)   [expand, reshape]   scaled_dot_product_attention(query, k, v, mask)

and give way to ``mla_pass::latent_attention``: the query is turned back and pulled through the up-projections, and
meets the rows as they lie. The rest goes to another backend, inductor unless `options` says otherwise:

    torch.compile(model, backend="mla_pass", options={"backend": "eager"})
"""

from __future__ import annotations

import json
import logging
import math
import operator as python
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from mla_pass.errors import MlaPassError
from mla_pass.pytorch import operator as ops  # registers the operators
from mla_pass.pytorch.rows import unrotated

INNER = "inductor"
log = logging.getLogger(__name__)

_ATTENTION = functional.scaled_dot_product_attention
_ATTENTION_OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_UPDATE_OPERANDS = (
    "key", "value", "latent", "rope", "cos", "sin", "position_ids", "total", "encode", "encode_bias", "query_map",
    "key_up", "key_mean", "value_up", "value_mean", "rows", "attributes",
)  # fmt: skip
_REPEATING = {"expand", "reshape", "view", "contiguous", "repeat_interleave"}
"""Methods that stand between a cache's keys and the attention when heads are repeated for it."""
_ADVICE = (
    "use attn_implementation='sdpa', or compile the converted checkpoint itself, whose attention needs no rewriting"
)


def mla_pass(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Callable[..., Any]:
    """The backend. `options`: ``backend``, a name or a function, compiles what is left; others are handed on to it.

    Raises MlaPassError when a layer's keys are read by something that this does not know, when gradients are asked for,
    and for a backend that torch does not know.
    """
    remaining = dict(options or {})
    inner = _inner(remaining.pop("backend", INNER))
    ours = _calls(graph, ops.latent_update) or _calls(graph, ops.latent_attention)
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    if ours and wanted:
        raise MlaPassError("latent attention serves inference; call the compiled model under torch.no_grad()")
    fuse(graph)
    if not ours:
        log.warning(
            "nothing to shrink: this graph has no LatentCache among its inputs, so it is compiled by %s as it is; pass "
            "past_key_values=LatentCache.from_pretrained(folder, model=model)", _name(inner),
        )  # fmt: skip
    if remaining:
        kwargs["options"] = remaining
    return inner(graph, list(example_inputs), **kwargs)


def fuse(graph: fx.GraphModule) -> None:
    """Rewrite every layer in place. Raises MlaPassError, the graph as it was."""
    found = [(node, _attention(node)) for node in _calls(graph, ops.latent_update)]
    for update, attention in found:
        _replace(graph.graph, update, attention)
    if found:
        graph.graph.lint()
        graph.recompile()


def attend(
    query: Tensor, key: Tensor, value: Tensor, latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, total: Tensor, encode: Tensor, encode_bias: Tensor, query_map: Tensor, key_up: Tensor | None,
    key_mean: Tensor | None, value_up: Tensor, value_mean: Tensor, attributes: str, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """What a layer's update and attention compute, [B, H, S, V], from rotated queries [B, H, S, D]."""
    a = json.loads(attributes)
    angles = cos[position_ids], sin[position_ids]
    still, heads = unrotated(key.float(), a, *angles), unrotated(query.float(), a, *angles)
    y = torch.cat([x.transpose(1, 2).flatten(2) for x in (still.to(key.dtype), value)], -1)
    row = functional.linear(y, encode, encode_bias)
    context = torch.ops.mla_pass.latent_attention(
        heads.to(query.dtype).transpose(1, 2).flatten(2), row, latent, rope, cos, sin, position_ids, total, mask,
        query_map, key_up, key_mean, value_up, attributes,
    )  # fmt: skip
    groups, size = value_mean.shape
    context = context.unflatten(-1, (groups, -1, size)) + value_mean[:, None]
    return context.flatten(2, 3).transpose(1, 2)


# ---- finding


def _calls(graph: fx.GraphModule, op: Any) -> list[fx.Node]:
    """Nodes that call one of our operators."""
    overload = op._opoverload
    targets = (overload, overload.overloadpacket)
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target in targets]


def _attention(update: fx.Node) -> fx.Node:
    """The attention over what an update hands back. Raises MlaPassError when there is no other reader, or another."""
    ends: dict[int, set[fx.Node]] = {0: set(), 1: set()}
    for user in update.users:
        if user.target is not python.getitem:
            raise _unread(update, user)
        ends[user.args[1]] |= _readers(user)  # type: ignore[index]
    readers = ends[0] | ends[1]
    if len(readers) != 1 or ends[0] != ends[1]:
        raise _unread(update, next(iter(readers), update))
    (attention,) = readers
    if attention.target is not _ATTENTION:
        raise _unread(update, attention)
    _check(update, attention)
    return attention


def _readers(value: fx.Node) -> set[fx.Node]:
    """What reads keys or values, past the repetition of heads."""
    found = set()
    for user in value.users:
        sliced = user.target is python.getitem
        repeated = user.op == "call_method" and user.target in _REPEATING
        found |= _readers(user) if sliced or repeated else {user}
    return found


def _check(update: fx.Node, attention: fx.Node) -> None:
    """Raises MlaPassError unless the attention computes what the conversion was made for."""
    a, given = json.loads(_operands(update, _UPDATE_OPERANDS)["attributes"]), _operands(attention, _ATTENTION_OPERANDS)
    query = given["query"].meta["example_value"]
    scale = given.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not isinstance(scale, float) or not math.isclose(scale, a["scale"], rel_tol=1e-5) or a["softcap"]:
        raise MlaPassError(
            f"{attention.name} scales its scores by {scale} without a cap, the cache is of a model with scale "
            f"{a['scale']} and cap {a['softcap']:g}; give the cache of this model, with the attention implementation "
            "that the model needs"
        )
    sees_all = given.get("attn_mask") is None and given.get("is_causal") in (None, False)
    if sees_all and isinstance(query.shape[2], int) and query.shape[2] > 1:
        raise MlaPassError(f"{attention.name} lets tokens see later ones; expected a causal model")
    if given.get("dropout_p"):
        raise MlaPassError(f"{attention.name} drops attention at random; call model.eval() before compiling")


def _operands(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Operands by name, however they are passed."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _unread(update: fx.Node, reader: fx.Node) -> MlaPassError:
    return MlaPassError(
        f"{update.name}: the cache's keys and values are read by {reader.name} ({reader.target}); expected "
        f"scaled_dot_product_attention alone: {_ADVICE}"
    )


# ---- rewriting


def _replace(graph: fx.Graph, update: fx.Node, attention: fx.Node) -> None:
    """Put one `attend` where the attention stood, and take away update and attention."""
    given, told = _operands(update, _UPDATE_OPERANDS), _operands(attention, _ATTENTION_OPERANDS)
    given.pop("rows")
    with graph.inserting_before(attention):
        fused = graph.call_function(attend, (told["query"],), {**given, "mask": told.get("attn_mask")})
        fused.meta = dict(attention.meta)
    attention.replace_all_uses_with(fused)
    graph.erase_node(attention)
    _erase(graph, update)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a node and all that reads it; nothing else does any more."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


# ---- what compiles the rest


def _inner(backend: Any) -> Callable[..., Any]:
    if callable(backend):
        return backend
    if backend == "mla_pass" or backend not in torch.compiler.list_backends(exclude_tags=()):
        raise MlaPassError(f"options={{'backend': {backend!r}}}: torch knows no such backend; try inductor or eager")
    return torch._dynamo.lookup_backend(backend)


def _name(backend: Callable[..., Any]) -> str:
    return getattr(backend, "__name__", type(backend).__name__)
