"""LatentAttention as operators of torch: opaque to torch.compile, computed by the op library on the CPU.

    mla_pass::latent_attention   writes the new rows into the cache, attends over it, decodes the values
    mla_pass::latent_update      writes the new rows, hands back decoded keys and values for another's attention

Operands are those of `mla_pass.onnx.body`, the cache a shared buffer that is written in place; `attributes` is the
JSON text of the operator's attributes (`mla_pass.pytorch.spec.operator_json`). A mask [B or 1, 1 or H, S, T or more],
boolean (False hides) or added to the scores, stands in for padding mask and bias alike.

On the CPU the op library's kernel computes `latent_attention`, the same that ONNX Runtime runs, on as many threads as
torch is told to use. Elsewhere, and where the library is not built, torch's own operators do (`mla-pass env`
tells whether it is).
"""

from __future__ import annotations

import json
import logging
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from mla_pass import native
from mla_pass.errors import MlaPassError
from mla_pass.native.kernel import Layout, Operand
from mla_pass.pytorch.latent import latent_attention as expanded
from mla_pass.pytorch.rows import check_room, decode, write_rows

log = logging.getLogger(__name__)


@torch.library.custom_op("mla_pass::latent_attention", mutates_args=("latent", "rope"))
def latent_attention(
    query: Tensor, row: Tensor, latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor,
    total: Tensor, mask: Tensor | None, query_map: Tensor | None, key_up: Tensor | None, key_mean: Tensor | None,
    value_up: Tensor | None, attributes: str,
) -> Tensor:  # fmt: skip
    """Context [B, S, H*V] (w in place of V without value_up); rows total-S..total-1 of `latent` and `rope` are written.

    `total` int64 [1]. The last S of the `total` rows are the new tokens'; without a mask a token sees itself and what
    came before. Raises MlaPassError naming the operand that is not as it should be.
    """
    bias = None if mask is None else added(mask, int(total), query)
    maps = (query_map, key_up, key_mean, value_up)
    operands = [query, row, latent, rope, cos, sin, position_ids, total, None, bias, *maps]
    if query.device.type == "cpu":
        if native.find_library() is not None:
            return _by_kernel(operands, attributes, causal=mask is None)
        _say_that_it_is_slow()
    return _by_torch(operands, attributes, causal=mask is None)


@latent_attention.register_fake
def _(
    query: Tensor, row: Tensor, latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor,
    total: Tensor, mask: Tensor | None, query_map: Tensor | None, key_up: Tensor | None, key_mean: Tensor | None,
    value_up: Tensor | None, attributes: str,
) -> Tensor:  # fmt: skip
    return _new_context(query, value_up, attributes)


@torch.library.custom_op("mla_pass::latent_update", mutates_args=("latent", "rope"))
def latent_update(
    key: Tensor, value: Tensor, latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor,
    total: Tensor, encode: Tensor, encode_bias: Tensor, query_map: Tensor, key_up: Tensor | None,
    key_mean: Tensor | None, value_up: Tensor, value_mean: Tensor, rows: int, attributes: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys [B, G, rows, D], rotated, and values [B, G, rows, V] as the cache gives them back.

    `key` [B, G, S, D], rotated, and `value` [B, G, S, V] are the new tokens'. `rows` is `total`, or the buffer's size:
    rows beyond `total` are zeros.
    """
    read = _read(attributes)
    write_rows(read, key, value, latent, rope, cos, sin, position_ids, int(total), encode, encode_bias)
    maps = {"query_map": query_map, "key_up": key_up, "key_mean": key_mean, "value_up": value_up}
    keys, values = decode(read, latent, rope, cos, sin, position_ids, int(total), maps, value_mean)
    missing = rows - keys.shape[2]
    if missing:
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (keys, values))
    return keys.to(key.dtype).contiguous(), values.to(value.dtype).contiguous()


@latent_update.register_fake
def _(
    key: Tensor, value: Tensor, latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor,
    total: Tensor, encode: Tensor, encode_bias: Tensor, query_map: Tensor, key_up: Tensor | None,
    key_mean: Tensor | None, value_up: Tensor, value_mean: Tensor, rows: int, attributes: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, groups, _, size = key.shape
    return key.new_empty(batch, groups, rows, size), value.new_empty(batch, groups, rows, value.shape[3])


def added(mask: Tensor, total: int, query: Tensor) -> Tensor:
    """A mask's first `total` columns as something to add to the scores, in the query's type."""
    if mask.dim() != 4 or mask.shape[-1] < total:
        raise MlaPassError(
            f"LatentAttention got a mask of shape {list(mask.shape)} over {total} cached rows; expected [batch, heads, "
            "tokens, rows]: use the attention implementation 'sdpa' or 'eager'"
        )
    return as_bias(mask[..., :total], query.dtype)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, boolean or added, as something to add to scores of a type."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask.to(dtype)


# ---- on the CPU: the op library


def _by_kernel(operands: list[Tensor | None], attributes: str, *, causal: bool) -> Tensor:
    layout = _layout(attributes, causal)
    given = [None if x is None else x.contiguous() for x in operands]
    assert given[0] is not None  # the query is required
    context = _new_context(given[0], given[13], attributes)
    layout.attend([None if x is None else _operand(x) for x in given], _operand(context), torch.get_num_threads())
    return context


def _new_context(query: Tensor, value_up: Tensor | None, attributes: str) -> Tensor:
    """Room for [B, S, H*V]."""
    read = _read(attributes)
    size = read["rank"] - read["value_offset"] if value_up is None else value_up.shape[2]
    return query.new_empty(query.shape[0], query.shape[1], read["num_heads"] * size)


@lru_cache(maxsize=4096)
def _layout(attributes: str, causal: bool) -> Layout:
    return Layout({**_read(attributes), "causal": int(causal)})


def _operand(x: Tensor) -> Operand:
    return Operand(x.data_ptr(), _NAMES[x.dtype], tuple(x.shape))


_NAMES = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int8: "int8",
    torch.uint8: "uint8", torch.int64: "int64",
}  # fmt: skip


# ---- anywhere: torch


def _by_torch(operands: list[Tensor | None], attributes: str, *, causal: bool) -> Tensor:
    """In float32, over a cache that ends with the new rows; these are then put where they belong."""
    query, latent, rope, total = operands[0], operands[2], operands[3], operands[7]
    assert query is not None and latent is not None and rope is not None and total is not None  # they are required
    cos = operands[4]
    assert cos is not None  # likewise
    end, new = int(total), query.shape[1]
    check_room(latent, cos, end)
    pasts = [x[:, :, : end - new] for x in (latent, rope)]
    read = {**_read(attributes), "causal": int(causal), "shared_buffer": 0}
    wide = [x if x is None or not x.is_floating_point() else x.float() for x in operands]
    wide[2:4] = [x.float() if x.is_floating_point() else x for x in pasts]
    context, *presents = expanded(read, wide)
    for buffer, present in zip((latent, rope), presents, strict=True):
        buffer[:, :, end - new : end] = present[:, :, end - new :]
    return context.to(query.dtype)


@cache
def _say_that_it_is_slow() -> None:
    """Once."""
    log.warning(
        "the op library is not built, so torch's own operators compute latent attention, several times slower: install "
        "a C++ compiler and install mla_pass again"
    )


@lru_cache(maxsize=4096)
def _read(attributes: str) -> dict[str, Any]:
    return json.loads(attributes)
