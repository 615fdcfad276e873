"""Calibration text as windows: cut from a stream, mixed with what the model writes itself, some held out.

A conversion forgets what its calibration text does not show, and one user's text is one kind of text. So the windows
are shared between the text given and text that the model writes by itself, which is of all kinds that it learnt from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mla_pass.errors import MlaPassError

HELD_OUT = 8
"""Windows that no moment sees, to choose and to check on; fewer where there are few in all."""


def hold_out(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The windows to learn from and those to hold out. Raises MlaPassError when there are fewer than two."""
    if len(windows) < 2:
        raise MlaPassError(
            f"calibration needs at least 2 windows of text, {2 * windows.shape[1]} tokens; got {windows.size}"
        )
    kept = held_out_count(len(windows))
    return windows[:-kept], windows[-kept:]


def cut_windows(ids: np.ndarray, context: int, tokens: int, needed: int, origin: str | Path) -> np.ndarray:
    """The first `tokens` of a stream of ids as windows [n, context], one more than asked so that one can be held out.

    Raises MlaPassError when the text has fewer than `needed` tokens or does not fill two windows.
    """
    context = min(context, len(ids) // 2)
    count = min(len(ids) // max(context, 1), -(-tokens // max(context, 1)) + 1)
    if context < 2 or (count - 1) * context < needed:
        raise MlaPassError(
            f"calibration text too short: {origin} has {len(ids)} tokens, but this model needs at least "
            f"{needed + max(context, 2)}; give a longer text, or let the model write it: calibrate on 'self'"
        )
    return ids[: count * context].reshape(count, context)


def mixed(given: np.ndarray, written: np.ndarray) -> tuple[np.ndarray, int]:
    """Windows of the text given [g, T] and of the model's own [w, T] in one order [g + w, T], and how many of those
    that `hold_out` takes are the model's own: they come last.

    Either kind is held out in proportion, and alternates with the other before.
    """
    kept = held_out_count(len(given) + len(written))
    own = round(kept * len(written) / (len(given) + len(written)))
    tails = given[len(given) - (kept - own) :], written[len(written) - own :]
    heads = given[: len(given) - len(tails[0])], written[: len(written) - len(tails[1])]
    place = np.concatenate([(np.arange(len(head)) + 0.5) / max(len(head), 1) for head in heads])
    return np.concatenate([np.concatenate(heads)[np.argsort(place, kind="stable")], *tails]), own


def held_out_count(windows: int) -> int:
    """How many of so many windows are held out."""
    return max(1, min(HELD_OUT, windows // 8))
