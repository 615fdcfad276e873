"""The sizes of a Hugging Face model's attention, and the attention layers themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_pass.errors import MlaPassError


@dataclass(frozen=True)
class Geometry:
    """Sizes that all layers of the model share."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def keys(self) -> int:
        """Numbers in the keys of one token: G * D. The values hold as many."""
        return self.kv_heads * self.head_dim

    def row(self, budget: float) -> int:
        """Numbers a token and layer may keep at `budget`, a fraction of the 2 * G * D of the original cache."""
        if not 0 < budget <= 1:
            raise MlaPassError(f"the budget is {budget}; expected a fraction of the cache, above 0 and at most 1")
        return int(budget * 2 * self.keys + 1e-9)  # down, but not below what a fraction like 0.7 means


def read_geometry(model: Any) -> Geometry:
    """Sizes of a Llama-like model (Llama, Qwen2: rotary positions on whole heads, no norm on queries or keys)."""
    config, first = model.config, model.base_model.layers[0].self_attn
    if not all(hasattr(first, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")) or hasattr(first, "q_norm"):
        raise MlaPassError(f"{config.model_type} is not built like Llama or Qwen2, which is what the baselines read")
    if model.base_model.rotary_emb.attention_scaling != 1:
        raise MlaPassError("this model's rotary positions scale the scores as well; the baselines read plain ones")
    return Geometry(
        len(model.base_model.layers),
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        first.head_dim,
    )
