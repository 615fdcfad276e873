"""Gradients at the rows that attention caches: of the model's log-likelihood, and of each block's own output.

Fisher information is made of the first. With labels drawn from the model's prediction at every position, the gradient
g of sum_t -log p(label_t | prefix) has E[g g^T] equal to the Fisher information: to second order, how far predictions
move when the rows do. The second, of random signs on the output of every token, has E[g g^T] equal to how far the
block's output moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mla_pass.onnx.instrument import heads_first
from mla_pass.onnx.ports import graph_ports
from mla_pass.pytorch.graph import TorchGraph
from mla_pass.site import AttentionSite, Branch


class SiteGradients(NamedTuple):
    """One site in one window, all float32."""

    query: np.ndarray
    """[T, H, D], before rotation, as `key` [T, G, D] and `value` [T, G, V] are."""
    key: np.ndarray
    value: np.ndarray
    gammas: list[np.ndarray]
    """For each sample the gradient [T, N] at y = [key heads ; value heads], N = G * (D + V), in nats."""
    outward: np.ndarray
    """The gradient [T, N] at y of random signs on the block's output; empty [0, N] where no sample was drawn."""


class Gradients:
    """A model opened in torch to be differentiated at its sites' keys and values."""

    def __init__(self, model: ir.Model, sites: Sequence[AttentionSite], logits: ir.Value | None = None) -> None:
        """`sites` are of `model`; `logits` [B, T, vocab] is by default the graph output that is one.

        Raises MlaPassError as `TorchGraph` does.
        """
        self.sites = tuple(sites)
        branches = [branch.value for site in sites for branch in (site.query, site.key, site.value)]
        contexts = [site.context for site in sites]
        self.graph = TorchGraph(model, outputs=[*branches, *contexts, logits or graph_ports(model.graph)[2]])
        self.projections = [torch.from_numpy(site.output.weight.read().astype(np.float32)) for site in sites]
        self.logits = logits or self.graph.logits

    def window(self, ids: np.ndarray, random: np.random.Generator, samples: int) -> list[SiteGradients]:
        """`samples` independent draws of labels for every position of one window of token ids [T]."""
        found, logits = self._forward(ids)
        chances = torch.softmax(logits.detach(), -1)
        outward = self._outward(found, random) if samples else None
        return self._collect(found, logits, chances, draw(chances, random, samples), outward)

    def labelled(self, ids: np.ndarray, labels: np.ndarray) -> list[SiteGradients]:
        """The gradients for given labels [samples, T], a token id each: what comes after each position of ids [T]."""
        found, logits = self._forward(ids)
        return self._collect(found, logits, torch.softmax(logits.detach(), -1), torch.from_numpy(labels))

    def _forward(self, ids: np.ndarray) -> tuple[dict[ir.Value, Tensor], Tensor]:
        """Every branch, keys and values ready to be differentiated at, and the logits [T, vocab]."""
        leaves = [branch.value for site in self.sites for branch in (site.key, site.value)]
        wanted = [*(value for site in self.sites for value in (site.query.value, site.context)), self.logits]
        found = self.graph.run(torch.from_numpy(np.asarray(ids))[None], wanted=wanted, require_grad=leaves)
        return found, found.pop(self.logits)[0]

    def _outward(self, found: dict[ir.Value, Tensor], random: np.random.Generator) -> list[np.ndarray]:
        """For every site the gradient [T, N] of random signs on its own output; it goes back through one block."""
        gammas = []
        for site, projection in zip(self.sites, self.projections, strict=True):
            context = found[site.context]
            signs = random.integers(0, 2, (context.shape[1], projection.shape[1]), dtype=np.int8) * 2 - 1
            upstream = (torch.from_numpy(signs).to(projection.dtype) @ projection.T).reshape(context.shape)
            rows = [found[branch.value] for branch in (site.key, site.value)]
            slopes = torch.autograd.grad(context, rows, upstream.to(context.dtype), retain_graph=True)
            gammas.append(flattened(site, slopes))
        return gammas

    def _collect(
        self, found: dict[ir.Value, Tensor], logits: Tensor, chances: Tensor, labels: Tensor,
        outward: list[np.ndarray] | None = None,
    ) -> list[SiteGradients]:  # fmt: skip
        """One backward pass a sample, started from the loss's gradient at the logits: chances minus the label's one."""
        leaves = {branch.value: found[branch.value] for site in self.sites for branch in (site.key, site.value)}
        gammas: list[list[np.ndarray]] = [[] for _ in self.sites]
        position = torch.arange(len(logits))
        for sample, drawn in enumerate(labels):
            upstream = chances.clone()
            upstream[position, drawn] -= 1
            slopes = torch.autograd.grad(logits, list(leaves.values()), upstream, retain_graph=sample + 1 < len(labels))
            at = dict(zip(leaves, slopes, strict=True))
            for gamma, site in zip(gammas, self.sites, strict=True):
                gamma.append(flattened(site, [at[branch.value] for branch in (site.key, site.value)]))

        def rows(branch: Branch) -> np.ndarray:
            return heads_first(found[branch.value].detach().numpy(), branch)

        none = [np.zeros((0, site.cache_width), np.float32) for site in self.sites]
        return [
            SiteGradients(rows(site.query), rows(site.key), rows(site.value), gamma, out)
            for site, gamma, out in zip(self.sites, gammas, outward or none, strict=True)
        ]


def flattened(site: AttentionSite, slopes: Sequence[Tensor]) -> np.ndarray:
    """Gradients at a site's keys and values, as the graph lays them out with B = 1, as rows [T, N]."""
    parts = [
        heads_first(slope.numpy(), branch) for slope, branch in zip(slopes, (site.key, site.value), strict=True)
    ]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def draw(chances: Tensor, random: np.random.Generator, samples: int) -> Tensor:
    """Labels [samples, T], int64, drawn from each row of `chances` [T, vocab]."""
    uniform = torch.from_numpy(random.random((len(chances), samples)))
    drawn = []
    for row, place in zip(chances, uniform, strict=True):  # a row at a time: in float64 all would take much memory
        steps = row.double().cumsum(0)
        drawn.append(torch.searchsorted(steps, place * steps[-1], right=True).clamp_(max=len(row) - 1))
    return torch.stack(drawn, 1)
