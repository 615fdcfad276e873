"""``mla_pass::LatentAttention`` as one differentiable torch function, in its expanded form.

The contract (inputs, attributes, layouts) is that of `mla_pass.onnx.body`; this computes the same numbers from the
node alone, never looking into the function's body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mla_pass.onnx.body import INPUTS
from mla_pass.pytorch.attention import attend
from mla_pass.storage import CODED, OCTAVE, SEGMENTS, segment_length

_CODED = {getattr(torch, coded.element.name): coded for coded in CODED.values()}
"""What eight-bit tensors of a type hold."""


def latent_attention(attributes: Mapping[str, Any], operands: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Context [B, S, H*V] and both presents; differentiable in every floating-point operand.

    Where total_length is left out the cache grows and sizes alone decide: no number is looked at, so that it can be
    traced.
    """
    return Node(named(operands), attributes).run()


def named(operands: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Those that are given, by name."""
    return {name: x for name, x in zip(INPUTS, operands, strict=False) if x is not None}


class Node:
    """One execution; each method is one step."""

    def __init__(self, given: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
        self.given, self.a = given, attributes
        self.batch, self.new = given["query"].shape[:2]
        self.by_sizes = "total_length" not in given
        self.total = given["past_latent"].shape[2] + self.new if self.by_sizes else int(given["total_length"])
        self.rows = torch.arange(self.total, device=given["query"].device)
        self.own = self.rows[self.total - self.new :]
        """Rows of the new tokens."""

    def run(self) -> tuple[Tensor, ...]:
        """Write the rows, attend over the live ones."""
        a, given = self.a, self.given
        latent, rope = given["row"].split([a["rank"], a["rope_dim"]], dim=-1)
        row = torch.cat([latent, turn(rope, *self.angles())], -1)
        parts = row.tensor_split([a["split"]], dim=-1)
        pasts = ("past_latent", "past_rope")
        live, presents = zip(
            *(self.stored(name, new[:, None]) for name, new in zip(pasts, parts, strict=True)), strict=True
        )
        latent, rope = torch.cat(live, -1).split([a["rank"], a["rope_dim"]], dim=-1)
        keys = self.keys(latent[..., : a["key_rank"]])
        key = torch.cat([keys, rope.expand(-1, keys.shape[1], -1, -1)], -1)
        value = latent[..., a["value_offset"] :]
        value = value @ given["value_up"] if "value_up" in given else value
        causal, mask = self.mask()
        context = attend(self.query(), key, value, scale=a["scale"], softcap=a["softcap"], mask=mask, causal=causal)
        return context.transpose(1, 2).reshape(self.batch, self.new, -1), *presents

    def stored(self, name: str, new: Tensor) -> tuple[Tensor, Tensor]:
        """The T live rows as numbers, and the cache with the new rows [B, 1, S, .] as rows T-S..T-1.

        A growing cache ends there. Rounding to 8 bits passes gradients as they come.
        """
        past = self.given[name]
        before = past[:, :, : self.total - self.new]
        after = [past[:, :, self.total :]] if self.a["shared_buffer"] else []
        if past.dtype.is_floating_point:
            present = torch.cat([before, new.to(past.dtype), *after], 2)
            return present[:, :, : self.total].to(new.dtype), present
        rows = encoded(new.detach(), past.dtype)
        seen = new + (decoded(rows, new.dtype) - new).detach()
        return torch.cat([decoded(before, new.dtype), seen], 2), torch.cat([before, rows, *after], 2)

    def angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, S, p/2] of the new tokens' cached rotation."""
        columns, positions = columns_of(self.a, "rope_index"), self.given["position_ids"]
        return self.given["cos"][positions][..., columns], self.given["sin"][positions][..., columns]

    def query(self) -> Tensor:
        """[B, H, S, n + p]: bands turned by their rows, the rope part by its positions."""
        a, given = self.a, self.given
        groups, per_group = a["kv_groups"], a["num_heads"] // a["kv_groups"]
        query = given["query"].reshape(self.batch, self.new, groups, per_group, -1).permute(0, 2, 3, 1, 4)
        if "query_map" in given:
            query = query @ given["query_map"][:, None]
        query = query.reshape(self.batch, a["num_heads"], self.new, -1)
        nope, rope = query.split([a["nope_dim"], a["rope_dim"]], dim=-1)
        bands, still = self.bands(nope)
        columns = columns_of(a, "band_index")
        bands = turn(bands, given["cos"][self.own][:, columns], given["sin"][self.own][:, columns])
        rope = turn(rope, *(x[:, None] for x in self.angles()))
        return torch.cat([bands, still, rope], -1)

    def bands(self, nope: Tensor) -> tuple[Tensor, Tensor]:
        """The 2*m dims whose block turns, and the dims left still."""
        pairs = len(self.a["band_index"])
        return nope[..., : 2 * pairs], nope[..., 2 * pairs :]

    def keys(self, latent: Tensor) -> Tensor:
        """Keys without the cached rotation: [B, G, T, n], or the latents themselves where key_up is folded away.

        `latent` [B, 1, T, key_rank] holds the columns that keys read.
        """
        if not self.a["nope_dim"]:
            return latent[..., :0]
        if "key_up" not in self.given:
            return latent
        keys = latent @ self.given["key_up"].transpose(1, 2) + self.given["key_mean"][:, None]
        bands, still = self.bands(keys)
        if not bands.shape[-1]:
            return still
        factor = band_factor(self.a, self.given["cos"], self.given["sin"], self.rows)
        return torch.cat([turn(bands, *factor), still], -1)

    def mask(self) -> tuple[bool, Tensor | None]:
        """Whether attention is causal, and what else hides a key (boolean) or moves its score."""
        given, window, causal = self.given, self.a["local_window_size"], bool(self.a["causal"])
        back = self.own[:, None] - self.rows
        keep: Tensor | None = back < window if window > 0 else None
        if causal and self.by_sizes:
            keep, causal = back >= 0 if keep is None else keep & (back >= 0), False
        padding = given.get("padding_mask")
        if padding is not None and (self.by_sizes or not bool(padding.all())):
            seen = padding.bool()[:, None, None]
            keep = seen if keep is None else keep & seen
        bias = given.get("attention_bias")
        if bias is not None:
            keep = bias if keep is None else bias.masked_fill(~keep, -torch.inf)
        return causal, keep


def columns_of(a: Mapping[str, Any], name: str) -> Any:
    """An attribute that lists columns of the tables, to index with: a list, or the tensor that it is already."""
    return a[name] if isinstance(a[name], Tensor) else list(a[name])


def band_factor(a: Mapping[str, Any], cos: Tensor, sin: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """exp(j theta centre) (a0 + j a1 delta) for every row and band pair, real and imaginary [T, m].

    `centre` is the middle of a row's block and may lie between two rows of the tables: theta is read off their row 1,
    exact while it is below pi radians per position.
    """
    names = ("band_index", "band_block", "band_a0", "band_a1")
    index, block, a0, a1 = (torch.as_tensor(a[name], device=cos.device) for name in names)
    first = torch.div(rows[:, None], block, rounding_mode="floor") * block
    middle = (block - 1).to(cos.dtype) / 2
    phase = middle * torch.atan2(sin[1:2, index].sum(0), cos[1:2, index].sum(0))
    slope = a1.to(cos.dtype) * ((rows[:, None] - first).to(cos.dtype) - middle)
    fit_re, fit_im = turned(a0.to(cos.dtype), slope, torch.cos(phase), torch.sin(phase))
    return turned(fit_re, fit_im, cos[first, index], sin[first, index])


def turned(re: Tensor, im: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(re + j im) * (cos + j sin)."""
    return re * cos - im * sin, re * sin + im * cos


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply x [..., 2k], k real parts before k imaginary parts, by cos + j sin [..., k]."""
    re, im = x.chunk(2, -1)
    return torch.cat(turned(re, im, cos, sin), -1) if x.shape[-1] else x


def encoded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Eight-bit rows [..., n + 4] of numbers [..., n], int8 or uint8; see `mla_pass.storage.encoded`."""
    n, coded = x.shape[-1], _CODED[dtype]
    length = segment_length(n)
    parts = torch.nn.functional.pad(x, (0, SEGMENTS * length - n)).unflatten(-1, (SEGMENTS, length))
    code = torch.ceil(OCTAVE * torch.log2(parts.abs().amax(-1) / coded.largest)).clamp(-128, 127)
    q = (parts / torch.exp2(code / OCTAVE)[..., None]).clamp(-coded.largest, coded.largest).flatten(-2)[..., :n]
    bits = q.to(torch.float8_e4m3fn).view(torch.uint8) if dtype == torch.uint8 else torch.round(q).to(dtype)
    return torch.cat([bits, (code + coded.zero).to(dtype)], -1)


def decoded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [..., n] of eight-bit rows [..., n + 4]; see `mla_pass.storage.decoded`."""
    n = rows.shape[-1] - SEGMENTS
    step = torch.exp2((rows[..., n:].to(dtype) - _CODED[rows.dtype].zero) / OCTAVE)
    scale = step[..., None].expand(*step.shape, segment_length(n)).flatten(-2)[..., :n]
    q = rows[..., :n].contiguous().view(torch.float8_e4m3fn) if rows.dtype == torch.uint8 else rows[..., :n]
    return q.to(dtype) * scale
