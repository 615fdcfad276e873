"""Rows of 8 bits: what they hold, how far off they are, and that torch says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mla_pass.pytorch import latent
from mla_pass.storage import CODED, SEGMENTS, decoded, encoded, float8_numbers, rounded, segment_of, stored_bytes

ROWS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.integers(0, 23)),
    elements=st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-2),
)  # fmt: skip


@pytest.mark.parametrize("dtype", CODED)
@given(ROWS)
def test_every_number_is_within_half_a_step(dtype: str, x: np.ndarray) -> None:
    rows = encoded(x, dtype)
    n = x.shape[1]
    assert rows.dtype == CODED[dtype].element and rows.shape == (len(x), n + SEGMENTS)
    assert stored_bytes(n, dtype) == rows[:1].nbytes
    back = decoded(rows)
    for segment in range(SEGMENTS):
        mine = segment_of(n) == segment
        top = np.abs(x[:, mine]).max(1, initial=0.0)[:, None]
        # Codes lie an eighth of an octave apart: a scale is at most 2^(1/8) of the least that would do. Whole numbers
        # have one step; the step of a float8 is an eighth of its power of two, or 2^-9 below the least of them.
        scale = top / CODED[dtype].largest * 2 ** (1 / 8)
        half = scale / 2 if dtype == "int8" else np.maximum(np.abs(x[:, mine]) / 16, scale * 2.0**-10)
        assert (np.abs(back - x)[:, mine] <= half * (1 + 1e-6)).all()


def test_a_row_by_hand() -> None:
    x = np.array([[127.0, -63.4, 0.0, 0.0, 0.0, 254.0, 1e-9, 0.5e-9]])
    rows = encoded(x, "int8")
    np.testing.assert_array_equal(rows[0, :6], [127, -63, 0, 0, 0, 127])
    np.testing.assert_array_equal(rows[0, 8:], [0, -128, 8, -128])  # steps of 1, the least, 2, and the least again
    np.testing.assert_array_equal(decoded(rows)[0, :6], [127, -63, 0, 0, 0, 254])


def test_a_row_of_float8_by_hand() -> None:
    x = np.array([[448.0, -1.0, 896.0, 2.25 * 2**-8, 0.0, 0.0, 17.0, 448.0]])
    rows = encoded(x, "float8")
    # 0x7e is 448, the largest; one is 0 0111 000; halved, 2.25 * 2^-8 is 2.25 of the smallest steps; 17 is nearest 16.
    np.testing.assert_array_equal(rows[0, :8], [0x7E, 0xB8, 0x7E, 0x02, 0, 0, 0x58, 0x7E])
    np.testing.assert_array_equal(rows[0, 8:], [128, 136, 0, 128])
    np.testing.assert_array_equal(decoded(rows)[0], [448, -1, 896, 2 * 2**-8, 0, 0, 16, 448])


def test_the_numbers_of_a_float8() -> None:
    numbers = float8_numbers()
    assert np.isnan(numbers[[0x7F, 0xFF]]).all() and np.isnan(numbers).sum() == 2
    for bits in range(127):  # by the format's own words: (1 + m / 8) 2^(e - 7), and m / 8 2^-6 where e is 0
        e, m = bits >> 3, bits & 7
        assert numbers[bits] == -numbers[bits + 128] == ((1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6)


@pytest.mark.parametrize("dtype", CODED)
def test_numbers_beyond_the_largest_step_are_clipped(dtype: str) -> None:
    x = np.array([[1e30, -1e30, 1.0, 1.0]])
    found = decoded(encoded(x, dtype))[0]
    assert found[0] == pytest.approx(CODED[dtype].largest * 2 ** (127 / 8))
    assert found[1] == -found[0]


@pytest.mark.parametrize("dtype", CODED)
@given(ROWS)
def test_torch_reads_and_writes_the_same(dtype: str, x: np.ndarray) -> None:
    element, n = getattr(torch, CODED[dtype].element.name), x.shape[1]
    ours, theirs = encoded(x, dtype), latent.encoded(torch.from_numpy(x), element).numpy()
    # On the edge between two codes, or two numbers, rounding may take either.
    codes = np.maximum(ours, theirs)[:, n:].astype(np.float64) - CODED[dtype].zero
    assert (np.abs(ours[:, n:].astype(int) - theirs[:, n:]) <= 1).all()
    scale = 2.0 ** (codes / 8)[:, segment_of(n)]
    half = scale / 2 if dtype == "int8" else np.maximum(np.abs(x) / 16, scale * 2.0**-10)
    assert (np.abs(decoded(theirs) - x) <= half * 1.0002).all()
    np.testing.assert_allclose(
        latent.decoded(torch.from_numpy(ours), torch.float64).numpy(), decoded(ours), rtol=1e-12
    )


def test_what_comes_back_from_a_cache() -> None:
    x = np.array([[1.0, 1 + 2.0**-9, 3.0, 0.0]])
    np.testing.assert_array_equal(rounded(x, "float16"), x)
    np.testing.assert_array_equal(rounded(x, "bfloat16"), [[1, 1, 3, 0]])
    for dtype in CODED:
        np.testing.assert_array_equal(rounded(x, dtype), decoded(encoded(x, dtype)))
