"""Rotary positions: which numbers of a head turn with the position, how fast, and in which pairs.

Spellings differ (Neg-Concat, stacked halves, RotaryEmbedding, partial through Slice-Concat), so the walk matches no
spelling. `rotation` cuts out the region between a rotated value and the one value x it was made from: data flows
through additions, slices and products with tables, and all of it starts at x. What the region does is then found by
running it: x random, positions given,

    y[pair i] = a * exp(1j * theta[i] * position) * x[pair i]

for every head, every pair and positions up to thousands, or it is no rotation that this project can absorb. theta is
read where the graph computes its angles (the operand of Cos), so it is exact; failing that, from the tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_pass.patterns.layout import Axes, arrange, rank, to_heads
from mla_pass.patterns.scores import factor
from mla_pass.patterns.stop import Stop
from mla_pass.site import Handle, Rope
from mla_pass.view import EvaluationError, View, ancestors

NOT_LINEAR = "rotations that change with the length (dynamic NTK, longrope) cannot be absorbed: export with fixed ones"
_MOVES = {"add", "sub", "neg", "concat", "slice", "reshape", "transpose", "unsqueeze", "squeeze", "cast", "identity",
          "gather", "mul", "rope", "expand"}  # fmt: skip
_CHECKED = 4096
"""Positions are checked up to here, or to the model's own longest sequence if that is shorter."""


@dataclass(frozen=True)
class Rotation:
    """The region from `x` to `out`, both laid out as `axes`."""

    x: Handle
    out: Handle
    axes: Axes
    tables: tuple[Handle, ...]


def rotation(view: View, carries: set[Handle], order: dict[Handle, int], out: Handle, axes: Axes) -> Rotation | None:
    """Finds the region that ends at `out`; None if no product with a position-dependent table lies in it."""
    tables: dict[Handle, None] = {}
    frontier = {out}
    while True:
        latest = max(frontier, key=order.__getitem__)
        if len(frontier) == 1 and (tables or latest is not out):
            break
        if view.op(latest) not in _MOVES:
            return None
        frontier.remove(latest)
        operands = view.inputs(latest)
        frontier |= {operand for operand in operands if operand in carries}
        if view.op(latest) == "rope":
            tables |= dict.fromkeys(operand for operand in operands[1:] if operand is not None)
        elif view.op(latest) == "mul":
            turning = [operand for operand in operands if operand not in carries and not view.is_constant(operand)]
            tables |= dict.fromkeys(turning)
        if not frontier:
            return None
    x = frontier.pop()
    return Rotation(x, out, axes, tuple(tables)) if tables else None


class RopeReader:
    """Measures rotations; equal regions (all layers share one, usually) are measured once."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._known: dict[Any, Rope | Stop] = {}

    def read(self, found: Rotation, heads: int, head_dim: int) -> Rope:
        """What a region does to [B, S, heads, head_dim]. Raises Stop."""
        positions = positions_of(self.view, found)
        key = (signature(self.view, [found.out], (found.x, positions)), found.axes, heads, head_dim, positions)
        if key not in self._known:
            try:
                self._known[key] = _measure(self.view, found, positions, heads, head_dim)
            except Stop as stop:
                self._known[key] = stop
        known = self._known[key]
        if isinstance(known, Stop):
            raise Stop(found.out, known.expected, known.advice)
        return known


def positions_of(view: View, found: Rotation) -> Handle:
    """The int64 [B or 1, S] value that the tables are computed from. Raises Stop."""
    sources: dict[Handle, None] = {}
    for value in ancestors(view, found.tables, through_shape=False):
        op, operands = view.op(value), view.inputs(value)
        index = {"cast": 0, "gather": 1, "rope": 3}.get(op)
        if index is None or index >= len(operands) or operands[index] is None:
            continue
        source = operands[index]
        if "int" in view.dtype(source) and "float" in view.dtype(value) and not view.is_constant(source):
            sources[_flat(view, source)] = None
    if view.op(found.out) == "rope" and len(view.inputs(found.out)) > 3 and view.inputs(found.out)[3] is not None:
        sources = {_flat(view, view.inputs(found.out)[3]): None}
    if len(sources) != 1:
        told = ", ".join(view.name(source) for source in sources) or "none"
        raise Stop(found.out, f"rotation tables computed from one value of token positions (found {told})")
    return next(iter(sources))


def signature(view: View, outputs: list[Handle], given: tuple[Handle, ...]) -> tuple[Any, ...]:
    """Equal for pieces of the graph that compute the same from `given` and the graph's inputs."""
    numbers: dict[Handle, int] = {value: -1 - i for i, value in enumerate(given)}
    lines: list[Any] = []
    todo = [(output, False) for output in reversed(outputs)]
    while todo:
        value, ready = todo.pop()
        if value in numbers:
            continue
        operands = view.inputs(value)
        constant = view.constant(value) if view.is_constant(value) else None
        if constant is not None:
            lines.append((constant.dtype.name, constant.shape, constant.tobytes()))
        elif view.op(value) in ("input", "constant"):
            lines.append(value)
        elif not ready:
            todo.append((value, True))
            todo += [(operand, False) for operand in reversed(operands) if operand is not None]
            continue
        else:
            lines.append((view.op(value), view.settings(value), tuple(numbers.get(o, 0) for o in operands)))
        numbers[value] = len(lines)
    return tuple(lines)


def _flat(view: View, value: Handle) -> Handle:
    """Peels the axes put around positions for broadcasting: the innermost value with two axes."""
    while (rank(view, value) or 0) != 2 and view.op(value) in ("unsqueeze", "reshape", "expand", "identity", "cast"):
        inner = view.inputs(value)[0]
        if (rank(view, inner) or 0) < 2:
            break
        value = inner
    return value


def _measure(view: View, found: Rotation, positions: Handle, heads: int, head_dim: int) -> Rope:
    """Runs the region on random heads at many positions and reads off the rotation. Raises Stop."""
    limit = min(_CHECKED, view.max_position or _CHECKED, *_table_rows(view, found))
    spread = np.unique(np.r_[np.arange(min(64, limit)), np.geomspace(1, limit, 64).astype(int) - 1, limit - 1])
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, (2, heads, 1, head_dim)) * rng.choice([-1.0, 1.0], (2, heads, 1, head_dim))
    x = np.repeat(x.astype(np.float32), len(spread), axis=2)
    y = _run(view, found, positions, x, spread)
    rotary_dim = _rotary_dim(found, x, y)
    for interleaved in (False, True):
        turns = _turns(x, y, rotary_dim, interleaved)
        if np.abs(turns - turns[:1, :1]).max() < 1e-4:  # all heads turn alike only if the pairs are the right ones
            break
    else:
        raise Stop(found.out, "a rotation of pairs (i, i + R/2) or (2i, 2i + 1), the same in every head", NOT_LINEAR)
    turn = turns[0, 0]  # [positions, pairs]
    scaling = _scaling(view, found, float(np.abs(turn).mean()))
    for theta in _candidates(view, found, positions, spread, turn):
        if _turns_by(theta, turn, scaling, spread):
            break
    else:
        raise Stop(found.out, "a rotation by a fixed angle per position", NOT_LINEAR)
    short = np.arange(min(8, limit))  # a rotation that switches on the length differs on a short sequence
    x = x[:, :, : len(short)]
    again = _turns(x, _run(view, found, positions, x, short), rotary_dim, interleaved)[0, 0]
    if not _turns_by(theta, again, scaling, short):
        raise Stop(found.out, "the same rotation for short and long sequences", NOT_LINEAR)
    return Rope(theta, rotary_dim, interleaved, scaling, positions)


def _table_rows(view: View, found: Rotation) -> list[int]:
    """Positions that stored tables reach."""
    rows = []
    for value in [found.out, *ancestors(view, found.tables, through_shape=False)]:
        operands = view.inputs(value)
        table = operands[0] if view.op(value) == "gather" else operands[1] if view.op(value) == "rope" else None
        shape = view.shape(table) if table is not None and view.is_constant(table) else None
        if shape and shape[0] is not None and len(shape) > 1:
            rows.append(shape[0])
    return rows


def _run(view: View, found: Rotation, positions: Handle, x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The region's result [B, H, S, D] at the given positions."""
    rows = 1 if (view.shape(positions) or (None,))[0] == 1 else len(x)
    feeds = {found.x: arrange(x, found.axes), positions: np.repeat(at[None].astype(np.int64), rows, axis=0)}
    try:
        _lend_sizes(view, [found.out], feeds, len(x), len(at))
        return to_heads(view.evaluate([found.out], feeds)[0], found.axes, x.shape)  # type: ignore[arg-type]
    except (EvaluationError, ValueError) as error:
        raise Stop(found.out, f"a rotation that can be computed from positions alone ({error})") from error


def _lend_sizes(view: View, outputs: list[Handle], feeds: dict[Handle, np.ndarray], batch: int, tokens: int) -> None:
    """Adds the graph inputs that only lend their sizes: zero rows of past, ones for what counts tokens."""
    for value in view.needs(outputs, tuple(feeds)):
        shape = view.shape(value) or ()
        if len(shape) == 4:
            feeds[value] = np.zeros((batch, shape[1] or 1, 0, shape[3] or 1), np.float32)
        else:
            feeds[value] = np.ones((batch, tokens)[: len(shape)], np.int64)


def _rotary_dim(found: Rotation, x: np.ndarray, y: np.ndarray) -> int:
    changed = np.flatnonzero((x != y).any(axis=(0, 1, 2)))
    if not len(changed):
        raise Stop(found.out, "a rotation by the position; nothing turns", NO_ROPE)
    return int(changed[-1]) + 1 + (int(changed[-1]) + 1) % 2


def _turns(x: np.ndarray, y: np.ndarray, rotary_dim: int, interleaved: bool) -> np.ndarray:
    """Complex factor of every pair [B, H, S, R/2]."""

    def pairs(array: np.ndarray) -> np.ndarray:
        turned = array[..., :rotary_dim].astype(np.float64)
        if interleaved:
            return turned[..., 0::2] + 1j * turned[..., 1::2]
        return turned[..., : rotary_dim // 2] + 1j * turned[..., rotary_dim // 2 :]

    return pairs(y) / pairs(x)


def _candidates(
    view: View, found: Rotation, positions: Handle, at: np.ndarray, turn: np.ndarray
) -> Iterator[np.ndarray]:
    """Angles per position: the operand of the graph's Cos at position 1, for every pair; else what the turns say."""
    pairs = turn.shape[-1]
    angles = {view.inputs(v)[0] for v in ancestors(view, found.tables, through_shape=False) if view.op(v) == "cos"}
    for angle in angles:
        feeds = {positions: np.ones((1, 1), np.int64)}
        try:
            _lend_sizes(view, [angle], feeds, 1, 1)
            rates = view.evaluate([angle], feeds)[0].reshape(-1).astype(np.float64)
        except EvaluationError as error:
            raise Stop(found.out, f"angles that can be computed from positions alone ({error})", NOT_LINEAR) from error
        if rates.size == pairs:
            yield rates
        elif rates.size == 2 * pairs:  # one entry for each number of the head
            yield rates[:pairs]
            yield rates[::2]
    theta = np.angle(turn[1])  # position 1, at most half a turn
    for place in range(2, len(at)):  # the lever grows slowly, so whole turns are never mistaken
        whole = np.round((theta * at[place] - np.angle(turn[place])) / (2 * np.pi))
        theta = (np.angle(turn[place]) + 2 * np.pi * whole) / at[place]
    yield theta


def _scaling(view: View, found: Rotation, measured: float) -> float:
    """The factor on both tables: 1, or the constant of the graph that was measured, or what was measured."""
    factors = [factor(view, value) for value in ancestors(view, found.tables, through_shape=False)]
    told = [1.0, *(each[1] for each in factors if each is not None)]
    nearest = min(told, key=lambda number: abs(number - measured))
    return nearest if abs(nearest - measured) < 1e-5 * measured else measured


def _turns_by(theta: np.ndarray, turn: np.ndarray, scaling: float, at: np.ndarray) -> bool:
    """True if every pair turns by theta * position, to float32's rounding of the angle."""
    expected = scaling * np.exp(1j * at[:, None] * theta)
    allowed = scaling * (2e-6 + at[:, None] * np.abs(theta) * 2.0**-22)
    return bool((np.abs(turn - expected) <= allowed).all())


NO_ROPE = "layers without rotary positions are not converted: leave this layer as it is (--partial)"
