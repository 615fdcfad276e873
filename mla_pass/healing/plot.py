"""The loss of a healing run as a picture, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

LEFT_OUT = 'The plot was left out: matplotlib is not installed (pip install "mla-pass[plot]").'


def plot_losses(
    path: Path, steps: Sequence[float], held_out: Sequence[tuple[int, float]], tokens_per_step: int
) -> str:
    """Write an SVG of every step's loss, and of held-out ones at (tokens seen, loss), in nats per token.

    Returns what the user should know: "" or why there is no plot.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return LEFT_OUT
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    seen = [number * tokens_per_step for number in range(len(steps))]
    axes.plot(seen, steps, color="0.75", linewidth=1, label="text of the step, before its update")
    axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held-out text")
    axes.set(xlabel="tokens", ylabel="KL from the original, nats per token", ylim=(0, None))
    axes.legend()
    FigureCanvasSVG(figure).print_svg(path)
    return ""
