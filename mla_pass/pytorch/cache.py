"""A transformers cache of latent rows, for a model that is not modified and for one that is.

    cache = LatentCache.from_pretrained("latent/", model=model)
    model.generate(**inputs, past_key_values=cache)

A layer's keys and values go in as the model makes them; what is kept is one row a token, and what comes back are the
keys and values that these rows stand for. They are made anew in every step, so this saves memory, not time: time is
saved by the attention of `mla_pass.pytorch.modeling`, and by torch.compile with the backend ``mla_pass``, which never
make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mla_pass.errors import MlaPassError
from mla_pass.pytorch import operator
from mla_pass.pytorch.latent import latent_attention as expanded
from mla_pass.pytorch.spec import LatentLayer, LayerSpec, operator_json, stored_dtype
from mla_pass.storage import stored_width


class LatentRows(CacheLayerMixin):
    """One layer's rows, longer by S with every S new tokens.

    `keys` [B, 1, T, r] holds latents and `values` [B, 1, T, p] rotated parts: under these names transformers moves,
    offloads and reorders what a layer keeps.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    """transformers would size it by keys and values."""
    keys: Tensor
    values: Tensor

    def __init__(self, layer: LatentLayer, max_positions: int) -> None:
        super().__init__()
        self.spec, self.given, self.max_positions = layer.spec, layer.maps, max_positions
        self.attributes = operator_json(layer.spec)

    # ---- what transformers asks of a layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, type and device from the first tokens. Raises MlaPassError when they are of another model."""
        spec = self.spec
        expected = (spec.kv_groups, spec.head_dim, spec.value_dim)
        got = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        if got != expected:
            raise MlaPassError(
                f"{spec.name}: this cache is of a model with {expected[0]} key/value heads of {expected[1]} and "
                f"{expected[2]} numbers, this one has {got[0]} of {got[1]} and {got[2]}; give the model it was made of"
            )
        self.start(key_states.shape[0], key_states.dtype, key_states.device)
        self.maps = {name: x.to(self.device, self.dtype) for name, x in self.given.items()}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, position_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep keys [B, G, S, D] and values [B, G, S, V]; returns all that are kept, decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, maps = key_states.shape[2], self.maps
        position_ids = self.positions(new) if position_ids is None else position_ids
        total = self.extend(new)
        decoded = torch.ops.mla_pass.latent_update(
            key_states, value_states, self.keys, self.values, self.cos, self.sin, position_ids, total, maps["encode"],
            maps["encode_bias"], maps["query_map"], maps.get("key_up"), maps.get("key_mean"), maps["value_up"],
            maps["value_mean"], self.keys.shape[2], self.attributes,
        )  # fmt: skip
        self.keep(total)
        return decoded

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that a mask has to cover, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Rows that are kept."""
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """No limit but that of the rotary table, which positions meet first."""
        return -1

    def reset(self) -> None:
        """Forget all rows."""
        self.is_initialized = False
        self.keys = self.values = None  # type: ignore[assignment]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last rows; transformers counts them as a negative number."""
        if tokens_to_remove > 0:
            raise MlaPassError(f"crop takes the number of tokens to remove as a negative one; got {tokens_to_remove}")
        if self.is_initialized and tokens_to_remove:
            self.keys, self.values = (x[:, :, :tokens_to_remove] for x in (self.keys, self.values))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        if self.is_initialized:
            self.keys, self.values = (x.repeat_interleave(repeats, dim=0) for x in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        if self.is_initialized:
            self.keys, self.values = (x[indices] for x in (self.keys, self.values))

    # ---- what the attention of a converted model asks of it

    def attend(
        self, query: Tensor, row: Tensor, maps: dict[str, Tensor | None], *, position_ids: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Keep the rows [B, S, r + p] and attend over all; context [B, S, H*V] as `latent_attention` gives it."""
        if not self.is_initialized:
            self.start(row.shape[0], row.dtype, row.device)
        total = self.extend(row.shape[1])
        context = torch.ops.mla_pass.latent_attention(
            query, row, self.keys, self.values, self.cos, self.sin, position_ids, total, mask, maps["query_map"],
            maps["key_up"], maps["key_mean"], maps["value_up"], self.attributes,
        )  # fmt: skip
        self.keep(total)
        return context

    def positions(self, new: int) -> Tensor:
        """Of `new` tokens behind those that are kept, [1, S], none of them padding."""
        return (torch.arange(new, device=self.device) + self.get_seq_length())[None]

    # ---- memory

    def start(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for the first rows."""
        self.dtype, self.device, self.batch_size = dtype, device, batch
        self.cos, self.sin = rope_tables(self.spec.theta, self.max_positions, device)
        self.keys, self.values = (
            torch.zeros(batch, 1, self.room(), width, dtype=kind, device=device)
            for width, kind in self.widths(self.spec, dtype)
        )
        self.is_initialized = True

    @staticmethod
    def widths(spec: LayerSpec, dtype: torch.dtype) -> list[tuple[int, torch.dtype]]:
        """Elements of a row and their type, of latents and rotated parts."""
        return [
            (stored_width(spec.rank, spec.latent_dtype), stored_dtype(spec.latent_dtype, dtype)),
            (stored_width(spec.rope_dim, spec.rope_dtype), stored_dtype(spec.rope_dtype, dtype)),
        ]

    def room(self) -> int:
        """Rows to begin with."""
        return 0

    def extend(self, new: int) -> Tensor:
        """Make room for `new` rows; returns how many there are then, int64 [1]."""
        self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, new)) for x in (self.keys, self.values))
        return torch.full((1,), self.keys.shape[2], dtype=torch.int64, device=self.keys.device)

    def keep(self, total: Tensor) -> None:
        """The rows are written: `total` of them count from here on. Here their tensors' size says so."""

    def bytes(self) -> int:
        """Of the memory that the rows take."""
        return sum(x.untyped_storage().nbytes() for x in (self.keys, self.values)) if self.is_initialized else 0


class StaticLatentRows(LatentRows):
    """Rows in a buffer of a fixed number of them: nothing changes its shape, so one compiled step fits all."""

    is_compileable = True

    def __init__(self, layer: LatentLayer, max_positions: int, max_cache_len: int) -> None:
        super().__init__(layer, max_positions)
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.zeros(1, dtype=torch.int64)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole buffer."""
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """Rows that are kept, a tensor as transformers' own static layers have it."""
        return self.cumulative_length[0] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Rows of the buffer."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget all rows; the buffer stays."""
        self.cumulative_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last rows; transformers counts them as a negative number."""
        if tokens_to_remove > 0:
            raise MlaPassError(f"crop takes the number of tokens to remove as a negative one; got {tokens_to_remove}")
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def room(self) -> int:
        """All of them."""
        return self.max_cache_len

    def start(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """The buffer, at an address that does not change, and the count of its rows on the same device."""
        super().start(batch, dtype, device)
        self.cumulative_length = self.cumulative_length.to(device)
        if not torch.compiler.is_compiling():
            operator.settled(self.attributes, device)  # before anybody captures a step
            for x in (self.keys, self.values, self.cumulative_length):
                torch._dynamo.mark_static_address(x)

    def extend(self, new: int) -> Tensor:
        """As many as there are and `new` more; the operator tells when the buffer is full."""
        return self.cumulative_length + new

    def keep(self, total: Tensor) -> None:
        """Count them."""
        self.cumulative_length.copy_(total)


class TracedRows(LatentRows):
    """Rows that are given and handed on, by torch's own operators and without a look at any size: for a trace."""

    def __init__(
        self, layer: LatentLayer, max_positions: int, latent: Tensor, rope: Tensor, dtype: torch.dtype
    ) -> None:  # fmt: skip
        super().__init__(layer, max_positions)
        self.keys, self.values, self.is_initialized = latent, rope, True
        self.dtype, self.device, self.batch_size = dtype, latent.device, latent.shape[0]
        self.cos, self.sin = rope_tables(self.spec.theta, max_positions, latent.device)

    def attend(
        self, query: Tensor, row: Tensor, maps: dict[str, Tensor | None], *, position_ids: Tensor, mask: Tensor | None
    ) -> Tensor:
        """See `LatentRows.attend`."""
        bias = None if mask is None else operator.as_bias(mask, query.dtype)
        attributes = {**self.spec.attributes(causal=mask is None), "shared_buffer": 0}
        tables = [self.cos.to(query.dtype), self.sin.to(query.dtype)]
        projections = [maps[name] for name in ("query_map", "key_up", "key_mean", "value_up")]
        operands = [query, row, self.keys, self.values, *tables, position_ids, None, None, bias, *projections]
        context, self.keys, self.values = expanded(attributes, operands)
        return context


class LatentCache(Cache):
    """A cache of latent rows for generate() and forward passes of the model that was converted.

    Left-padded batches need the tokens' positions, which transformers does not hand to a cache: `hear` a model (or give
    it to `from_pretrained`) and they are taken from its calls. Without that, one sequence at a time.
    """

    def __init__(
        self, layers: Sequence[LatentLayer], *, max_positions: int, max_cache_len: int | None = None,
        offloading: bool = False,
    ) -> None:  # fmt: skip
        """`max_positions`: rows of the rotary tables; `max_cache_len`: rows of a static cache, None for a growing one.

        Raises MlaPassError when a size makes no sense.
        """
        if max_cache_len is not None and not 1 <= max_cache_len <= max_positions:
            raise MlaPassError(f"max_cache_len must lie in 1..{max_positions}, the model's limit; got {max_cache_len}")
        if offloading and not torch.cuda.is_available():
            raise MlaPassError("offloading keeps rows on the CPU for a model on a GPU, and torch finds none here")
        rows: list[CacheLayerMixin]
        if max_cache_len is None:
            rows = [LatentRows(layer, max_positions) for layer in layers]
        else:
            rows = [StaticLatentRows(layer, max_positions, max_cache_len) for layer in layers]
        super().__init__(layers=rows, offloading=offloading)
        self.position_ids: Tensor | None = None
        self.hears = False

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, model: Any = None, max_cache_len: int | None = None, offloading: bool = False
    ) -> Self:
        """A cache of the conversion in `folder`, for the original model; `model` is that model, if it is to be heard.

        Raises MlaPassError when the folder holds no conversion, or one of another model.
        """
        from mla_pass.pytorch.folder import load_layers

        layers, max_positions = load_layers(Path(folder))
        if model is not None:
            check_model(model, layers)
            hear(model)
        return cls(layers, max_positions=max_positions, max_cache_len=max_cache_len, offloading=offloading)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`. Raises MlaPassError for another model's tensors, and for a batch that is not heard."""
        if layer_idx >= len(self.layers):
            raise MlaPassError(
                f"this cache has {len(self.layers)} layers, the model more: give the model it was made of"
            )
        if key_states.shape[0] > 1 and not self.hears:
            raise MlaPassError(
                "a batch may be padded, and where its tokens stand only the model knows; make the cache with "
                "LatentCache.from_pretrained(folder, model=model)"
            )
        position_ids = self.position_ids
        if layer_idx + 1 == len(self.layers):
            self.position_ids = None  # the next step's are its own
        return super().update(key_states, value_states, layer_idx, *args, position_ids=position_ids, **kwargs)

    def bytes(self) -> int:
        """Of the memory that the rows take."""
        return sum(layer.bytes() for layer in self.layers)


@lru_cache(maxsize=16)
def rope_tables(theta: tuple[float, ...], rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, R/2], float32; the angle is rounded to float32 before the cosine is taken, as models do."""
    angle = np.outer(np.arange(max(rows, 2), dtype=np.float32), np.array(theta, np.float32)).astype(np.float64)
    cos, sin = (torch.from_numpy(f(angle).astype(np.float32)).to(device) for f in (np.cos, np.sin))
    return cos, sin


# ---- hearing a model's positions


def hear(model: Any) -> None:
    """Let every LatentCache that `model` is called with know the positions of its tokens."""
    decoder = model.base_model
    if not getattr(decoder, "_mla_pass_heard", False):
        decoder.register_forward_pre_hook(_hear, with_kwargs=True)
        decoder._mla_pass_heard = True


def _hear(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, LatentCache):
        if decoder.training:
            raise MlaPassError("a LatentCache serves generation, and this model is in training mode; call model.eval()")
        cache.hears = True
        cache.position_ids = kwargs.get("position_ids")


def check_model(model: Any, layers: Sequence[LatentLayer]) -> None:
    """Raises MlaPassError when the conversion is not of `model`: other layers, or another rotation."""
    config = model.config.get_text_config()
    if config.num_hidden_layers != len(layers):
        raise MlaPassError(
            f"the conversion has {len(layers)} layers, the model {config.num_hidden_layers}; give the model it was "
            "made of"
        )
    ladders = [x.double().cpu() for name, x in model.named_buffers() if name.endswith("inv_freq")]
    for layer in layers:
        theta = torch.tensor(layer.spec.theta, dtype=torch.float64)
        if ladders and not any(x.shape == theta.shape and torch.allclose(x, theta, rtol=1e-4) for x in ladders):
            raise MlaPassError(
                f"{layer.spec.name}: the conversion's rotary frequencies are not this model's; give the model it was "
                "made of"
            )
