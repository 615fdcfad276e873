"""One converted attention block without a graph: plain data, and the tensors that go with it.

Every backend of the torch side reads a block from here: the cache that serves an unmodified model, the module that
stands in for its attention, and the compiler backend. Dimensions as in `mla_pass.onnx.body`, N = G * (D + V).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mla_pass.errors import MlaPassError
from mla_pass.onnx.emit import Conversion
from mla_pass.storage import CODED

FORMAT_VERSION = 1
MAPS = ("encode", "encode_bias", "query_map", "key_up", "key_mean", "value_up", "value_mean")
"""encode [r+p, N], encode_bias [r+p]: row = encode y + encode_bias of y = [keys before rotation, values]; query_map
[G, D, n+p], key_up [G, n, k], key_mean [G, n], value_up [G, w, V] as the operator takes them; value_mean [G, V]."""


@dataclass(frozen=True)
class LayerSpec:
    """What is known of a block beside its tensors; JSON can carry it."""

    name: str
    """Path of the attention module, e.g. ``model.layers.0.self_attn``."""
    layer: int
    num_heads: int
    kv_groups: int
    head_dim: int
    value_dim: int
    rank: int
    key_rank: int
    value_offset: int
    rope_dim: int
    nope_dim: int
    rope_index: tuple[int, ...]
    band_index: tuple[int, ...]
    band_block: tuple[int, ...]
    band_a0: tuple[float, ...]
    band_a1: tuple[float, ...]
    scale: float
    softcap: float
    window: int
    """0: none."""
    theta: tuple[float, ...]
    """[R/2] radians per position, already scaled."""
    rotary_dim: int
    interleaved: bool
    attention_scaling: float
    latent_dtype: str
    """What latents are stored as; `same` as the model."""
    rope_dtype: str

    @property
    def still(self) -> int:
        """Numbers of a key's rotary part that are neither turned in bands nor cached rotated."""
        return self.nope_dim - 2 * len(self.band_index) - (self.head_dim - self.rotary_dim)

    @property
    def cache_width(self) -> int:
        """Numbers the original caches per token: G * (D + V)."""
        return self.kv_groups * (self.head_dim + self.value_dim)

    def attributes(self, *, causal: bool) -> dict[str, Any]:
        """The operator's attributes, by the names of `mla_pass.onnx.body.ATTRIBUTES`; the cache is a shared buffer."""
        same = (
            "num_heads", "kv_groups", "rank", "key_rank", "value_offset", "rope_dim", "nope_dim", "rope_index",
            "band_index", "band_block", "band_a0", "band_a1", "scale", "softcap",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in same},
            "split": self.rank, "local_window_size": self.window or -1, "causal": int(causal), "shared_buffer": 1,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote. Raises MlaPassError when a field is missing or unknown."""
        names = {f.name for f in fields(cls)}
        if names != set(data):
            raise MlaPassError(
                f"a block's description has fields {', '.join(sorted(names ^ set(data)))} missing or unknown; convert "
                "the model again with this version of mla_pass"
            )
        values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class LatentLayer:
    """A block and its `MAPS`; `key_up` and `key_mean` are absent where no key number is left un-rotated."""

    spec: LayerSpec
    maps: Mapping[str, Tensor]


def layer_spec(conversion: Conversion) -> LayerSpec:
    """The description of a converted site."""
    site, w, row = conversion.site, conversion.weights, conversion.row
    if site.mask.kind == "structured" and not site.mask.causal:
        raise MlaPassError(f"{site.name}: attention that sees later tokens has no cache; expected a decoder")
    return LayerSpec(
        site.name, site.layer, site.heads, site.kv_groups, site.head_dim, site.value_dim, w.rank, w.key_rank,
        w.value_offset, w.rope_dim, w.nope_dim, _whole(w.rope_index), _whole(w.bands.index), _whole(w.bands.block),
        _real(w.bands.a0), _real(w.bands.a1), site.scale, site.softcap, site.mask.window, _real(site.rope.theta),
        site.rope.rotary_dim, site.rope.interleaved, site.rope.attention_scaling,
        "same" if row.latent == site.dtype else row.latent, "same" if row.rope == site.dtype else row.rope,
    )  # fmt: skip


def latent_layer(conversion: Conversion, dtype: torch.dtype) -> LatentLayer:
    """A converted site with its maps, cast once from float64."""
    w = conversion.weights
    maps = {name: as_torch(getattr(w, name), dtype) for name in maps_of(w.nope_dim)}
    return LatentLayer(layer_spec(conversion), maps)


def maps_of(nope_dim: int) -> list[str]:
    """Those of `MAPS` that a block has."""
    return [name for name in MAPS if nope_dim or name not in ("key_up", "key_mean")]


def as_torch(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A contiguous copy."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def stored_dtype(name: str, model: torch.dtype) -> torch.dtype:
    """Element type of a cache tensor that stores its rows as `name` says."""
    if name == "same":
        return model
    return getattr(torch, CODED[name].element.name if name in CODED else name)


def operator_json(spec: LayerSpec) -> str:
    """The operator's attributes as the one string that a node of a torch graph carries.

    What tells how the model itself rotates is in it as well: `latent_update` has to undo that.
    """
    own = {"rotary_dim": spec.rotary_dim, "interleaved": spec.interleaved, "attention_scaling": spec.attention_scaling}
    return json.dumps({**spec.attributes(causal=True), **own}, separators=(",", ":"))


def by_layer_number(conversions: Iterable[Conversion]) -> tuple[Conversion, ...]:
    """In the order of their layers. Raises MlaPassError where one is missing or there twice."""
    ordered = sorted(conversions, key=lambda each: each.site.layer)
    numbers = [each.site.layer for each in ordered]
    if numbers != list(range(len(numbers))):
        raise MlaPassError(
            f"converted layers {numbers} do not count from 0 without a gap; a checkpoint is converted whole or not at "
            "all"
        )
    return tuple(ordered)


def _whole(x: np.ndarray) -> tuple[int, ...]:
    return tuple(int(n) for n in x)


def _real(x: np.ndarray) -> tuple[float, ...]:
    return tuple(float(n) for n in x)
