"""What a mask hides is found by running it.

A mask depends on the graph's inputs alone: the attention mask, the positions, and the sizes of past and new tokens. It
is computed for several sizes and attention masks, all ones, left-padded and with holes, and compared with

    keep[b, t, s] = (s <= P + t)  and  (P + t - s < window)  and  padding[b, s]

The window is read off one query at the end of a long past. Where nothing of that form reproduces the mask exactly, it
is "additive": passed on as it is. Rows with no visible key are left out of the comparison: their result is junk in any
model, and exporters disagree on which junk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mla_pass.patterns.layout import rank
from mla_pass.patterns.rope import signature
from mla_pass.patterns.scores import HIDDEN, MaskTerm
from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle, Mask
from mla_pass.view import EvaluationError, View, ancestors

_LONGEST = 1 << 17
"""Windows are looked for up to this many tokens when the graph does not tell its longest sequence."""


@dataclass(frozen=True)
class _Try:
    """One size and one attention mask [B, P + S]."""

    past: int
    keep: np.ndarray
    counted: bool = True
    """Positions count visible tokens only (as runtimes do under left padding), or simply all tokens."""

    @property
    def new(self) -> int:
        return self.keep.shape[1] - self.past


class MaskReader:
    """Classifies masks; equal masks (all layers share one or two) are measured once."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._known: dict[Any, Mask] = {}

    def read(self, terms: Sequence[MaskTerm], positions: Handle, softmax: Handle) -> Mask:
        """What the terms hide together; `positions` may be read by a mask. Raises Stop."""
        if not terms:
            return Mask("structured", causal=False, window=0, padding=None, additive=None)
        values = [term.value for term in terms]
        key = (signature(self.view, values, ()), tuple(term.form for term in terms), positions)
        if key not in self._known:
            padding, others = self._read_inputs(values, positions)
            measured = None if others else _Measured(self.view, tuple(terms), padding, positions).mask()
            self._known[key] = measured or replace(_opaque(terms, softmax), padding=padding)
        known = self._known[key]
        # Equal masks may be values of their own: each site is handed the one it reads.
        return known if known.additive is None else replace(known, additive=values[0])

    def _read_inputs(self, values: list[Handle], positions: Handle) -> tuple[Handle | None, list[Handle]]:
        """The graph inputs whose numbers the mask reads: the attention mask [B, T], and any that are no such thing."""
        read = [v for v in ancestors(self.view, values, through_shape=False) if self.view.op(v) == "input"]
        read = [value for value in read if value is not positions]
        padding = [v for v in read if rank(self.view, v) == 2 and "float" not in self.view.dtype(v)]
        if len(padding) == 1:
            return padding[0], [value for value in read if value is not padding[0]]
        return None, read


@dataclass(frozen=True)
class _Measured:
    """One mask under measurement."""

    view: View
    terms: tuple[MaskTerm, ...]
    padding: Handle | None
    positions: Handle

    def mask(self) -> Mask | None:
        """The structured mask that hides exactly what the terms hide, or None."""
        try:
            causal = self._hides_future()
            window = self._window() if causal else 0
            exact = all(self._agrees(causal, window, trial) for trial in _trials(window))
        except EvaluationError:
            return None
        handle = self.terms[0].value if len(self.terms) == 1 else None
        return Mask("structured", causal, window, self.padding, handle) if exact else None

    def _hides_future(self) -> bool:
        keep = self._keep(_Try(3, np.ones((1, 5), bool)))
        return keep is not None and not keep[0, 0, 0, 4]

    def _window(self) -> int:
        """How many keys the last of many tokens sees, itself included; 0 for all."""
        tokens = self.view.max_position or _LONGEST
        keep = self._keep(_Try(tokens - 1, np.ones((1, tokens), bool)))
        if keep is None:
            return 0
        seen = int(keep[0, 0, 0].sum())
        return seen if seen < tokens else 0

    def _agrees(self, causal: bool, window: int, trial: _Try) -> bool:
        keep = self._keep(trial)
        if keep is None:
            return False
        row = trial.past + np.arange(trial.new)[:, None]
        column = np.arange(trial.past + trial.new)[None, :]
        formula = np.ones((len(trial.keep), trial.new, trial.past + trial.new), bool)
        if causal:
            formula &= column <= row
        if window:
            formula &= row - column < window
        if self.padding is not None:
            formula &= trial.keep[:, None, :]
        judged = np.logical_or.reduce(formula, axis=-1, keepdims=True)
        return bool(np.all(np.equal(keep, formula[:, None]) | ~judged[:, None]))

    def _keep(self, trial: _Try) -> np.ndarray | None:
        """What the graph keeps, [B or 1, H or 1, S, T]; None if a bias is neither 0 nor hiding."""
        values = [term.value for term in self.terms]
        arrays = self.view.evaluate(values, self._feeds(values, trial))
        keep = np.ones((1, 1, 1, 1), bool)
        for term, array in zip(self.terms, arrays, strict=True):
            if array.ndim > 4:
                return None
            array = array.reshape((1,) * (4 - array.ndim) + array.shape)
            if (term.form == "add") == (array.dtype == bool):
                return None
            if term.form == "add" and not np.all((array == 0) | (array <= HIDDEN)):
                return None
            keep = keep & (np.equal(array, 0) if term.form == "add" else np.equal(array, term.form == "keep"))
        full = (keep.shape[0], keep.shape[1], trial.new, trial.past + trial.new)
        return np.broadcast_to(keep, full)

    def _feeds(self, values: list[Handle], trial: _Try) -> Mapping[Handle, np.ndarray]:
        """Every graph input the mask needs; only the attention mask and the positions have numbers that matter."""
        batch, tokens = trial.keep.shape
        feeds: dict[Handle, np.ndarray] = {}
        for value in self.view.needs(values, ()):
            shape = self.view.shape(value) or ()
            if len(shape) == 4:  # a cache: broadcasting takes no memory
                sizes = (batch, shape[1] or 1, trial.past, shape[3] or 1)
                feeds[value] = np.broadcast_to(np.zeros((), np.float32), sizes)
            elif value is self.padding:
                feeds[value] = trial.keep.astype(self.view.dtype(value) or "int64")
            else:
                counts = trial.keep.cumsum(axis=1) - 1 if trial.counted else np.tile(np.arange(tokens), (batch, 1))
                feeds[value] = np.maximum(counts, 0)[:, trial.past :].astype(np.int64)
        return feeds


def _opaque(terms: Sequence[MaskTerm], softmax: Handle) -> Mask:
    if len(terms) != 1 or terms[0].form == "hide":
        raise Stop(softmax, "one mask that is added to the scores, or a causal, windowed or padding mask")
    return Mask("additive", causal=False, window=0, padding=None, additive=terms[0].value)


def _trials(window: int) -> list[_Try]:
    """Sizes and attention masks a reading must survive: past and none, one token and many, around the window's edge."""
    left, holes = np.ones((3, 7), bool), np.ones((2, 9), bool)
    left[1, :2], left[2, :4] = False, False
    holes[0, [1, 4]], holes[1, [0, 6]] = False, False
    right = np.ones((2, 6), bool)
    right[1, 4:] = False
    trials = [_Try(0, np.ones((1, 5), bool)), _Try(2, np.ones((2, 3), bool)), _Try(0, left), _Try(4, left),
              _Try(4, left, counted=False), _Try(6, holes), _Try(0, right)]  # fmt: skip
    if window:
        for past in {max(window - 2, 0), window, window + 3, 2 * window + 1}:
            edge = np.ones((2, past + 4), bool)
            edge[1, :2] = False
            trials.append(_Try(past, edge))
    return trials
