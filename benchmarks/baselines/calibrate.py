"""What a model says about a text: second moments of its attention inputs, and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS_AT_ONCE = 4096
"""Tokens of one forward pass, which bounds memory."""


@torch.no_grad()
def input_moments(model: Any, ids: Tensor) -> Tensor:
    """E[x x^T] of every layer's attention input x, a one appended: float64 [layers, hidden + 1, hidden + 1].

    `ids` [n, L] are windows, each from an empty cache. Keys and values are linear in x, so that all their second
    moments follow; the appended one carries means and biases.
    """
    layers = model.base_model.layers
    size = model.config.hidden_size + 1
    sums = torch.zeros(len(layers), size, size, dtype=torch.float64)

    def add(index: int, hidden: Tensor) -> None:
        flat = hidden.flatten(0, 1).double()
        flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
        sums[index] += flat.T @ flat

    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, __, kwargs, index=index: add(index, kwargs["hidden_states"]), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    try:
        for batch in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
            model.base_model(batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums / ids.numel()


@torch.no_grad()
def window_losses(model: Any, ids: Tensor) -> Tensor:
    """Mean loss of tokens 2..L of each window of ids [n, L], nats per token; float64 [n]."""
    losses = []
    for window in ids:  # one at a time: logits of a large vocabulary are most of the memory
        logits = model(window[None, :-1], use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none").double().mean())
    return torch.stack(losses)
