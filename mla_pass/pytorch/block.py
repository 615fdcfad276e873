"""What replaces one attention block of an exported program, as a graph of plain ATen nodes.

Traced from `mla_pass.pytorch.latent` with the sizes of the program it will stand in, so that batch, tokens and past
stay what they are there: symbols.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from mla_pass.export.fx import any_size
from mla_pass.onnx.body import INPUTS
from mla_pass.onnx.emit import Conversion
from mla_pass.pytorch.latent import latent_attention
from mla_pass.pytorch.spec import as_torch, layer_spec
from mla_pass.site import Branch

ROW_WEIGHT = "latent_proj.weight"
"""Name of the one weight that every block brings, behind the block's own."""


@dataclass(frozen=True)
class Block:
    """A converted site: which values of the program it reads, which weights it brings, and what it computes."""

    conversion: Conversion

    def handles(self) -> dict[str, fx.Node]:
        """The program's values that it reads."""
        site, plan = self.conversion.site, self.conversion.absorption
        structured = site.mask.kind == "structured"
        read: dict[str, fx.Node | None] = {
            "hidden": site.key.projection.x if plan.query_map or not self.conversion.behind_norm else None,
            "query": None if plan.query_map else site.query.value,
            "key": site.key.value if self.conversion.behind_norm else None,
            "value": site.value.value if self.conversion.behind_norm else None,
            "past_latent": site.cache.past_key,
            "past_rope": site.cache.past_value,
            "position_ids": site.rope.positions,
            "padding_mask": site.mask.padding if structured else None,
            "attention_bias": None if structured else site.mask.additive,
        }
        return {name: node for name, node in read.items() if node is not None}

    def weights(self) -> dict[str, Tensor]:
        """New weights in the type the program computes in, cast once from float64; matrices [out, in]."""
        conversion, site = self.conversion, self.conversion.site
        w, plan = conversion.weights, conversion.absorption
        found: dict[str, np.ndarray] = {}
        row = (w.encode.T, w.encode_bias) if conversion.behind_norm else conversion.row_projection()
        found[ROW_WEIGHT], found["latent_proj.bias"] = row[0].T, row[1]
        if plan.query_map:
            weight, bias = plan.fold_query(site, w)
            found["q_proj_latent.weight"] = weight.T
            if bias is not None:
                found["q_proj_latent.bias"] = bias
        else:
            found["query_map"] = w.query_map
        if w.nope_dim and not plan.key_up:
            found |= {"key_up": w.key_up, "key_mean": w.key_mean}
        if plan.value_up:
            weight, bias = plan.fold_output(site, w)
            found |= {"o_proj_latent.weight": weight.T, "o_proj_latent.bias": bias}
        else:
            found["value_up"] = w.value_up
            if w.value_mean.any():
                found["value_mean"] = np.repeat(w.value_mean, site.heads // site.kv_groups, axis=0).reshape(-1)
        return {name: as_torch(array, getattr(torch, site.dtype)) for name, array in found.items()}

    def traced(self, operands: Mapping[str, fx.Node]) -> fx.GraphModule:
        """The computation of `run` as a graph over the operands, in their order."""
        values = [node.meta["val"] for node in operands.values()]

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            return self.run(dict(zip(operands, given, strict=True)))

        mode = values[0].fake_mode
        with mode, any_size(mode):
            return make_fx(run, pre_dispatch=True)(*values)

    def run(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What is handed over in place of the context (or the output), and both presents."""
        site, plan = self.conversion.site, self.conversion.absorption
        if self.conversion.behind_norm:
            y = torch.cat([flat(x["key"], site.key), flat(x["value"], site.value)], -1)
        else:
            y = x["hidden"]
        row = functional.linear(y, x[ROW_WEIGHT], x["latent_proj.bias"])
        if plan.query_map:
            query = functional.linear(x["hidden"], x["q_proj_latent.weight"], x.get("q_proj_latent.bias"))
        else:
            query = flat(x["query"], site.query)
        given = {**x, "query": query, "row": row}
        operands = [given.get(name) if name.startswith("past") else wide(given.get(name)) for name in INPUTS]
        context, *presents = latent_attention(self.attributes(), operands)
        context = context.to(query.dtype)
        if plan.value_up:
            context = functional.linear(context, x["o_proj_latent.weight"], x["o_proj_latent.bias"])
        elif "value_mean" in x:
            context = context + x["value_mean"]
        return context, presents[0], presents[1]

    def attributes(self) -> dict[str, Any]:
        """The operator's, of a growing cache."""
        site, w = self.conversion.site, self.conversion.weights
        causal = site.mask.kind == "structured" and site.mask.causal
        nope = w.key_rank if self.conversion.absorption.key_up else w.nope_dim
        return {**layer_spec(self.conversion).attributes(causal=causal), "nope_dim": nope, "shared_buffer": 0}


def flat(x: Tensor, branch: Branch) -> Tensor:
    """A branch's value as [B, S, heads * size]."""
    if branch.layout == "BSE":
        return x
    return (x.transpose(1, 2) if branch.layout == "BHSD" else x).flatten(2)


def wide(x: Tensor | None) -> Tensor | None:
    """Half precision in float32, in which attention over latents is computed."""
    return x.float() if x is not None and x.is_floating_point() else x
