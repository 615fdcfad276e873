"""Decoding in the absorbed form, in Triton: a second implementation of what the CUDA kernels do, to check them by.

    context = latent_attention(attributes, operands, splits=8)

takes what ``mla_pass::latent_attention`` takes, of any rank and number of rope dims, and computes the same in float32,
float16 and bfloat16. One Triton kernel meets the cached rows, a share of them in every split, as they lie: a query of
a block is pulled through key_up once and then multiplied with latents. Around it torch makes those queries (they are
few), decodes the pairs whose blocks are too short for that, and joins the splits. Nothing waits for the device to tell
how many rows are filled.

Letters as in `mla_pass.onnx.body`; P = H/G heads of a group, f decoded pairs, N blocks of absorbed queries. Query rows
are P*S of a group, head by head.

With ``TRITON_INTERPRET=1`` in the environment when this module is first imported the kernel runs on the CPU. Not in
bfloat16: numpy, which the interpreter computes with, has no such type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mla_pass.errors import Unsupported
from mla_pass.pytorch.buffer import most_rows, place, put
from mla_pass.pytorch.latent import band_factor, decoded, encoded, named, turn

SHORTEST = 64
"""Rows of the shortest block whose queries are absorbed; a tile of keys lies within one."""
QUERY_ROWS = 16
"""Of a program: the least that tl.dot takes."""


def latent_attention(attributes: Mapping[str, Any], operands: Sequence[Tensor | None], *, splits: int = 8) -> Tensor:
    """Context [B, S, H*V] (w in place of V without value_up); rows total-S..total-1 of the cache are written.

    Raises Unsupported for a row that is not cut behind its latent, and for a padding_mask (a bias says as much).
    """
    given = named(operands)
    if attributes["split"] != attributes["rank"] or "padding_mask" in given:
        raise Unsupported("the Triton kernel takes rows cut behind their latent, and a bias in place of a padding_mask")
    return _Call(attributes, given).run(splits)


@dataclass(frozen=True)
class _Queries:
    """Contiguous, of the model's type: what the kernel multiplies with latents, rope parts and decoded keys."""

    varying: Tensor
    """[B, N, orders, G, P*S, k]: of block i for rows i*block.. of the cache; order 1 counts times the row in it."""
    mean: Tensor
    """[B, N, orders, G, P*S] float32: what the keys' mean adds."""
    rope: Tensor
    """[B, G, P*S, p]"""
    fine: Tensor
    """[B, G, P*S, 2f]"""
    block: int


class _Call:
    """One execution; each method is one step."""

    def __init__(self, attributes: Mapping[str, Any], given: Mapping[str, Tensor]) -> None:
        self.a, self.given = attributes, given
        query, bias = given["query"], given.get("attention_bias")
        self.dtype, self.device = query.dtype, query.device
        self.batch, self.new = query.shape[:2]
        self.groups, self.per_group = attributes["kv_groups"], attributes["num_heads"] // attributes["kv_groups"]
        self.most = most_rows(given["past_latent"], given["cos"])
        self.most = self.most if bias is None else min(self.most, bias.shape[-1])
        self.own, self.fits = place(given["total_length"], self.new, self.most)
        self.index, self.block, self.a0, self.a1 = (
            torch.tensor(attributes[name], device=self.device, dtype=kind)
            for name, kind in (
                ("band_index", torch.int64), ("band_block", torch.int64), ("band_a0", torch.float32),
                ("band_a1", torch.float32),
            )
        )  # fmt: skip

    def run(self, splits: int) -> Tensor:
        """Write the rows, meet them split by split, join."""
        latent, rope = self.write_rows()
        queries, w = self.queries(), self.a["rank"] - self.a["value_offset"]
        shape = (self.batch, self.groups, splits, self.per_group * self.new)
        sums = torch.empty(*shape, w, device=self.device)
        tops, masses = torch.empty(shape, device=self.device), torch.empty(shape, device=self.device)
        self.launch(queries, latent, rope, self.fine_keys(latent), sums, tops, masses)
        joined = join(sums, tops, masses)  # [B, G, P*S, w]
        if "value_up" in self.given:
            joined = joined.to(self.dtype).float() @ self.given["value_up"].float()
        context = joined.unflatten(2, (self.per_group, self.new)).permute(0, 3, 1, 2, 4).flatten(2)
        return context.masked_fill(~self.fits, torch.nan).to(self.dtype)

    def write_rows(self) -> tuple[Tensor, Tensor]:
        """The new rows, rotated, into the cache; all rows as floats [B, most, r] and [B, most, p]."""
        latent, rope = self.given["row"].float().split([self.a["rank"], self.a["rope_dim"]], dim=-1)
        parts = []
        for name, part in (("past_latent", latent), ("past_rope", turn(rope, *self.angles()))):
            buffer = self.given[name]
            coded = not buffer.dtype.is_floating_point
            put(buffer, self.own, (encoded(part, buffer.dtype) if coded else part)[:, None], self.fits)
            live = buffer[:, 0, : self.most]
            parts.append(decoded(live, torch.float32).to(self.dtype) if coded else live)
        return parts[0], parts[1]

    def angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, S, p/2] of the new tokens' cached rotation."""
        columns, positions = list(self.a["rope_index"]), self.given["position_ids"]
        return self.given["cos"][positions][..., columns], self.given["sin"][positions][..., columns]

    # ---- queries

    def queries(self) -> _Queries:
        """Everything that meets the cache."""
        a, given = self.a, self.given
        query = given["query"].float().unflatten(-1, (self.groups, self.per_group, -1)).permute(0, 2, 3, 1, 4)
        if "query_map" in given:
            query = query @ given["query_map"].float()[:, None]
        nope, rope = query.split([a["nope_dim"], a["rope_dim"]], dim=-1)  # [B, G, P, S, .]
        rope = turn(rope, *(x[:, None, None] for x in self.angles()))
        m = len(self.index)
        pairs, still = torch.complex(nope[..., :m], nope[..., m : 2 * m]), nope[..., 2 * m :]
        pairs = pairs * torch.complex(given["cos"], given["sin"])[self.own][:, self.index]
        fine, coarse = self.fine_pairs, ~self.fine_pairs
        varying, mean, block = self.absorbed(pairs[..., coarse], still)
        own = torch.cat([pairs[..., fine].real, pairs[..., fine].imag], -1)
        return _Queries(varying, mean, self.as_rows(rope), self.as_rows(own), block)

    @property
    def fine_pairs(self) -> Tensor:
        """Whether a pair is decoded: its block is too short, or no whole number of the shortest, [m]."""
        return torch.tensor([block % SHORTEST != 0 for block in self.a["band_block"]], dtype=torch.bool)

    def absorbed(self, pairs: Tensor, still: Tensor) -> tuple[Tensor, Tensor, int]:
        """`_Queries.varying`, `.mean` and `.block` of turned pairs and still dims [B, G, P, S, .].

        A pair's factor at row start + d is exp(j theta centre) (a0 + j a1 (start + d - centre)), linear in d within
        any block that its own holds; the score is the real part of conj(query) factor key.
        """
        coarse = ~self.fine_pairs
        block, index, cos, sin = self.block[coarse], self.index[coarse], self.given["cos"], self.given["sin"]
        fits = [(b, a1) for b, a1 in zip(self.a["band_block"], self.a["band_a1"], strict=True) if b % SHORTEST == 0]
        orders, rows = 2 if any(a1 for _, a1 in fits) else 1, min((b for b, _ in fits), default=max(self.most, 1))
        start = torch.arange(0, max(self.most, 1), rows, device=self.device)[:, None]
        first, half = start // block * block, (block - 1).float() / 2
        centre = torch.complex(cos, sin)[first, index]
        centre = centre * torch.exp(1j * half * torch.atan2(sin[1:2, index].sum(0), cos[1:2, index].sum(0)))
        slope = 1j * self.a1[coarse]
        factors = torch.stack([centre * (self.a0[coarse] + slope * (start - first - half)), centre * slope], 1)
        turned = pairs[:, None, None] * factors[:, :orders, None, None, None].conj()  # [B, N, orders, G, P, S, .]
        rest = still[:, None, None] * torch.eye(orders, 1, device=self.device).view(orders, 1, 1, 1, 1)
        dims = torch.cat([turned.real, turned.imag, rest.expand(*turned.shape[:-1], -1)], -1)
        if "key_up" not in self.given:
            return self.as_rows(dims), torch.zeros(*dims.shape[:4], self.per_group * self.new, device=self.device), rows
        m, dim = len(self.index), torch.arange(self.a["nope_dim"], device=self.device)
        own = torch.cat([dim[:m][coarse], dim[m : 2 * m][coarse], dim[2 * m :]])
        key_up, key_mean = (self.given[name].float()[:, own] for name in ("key_up", "key_mean"))
        return self.as_rows(dims @ key_up[:, None]), (dims @ key_mean[:, None, :, None]).flatten(4), rows

    def fine_keys(self, latent: Tensor) -> Tensor:
        """Decoded pairs of all rows, turned, [B, G, most, 2f] of the model's type."""
        fine, m = self.fine_pairs, len(self.index)
        if not fine.any():
            return latent.new_empty(self.batch, self.groups, self.most, 0, dtype=self.dtype)
        own = torch.arange(m, device=self.device)[fine]
        key_up, key_mean = (self.given[name].float()[:, torch.cat([own, own + m])] for name in ("key_up", "key_mean"))
        keys = latent[:, None, :, : self.a["key_rank"]].float() @ key_up.transpose(1, 2) + key_mean[:, None]
        factor = band_factor(self.a, self.given["cos"], self.given["sin"], torch.arange(self.most, device=self.device))
        return turn(keys, *(x[:, fine] for x in factor)).to(self.dtype).contiguous()

    def as_rows(self, x: Tensor) -> Tensor:
        """[..., P, S, n] as [..., P*S, n] of the model's type."""
        return x.flatten(-3, -2).to(self.dtype).contiguous()

    # ---- the kernel

    def launch(
        self, queries: _Queries, latent: Tensor, rope: Tensor, fine: Tensor, sums: Tensor, tops: Tensor, masses: Tensor
    ) -> None:
        """Fill sums, tops and masses of all splits."""
        a, (_, groups, splits, rows, w) = self.a, sums.shape
        bias = self.given.get("attention_bias")
        everywhere = (self.batch, a["num_heads"], self.new, -1)
        bias_strides = (0,) * 4 if bias is None else bias.expand(everywhere).stride()
        values = max(triton.next_power_of_2(w), 16)
        # Of a tile's values at most 32 KB are to lie in shared memory at a time.
        tile = min(SHORTEST, max(16, 2**15 // (values * self.dtype.itemsize)))
        grid = (triton.cdiv(rows, QUERY_ROWS), self.batch * groups, splits)
        _meet[grid](
            queries.varying, queries.mean, queries.rope, queries.fine, latent, rope, fine, bias,
            self.given["total_length"].clamp(max=self.most), sums, tops, masses,
            rows, self.new, self.per_group, groups, a["key_rank"] if a["nope_dim"] else 0, a["rope_dim"],
            queries.fine.shape[-1], a["value_offset"], w, queries.block, queries.varying.shape[1],
            latent.stride(0), latent.stride(1), rope.stride(0), rope.stride(1), self.most, *bias_strides,
            a["scale"], a["softcap"],
            ORDERS=queries.varying.shape[2], WINDOW=max(a["local_window_size"], 0), CAUSAL=bool(a["causal"]),
            CAPPED=a["softcap"] > 0, BIASED=bias is not None, ROWS=QUERY_ROWS, TILE=tile, STEP=32, VALUES=values,
        )  # fmt: skip


@triton.jit
def _products(scores, query, query_step, rows, row_there, key, key_step, keys, key_there, width, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """scores [ROWS, TILE] + query rows . key rows, both `width` numbers."""
    for at in range(0, width, STEP):
        columns = at + tl.arange(0, STEP)
        there = columns < width
        q = tl.load(
            query + rows[:, None] * query_step + columns[None, :], mask=row_there[:, None] & there[None, :], other=0.0
        )
        k = tl.load(
            key + keys[None, :] * key_step + columns[:, None], mask=key_there[None, :] & there[:, None], other=0.0
        )
        scores = tl.dot(q, k.to(q.dtype), scores, input_precision="ieee")
    return scores


@triton.jit
def _hidden(  # type: ignore[no-untyped-def]
    products, seen, back, bias, place, scale, softcap,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Products to scores, -inf where a query does not see a key, which lies `back` rows behind it.

    `place` tells where each score's bias is.
    """
    scores = products * scale
    if CAPPED:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # softcap tanh(scores / softcap)
    if CAUSAL:
        seen &= back >= 0
    if WINDOW:
        seen &= back < WINDOW
    if BIASED:
        scores += tl.load(bias + place, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _meet(  # type: ignore[no-untyped-def]
    varying, mean, rope_query, fine_query, latent, rope, fine, bias, filled, sums, tops, masses,
    rows, tokens, per_group, groups, key_rank, rope_dim, fine_dim, value_offset, value_dim, block, blocks,
    latent_batch, latent_step, rope_batch, rope_step, fine_step, bias_batch, bias_head, bias_token, bias_key,
    scale, softcap,
    ORDERS: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Some query rows of one sequence's group meet one split's share of the keys; the sum is not divided by its mass.

    Splits share the tiles that lie within the window of any token, evenly, as many as are filled.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    problem, split, splits = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    batch, group = problem // groups, problem % groups
    row_there, head, token = row < rows, group * per_group + row // tokens, row % tokens
    total = tl.load(filled).to(tl.int32)
    own = total - tokens + token  # the row of the cache that a query's token has
    first = tl.maximum(total - tokens - WINDOW + 1, 0) // TILE if WINDOW else 0
    share = tl.cdiv(tl.cdiv(total, TILE) - first, splits)
    begin = first + split * share
    end = tl.minimum(begin + share, tl.cdiv(total, TILE))

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, VALUES), tl.float32)
    value = tl.arange(0, VALUES)
    for tile in range(begin, end):
        key = tile * TILE + tl.arange(0, TILE)
        key_there = key < total
        latents = latent + batch * latent_batch
        at = tile * TILE // block
        scores = tl.zeros((ROWS, TILE), tl.float32)
        for order in tl.static_range(ORDERS):
            query = ((batch * blocks + at) * ORDERS + order) * groups + group
            scores_of_order = tl.zeros((ROWS, TILE), tl.float32)
            scores_of_order += tl.load(mean + query * rows + row, mask=row_there, other=0.0)[:, None]
            scores_of_order = _products(
                scores_of_order, varying + query * rows * key_rank, key_rank, row, row_there, latents, latent_step, key,
                key_there, key_rank, STEP,
            )  # fmt: skip
            scores += scores_of_order if order == 0 else scores_of_order * (key - at * block).to(tl.float32)[None, :]
        scores = _products(
            scores, rope_query + problem * rows * rope_dim, rope_dim, row, row_there, rope + batch * rope_batch,
            rope_step, key, key_there, rope_dim, STEP,
        )  # fmt: skip
        scores = _products(
            scores, fine_query + problem * rows * fine_dim, fine_dim, row, row_there,
            fine + problem * fine_step * fine_dim, fine_dim, key, key_there, fine_dim, STEP,
        )  # fmt: skip
        place = batch * bias_batch + head * bias_head + token * bias_token
        scores = _hidden(
            scores, row_there[:, None] & key_there[None, :], own[:, None] - key[None, :],
            bias, place[:, None] + key[None, :] * bias_key, scale, softcap, WINDOW, CAUSAL, CAPPED, BIASED,
        )  # fmt: skip
        # Where nothing was seen yet the top is -inf, and any number does in its place.
        risen = tl.maximum(top, tl.max(scores, 1))
        against = tl.where(risen == float("-inf"), 0.0, risen)
        weights, kept = tl.exp(scores - against[:, None]), tl.exp(top - against)
        v = tl.load(
            latents + key[:, None] * latent_step + value_offset + value[None, :],
            mask=key_there[:, None] & (value < value_dim)[None, :], other=0.0,
        ).to(varying.dtype.element_ty)  # fmt: skip
        summed = tl.dot(weights.to(v.dtype), v, summed * kept[:, None], input_precision="ieee")
        mass = mass * kept + tl.sum(weights, 1)
        top = risen

    at = (problem * splits + split) * rows + row
    tl.store(tops + at, top, mask=row_there)
    tl.store(masses + at, mass, mask=row_there)
    tl.store(
        sums + at[:, None] * value_dim + value[None, :], summed, mask=row_there[:, None] & (value < value_dim)[None, :]
    )


def join(sums: Tensor, tops: Tensor, masses: Tensor) -> Tensor:
    """Attention [B, G, rows, w] from what the splits [B, G, splits, rows, .] found; zeros where nothing was seen."""
    top = tops.amax(2, keepdim=True)
    weight = torch.exp(tops - top.masked_fill(top == -torch.inf, 0))
    mass = (weight * masses).sum(2)[..., None]
    return (weight[..., None] * sums).sum(2) / mass.masked_fill(mass == 0, 1)
