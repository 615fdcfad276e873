"""Rows of 8 bits: what they hold, how far off they are, and that torch says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mla_pass.pytorch import latent
from mla_pass.storage import LARGEST, SEGMENTS, decoded, encoded, rounded, segment_of, stored_bytes

ROWS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.integers(0, 23)),
    elements=st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-2),
)  # fmt: skip


@given(ROWS)
def test_every_number_is_within_half_a_step(x: np.ndarray) -> None:
    rows = encoded(x)
    n = x.shape[1]
    assert rows.dtype == np.int8 and rows.shape == (len(x), n + SEGMENTS)
    assert stored_bytes(n, "int8") == rows[:1].nbytes
    back = decoded(rows)
    for segment in range(SEGMENTS):
        mine = segment_of(n) == segment
        top = np.abs(x[:, mine]).max(1, initial=0.0)
        # Codes lie an eighth of an octave apart: a step is at most 2^(1/8) of the least that would do.
        half = top / LARGEST * 2 ** (1 / 8) / 2
        assert (np.abs(back - x)[:, mine] <= half[:, None] * (1 + 1e-6)).all()


def test_a_row_by_hand() -> None:
    x = np.array([[127.0, -63.4, 0.0, 0.0, 0.0, 254.0, 1e-9, 0.5e-9]])
    rows = encoded(x)
    np.testing.assert_array_equal(rows[0, :6], [127, -63, 0, 0, 0, 127])
    np.testing.assert_array_equal(rows[0, 8:], [0, -128, 8, -128])  # steps of 1, the least, 2, and the least again
    np.testing.assert_array_equal(decoded(rows)[0, :6], [127, -63, 0, 0, 0, 254])


def test_numbers_beyond_the_largest_step_are_clipped() -> None:
    x = np.array([[1e30, -1e30, 1.0, 1.0]])
    assert decoded(encoded(x))[0, 0] == pytest.approx(LARGEST * 2 ** (127 / 8))
    assert decoded(encoded(x))[0, 1] == -decoded(encoded(x))[0, 0]


@given(ROWS)
def test_torch_reads_and_writes_the_same(x: np.ndarray) -> None:
    ours, theirs, n = encoded(x), latent.encoded(torch.from_numpy(x)).numpy(), x.shape[1]
    # On the edge between two codes, or two whole numbers, rounding may take either.
    assert (np.abs(ours[:, n:].astype(int) - theirs[:, n:]) <= 1).all()
    step = 2.0 ** (np.maximum(ours, theirs)[:, n:].astype(np.float64) / 8)[:, segment_of(n)]
    assert (np.abs(decoded(theirs) - x) <= step * 0.5001).all()
    np.testing.assert_allclose(
        latent.decoded(torch.from_numpy(ours), torch.float64).numpy(), decoded(ours), rtol=1e-12
    )


def test_what_comes_back_from_a_cache() -> None:
    x = np.array([[1.0, 1 + 2.0**-9, 3.0, 0.0]])
    np.testing.assert_array_equal(rounded(x, "float16"), x)
    np.testing.assert_array_equal(rounded(x, "bfloat16"), [[1, 1, 3, 0]])
    np.testing.assert_array_equal(rounded(x, "int8"), decoded(encoded(x)))
