"""Loss against cache size, from the JSON that quality.py prints.

    python benchmarks/quality.py MODEL --text wiki.test.raw --json > quality.json
    python benchmarks/plot.py quality.json --out quality.svg

Reads a list of rows with `model`, `cache_bytes_per_token`, `excess`, `stderr` (or null) and, beside our own method,
`method`. The original, whose excess is nothing by definition, gives the size that a vertical line marks. Rows without
any excess (full size) have no place on a logarithmic scale and are left out; so are ablations, which are no curve.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mla_pass

OURS = "mla_pass"
COLOURS = ("#0b6e4f", "#c8553d", "#5b5f97", "#e09f3e", "#7a7a7a")  # told apart by colour-blind readers as well
MARKERS = "osD^v"


@dataclass(frozen=True)
class Point:
    """One method at one size."""

    bytes: float
    excess: float
    stderr: float


@dataclass(frozen=True)
class Curves:
    """All methods, each by size, and the size of the original cache."""

    methods: dict[str, list[Point]]
    original: float | None


def read(path: Path) -> Curves:
    """The curves of a JSON file. Raises MlaPassError when it holds anything else, or nothing to draw."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise mla_pass.MlaPassError(f"{path} cannot be read as JSON: {error}") from error
    needed = {"model", "cache_bytes_per_token", "excess"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise mla_pass.MlaPassError(
            f"{path} is no list of rows with {', '.join(sorted(needed))}; expected what quality.py --json prints"
        )
    originals = [row for row in rows if row["model"] == "original"]
    methods: dict[str, list[Point]] = {}
    for row in rows:
        method = row.get("method", OURS)
        if row["model"] != "original" and method != "ablation" and row["excess"] > 0:
            point = Point(row["cache_bytes_per_token"], row["excess"], row.get("stderr") or 0.0)
            methods.setdefault(method, []).append(point)
    if not methods:
        raise mla_pass.MlaPassError(f"{path} has no row whose loss exceeds the original's; there is nothing to draw")
    by_size = {name: sorted(points, key=lambda point: point.bytes) for name, points in methods.items()}
    return Curves(by_size, originals[0]["cache_bytes_per_token"] if originals else None)


def draw(curves: Curves, out: Path, title: str) -> None:
    """Write the figure; the name's ending (.svg, .png, .pdf) is its format."""
    figures = _matplotlib()
    if out.suffix[1:] not in figures.figure().canvas.get_supported_filetypes():
        raise mla_pass.MlaPassError(f"{out} ends in no format that matplotlib writes; expected .svg, .png or .pdf")
    figures.rcParams.update({"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none"})
    figure, axes = figures.subplots(figsize=(6.4, 4.2), layout="constrained")
    ordered = sorted(curves.methods, key=lambda name: (not name.startswith(OURS), name))
    for index, name in enumerate(ordered):
        _curve(axes, name, curves.methods[name], index)
    axes.set_yscale("log")
    least = min(point.excess for points in curves.methods.values() for point in points)
    axes.set_ylim(bottom=least / 3)  # bars that reach zero leave the figure
    axes.set_xlim(left=0)
    if curves.original is not None:
        axes.axvline(curves.original, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate("original", (curves.original, 1), xycoords=("data", "axes fraction"), xytext=(-4, -4),
                      textcoords="offset points", ha="right", va="top", color="#777777")  # fmt: skip
        axes.set_xlim(0, curves.original * 1.03)
    axes.set_xlabel("cache, bytes per token")
    axes.set_ylabel("excess loss, nats per token")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.grid(True, which="minor", axis="y", color="#f3f3f3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    try:
        figure.savefig(out, dpi=200)
    except OSError as error:
        raise mla_pass.MlaPassError(f"{out} cannot be written: {error}") from error
    finally:
        figures.close("all")


def _curve(axes: Any, name: str, points: list[Point], index: int) -> None:
    """A line with error bars; ours is drawn heavier and on top."""
    ours = name.startswith(OURS)  # any type of the cache
    axes.errorbar(
        [point.bytes for point in points],
        [point.excess for point in points],
        # a bar that reaches zero would reach the bottom of a logarithmic scale
        yerr=[[min(p.stderr, 0.95 * p.excess) for p in points], [p.stderr for p in points]],
        label=name,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=6 if ours else 5,
        linewidth=2.2 if ours else 1.3,
        elinewidth=1,
        capsize=2.5,
        zorder=3 if ours else 2,
    )


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise mla_pass.MlaPassError(
            "drawing needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")  # no display is needed to write a file
    from matplotlib import pyplot

    return pyplot


def main() -> int:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what quality.py --json printed")
    parser.add_argument("--out", type=Path, default=Path("quality.svg"))
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    draw(read(arguments.json), arguments.out, arguments.title)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except mla_pass.MlaPassError as error:
        sys.exit(f"plot: {error}")
