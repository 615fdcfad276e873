"""Gradients of the model's own log-likelihood at the rows that attention caches: what Fisher information is made of.

With labels drawn from the model's prediction at every position, the gradient g of sum_t -log p(label_t | prefix) has
E[g g^T] equal to the Fisher information: to second order, how far predictions move when the rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mla_pass.onnx.instrument import heads_first
from mla_pass.pytorch.graph import TorchGraph, ports
from mla_pass.site import AttentionSite, Branch


class SiteGradients(NamedTuple):
    """One site in one window, all float32."""

    query: np.ndarray
    """[T, H, D], before rotation, as `key` [T, G, D] and `value` [T, G, V] are."""
    key: np.ndarray
    value: np.ndarray
    gammas: list[np.ndarray]
    """For each sample the gradient [T, N] at y = [key heads ; value heads], N = G * (D + V), in nats."""


class Gradients:
    """A model opened in torch to be differentiated at its sites' keys and values."""

    def __init__(self, model: ir.Model, sites: Sequence[AttentionSite], logits: ir.Value | None = None) -> None:
        """`sites` are of `model`; `logits` [B, T, vocab] is by default the graph output that is one.

        Raises MlaPassError as `TorchGraph` does.
        """
        self.sites = tuple(sites)
        branches = [branch.value for site in sites for branch in (site.query, site.key, site.value)]
        self.graph = TorchGraph(model, outputs=[*branches, logits or ports(model.graph)[1]])
        self.logits = logits or self.graph.logits

    def window(self, ids: np.ndarray, random: np.random.Generator, samples: int) -> list[SiteGradients]:
        """`samples` independent draws of labels for every position of one window of token ids [T]."""
        found, logits = self._forward(ids)
        chances = torch.softmax(logits.detach(), -1)
        return self._collect(found, logits, chances, draw(chances, random, samples))

    def labelled(self, ids: np.ndarray, labels: np.ndarray) -> list[SiteGradients]:
        """The gradients for given labels [samples, T], a token id each: what comes after each position of ids [T]."""
        found, logits = self._forward(ids)
        return self._collect(found, logits, torch.softmax(logits.detach(), -1), torch.from_numpy(labels))

    def _forward(self, ids: np.ndarray) -> tuple[dict[ir.Value, Tensor], Tensor]:
        """Every branch, keys and values ready to be differentiated at, and the logits [T, vocab]."""
        leaves = [branch.value for site in self.sites for branch in (site.key, site.value)]
        wanted = [*(site.query.value for site in self.sites), self.logits]
        found = self.graph.run(torch.from_numpy(np.asarray(ids))[None], wanted=wanted, require_grad=leaves)
        return found, found.pop(self.logits)[0]

    def _collect(
        self, found: dict[ir.Value, Tensor], logits: Tensor, chances: Tensor, labels: Tensor
    ) -> list[SiteGradients]:
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
                parts = [heads_first(at[b.value].numpy(), b).reshape(len(logits), -1) for b in (site.key, site.value)]
                gamma.append(np.concatenate(parts, axis=1))

        def rows(branch: Branch) -> np.ndarray:
            return heads_first(found[branch.value].detach().numpy(), branch)

        return [
            SiteGradients(rows(site.query), rows(site.key), rows(site.value), gamma)
            for site, gamma in zip(self.sites, gammas, strict=True)
        ]


def draw(chances: Tensor, random: np.random.Generator, samples: int) -> Tensor:
    """Labels [samples, T], int64, drawn from each row of `chances` [T, vocab]."""
    uniform = torch.from_numpy(random.random((len(chances), samples)))
    drawn = []
    for row, place in zip(chances, uniform, strict=True):  # a row at a time: in float64 all would take much memory
        steps = row.double().cumsum(0)
        drawn.append(torch.searchsorted(steps, place * steps[-1], right=True).clamp_(max=len(row) - 1))
    return torch.stack(drawn, 1)
