"""How wide the layers of a ``deepseek_v3`` checkpoint are, and which frequencies its rotated numbers have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mla_pass.budget import rope_dims_to_try
from mla_pass.config import MlaConfig
from mla_pass.errors import BudgetTooSmall, MlaPassError
from mla_pass.fold import Prepared, predicted_loss
from mla_pass.fold.ladder import Ladder, best_ladder, ladders, saved_losses
from mla_pass.parallel import each
from mla_pass.pytorch.deepseek_fold import INSTEAD, laddered, query_norm
from mla_pass.site import AttentionSite

SAME_FREQUENCY = 1e-5
"""Largest relative difference of two frequencies that are the same but for float32 rounding."""


@dataclass(frozen=True)
class Sizes:
    """The shape of every layer: the latent beside its constant, the rotated numbers, and which pairs they turn."""

    rank: int
    rope_dims: int
    ladder: Ladder
    rope_parameters: Mapping[str, Any]


def choose_sizes(layers: Sequence[Prepared], site: AttentionSite, about: Any, config: MlaConfig) -> Sizes:
    """Of the sizes that `config` allows, those of the least predicted loss over all layers.

    Raises MlaPassError when the row is too small, or no ladder of the target turns as the original does.
    """
    pairs, given = site.rope.rotary_dim // 2, config.rope_dims
    if given is not None and given > site.rope.rotary_dim:
        raise MlaPassError(f"rope_dims is {given}; a deepseek_v3 checkpoint has one rotated head, here of at most "
                           f"{site.rope.rotary_dim} numbers")  # fmt: skip
    saved = np.sum([saved_losses(p.components, pairs) for p in layers], axis=0)
    room = int(config.budget * site.cache_width + 1e-9)
    fitting = [
        (config.rank or room - 1 - rope_dims, rope_dims)
        for rope_dims in rope_dims_to_try(layers[0].geometry, config)
        if rope_dims <= site.rope.rotary_dim and (config.rank or room - 1 - rope_dims) >= 1
    ]
    if not fitting:
        raise BudgetTooSmall(f"a budget of {room} numbers a token and layer holds no latent beside its constant and "
                             "rope dims; give a larger one")  # fmt: skip
    tried = []
    for rank, rope_dims in fitting:
        turning = same_ladders(site, about, rope_dims)
        if turning:
            ladder = best_ladder([ladder for ladder, _ in turning], saved)
            parameters = next(found for choice, found in turning if choice is ladder)
            tried.append(Sizes(rank, rope_dims, ladder, parameters))
    if not tried:
        raise MlaPassError(f"no rope of a deepseek_v3 model turns {' or '.join(str(p) for _, p in fitting)} numbers as "
                           f"{dict(about.rope_parameters)} turns this model's: {INSTEAD}")  # fmt: skip
    return tried[0] if len(tried) == 1 else min(tried, key=partial(total_loss, layers))


def total_loss(layers: Sequence[Prepared], sizes: Sizes) -> float:
    """Predicted loss over all layers."""
    ranks = np.array([sizes.rank])
    losses = each(lambda p: predicted_loss(laddered(p, sizes.ladder), sizes.rope_dims, ranks), layers)
    return float(np.sum(list(losses)))


def same_ladders(site: AttentionSite, about: Any, rope_dims: int) -> list[tuple[Ladder, dict[str, Any]]]:
    """The ladders of `rope_dims` numbers, and the target's rope_parameters, whose frequencies are the original's."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    found = []
    for ladder in ladders(len(site.rope.theta), rope_dims):
        parameters = {key: value for key, value in about.rope_parameters.items() if key != "partial_rotary_factor"}
        parameters["rope_theta"] = parameters["rope_theta"] ** (ladder.stride * rope_dims / site.rope.rotary_dim)
        table = DeepseekV3RotaryEmbedding(target_config(about, site, Sizes(1, rope_dims, ladder, parameters), 0))
        if np.allclose(table.inv_freq.double().numpy(), site.rope.theta[ladder.pairs], rtol=SAME_FREQUENCY, atol=0):
            found.append((ladder, parameters))
    return found


def target_config(about: Any, site: AttentionSite, sizes: Sizes, nope_dim: int) -> Any:
    """The configuration; `about` is the original's."""
    from transformers import AutoConfig

    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings",
        "initializer_range", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    biased = site.query.projection.bias is not None
    return AutoConfig.for_model(
        "deepseek_v3",
        **{name: getattr(about, name) for name in kept if hasattr(about, name)},
        num_attention_heads=site.heads,
        num_key_value_heads=site.heads,
        q_lora_rank=query_norm(site.query.projection.weight.shape[0]).width if biased else None,
        kv_lora_rank=sizes.rank + 1,
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=sizes.rope_dims,
        v_head_dim=site.value_dim,
        rope_parameters=dict(sizes.rope_parameters),
        rope_interleave=True,
        attention_bias=True,
        # No layer has experts and none is added to guess ahead; what is said of experts is the least there can be.
        first_k_dense_replace=about.num_hidden_layers,
        num_mtp_layers=0,
        **dict.fromkeys(("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok"), 1),
    )
