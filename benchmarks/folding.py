"""Time and memory of folding one layer, by default of an 8B model: 4096 hidden, 32 heads, 8 kv heads of 128.

    python benchmarks/folding.py [--heads 32 --kv-heads 8 --head-dim 128 --hidden 4096 --budget 0.5]

The statistics are random with falling spectra; what is timed is everything between them and the matrices that the graph
gets: band layouts, the curve of loss against size, the split, the fold, and the products with the projections.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from mla_pass.budget import choose_splits
from mla_pass.config import MlaConfig
from mla_pass.fold import Geometry, fold, prepare_layouts
from mla_pass.onnx.choose import recipes
from mla_pass.site import Rope
from mla_pass.statistics import SiteStatistics
from mla_pass.storage import row_format


def statistics(width: int, seed: int = 0) -> SiteStatistics:
    """Random moments of a site that caches `width` numbers a token."""
    rng = np.random.default_rng(seed)
    roots = [rng.standard_normal((width, width)) * np.geomspace(1, 1e-3, width) for _ in range(2)]
    distance = 1 / (1 + np.arange(512.0))
    moments = [root @ root.T / width for root in roots]
    return SiteStatistics(32768, rng.standard_normal(width), *moments, distance / distance.sum())


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("hidden", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget", type=float, default=0.5)
    arguments = parser.parse_args()
    groups, size = arguments.kv_heads, arguments.head_dim
    theta = 5e5 ** (-np.arange(size // 2) / (size // 2))
    geometry = Geometry(groups, arguments.heads // groups, size, size, Rope(theta, size, False, 1.0, None))
    seen = statistics(geometry.width)
    projection = np.random.default_rng(1).standard_normal((geometry.width, arguments.hidden)).astype(np.float32)
    config = MlaConfig(budget=arguments.budget, metric_mix=0.1)
    rows = []

    def timed(what: str, since: float) -> float:
        now = time.perf_counter()
        rows.append((what, now - since))
        return now

    start = now = time.perf_counter()
    layouts = prepare_layouts(geometry, seen, recipes(config))
    now = timed(f"{len(layouts)} band layouts", now)
    (split,) = choose_splits([layouts], [row_format("float32", config)], config)
    now = timed("curve, split, layout", now)
    weights = fold(split.prepared, split.rank, split.rope_dims, split.key_rank)
    now = timed("fold", now)
    down = weights.encode @ projection
    now = timed("product with the projections", now)
    timed("in all", start)
    for what, seconds in rows:
        print(f"{what:32}{seconds:8.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'peak memory of the process':32}{peak:8.0f} MiB")
    print(f"rank {split.rank}, rope dims {split.rope_dims}, keys read {split.key_rank}; row projection {down.shape}")


if __name__ == "__main__":
    main()
