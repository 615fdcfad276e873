"""Proof that a written ``deepseek_v3`` checkpoint computes what it should, in the runtime it is for.

1. The original's attention, put in the place of the written model's, must give the original's logits: all around the
   attention is the same.
2. The written model's logits must be those of the latents' attention in float64 in the same place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mla_pass.errors import MlaPassError
from mla_pass.export.tracing import TOLERANCE, cache_tensors
from mla_pass.fold import LatentWeights
from mla_pass.proof import heads, projected, reference
from mla_pass.pytorch.deepseek_fold import INSTEAD
from mla_pass.reference import attend, rows
from mla_pass.site import AttentionSite

PROOF_TOKENS = 24


@dataclass(frozen=True)
class Proof:
    """`around` and `error`: the two differences, over the largest logit. `cached`: numbers that the installed
    transformers kept a token and layer."""

    around: float
    error: float
    cached: float


def prove(
    folder: Path, wanted: np.ndarray, blocks: Sequence[AttentionSite], latents: Sequence[LatentWeights], dtype: str
) -> Proof:  # fmt: skip
    """Load the folder and compare; `wanted` are the original's logits [T, vocabulary] of `proof_ids`.

    Raises MlaPassError when either difference is more than rounding explains.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = proof_ids(model)
    with torch.no_grad():
        result = model(ids, use_cache=True)
    got = result.logits[0].double().numpy()
    cached = sum(tensor.numel() for tensor in cache_tensors(result.past_key_values)) / (ids.shape[1] * len(blocks))
    del result
    replace_attention(model, [partial(original_attention, site) for site in blocks])
    around = difference(logits(model, ids), wanted)
    if not around <= TOLERANCE["float32"]:  # a NaN is a difference
        raise MlaPassError(
            f"deepseek_v3 blocks around this model's own attention change its logits by {around:.2g} of the largest, "
            f"where rounding explains {TOLERANCE['float32']:.2g}: its blocks compute something else, or the graph was "
            f"exported from other weights; {INSTEAD}"
        )
    replace_attention(model, [partial(latent_attention, *layer) for layer in zip(blocks, latents, strict=True)])
    error = difference(got, logits(model, ids))
    if not error <= TOLERANCE[dtype]:
        raise MlaPassError(
            f"the deepseek_v3 checkpoint's logits differ from its latents' attention in float64 by {error:.2g} of the "
            f"largest, where rounding to {dtype} explains {TOLERANCE[dtype]:.2g}: {INSTEAD}"
        )
    return Proof(around, error, cached)


def proof_ids(model: Any) -> Tensor:
    """Token ids [1, T] to compare on."""
    return (torch.arange(PROOF_TOKENS)[None] * 7 + 3) % model.config.vocab_size


def logits(model: Any, ids: Tensor) -> np.ndarray:
    """Logits [T, vocabulary] in float64."""
    with torch.no_grad():
        return np.asarray(model(ids, use_cache=False).logits[0].double().numpy())


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest value; infinite when there is something not finite."""
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    return error if math.isfinite(error) else math.inf


class Replaced(nn.Module):
    """Stands where an attention module stood, and computes in float64 numpy on one sequence without padding."""

    def __init__(self, attention: Callable[[np.ndarray], np.ndarray]) -> None:
        """`attention`: from the normed hidden state [T, E] to what is added to the residual, [T, E]."""
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """The attention's output in the type of what comes in."""
        return torch.from_numpy(self.attention(hidden_states[0].double().numpy()))[None].to(hidden_states), None


def replace_attention(model: Any, attentions: Sequence[Callable[[np.ndarray], np.ndarray]]) -> None:
    """Put an attention into each layer of a deepseek_v3 model."""
    for layer, attention in zip(model.model.layers, attentions, strict=True):
        layer.self_attn = Replaced(attention)


def original_attention(site: AttentionSite, hidden: np.ndarray) -> np.ndarray:
    """What the site computes of hidden [T, E], by its description alone."""
    count, groups = len(hidden), site.kv_groups
    key, value = np.zeros((1, groups, 0, site.head_dim)), np.zeros((1, groups, 0, site.value_dim))
    keep = np.tri(count, dtype=bool)[None, None]
    return projected(site.output, reference(site, hidden[None], key, value, keep, np.arange(count)[None])[0])


def latent_attention(site: AttentionSite, weights: LatentWeights, hidden: np.ndarray) -> np.ndarray:
    """The same over latent rows."""
    position = np.arange(len(hidden))
    query, key, value = (heads(b, hidden[None])[0].swapaxes(0, 1) for b in (site.query, site.key, site.value))
    y = np.concatenate([key.reshape(len(hidden), -1), value.reshape(len(hidden), -1)], axis=1)
    cache = rows(weights, site.rope.theta, y, position)
    context = attend(
        weights, site.rope.theta, query, cache, position, np.tri(len(hidden), dtype=bool), scale=site.scale
    )  # fmt: skip
    return projected(site.output, context.reshape(len(hidden), -1))
