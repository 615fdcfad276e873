"""The converted model in transformers: the original's own class, with latent attention in place of its attention.

    import mla_pass.pytorch.modeling                       # registers the format
    model = AutoModelForCausalLM.from_pretrained("latent/")

The class is made when a folder names its family: a subclass of whatever transformers has for it, so that embeddings,
norms, MLPs, experts and generate() stay as they are. `config.json` says ``"model_type": "mla_pass"``, which
transformers alone refuses to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mla_pass.errors import MlaPassError
from mla_pass.pytorch.cache import LatentCache, LatentRows, TracedRows
from mla_pass.pytorch.spec import FORMAT_VERSION, LatentLayer, LayerSpec

MODEL_TYPE = "mla_pass"
KEY = "mla"
"""Of config.json: what the conversion made of the attention."""


@dataclass(frozen=True)
class BlockSpec:
    """A converted block as a module: its operator, and what stands around it."""

    spec: LayerSpec
    hidden: int
    """E, what the block reads; `output` is what it writes."""
    output: int
    query_width: int
    """Numbers of the query projection: H*D, or H*(n+p) where the query map is folded into it."""
    query_map: bool
    key_up: bool
    value_up: bool
    """Which maps the operator is given; the others are folded into the projections, or empty."""
    query_bias: bool
    output_bias: bool
    query_norm: float | None
    key_norm: float | None
    value_norm: float | None
    """Epsilon of the RMS norm over each head, None where there is none."""
    encoded: bool
    """Rows are encoded from keys and values (they stand behind a norm), not projected from the hidden state."""
    key_bias: bool = False
    value_bias: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "spec": self.spec.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote. Raises MlaPassError when it is of another format."""
        try:
            return cls(**{**data, "spec": LayerSpec.from_json(data["spec"])})
        except (TypeError, KeyError) as error:
            raise MlaPassError(f"a block's description cannot be read ({error}); convert the model again") from error

    @property
    def operator(self) -> LayerSpec:
        """The block as the operator sees it: without key_up the un-rotated query is as wide as what keys read."""
        folded = self.spec.nope_dim > 0 and not self.key_up
        return replace(self.spec, nope_dim=self.spec.key_rank) if folded else self.spec


class HeadNorm(nn.Module):
    """RMS norm over each head's numbers, computed in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Heads side by side, [B, S, H*D]."""
        size = self.weight.shape[0]
        heads = functional.rms_norm(x.float().unflatten(-1, (-1, size)), (size,), eps=self.epsilon)
        return (heads * self.weight.float()).flatten(-2).to(x.dtype)


class LatentAttention(nn.Module):
    """Stands where the original's attention stood, and takes what that took."""

    def __init__(self, block: BlockSpec) -> None:
        super().__init__()
        spec = block.spec
        self.layer_idx = spec.layer
        width, inner = spec.rank + spec.rope_dim, spec.value_dim if block.value_up else spec.rank - spec.value_offset
        self.query = nn.Linear(block.hidden, block.query_width, bias=block.query_bias)
        if block.query_norm is not None:
            self.query_norm = HeadNorm(spec.head_dim, block.query_norm)
        if block.encoded:
            keys, values = spec.kv_groups * spec.head_dim, spec.kv_groups * spec.value_dim
            self.key = nn.Linear(block.hidden, keys, bias=block.key_bias)
            self.value = nn.Linear(block.hidden, values, bias=block.value_bias)
            if block.key_norm is not None:
                self.key_norm = HeadNorm(spec.head_dim, block.key_norm)
            if block.value_norm is not None:
                self.value_norm = HeadNorm(spec.value_dim, block.value_norm)
        self.row = nn.Linear(spec.cache_width if block.encoded else block.hidden, width)
        self.output = nn.Linear(spec.num_heads * inner, block.output, bias=block.output_bias)
        operator = block.operator
        if block.query_map:
            self.query_map = _empty(spec.kv_groups, spec.head_dim, spec.nope_dim + spec.rope_dim)
        if block.key_up:
            self.key_up = _empty(spec.kv_groups, spec.nope_dim, spec.key_rank)
            self.key_mean = _empty(spec.kv_groups, spec.nope_dim)
        if block.value_up:
            self.value_up = _empty(spec.kv_groups, spec.rank - spec.value_offset, spec.value_dim)
        self.layer = LatentLayer(operator, {})

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None,
        past_key_values: Any = None, position_ids: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Output [B, S, E] of hidden states [B, S, E]. Raises MlaPassError for a mask that is no [B, H, S, T]."""
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise MlaPassError(
                f"latent attention got a {type(attention_mask).__name__} for a mask; load the model with "
                "attn_implementation='sdpa'"
            )
        rows: LatentRows = past_key_values.layers[self.layer_idx]
        query = self.query(hidden_states)
        if hasattr(self, "query_norm"):
            query = self.query_norm(query)
        row = self.row(self.read(hidden_states))
        if not rows.is_initialized:
            rows.start(row.shape[0], row.dtype, row.device)
        position_ids = past_key_values.position_ids if position_ids is None else position_ids
        position_ids = rows.positions(row.shape[1]) if position_ids is None else position_ids
        maps = {name: getattr(self, name, None) for name in ("query_map", "key_up", "key_mean", "value_up")}
        context = rows.attend(query, row, maps, position_ids=position_ids, mask=attention_mask)
        return self.output(context), None

    def read(self, hidden: Tensor) -> Tensor:
        """What rows are made of: the hidden state, or keys and values [B, S, N]."""
        if not hasattr(self, "key"):
            return hidden
        key, value = self.key(hidden), self.value(hidden)
        key = self.key_norm(key) if hasattr(self, "key_norm") else key
        return torch.cat([key, self.value_norm(value) if hasattr(self, "value_norm") else value], -1)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


class LatentModelMixin:
    """What a converted model has that the original has not."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.latent_blocks = read_blocks(config)
        for block in self.latent_blocks:
            self.set_submodule(block.spec.name, LatentAttention(block))  # type: ignore[attr-defined]
        self.base_model.register_forward_pre_hook(_with_latent_cache, with_kwargs=True)  # type: ignore[attr-defined]
        self.base_model._mla_pass_blocks = self.latent_blocks, config.mla["max_positions"]  # type: ignore[attr-defined]

    def latent_cache(self, max_cache_len: int | None = None) -> LatentCache:
        """An empty cache for this model; static with `max_cache_len`, growing without."""
        return latent_cache(self.base_model, max_cache_len)  # type: ignore[attr-defined]

    def flat_cache(self, past: Sequence[Tensor]) -> LatentCache:
        """A cache of given latents and rotated parts, in turn, that can be traced: `mla_pass.export` asks for it."""
        cache = self.latent_cache()
        positions, dtype = self.config.mla["max_positions"], self.dtype  # type: ignore[attr-defined]
        cache.layers = [
            TracedRows(LatentLayer(block.operator, {}), positions, latent, rope, dtype)
            for block, latent, rope in zip(self.latent_blocks, past[::2], past[1::2], strict=True)
        ]
        return cache

    def _prepare_static_cache(self, *args: Any, max_cache_len: int, **kwargs: Any) -> LatentCache:
        """What generate() asks for a static cache; as large as any before, so that nothing is compiled anew."""
        self._previous_max_cache_length = max(max_cache_len, getattr(self, "_previous_max_cache_length", -1))
        return self.latent_cache(self._previous_max_cache_length)


def read_blocks(config: Any) -> tuple[BlockSpec, ...]:
    """The converted blocks that a configuration describes. Raises MlaPassError when it describes none."""
    told = getattr(config, KEY, None)
    if not isinstance(told, dict) or told.get("format_version") != FORMAT_VERSION:
        version = told.get("format_version") if isinstance(told, dict) else None
        raise MlaPassError(
            f"config.json describes a conversion of format version {version}; this mla_pass reads {FORMAT_VERSION}: "
            "convert the model again"
        )
    return tuple(BlockSpec.from_json(block) for block in told["blocks"])


def _with_latent_cache(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the decoder a cache of latent rows, in place of none or of one that holds nothing yet."""
    if decoder.training:
        raise MlaPassError("latent attention serves inference, and this model is in training mode; call model.eval()")
    given, (blocks, _) = kwargs.get("past_key_values"), decoder._mla_pass_blocks
    if given is None:
        given = latent_cache(decoder)
    elif not all(isinstance(layer, LatentRows) for layer in given.layers) or not given.layers:
        given.layers = _in_place_of(given, decoder).layers
        given.layer_class_to_replicate = None
    if len(given.layers) != len(blocks):
        raise MlaPassError(f"the cache given has {len(given.layers)} layers, this model {len(blocks)}; give none")
    given.position_ids = kwargs.get("position_ids")
    return args, {**kwargs, "past_key_values": given}


def latent_cache(decoder: Any, max_cache_len: int | None = None) -> LatentCache:
    """An empty cache for a converted model; static with `max_cache_len`, growing without."""
    blocks, positions = decoder._mla_pass_blocks
    layers = [LatentLayer(block.operator, {}) for block in blocks]
    return LatentCache(layers, max_positions=positions, max_cache_len=max_cache_len)


def _in_place_of(given: Any, decoder: Any) -> LatentCache:
    """Rows of the kind of a transformers cache. Raises MlaPassError unless it is empty, and of a kind we have."""
    static = type(given) is StaticCache
    wide = [layer.get_max_length() for layer in given.layers if not layer.is_sliding] if static else []
    if type(given) not in (DynamicCache, StaticCache) or (static and not wide):
        raise MlaPassError(
            f"this model keeps latent rows, and cannot tell what a {type(given).__name__} of this kind is to hold; "
            "give model.latent_cache(max_cache_len), or none"
        )
    if given.get_seq_length() > 0:
        raise MlaPassError(
            "this model keeps latent rows, and the cache given holds keys and values; give an empty one"
        )
    return latent_cache(decoder, max(wide) if wide else None)


# ---- the classes of a family, and what AutoConfig and AutoModelForCausalLM find


class LatentConfigMixin:
    """A family's configuration that says it is a converted model's."""

    def to_dict(self) -> dict[str, Any]:
        """As the family's, under this format's name."""
        return {**super().to_dict(), "model_type": MODEL_TYPE}  # type: ignore[misc]


class LatentConfig(PreTrainedConfig):
    """Reads config.json; what comes out is of the family's own class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See `PreTrainedConfig.from_dict`. Raises MlaPassError when the family is not told, or not known."""
        told = config_dict.get(KEY)
        if not isinstance(told, dict) or "family" not in told:
            raise MlaPassError(f"config.json lacks the {KEY!r} entry that names the original's family; convert again")
        family, _ = latent_classes(told["family"])
        return family.from_dict({**config_dict, "model_type": told["family"]}, **kwargs)


class LatentModel:
    """For config.json's auto_map: loads a folder as its family's class."""

    config_class = LatentConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`."""
        config = LatentConfig.from_pretrained(folder) if config is None else config
        return latent_classes(config.mla["family"])[1].from_pretrained(folder, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to remember: folders carry their auto_map."""


@cache
def latent_classes(family: str) -> tuple[Any, Any]:
    """Configuration and model class of converted models of a family, by its model_type; registered when made."""
    if family not in CONFIG_MAPPING:
        raise MlaPassError(f"this transformers knows no model type {family!r}; install the version it was made with")
    base_config = CONFIG_MAPPING[family]
    base = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    config = type(f"Latent{base_config.__name__}", (LatentConfigMixin, base_config), {"__module__": __name__})
    model = type(
        f"Latent{base.__name__}", (LatentModelMixin, base), {"__module__": __name__, "config_class": config}
    )  # fmt: skip
    AutoModelForCausalLM.register(config, model)
    return config, model


AutoConfig.register(MODEL_TYPE, LatentConfig)
