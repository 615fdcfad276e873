"""Loss on a text and self-written text, against a numpy oracle (tests/latent_toy.py)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mla_pass.errors import MlaPassError
from mla_pass.onnx import perplexity as module
from mla_pass.onnx.perplexity import Perplexity, paired, perplexity, sample_tokens, token_losses
from mla_pass.onnx.session import ModelSession, session
from tests import latent_toy

WEIGHTS = latent_toy.weights(vocab=31, seed=4)
TEXT = np.random.default_rng(0).integers(0, 31, 100)


@pytest.fixture(scope="module", params=["shared", "growing"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    folder = latent_toy.save(tmp_path_factory.mktemp("toy"), WEIGHTS, shared=request.param == "shared")
    return session(folder, threads=1)


def oracle(window: np.ndarray) -> float:
    """Mean loss of tokens 2..n of a window."""
    logits = latent_toy.reference(WEIGHTS, window)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return float(np.mean([-math.log(p[t, window[t + 1]]) for t in range(len(window) - 1)]))


class TestPerplexity:
    @pytest.mark.parametrize("rows_at_once", [None, 1, 7])
    def test_windows_against_the_oracle(
        self, toy: ModelSession, monkeypatch: pytest.MonkeyPatch, rows_at_once: int | None
    ) -> None:
        if rows_at_once:
            monkeypatch.setattr(module, "LOGITS_BYTES", rows_at_once * 4 * 31)
        found = perplexity(toy, TEXT, windows=4, context=24)
        losses = [oracle(TEXT[i * 24 : (i + 1) * 24]) for i in range(4)]
        np.testing.assert_allclose(found.per_window, losses, rtol=1e-5)
        assert found.nll == pytest.approx(np.mean(losses), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        assert found.stderr == pytest.approx(np.std(losses, ddof=1) / 2, rel=1e-4)
        assert found.tokens == 4 * 23

    def test_bos_stands_before_every_window(self, toy: ModelSession) -> None:
        found = perplexity(toy, TEXT.tolist(), windows=2, context=24, bos=3)
        losses = [oracle(np.append(3, TEXT[i * 23 : (i + 1) * 23])) for i in range(2)]
        np.testing.assert_allclose(found.per_window, losses, rtol=1e-5)
        assert found.tokens == 2 * 23

    def test_one_window_has_no_standard_error(self, toy: ModelSession) -> None:
        assert perplexity(toy, TEXT, windows=1, context=24).stderr is None

    def test_too_short(self, toy: ModelSession) -> None:
        with pytest.raises(MlaPassError, match="the text has 100 tokens; 5 windows of 24 need 120"):
            perplexity(toy, TEXT, windows=5, context=24)
        assert perplexity(toy, TEXT, windows=4, context=25).tokens == 96
        assert perplexity(toy, TEXT, windows=4, context=26, bos=1).tokens == 100
        with pytest.raises(MlaPassError, match="at least 1 window of 2 tokens"):
            perplexity(toy, TEXT, windows=1, context=1)

    def test_paired(self) -> None:
        a = Perplexity(2.0, 0.1, 30, (1.0, 2.0, 3.0))
        b = Perplexity(2.2, 0.1, 30, (1.1, 2.4, 3.1))
        excess, stderr = paired(a, b)
        assert excess == pytest.approx(0.2)
        assert stderr == pytest.approx(math.sqrt(0.03) / math.sqrt(3))  # differences 0.1, 0.4, 0.1
        with pytest.raises(MlaPassError, match="expected the same windows"):
            paired(a, Perplexity(2.0, 0.1, 20, (1.0, 2.0)))


class TestTokenLosses:
    def test_far_from_zero(self) -> None:
        logits = np.array([[1e4, 1e4 - 1, -1e4], [-3e38, 0.0, 0.0]], np.float32)
        expected = [1 + math.log(1 + math.exp(-1)), math.log(2)]
        np.testing.assert_allclose(token_losses(logits, np.array([1, 2])), expected, rtol=1e-12)

    def test_many_rows(self) -> None:
        rng = np.random.default_rng(1)
        logits, targets = rng.standard_normal((200, 9)), rng.integers(0, 9, 200)
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(token_losses(logits, targets), -np.log(p[np.arange(200), targets]), rtol=1e-12)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_not_finite(self, bad: float) -> None:
        with pytest.raises(MlaPassError, match="not finite"):
            token_losses(np.array([[0.0, bad]], np.float32), np.array([0]))


class TestSampleTokens:
    def test_rows_start_with_bos_and_repeat(self, toy: ModelSession) -> None:
        (toy.folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 9, "eos_token_id": 2}))
        heard: list[tuple[int, int]] = []
        rows = sample_tokens(toy, 85, length=20, batch=2, seed=1, progress=lambda *told: heard.append(told))
        assert heard[-1] == (rows.size, rows.size) and heard == sorted(heard)
        assert rows.shape == (5, 20)
        assert rows.dtype == np.int64
        assert (rows[:, 0] == 9).all()
        np.testing.assert_array_equal(sample_tokens(toy, 85, length=20, batch=2, seed=1), rows)
        assert (sample_tokens(toy, 85, length=20, batch=2, seed=2) != rows).any()
        assert len({tuple(row) for row in rows}) == 5

    def test_it_writes_what_the_model_predicts(self, toy: ModelSession) -> None:
        (toy.folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 9}))
        rows = sample_tokens(toy, 4000 * 3, length=3, batch=4000)
        p = np.exp(latent_toy.reference(WEIGHTS, np.array([9]))[0] / 1.0)
        expected = p / p.sum()
        found = np.bincount(rows[:, 1], minlength=31) / 4000
        np.testing.assert_allclose(found, expected, atol=5 * math.sqrt(0.25 / 4000))
        best = int(found.argmax())
        after = np.exp(latent_toy.reference(WEIGHTS, np.array([9, best]))[1])
        third = rows[rows[:, 1] == best, 2]
        np.testing.assert_allclose(
            np.bincount(third, minlength=31) / third.size, after / after.sum(), atol=5 * math.sqrt(0.25 / third.size)
        )

    def test_without_bos(self, tmp_path: Path) -> None:
        opened = session(latent_toy.save(tmp_path, WEIGHTS), threads=1)
        assert len(set(sample_tokens(opened, 64, length=2)[:, 0])) > 8  # any token opens a text
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
        assert set(sample_tokens(opened, 64, length=2)[:, 0]) == {7}

    def test_bad_counts(self, toy: ModelSession) -> None:
        with pytest.raises(MlaPassError, match="expected at least 1, 2 and 1"):
            sample_tokens(toy, 0)
        with pytest.raises(MlaPassError, match="rows of 5000 tokens need 4999 positions; the model has 4096"):
            sample_tokens(toy, 5000, length=5000)
