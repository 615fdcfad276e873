"""LatentAttention as operators of torch: opaque to torch.compile, computed by the op library.

    mla_pass::latent_attention   writes the new rows into the cache, attends over it, decodes the values
    mla_pass::latent_update      writes the new rows, hands back decoded keys and values for another's attention

Operands are those of `mla_pass.onnx.body`, the cache a shared buffer that is written in place; `attributes` is the
JSON text of the operator's attributes (`mla_pass.pytorch.spec.operator_json`). A mask [B or 1, 1 or H, S, T or more],
boolean (False hides) or added to the scores, stands in for padding mask and bias alike.

The op library's kernels compute `latent_attention`, the same that ONNX Runtime runs: on the CPU on as many threads as
torch is told to use, on a CUDA device behind all that its current stream has to do. What they do not take (float32 on a
GPU, say), and all of it where the library is not built, torch's own operators compute; the log says so once
(`mla-pass env` tells what is built).

On a device nothing waits for it to tell a number, `total` among them: a step can be captured in a CUDA graph and
replayed while the cache grows. What is refused on the CPU for a number that is out of range is NaN there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from mla_pass import native
from mla_pass.errors import MlaPassError, Unsupported
from mla_pass.native.kernel import Layout, Operand
from mla_pass.onnx.body import INPUTS
from mla_pass.pytorch import buffer as buffers
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
    bias: Tensor | None = None
    if mask is not None:
        bias = added(mask, int(total) if _on_host(query) else most_columns(mask, query, latent), query)
    maps = (query_map, key_up, key_mean, value_up)
    operands = [query, row, latent, rope, cos, sin, position_ids, total, None, bias, *maps]
    compute = _on_cpu if _on_host(query) else _on_device
    return compute(operands, attributes, causal=mask is None)


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
    most = buffers.most_rows(latent, cos)
    if _on_host(key):
        check_room(latent, cos, int(total))
    live = int(total) if _on_host(key) else min(rows, most)
    read = settled(attributes, key.device)
    write_rows(read, key, value, latent, rope, cos, sin, position_ids, total, encode, encode_bias)
    maps = {"query_map": query_map, "key_up": key_up, "key_mean": key_mean, "value_up": value_up}
    keys, values = decode(read, latent, rope, cos, sin, position_ids, total, live, maps, value_mean)
    if not _on_host(key):
        keys, values = (buffers.only_filled(x, total, most) for x in (keys, values))
    missing = rows - live
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


def most_columns(mask: Tensor, query: Tensor, latent: Tensor) -> int:
    """Of a mask on a device, which alone knows how many rows are filled: as many as could be, and S at least."""
    return max(min(mask.shape[-1], latent.shape[2]), query.shape[1])


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, boolean or added, as something to add to scores of a type."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask.to(dtype)


def _on_host(x: Tensor) -> bool:
    """Whether the host can look at numbers without waiting for a device."""
    return x.device.type == "cpu"


def _has_kernels(x: Tensor) -> bool:
    """Whether the op library may have kernels for a tensor's device."""
    return x.device.type == "cuda"


# ---- the op library's kernels


def _on_cpu(operands: Sequence[Tensor | None], attributes: str, *, causal: bool) -> Tensor:
    """By the CPU kernel where it is built, by torch elsewhere."""
    if native.find_library() is not None:
        return _by_kernel(operands, attributes, causal=causal)
    _say_that_it_is_slow()
    return _by_torch(operands, attributes, causal=causal)


def _by_kernel(operands: Sequence[Tensor | None], attributes: str, *, causal: bool) -> Tensor:
    layout = _layout(attributes, causal)
    with _contiguous(operands) as given:
        context = _new_context(given[0], given[13], attributes)
        layout.attend([None if x is None else _operand(x) for x in given], _operand(context), torch.get_num_threads())
    return context


def _on_device(operands: Sequence[Tensor | None], attributes: str, *, causal: bool) -> Tensor:
    """By the CUDA kernels where they take it, by torch elsewhere."""
    operands = _together(operands)
    try:
        if not _has_kernels(operands[0]):
            raise Unsupported(f"there are no kernels for torch's device type {operands[0].device.type}")
        return _by_cuda(operands, attributes, causal=causal)
    except Unsupported as reason:
        _say_that_torch_computes(str(reason))
    return _by_torch_on_device(operands, attributes, causal=causal)


def _by_cuda(operands: Sequence[Tensor | None], attributes: str, *, causal: bool) -> Tensor:
    """Behind the work of the current stream. Raises Unsupported where no kernel takes it; nothing is written then."""
    if native.find_library() is None:
        raise Unsupported("the op library is not built: install a C++ compiler and CUDA, and install mla_pass again")
    layout = _layout(attributes, causal)
    with _contiguous(operands) as given, _current(given[0].device) as (device, stream):
        inputs = [None if x is None else _operand(x) for x in given]
        size = layout.cuda_scratch(inputs, device)
        # What is freed here is given to nobody before the stream has come past its use: the allocator knows streams.
        scratch = torch.empty(size, dtype=torch.uint8, device=given[0].device)
        context = _new_context(given[0], given[13], attributes)
        layout.attend_cuda(
            inputs, _operand(context), device=device, stream=stream, scratch=scratch.data_ptr(), scratch_bytes=size
        )
    return context


@contextmanager
def _current(device: torch.device) -> Iterator[tuple[int, int]]:
    """Make a CUDA device the current one; its number, and its current stream as CUDA has it."""
    with torch.cuda.device(device):
        yield torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


@contextmanager
def _contiguous(operands: Sequence[Tensor | None]) -> Iterator[list[Any]]:
    """The operands as kernels read them; a part of the cache that had to be copied for it is copied back."""
    given = [None if x is None else x.contiguous() for x in operands]
    yield given
    for part, copied in zip(operands[2:4], given[2:4], strict=True):
        if part is not copied and part is not None and copied is not None:
            part.copy_(copied)


def _together(operands: Sequence[Tensor | None]) -> list[Any]:
    """The operands, all on the query's device; `total` may come from the CPU. Raises MlaPassError naming another."""
    query, total = operands[0], operands[7]
    assert query is not None and total is not None  # they are required
    moved = [*operands[:7], total.to(query.device), *operands[8:]]
    for name, x in zip(INPUTS, moved, strict=True):
        if x is not None and x.device != query.device:
            raise MlaPassError(
                f"LatentAttention: {name} is on {x.device} and query on {query.device}; expected all tensors on one "
                "device"
            )
    return moved


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


# ---- torch's own operators


def _by_torch(operands: Sequence[Tensor | None], attributes: str, *, causal: bool) -> Tensor:
    """On the CPU, in float32, over a cache that ends with the new rows; these are then put where they belong."""
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


def _by_torch_on_device(operands: Sequence[Any], attributes: str, *, causal: bool) -> Tensor:
    """In float32, over all rows that the cache may hold."""
    query = operands[0]
    read = {**settled(attributes, query.device), "causal": int(causal)}
    wide = [x if x is None or not x.is_floating_point() else x.float() for x in operands]
    wide[2:4] = operands[2:4]  # they are written
    return buffers.latent_attention(read, wide).to(query.dtype)


@cache
def _say_that_torch_computes(reason: str) -> None:
    """Once each."""
    log.warning("torch's own operators compute latent attention on this device, several times slower: %s", reason)


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


@lru_cache(maxsize=4096)
def settled(attributes: str, device: torch.device) -> Mapping[str, Any]:
    """The attributes with all lists as tensors in a device's memory.

    To put them there the host waits, which a capture forbids: whoever means to capture calls this before.
    """
    kinds = dict.fromkeys(("band_a0", "band_a1"), torch.float32)
    return {
        name: torch.tensor(x, dtype=kinds.get(name, torch.int64), device=device) if isinstance(x, list) else x
        for name, x in _read(attributes).items()
    }
