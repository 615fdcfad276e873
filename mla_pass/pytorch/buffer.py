"""Latent attention over a buffer on a device, by torch's own operators and without a look at any number.

How many rows are filled is known on the device alone: nothing here waits for it, so that a CUDA graph can be captured
and replayed while the cache grows. All rows that the buffer may hold are read, those that are not filled as zeros.
What the CPU kernel refuses by looking at a number (more rows than there is room for, a position behind the tables, an
8-bit row that is not finite) makes the context of that sequence NaN here and leaves its rows as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mla_pass.pytorch.latent import Node, decoded, encoded, named


def latent_attention(attributes: Mapping[str, Any], operands: Sequence[Tensor | None]) -> Tensor:
    """Context [B, S, H*V], the new rows written into the buffers; see `mla_pass.pytorch.latent.latent_attention`.

    `attention_bias` has any number of columns; rows behind them are out of reach, as those behind the tables are. There
    is no `padding_mask`: a bias says as much.
    """
    node = _Buffered(named(operands), attributes)
    context, *_ = node.run()
    return context.masked_fill(~node.fits[..., None, None], torch.nan)


def most_rows(latent: Tensor, cos: Tensor) -> int:
    """Rows that a buffer [B, 1, C, .] may be filled to: it has no more, or the tables have not."""
    return min(latent.shape[2], cos.shape[0])


def place(total: Tensor, new: int, most: int) -> tuple[Tensor, Tensor]:
    """Rows [S] of the last `new` of `total` tokens and whether they lie within 0..most-1, bool [1].

    Where they do not, they are rows of the buffer all the same, for whoever has to index something.
    """
    fits = (total >= new) & (total <= most)
    rows = total - new + torch.arange(new, device=total.device)
    return rows.clamp(0, max(most - 1, 0)), fits


def put(buffer: Tensor, rows: Tensor, values: Tensor, fits: Tensor) -> None:
    """buffer[:, :, rows] = values [B, 1, S, .] of the sequences that `fits` [B or 1] names."""
    kept = buffer.index_select(2, rows)
    buffer.index_copy_(2, rows, torch.where(fits[:, None, None, None], values.to(buffer.dtype), kept))


def only_filled(x: Tensor, total: Tensor, most: int) -> Tensor:
    """Keys or values [B, G, T, .] with zeros behind the first `total` rows, all NaN where that is above `most`."""
    rows = torch.arange(x.shape[2], device=total.device)
    return x.masked_fill((rows >= total)[:, None], 0).masked_fill(total > most, torch.nan)


class _Buffered(Node):
    """One execution; what differs from a cache whose length is known."""

    def __init__(self, given: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
        cos, bias, positions = given["cos"], given.get("attention_bias"), given["position_ids"]
        most = most_rows(given["past_latent"], cos)
        most = most if bias is None else min(most, bias.shape[-1])
        self.a, self.by_sizes = attributes, False
        self.given = {**given, "position_ids": positions.clamp(0, cos.shape[0] - 1)}
        self.batch, self.new = given["query"].shape[:2]
        self.filled = given["total_length"]
        self.rows = torch.arange(most, device=self.filled.device)
        self.own, room = place(self.filled, self.new, most)
        self.fits = room & ((positions >= 0) & (positions < cos.shape[0])).all(-1)
        """Sequences that have an answer, [B or 1]."""
        if not all(given[name].dtype.is_floating_point for name in ("past_latent", "past_rope")):
            self.fits = self.fits & given["row"].isfinite().flatten(1).all(-1)

    def stored(self, name: str, new: Tensor) -> tuple[Tensor, Tensor]:
        """All rows within reach as numbers, those not filled as zeros, and the buffer, which has the new ones."""
        buffer = self.given[name]
        plain = buffer.dtype.is_floating_point
        put(buffer, self.own, new if plain else encoded(new, buffer.dtype), self.fits)
        live = buffer[:, :, : len(self.rows)]
        numbers = live.to(new.dtype) if plain else decoded(live, new.dtype)
        return numbers.masked_fill((self.rows >= self.filled)[:, None], 0), buffer

    def mask(self) -> tuple[bool, Tensor | None]:
        """Which rows a token sees, told by their numbers."""
        back, window = self.own[:, None] - self.rows, self.a["local_window_size"]
        keep = back >= 0 if self.a["causal"] else (self.rows < self.filled).expand(self.new, -1)
        keep = keep & (back < window) if window > 0 else keep
        bias = self.given.get("attention_bias")
        if bias is None:
            return False, keep
        return False, bias[..., : len(self.rows)].masked_fill(~keep, -torch.inf)
