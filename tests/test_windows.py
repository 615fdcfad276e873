"""Calibration text: cut, mixed with the model's own, and held out."""

from __future__ import annotations

import numpy as np
import pytest

from mla_pass import MlaConfig, MlaPassError, convert
from mla_pass.onnx.passes import MlaPass
from mla_pass.windows import HELD_OUT, cut_windows, hold_out, mixed
from tests.families import exported


def test_windows_are_cut_and_short_text_is_named() -> None:
    windows = cut_windows(np.arange(1000), 100, 500, 200, "text")
    assert windows.shape == (6, 100) and (windows.reshape(-1) == np.arange(600)).all()
    assert cut_windows(np.arange(90), 100, 500, 30, "text").shape == (2, 45)
    with pytest.raises(MlaPassError, match="text has 250 tokens, but this model needs at least 400"):
        cut_windows(np.arange(250), 100, 500, 300, "text")


def rows(first: int, count: int) -> np.ndarray:
    """Windows of three equal numbers, counted from `first`."""
    return np.repeat(np.arange(first, first + count), 3).reshape(count, 3)


@pytest.mark.parametrize(("given", "written"), [(40, 40), (60, 20), (1, 79), (80, 0), (0, 80), (5, 4), (1, 1)])
def test_mixed_windows_are_all_there_and_held_out_in_proportion(given: int, written: int) -> None:
    windows, own = mixed(rows(0, given), rows(1000, written))
    assert np.array_equal(np.sort(windows[:, 0]), np.append(rows(0, given)[:, 0], rows(1000, written)[:, 0]))
    seen, held_out = hold_out(windows)
    assert len(held_out) == max(1, min(HELD_OUT, (given + written) // 8))
    assert (held_out[:, 0] >= 1000).tolist() == [False] * (len(held_out) - own) + [True] * own
    assert own == round(len(held_out) * written / (given + written))
    # Any stretch of what is seen has of each kind what it should have, give or take one.
    share, wrote = (written - own) / len(seen), np.cumsum(seen[:, 0] >= 1000)
    assert np.abs(wrote - share * np.arange(1, len(seen) + 1)).max() <= 1


def test_a_text_given_is_joined_by_the_models_own() -> None:
    source, ids = exported("llama", 18, "float32"), np.full(4000, 5)  # nobody writes like that
    config = MlaConfig(calibrate_tokens=1600, calibrate_context=40, metric="output", metric_mix=0.1)
    found = convert(source, config, calibrate=ids)
    calibration = found.calibration
    kinds = [(window == 5).all() for window in (*calibration.seen, *calibration.held_out)]
    assert calibration.written == 3 and kinds == [True, False] * 3 + [True] * 3 + [False] * 3
    assert any("6 held-out windows of 40 tokens, 3 of them written by the model" in n for n in found.report.notes)
    alone = convert(source, MlaConfig(**{**vars(config), "calibrate_self": 0.0}), calibrate=ids).calibration
    assert alone.written == 0 and (alone.seen == 5).all() and (alone.held_out == 5).all()


def test_a_bfloat16_model_is_told_to_be_calibrated_on_the_text_alone() -> None:
    config = MlaConfig(calibrate_tokens=800, calibrate_context=40, metric="output", metric_mix=0.1)
    found = convert(exported("llama", 18, "bfloat16"), config, calibrate=np.random.default_rng(0).integers(3, 97, 4000))
    assert found.calibration.written == 0
    assert any("Calibrated on the given text alone" in note for note in found.report.notes)


def test_a_model_that_cannot_write_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def mute(*arguments: object, **options: object) -> None:
        raise MlaPassError("no words")

    monkeypatch.setattr("mla_pass.onnx.perplexity.sample_tokens", mute)
    with pytest.raises(MlaPassError, match="no words; or calibrate on the given text alone, with calibrate_self 0"):
        convert(exported("llama", 18, "float32"), MlaConfig(calibrate_context=40), calibrate=np.full(20000, 5))
    with pytest.raises(MlaPassError, match="calibrate_self must lie in"):
        MlaConfig(calibrate_self=1.5)


def test_a_model_that_writes_all_of_the_text_is_asked_for_all_of_it() -> None:
    """Also where it caches so many numbers a token that calibration needs more text than was asked for."""
    for needed in (100, 9000):
        config = MlaConfig(calibrate_tokens=1024, calibrate_context=64)
        asked: list[int] = []

        def write(count: int, asked: list[int] = asked) -> np.ndarray:
            asked.append(count)
            return np.arange(count)

        windows, own = MlaPass(config, write).windows(needed, share=0.5)
        assert own == 0 and windows.shape[1] == 64
        assert windows.size >= asked[0] - 64 >= max(needed, 1024)
