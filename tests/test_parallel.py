"""Pieces of linear algebra side by side."""

from __future__ import annotations

import os

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from mla_pass.parallel import each, usable_cores


def blas_threads(_: int = 0) -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_results_come_in_order() -> None:
    assert list(each(lambda n: float(np.eye(n).sum()), range(50))) == list(range(50))


def test_every_piece_has_one_blas_thread_and_the_others_come_back() -> None:
    before = blas_threads()
    assert before, "numpy names no BLAS"
    assert list(each(blas_threads, range(3))) == [{1}] * 3
    assert blas_threads() == before


def test_what_a_piece_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(each(lambda n: 1 // n, [1, 0]))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_only_the_cores_that_the_process_may_use_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cores() == len(allowed)
