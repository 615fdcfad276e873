"""Latents laid so that decoded keys read few of their columns."""

from __future__ import annotations

import numpy as np
import pytest

from mla_pass.fold.staggered import stagger


@pytest.mark.parametrize(
    ("groups", "pairs", "rest", "width"), [(3, 4, 5, 40), (2, 6, 0, 11), (1, 1, 3, 7), (2, 3, 1, 12)]
)
def test_pairs_read_their_own_columns_and_those_before(groups: int, pairs: int, rest: int, width: int) -> None:
    rng = np.random.default_rng(groups)
    key_up = rng.standard_normal((groups, 2 * pairs + rest, width))
    turn, staggered = stagger(key_up, pairs)
    np.testing.assert_allclose(turn.T @ turn, np.eye(width), atol=1e-12)
    latent = rng.standard_normal(width)
    np.testing.assert_allclose(staggered @ (turn.T @ latent), key_up @ latent, atol=1e-12)
    for pair in range(pairs):
        read = min(2 * groups * (pair + 1), width)
        assert (staggered[:, [pair, pairs + pair], read:] == 0).all()
        # Fewer columns would not hold so many independent keys.
        so_far = staggered[:, [*range(pair + 1), *range(pairs, pairs + pair + 1)], :read]
        assert np.linalg.matrix_rank(so_far.reshape(-1, read)) == read


def test_keys_that_depend_on_each_other() -> None:
    # Two groups with one key: the decoder's rows are equal in twos, and what has no row left is any orthogonal rest.
    one = np.random.default_rng(0).standard_normal((1, 6, 10))
    turn, staggered = stagger(np.concatenate([one, one]), 3)
    np.testing.assert_allclose(staggered @ turn.T, np.concatenate([one, one]), atol=1e-12)
    assert (staggered[:, [0, 3], 4:] == 0).all()
