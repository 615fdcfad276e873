"""Proof that a block computes what was read from it, before anything is touched.

`reference` is attention as the site describes it, in float64 numpy. `admit` cuts each block out of the graph, from the
hidden state, the caches and the mask's inputs to the context, runs it on random inputs and compares. A walk can be
fooled by a transpose in the wrong place; this cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mla_pass.site import AttentionSite, Branch, Handle, Mask, Norm, Projection, Refusal, Rope, Weight
from mla_pass.view import EvaluationError, View, ancestors, view_of

if TYPE_CHECKING:
    import onnx_ir
    from torch.export import ExportedProgram

TOLERANCE = 1e-4
"""Largest error, relative to the largest number, between a block run in float32 and the reference in float64."""


# ---------------------------------------------------------------------------------------------- the reference


def reference(
    site: AttentionSite,
    hidden: np.ndarray,
    past_key: np.ndarray,
    past_value: np.ndarray,
    keep_or_bias: np.ndarray,
    positions: np.ndarray,
) -> np.ndarray:
    """The attention a site describes, in float64.

    hidden [B, S, E], past_key [B, G, P, D], past_value [B, G, P, V], positions [B or 1, S]; `keep_or_bias`
    [B or 1, 1 or H, S, T] is boolean (True: visible) or added to the scores. Returns the context [B, S, H*V].
    """
    key, value = appended(site, hidden, past_key, past_value, positions)
    query = rotated(site.rope, heads(site.query, hidden), positions)
    batch, _, tokens, width = query.shape
    query = query.reshape(batch, site.kv_groups, -1, tokens, width)  # heads of one group lie side by side
    scores = site.scale * np.einsum("bgrsd,bgtd->bgrst", query, key)
    if site.softcap:
        scores = site.softcap * np.tanh(scores / site.softcap)
    bias = np.where(keep_or_bias, 0.0, -np.inf) if keep_or_bias.dtype == bool else keep_or_bias.astype(np.float64)
    bias = np.broadcast_to(bias, (batch, site.heads, *scores.shape[-2:]))
    scores = scores + bias.reshape(scores.shape)
    with np.errstate(invalid="ignore"):  # a row with no visible key is NaN, and nobody's business
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bgrst,bgtv->bsgrv", weights, value).reshape(batch, tokens, -1)


def appended(
    site: AttentionSite, hidden: np.ndarray, past_key: np.ndarray, past_value: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The caches after this step: keys [B, G, T, D], rotated, and values [B, G, T, V]."""
    key = rotated(site.rope, heads(site.key, hidden), positions)
    value = heads(site.value, hidden)
    return np.concatenate([past_key, key], axis=2), np.concatenate([past_value, value], axis=2)


def heads(branch: Branch, hidden: np.ndarray) -> np.ndarray:
    """Projects [B, S, E] onto a branch's heads [B, n, S, d], normed if the branch has a norm, not rotated."""
    out = projected(branch.projection, hidden.astype(np.float64))
    out = out.reshape(*out.shape[:2], branch.heads, branch.head_dim).transpose(0, 2, 1, 3)
    return out if branch.norm is None else _normed(branch.norm, out)


def projected(projection: Projection, x: np.ndarray) -> np.ndarray:
    """x [..., in] to [..., out]."""
    out = x @ projection.weight.read()
    return out if projection.bias is None else out + projection.bias.read()


def rotated(rope: Rope, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Turns pair i of every head of x [B, n, S, d] by theta[i] * position."""
    pairs, half = x.astype(np.float64).copy(), rope.rotary_dim // 2
    angle = positions[:, None, :, None] * rope.theta
    turn = rope.attention_scaling * np.exp(1j * angle)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if rope.interleaved else (
        slice(0, half), slice(half, 2 * half))  # fmt: skip
    turned = (x[..., first] + 1j * x[..., second]) * turn
    pairs[..., first], pairs[..., second] = turned.real, turned.imag
    return pairs


def visible(mask: Mask, padding: np.ndarray, new: int) -> np.ndarray:
    """Which keys a structured mask shows, boolean [B, 1, new, T], given the attention mask [B, T]."""
    total = padding.shape[1]
    row, column = np.arange(total - new, total)[:, None], np.arange(total)[None, :]
    keep = np.ones((len(padding), 1, new, total), bool)
    if mask.causal:
        keep &= column <= row
    if mask.window:
        keep &= row - column < mask.window
    if mask.padding is not None:
        keep &= padding.astype(bool)[:, None, None, :]
    return keep


def _normed(norm: Norm, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + norm.epsilon) * norm.weight.read()


# ---------------------------------------------------------------------------------------------- the proof


def admit(
    model: onnx_ir.Model | ExportedProgram, sites: Sequence[AttentionSite | Refusal]
) -> list[AttentionSite | Refusal]:
    """The same list, with every site whose block does not compute what was read turned into a Refusal.

    Raises MlaPassError when the graph's runtime is missing.
    """
    view = view_of(model)
    return [site if isinstance(site, Refusal) else _admitted(view, site) for site in sites]


@dataclass(frozen=True)
class Discrepancy:
    """One value that the graph and the reference disagree on."""

    what: str
    error: float
    """Largest difference over largest number of the reference."""
    sizes: tuple[int, int, int]
    """Batch, new and past tokens."""


@dataclass(frozen=True)
class _Trial:
    """One set of sizes; `hidden_keys` of the first tokens are padding in every second sequence."""

    batch: int
    new: int
    past: int
    hidden_keys: int = 0
    offset: int = 0
    """Added to all positions, where the mask does not read them: slow frequencies show only far out."""


def discrepancies(model: onnx_ir.Model | ExportedProgram, site: AttentionSite) -> list[Discrepancy]:
    """How far a block is from what was read, for every value compared and all trials. Raises EvaluationError."""
    return _discrepancies(view_of(model), site)


def _admitted(view: View, site: AttentionSite) -> AttentionSite | Refusal:
    advice = "leave this layer as it is (--partial) and report the graph"
    try:
        found = _discrepancies(view, site)
    except EvaluationError as error:
        return Refusal(site.name, view.node(site.context), f"a block that runs on its own ({error})", advice)
    worst = max(found, key=lambda each: each.error if np.isfinite(each.error) else np.inf)
    if worst.error <= TOLERANCE:
        return site
    batch, new, past = worst.sizes
    told = f"relative error {worst.error:.1e} in {worst.what} at batch {batch}, {new} new and {past} past tokens"
    expected = f"the block to compute what was read from it ({told}; at most {TOLERANCE:.0e} is rounding)"
    return Refusal(site.name, view.node(site.context), expected, advice)


def _discrepancies(view: View, site: AttentionSite) -> list[Discrepancy]:
    block = _Block(view, site)
    return [each for number, trial in enumerate(_trials(site)) for each in block.compare(trial, number)]


def _trials(site: AttentionSite) -> list[_Trial]:
    """Prefill, continuation, decoding, padding on the left, and both sides of the window's edge."""
    trials = [_Trial(1, 5, 0), _Trial(2, 3, 4, offset=300), _Trial(3, 1, 6, hidden_keys=2),
              _Trial(2, 6, 0, hidden_keys=3)]  # fmt: skip
    if site.mask.window:
        trials.append(_Trial(1, 3, site.mask.window))
    return trials


class _Block:
    """One block, cut out of its graph and opened in its runtime, and the reference beside it."""

    def __init__(self, view: View, site: AttentionSite) -> None:
        self.view = view
        self.site = _loaded(site)
        given = [site.query.projection.x]
        if view.op(site.rope.positions) != "input":
            given.append(site.rope.positions)
        if site.mask.kind == "additive":
            given.append(site.mask.additive)
        branches = (site.query, site.key, site.value)
        cache = site.cache
        self.names = ["context", "present keys", "present values", "query", "key", "value"]
        outputs = [site.context, cache.present_key, cache.present_value, *(branch.value for branch in branches)]
        self.block = view.block(outputs, given)
        self.mask_reads_positions = site.mask.additive is None or site.rope.positions in ancestors(
            view, [site.mask.additive], through_shape=False
        )

    def compare(self, trial: _Trial, seed: int) -> list[Discrepancy]:
        """Runs graph and reference on the same random inputs."""
        site, rng = self.site, np.random.default_rng(seed)
        total = trial.past + trial.new
        padding = np.ones((trial.batch, total), np.int64)
        padding[1::2, : trial.hidden_keys] = 0
        counted = np.maximum(padding.cumsum(axis=1) - 1, 0)[:, trial.past :]
        if (self.view.shape(site.rope.positions) or (None,))[0] == 1:  # one row of positions for the whole batch
            counted = np.arange(trial.past, total)[None]
        positions = counted + (0 if self.mask_reads_positions else trial.offset)
        hidden, past_key, past_value = _inputs(site, trial, positions, rng)
        mask = self._mask(trial, padding, rng)
        feeds = {site.query.projection.x: hidden, site.rope.positions: positions,
                 site.cache.past_key: past_key, site.cache.past_value: past_value}  # fmt: skip
        if site.mask.kind == "additive":
            rank = len(self.view.shape(site.mask.additive) or mask.shape)
            feeds[site.mask.additive] = mask.reshape(mask.shape[4 - rank :])
        if site.mask.padding is not None:
            feeds[site.mask.padding] = padding.astype(self.view.dtype(site.mask.padding) or "int64")
        for value in self.block.needs:
            if value not in feeds:
                feeds[value] = self._filler(value, trial)
        got = self.block.run(feeds)
        context = reference(site, hidden, past_key, past_value, mask, positions)
        seen: np.ndarray = mask if mask.dtype == bool else np.greater(mask, -1e4)
        rows = np.logical_and.reduce(np.logical_or.reduce(seen, axis=-1), axis=1)  # [B or 1, S]: sees any key
        shown = np.broadcast_to(rows, context.shape[:2])
        want = [context[shown], *appended(site, hidden, past_key, past_value, positions)]
        got[0] = got[0].reshape(context.shape)[shown]
        for place, branch in enumerate((site.query, site.key, site.value), start=3):
            want.append(heads(branch, hidden))
            got[place] = _as_heads(branch, got[place], trial)
        return [
            Discrepancy(name, _error(one, other), (trial.batch, trial.new, trial.past))
            for name, one, other in zip(self.names, got, want, strict=True)
        ]

    def _mask(self, trial: _Trial, padding: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What the reference is given: the structured mask by its formula, or a random one of the additive kind."""
        if self.site.mask.kind == "structured":
            return visible(self.site.mask, padding, trial.new)
        shape = (1, 1, trial.new, trial.past + trial.new)
        keep = rng.random(shape) < 0.7
        keep[..., 0] = True
        if self.view.dtype(self.site.mask.additive) == "bool":
            return keep
        return np.where(keep, rng.normal(size=shape), -1e9).astype(np.float32)

    def _filler(self, value: Handle, trial: _Trial) -> np.ndarray:
        """Inputs of which only the sizes matter: other layers' caches, the token ids."""
        shape = self.view.shape(value) or ()
        if len(shape) == 4:
            return np.zeros((trial.batch, shape[1] or 1, trial.past, shape[3] or 1), np.float32)
        return np.zeros((trial.batch, trial.new)[: len(shape)], np.int64)


def _inputs(
    site: AttentionSite, trial: _Trial, positions: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random hidden states and caches, of a size that spreads the scores by about two: neither flat nor one-hot."""
    hidden = rng.normal(size=(trial.batch, trial.new, site.key.projection.weight.shape[0]))
    query, key = heads(site.query, hidden), heads(site.key, hidden)
    spread = abs(site.scale) * query.std() * key.std() * np.sqrt(site.head_dim)
    free = sum(branch.norm is None for branch in (site.query, site.key))  # a norm undoes any size
    if free and spread > 0:
        hidden *= (2.0 / spread) ** (1 / free)
    hidden = hidden.astype(np.float32)
    none = (trial.batch, site.kv_groups, 0)
    key, value = appended(site, hidden, np.zeros((*none, site.head_dim)), np.zeros((*none, site.value_dim)), positions)
    past = (trial.batch, site.kv_groups, trial.past)
    return (
        hidden,
        (key.std() * rng.normal(size=(*past, site.head_dim))).astype(np.float32),
        (value.std() * rng.normal(size=(*past, site.value_dim))).astype(np.float32),
    )


def _as_heads(branch: Branch, array: np.ndarray, trial: _Trial) -> np.ndarray:
    """A branch's value as the graph lays it out, to [B, n, S, d]."""
    if branch.layout == "BHSD":
        return array
    return array.reshape(trial.batch, trial.new, branch.heads, branch.head_dim).transpose(0, 2, 1, 3)


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the largest number; infinite when shapes differ or numbers are missing."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)) if want.size else 0.0


def _loaded(site: AttentionSite) -> AttentionSite:
    """The site with its weights read once, for as long as its block is looked at."""

    def load(weight: Weight) -> Weight:
        array = weight.read()
        return replace(weight, read=lambda: array)

    def branch(each: Branch) -> Branch:
        projection = replace(
            each.projection, weight=load(each.projection.weight),
            bias=None if each.projection.bias is None else load(each.projection.bias),
        )  # fmt: skip
        norm = None if each.norm is None else replace(each.norm, weight=load(each.norm.weight))
        return replace(each, projection=projection, norm=norm)

    return replace(site, query=branch(site.query), key=branch(site.key), value=branch(site.value))
