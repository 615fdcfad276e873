"""How cached rows lie in memory: their element types, widths and bytes, and the 8-bit code.

A row's latent and its rotated part are two tensors, each of the model's own type, of 16 bits, or of 8; or a row is cut
into two halves instead, as onnxruntime-genai wants it. Eight-bit rows hold n small numbers q, in four segments of
ceil(n / 4), and behind them a code c for each segment: x = q 2^(c / 8). A code is the least whole one with which the
largest number of its segment fits; nothing else is stored, and nothing is calibrated. Latents suit it: calibration
scaled their channels to unit variance. What a q is:

- `int8`: a whole number in [-127, 127]; a step is at most 1/116 of the segment's largest number.
- `float8`: a float8 E4M3 number (OCP 8-bit floating point, 4 bits of exponent and 3 of mantissa, no infinities) of at
  most 448; a step is at most an eighth of the number itself. Its tensors are uint8, which hold the bits, since stock
  operators neither scatter nor join float8 tensors; a code is stored as c + 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError

SEGMENTS = 4
"""Scales of an 8-bit row; four of them keep its width a multiple of four bytes."""
OCTAVE = 8
"""Codes between one scale and its double: 2^(1/8) = 1.09 apart, from 2^-16 to 2^15.9."""


@dataclass(frozen=True)
class Coded:
    """An eight-bit storage."""

    element: np.dtype
    """Of the tensor."""
    largest: int
    """What a q is at most."""
    zero: int
    """What code 0 is stored as."""


CODED = {"int8": Coded(np.dtype(np.int8), 127, 0), "float8": Coded(np.dtype(np.uint8), 448, 128)}
PAGED_TILE = 16
"""ONNX Runtime's PagedAttention rotates in multiples of 16 numbers, from a column that is a multiple of 8, in rows that
are one of 16."""
PAGED_WIDEST = 1024
"""Most numbers of a row that it rotates: one thread of a block each."""
STORED = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
} | {name: coded.element for name, coded in CODED.items()}  # fmt: skip
"""What a cache's elements can be."""


@dataclass(frozen=True)
class RowFormat:
    """Element types of a site's cache: `model` before conversion, `latent` and `rope` after it."""

    model: str
    latent: str
    rope: str
    halves: bool = False
    """The two tensors hold half a row each, both as `latent`."""
    tile: int = 1
    """Rank and rope dims are multiples of this."""
    widest: int | None = None
    """Most numbers of a row, where a runtime has a limit."""

    def holds(self, rank: int, rope_dims: int) -> bool:
        """Whether a row can have these sizes."""
        fits = self.widest is None or rank + rope_dims <= self.widest
        return fits and rank % self.tile == 0 and rope_dims % self.tile == 0

    def split(self, rank: int, rope_dims: int) -> int:
        """Numbers of a row in the first tensor. Raises MlaPassError for an odd row that is to be halved."""
        if self.halves and (rank + rope_dims) % 2:
            raise MlaPassError(
                f"layout genai cuts a row into two halves, but rank {rank} and {rope_dims} rope dims make an odd one; "
                "give a larger budget, or an even rank"
            )
        return (rank + rope_dims) // 2 if self.halves else rank

    def bytes(self, rank: int, rope_dims: int) -> int:
        """Of one cached row."""
        return stored_bytes(rank, self.latent) + stored_bytes(rope_dims, self.rope)

    def full_bytes(self, width: int) -> int:
        """Of one row of the original cache, `width` numbers."""
        return stored_bytes(width, self.model)

    def rank_within(self, room: int, rope_dims: int) -> int:
        """The largest rank whose row takes at most `room` bytes; below 1 where there is none."""
        return (room - self.bytes(0, rope_dims)) // STORED[self.latent].itemsize


def row_format(model: str, config: MlaConfig) -> RowFormat:
    """What a configuration asks for, in a model of type `model`.

    By itself the rotated part is as the latent, but in a tensor of its own never below 16 bits.
    """
    assert config.cache_dtype != "auto"  # settled by measurement before
    latent = model if config.cache_dtype == "same" else config.cache_dtype
    if config.target == "ort-latent":
        return RowFormat(model, latent, latent, tile=PAGED_TILE, widest=PAGED_WIDEST)
    if config.layout == "genai":
        return RowFormat(model, latent, latent, halves=True)
    if config.rope_dtype == "auto":
        narrow = "bfloat16" if model == "bfloat16" else "float16"
        return RowFormat(model, latent, narrow if latent in CODED else latent)
    return RowFormat(model, latent, model if config.rope_dtype == "same" else config.rope_dtype)


def stored_width(numbers: int, dtype: str) -> int:
    """Elements that so many numbers of a row take."""
    return numbers + SEGMENTS if dtype in CODED else numbers


def stored_bytes(numbers: int, dtype: str) -> int:
    """Bytes that so many numbers of a row take."""
    return stored_width(numbers, dtype) * STORED[dtype].itemsize


def segment_length(numbers: int) -> int:
    """Numbers in a segment of an 8-bit row; the last segments may hold fewer."""
    return max(1, -(-numbers // SEGMENTS))


def segment_of(numbers: int) -> np.ndarray:
    """The segment that each number of an 8-bit row lies in, [numbers]."""
    return np.arange(numbers) // segment_length(numbers)


def encoded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Eight-bit rows, [..., n + 4], of numbers x [..., n]."""
    n, coded = x.shape[-1], CODED[dtype]
    length = segment_length(n)
    padded = np.pad(x.astype(np.float64), [(0, 0)] * (x.ndim - 1) + [(0, SEGMENTS * length - n)])
    parts = padded.reshape(*x.shape[:-1], SEGMENTS, length)
    with np.errstate(divide="ignore"):  # a segment of zeros gets the least code
        code = np.ceil(OCTAVE * np.log2(np.abs(parts).max(-1) / coded.largest))
    code = np.clip(code, -128, 127)
    q = np.clip(parts * 2.0 ** (-code / OCTAVE)[..., None], -coded.largest, coded.largest)
    q = q.reshape(*x.shape[:-1], SEGMENTS * length)[..., :n]
    bits = q.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) if dtype == "float8" else np.rint(q)
    return np.concatenate([bits, code + coded.zero], -1).astype(coded.element)


def decoded(rows: np.ndarray) -> np.ndarray:
    """The numbers, float64 [..., n], of eight-bit rows [..., n + 4]."""
    n = rows.shape[-1] - SEGMENTS
    (coded,) = (coded for coded in CODED.values() if coded.element == rows.dtype)
    scale = 2.0 ** ((rows[..., n:].astype(np.float64) - coded.zero) / OCTAVE)
    q = rows[..., :n].copy().view(ml_dtypes.float8_e4m3fn) if rows.dtype == np.uint8 else rows[..., :n]
    return q.astype(np.float64) * scale[..., segment_of(n)]


def float8_numbers() -> np.ndarray:
    """What the 256 bit patterns of a float8 E4M3 stand for, float32; two of them for NaN."""
    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers [..., n] as they come back from the cache, float64."""
    return decoded(encoded(x, dtype)) if dtype in CODED else x.astype(STORED[dtype]).astype(np.float64)
