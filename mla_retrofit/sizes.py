"""The guide's words about size, as a configuration of the conversion.

`num_kv_heads * head_dim` is the width of the latent that keys and values of a token share; beside it a row holds the
numbers that keep their own rotation. A row fits when it is no wider than what it replaces: 2 * G * D numbers a token
and layer, of G key/value heads of D numbers. (At exactly that width nothing is lost and nothing saved.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError

ROPE_MODES = ("extend", "repeat")
"""What the guide offers; without a word `mla_pass` turns keys block by block, which loses least."""
ROPE_SHARE = 8
"""One in so many rotating key numbers keeps its own rotation, as in `mla-pass convert --rank`."""
DEFAULT_BUDGET = 0.5


@dataclass(frozen=True)
class Shape:
    """Keys and values of a model: G `kv_groups` of `head_dim` D, of which `rotary_dim` rotate, in each of `layers`."""

    name: str
    layers: int
    kv_groups: int
    head_dim: int
    rotary_dim: int

    @property
    def width(self) -> int:
        """Numbers the original caches a token and layer, 2 * G * D."""
        return 2 * self.kv_groups * self.head_dim

    @property
    def rotary_width(self) -> int:
        """Key numbers a token and layer that rotate."""
        return self.kv_groups * self.rotary_dim

    def rope_dims(self, rope_mode: str) -> int:
        """Numbers of a row that keep their own rotation, beside a latent whose width was asked for."""
        if rope_mode == "repeat":
            return self.rotary_width
        return 2 * max(1, round(self.rotary_width / ROPE_SHARE / 2))


def read_shape(config: Any, name: str) -> Shape:
    """The shape that a configuration of transformers describes.

    Raises MlaPassError when it has no attention heads to read.
    """
    text = config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        raise MlaPassError(
            f"the config.json of {name} tells no num_attention_heads and hidden_size; expected a decoder with "
            "grouped-query attention"
        )
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    rotary_dim = int(head_dim * rotary_share(text))
    groups = getattr(text, "num_key_value_heads", None) or heads
    return Shape(name, text.num_hidden_layers, groups, head_dim, rotary_dim)


def rotary_share(text: Any) -> float:
    """The largest part of a head that rotates in any layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [group for group in parameters.values() if isinstance(group, dict)]
    shares = [group.get("partial_rotary_factor") or 1.0 for group in by_layer_type or [parameters]]
    return float(max(shares))


def conversion_config(
    shape: Shape, *, num_kv_heads: int | None = None, head_dim: int | None = None, rope_mode: str | None = None,
    absorb: bool = False, budget: float | None = None, **others: Any,
) -> MlaConfig:  # fmt: skip
    """What the guide's words ask of a model of this shape; `others` are further fields of the configuration.

    Either word of size alone is completed by the model's own; with neither the whole cache goes to `budget`, by default
    half, except that `repeat`, whose rotated keys fill that half, then keeps everything.
    Raises MlaPassError when the words exclude each other, or the row does not fit.
    """
    if rope_mode not in (None, *ROPE_MODES):
        raise MlaPassError(f"rope_mode must be one of {', '.join(ROPE_MODES)}, or not be given; got {rope_mode!r}")
    common = {"rope_mode": rope_mode or "block", "absorb": "always" if absorb else "auto", **others}
    sized = num_kv_heads is not None or head_dim is not None
    if sized and budget is not None:
        raise MlaPassError("num_kv_heads and head_dim ask for a width, budget for a share: give one of them")
    if budget is not None or not (sized or rope_mode == "repeat"):
        return MlaConfig(budget=DEFAULT_BUDGET if budget is None else budget, **common)
    heads = shape.kv_groups if num_kv_heads is None else num_kv_heads
    size = shape.head_dim if head_dim is None else head_dim
    if min(heads, size) < 1:
        raise MlaPassError(f"num_kv_heads and head_dim must be at least 1; got {heads} and {size}")
    rank, rope_dims = heads * size, shape.rope_dims(common["rope_mode"])
    if rank + rope_dims > shape.width:
        raise MlaPassError(too_wide(shape, heads, size, rope_dims))
    return MlaConfig(rank=rank, rope_dims=rope_dims, **common)


def too_wide(shape: Shape, num_kv_heads: int, head_dim: int, rope_dims: int) -> str:
    """The sentence for a row that is wider than what it is to replace, with a width that does fit."""
    rank, share = num_kv_heads * head_dim, 2
    while shape.width // share + rope_dims >= shape.width:
        share *= 2
    fitting = shape.width // share
    words = f"{fitting:,} numbers"
    if fitting % num_kv_heads == 0:
        words = f"num_kv_heads {num_kv_heads} and head_dim {fitting // num_kv_heads}, {words}"
    return (
        f"num_kv_heads {num_kv_heads} x head_dim {head_dim} asks for a latent of {rank:,} numbers, "
        f"{rank + rope_dims:,} with the {rope_dims:,} that stay rotated, but {shape.name} caches no more than "
        f"{shape.width:,} a token and layer (2 x {shape.kv_groups} heads x {shape.head_dim}): at most "
        f"{shape.width - rope_dims:,} fit, and {words}, would save {1 - (fitting + rope_dims) / shape.width:.0%}"
    )
