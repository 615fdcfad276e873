"""Rope components for runtimes with a frequency ladder of their own: one component per frequency, evenly spaced.

Such a runtime turns pair k of a rope head of p numbers by base'^(-2k/p), one head for all query heads. The original
turns its pair i by base^(-2i/R), so base' = base^(s p / R) makes pair k turn as the original's pair s*k: every s-th of
its frequencies, from the fastest on. Scalings that depend on the frequency alone (linear, llama3) leave that true.

The original's own base leaves no choice but s = R/p, and a poor one: on SmolLM2-135M at half the cache, 32 of a head's
64 numbers rotated, the predicted loss is 0.61 nats a token with every second frequency and 0.21 with the fastest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from mla_pass.fold.components import Components


@dataclass(frozen=True)
class Ladder:
    """Every `stride`-th pair of an original's rope: `pairs` [p/2]."""

    stride: int
    pairs: np.ndarray


def ladders(pair_count: int, rope_dim: int) -> list[Ladder]:
    """All ladders of `rope_dim` numbers, the widest strides last; none when there are fewer pairs than that."""
    half = rope_dim // 2
    largest = (pair_count - 1) // (half - 1) if half > 1 else 1
    return [Ladder(stride, stride * np.arange(half)) for stride in range(1, largest + 1)]


def saved_losses(components: Components, pair_count: int) -> np.ndarray:
    """What caching the best component of each pair rotated saves, [R/2], in units of `Components.loss`."""
    saved = np.zeros(pair_count)
    np.maximum.at(saved, components.pair, components.loss)
    return saved


def best_ladder(choices: Sequence[Ladder], saved: np.ndarray) -> Ladder:
    """Of several ladders the one that saves most; `saved` [R/2] summed over the layers that share it."""
    return max(choices, key=lambda ladder: float(saved[ladder.pairs].sum()))


def on_ladder(components: Components, ladder: Ladder) -> Components:
    """The same components with the best one of each of the ladder's pairs in front, in the ladder's order."""
    # They come ordered by loss, so the first of a pair is its best.
    first = [int(np.flatnonzero(components.pair == pair)[0]) for pair in ladder.pairs]
    order = np.concatenate([first, np.setdiff1d(np.arange(len(components.pair)), first)]).astype(np.int64)
    return Components(*(getattr(components, field.name)[order] for field in fields(Components)))
