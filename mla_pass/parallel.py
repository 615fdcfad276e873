"""Independent pieces of linear algebra, one a layer, side by side on the machine's cores.

Each piece runs its own BLAS calls on one thread. Matrices here are of the cache's width, too small to gain by more; and
a BLAS whose threads wait for each other by spinning takes many times as long as soon as it has to share the cores with
its like, whether a piece beside it or another program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")
MOST_WORKERS = 4
"""Pieces at once: of an 8B-shaped layer each takes about half a gigabyte."""


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine has in a container, or under taskset."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def each(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` on every item, in order; what it raises is raised here."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(MOST_WORKERS, usable_cores())) as pool:
        yield from pool.map(work, items)
