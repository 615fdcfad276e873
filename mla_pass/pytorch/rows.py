"""Cached rows from keys and values, and keys and values from cached rows, for an attention that is not ours.

Keys come and go *rotated*, as models cache them: they are turned back to be encoded, and turned again once decoded.
A pair of a decoded key turns by its block's factor; that counts rows, the query's rotation counts positions, and a
sequence padded by f rows on its left has row = position + f, so the factor is turned back by f.

Nothing here waits for a device to tell a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mla_pass.errors import MlaPassError
from mla_pass.pytorch.buffer import most_rows, place, put
from mla_pass.pytorch.latent import band_factor, columns_of, decoded, encoded, turn, turned


def write_rows(
    a: Mapping[str, Any], key: Tensor, value: Tensor, latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, total: Tensor, encode: Tensor, encode_bias: Tensor,
) -> None:  # fmt: skip
    """Encode rotated keys [B, G, S, D] and values [B, G, S, V] into rows total-S..total-1 of the cache.

    `total` int64 [1]. Nothing is written when there is no room for them.
    """
    rows, fits = place(total, key.shape[2], most_rows(latent, cos))
    angles = cos[position_ids], sin[position_ids]  # [B or 1, S, R/2]
    still = unrotated(key.float(), a, *angles)
    y = torch.cat([x.transpose(1, 2).flatten(2) for x in (still, value.float())], -1)  # [B, S, N]
    row = y @ encode.float().T + encode_bias.float()
    c, rho = row.split([a["rank"], a["rope_dim"]], dim=-1)
    columns = columns_of(a, "rope_index")
    rho = turn(rho, angles[0][..., columns], angles[1][..., columns])
    for buffer, part in ((latent, c), (rope, rho)):
        packed = part if buffer.dtype.is_floating_point else encoded(part, buffer.dtype)
        put(buffer, rows, packed[:, None], fits)


def check_room(latent: Tensor, cos: Tensor, total: int) -> None:
    """Raises MlaPassError when `total` rows are more than the cache or the rotary table has."""
    for name, most in (("the cache holds", latent.shape[2]), ("the rotary table reaches", cos.shape[0])):
        if total > most:
            raise MlaPassError(
                f"LatentAttention: {total} rows with the new tokens, but {name} {most}; make a larger cache, or "
                "generate less"
            )


def decode(
    a: Mapping[str, Any], latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, total: Tensor,
    live: int, maps: Mapping[str, Tensor | None], value_mean: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys [B, G, T, D], rotated, and values [B, G, T, V] of the first T = `live` rows, float32.

    `total` int64 [1] of them are filled.
    """
    c, rho = (
        x[:, :, :live].float() if x.dtype.is_floating_point else decoded(x[:, :, :live], torch.float32)
        for x in (latent, rope)
    )
    wide = {name: x.float() for name, x in maps.items() if x is not None}
    parts = []
    if "key_up" in wide:
        keys = c[..., : a["key_rank"]] @ wide["key_up"].transpose(1, 2) + wide["key_mean"][:, None]  # [B, G, T, n]
        pairs = len(a["band_index"])
        if pairs:
            shift = total - 1 - position_ids[:, -1]  # [B or 1]: rows before the sequence's first token
            factor = (x[:, None] for x in _factor(a, cos, sin, live, shift.clamp(0, cos.shape[0] - 1)))
            keys = torch.cat([turn(keys[..., : 2 * pairs], *factor), keys[..., 2 * pairs :]], -1)
        parts.append(keys)
    groups = a["kv_groups"]
    if a["rope_dim"]:
        parts.append(rho.expand(-1, groups, -1, -1))
    key = torch.cat(parts, -1) @ wide["query_map"].transpose(1, 2)  # scores are query . (query_map key)
    scaling = torch.ones(key.shape[-1], device=key.device)
    scaling[: a["rotary_dim"]].fill_(1 / a["attention_scaling"])  # the model's queries carry it already
    value = c[..., a["value_offset"] :] @ wide["value_up"] + value_mean.float()[:, None]
    return key * scaling, value


def unrotated(x: Tensor, a: Mapping[str, Any], cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, S, D] before rotation, from rotated ones; cos and sin [B or 1, S, R/2] of their positions."""
    moved, rest = x.split([a["rotary_dim"], x.shape[-1] - a["rotary_dim"]], dim=-1)
    re, im = (moved[..., 0::2], moved[..., 1::2]) if a["interleaved"] else moved.chunk(2, -1)
    scaling = 1 / a["attention_scaling"]
    parts = turned(re, im, cos[:, None] * scaling, -sin[:, None] * scaling)
    back = torch.stack(parts, -1).flatten(-2) if a["interleaved"] else torch.cat(parts, -1)
    return torch.cat([back, rest], -1)


def _factor(a: Mapping[str, Any], cos: Tensor, sin: Tensor, live: int, shift: Tensor) -> tuple[Tensor, Tensor]:
    """What turns the decoded pairs of rows 0..T-1, real and imaginary [B or 1, T, m]."""
    re, im = band_factor(a, cos, sin, torch.arange(live, device=cos.device))
    columns = columns_of(a, "band_index")
    back = cos[shift][:, None, columns], -sin[shift][:, None, columns]
    return turned(re, im, *back)
