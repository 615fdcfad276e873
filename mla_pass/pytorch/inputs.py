"""What an exported program's inputs are, and what they are given for token ids over an empty cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mla_pass.errors import MlaPassError
from mla_pass.site import AttentionSite


def roles_of(sites: Sequence[AttentionSite]) -> dict[fx.Node, str]:
    """`positions` and `mask` among the values that a program's blocks read."""
    known = {site.rope.positions: "positions" for site in sites}
    return known | {site.mask.padding: "mask" for site in sites if site.mask.padding is not None}


def fed(node: fx.Node, role: str, ids: Tensor) -> Tensor:
    """What an input gets for token ids [B, S], all attended, over an empty cache. Half precision is float32.

    Raises MlaPassError for an input that is none of tokens, attention mask, positions and caches.
    """
    value = node.meta["val"]
    if value.dim() == 4:
        kind = torch.float32 if value.dtype.is_floating_point else value.dtype
        return torch.zeros(len(ids), int(value.shape[1]), 0, int(value.shape[3]), dtype=kind)
    if value.dim() != 2 or value.dtype.is_floating_point:
        raise MlaPassError(
            f"input {node.name} of {value.dim()} axes and type {value.dtype} is unknown; expected token ids, attention "
            "mask and positions [batch, tokens], and the caches"
        )
    feeds = {"positions": torch.arange(ids.shape[1]).expand_as(ids), "mask": torch.ones_like(ids)}
    return feeds.get(role, ids).to(torch.bool if value.dtype == torch.bool else torch.int64)
