"""Choices that are measured: the mix, the smallest cache, and what is told about them; and statistics on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mla_pass
from mla_pass import MlaConfig, MlaPassError
from mla_pass.onnx import choose, passes, probe
from mla_pass.onnx.choose import Chooser
from mla_pass.onnx.io import load_model
from mla_pass.onnx.perplexity import paired, perplexity
from mla_pass.onnx.probe import Excess, Probe
from mla_pass.patterns import find_sites
from mla_pass.statistics import Calibration
from tests.families import VOCAB, exported

SMALL = {"calibrate_tokens": 512, "calibrate_context": 64}


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(7).integers(3, VOCAB, 2000)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    # On text that the model writes itself the excess is a divergence, and cannot be a lucky gain.
    config = MlaConfig(**{**SMALL, "calibrate_tokens": 1024}, metric="output", metric_mix=0.1)
    return mla_pass.convert(exported("llama"), config).calibration


@pytest.fixture
def chooser(calibration: Calibration) -> Chooser:
    model = load_model(exported("llama"))
    return Chooser(model, find_sites(model), calibration, 256, lambda stage, done, total: None)


def test_excess_is_what_the_saved_model_loses(calibration: Calibration, chooser: Chooser, tmp_path: Path) -> None:
    config = MlaConfig(budget=0.5, metric_mix=0.1)
    told = chooser.excess(config)
    saved = mla_pass.convert(exported("llama"), config, calibration=calibration).save(tmp_path / "out")
    windows, length = calibration.held_out.shape
    sessions = [mla_pass.session(folder) for folder in (exported("llama"), saved)]
    mean, stderr = paired(
        *(perplexity(s, calibration.held_out.reshape(-1), windows=windows, context=length) for s in sessions)
    )
    assert told.mean == pytest.approx(mean, abs=1e-5)
    assert (told.stderr is None) == (stderr is None)


def test_the_mix_that_loses_least_is_taken(chooser: Chooser) -> None:
    config = MlaConfig(budget=0.5)
    settled = chooser.settle(config)
    losses = [chooser.excess(replace(config, metric_mix=mix)).mean for mix in choose.MIXES]
    assert settled.config.metric_mix is not None and settled.excess is not None
    place = choose.MIXES.index(settled.config.metric_mix)
    assert settled.excess.mean == losses[place] == min(losses[max(place - 1, 0) : place + 2])
    assert losses[place] <= losses[choose.MIXES.index(choose.USUAL_MIX)]
    assert chooser.settle(replace(config, metric_mix=0.7)).config.metric_mix == 0.7


@pytest.mark.parametrize("best", choose.MIXES)
def test_the_bottom_of_a_valley_of_mixes_is_found(
    chooser: Chooser, monkeypatch: pytest.MonkeyPatch, best: float
) -> None:
    tried = []

    def excess(config: MlaConfig) -> Excess:
        assert config.metric_mix is not None
        tried.append(config.metric_mix)
        return Excess(abs(np.log(config.metric_mix / best)), None)

    monkeypatch.setattr(chooser, "excess", excess)
    assert chooser.best_mix(MlaConfig(budget=0.5)).metric_mix == best
    assert len(tried) == len(set(tried))  # each is a conversion and a run


def test_the_smallest_cache_within_a_loss(chooser: Chooser) -> None:
    losses = {}
    for budget in choose.BUDGETS[5:]:
        losses[budget] = chooser.excess(MlaConfig(budget=budget, metric_mix=0.1)).mean
    limit = losses[0.5] * 1.0001
    settled = chooser.settle(MlaConfig(max_loss=limit, metric_mix=0.1))
    assert settled.config.max_loss is None
    assert losses[settled.config.budget] <= limit
    assert losses[settled.config.budget - 1 / 16] > limit  # one step smaller is too small


def test_the_type_that_loses_least_is_taken(chooser: Chooser) -> None:
    config = MlaConfig(budget=0.5, metric_mix=0.1, cache_dtype="auto")
    losses = {dtype: chooser.excess(replace(config, cache_dtype=dtype)).mean for dtype in choose.CACHE_DTYPES}
    assert len(set(losses.values())) == 2
    settled = chooser.settle(config)
    assert settled.config.cache_dtype == min(losses, key=lambda dtype: losses[dtype])
    assert settled.excess is not None and settled.excess.mean == min(losses.values())


def test_the_type_that_takes_fewest_bytes_is_taken(chooser: Chooser, monkeypatch: pytest.MonkeyPatch) -> None:
    def excess(config: MlaConfig) -> choose.Excess:
        return choose.Excess(1 / config.budget / (4 if config.cache_dtype == "int8" else 1), None)

    monkeypatch.setattr(chooser, "excess", excess)
    found = chooser.best_dtype(MlaConfig(max_loss=1.001, metric_mix=0.1, cache_dtype="auto"))
    assert (found.cache_dtype, found.budget) == ("int8", 0.25)
    # Out of reach of the model's own type, within that of 8 bits, and of neither.
    found = chooser.best_dtype(MlaConfig(max_loss=0.5, metric_mix=0.1, cache_dtype="auto"))
    assert (found.cache_dtype, found.budget) == ("int8", 0.5)
    with pytest.raises(MlaPassError, match="no cache keeps the loss within 0.1 "):
        chooser.best_dtype(MlaConfig(max_loss=0.1, metric_mix=0.1, cache_dtype="auto"))


def test_a_loss_that_no_cache_keeps_tells_the_best(chooser: Chooser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "excess", lambda self, model: choose.Excess(0.25, None))
    with pytest.raises(MlaPassError, match="no cache keeps the loss within 0.1.*reaches 0.2500"):
        chooser.settle(MlaConfig(max_loss=0.1))


def test_doubtful_text_is_told(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = load_model(exported("llama")), MlaConfig(budget=0.5, metric_mix=0.1)

    def settled(held_out: np.ndarray) -> choose.Settled:
        changed = replace(calibration, held_out=held_out)
        return Chooser(model, find_sites(model), changed, 256, lambda stage, done, total: None).settle(config)

    # What tiny random models lose on seen and on unseen text is noise, and differs between machines: it is given.
    with monkeypatch.context() as alike:
        alike.setattr(Probe, "excess", lambda self, converted: choose.Excess(0.05, 0.01))
        assert settled(calibration.held_out).notes == ()
    # Random tokens, in place of what the model writes itself.
    monkeypatch.setattr(choose, "UNLIKELY_LOSS", 3.0)
    foreign = np.random.default_rng(3).integers(3, VOCAB, calibration.held_out.shape)
    assert any("is it in a language" in note for note in settled(foreign).notes)
    losses = iter([choose.Excess(0.5, 0.01), choose.Excess(0.05, 0.01)])
    monkeypatch.setattr(Probe, "excess", lambda self, converted: next(losses))
    assert any("too short or too uneven" in note for note in settled(calibration.held_out).notes)


def test_without_held_out_text_the_usual_mix_is_said(calibration: Calibration) -> None:
    model = load_model(exported("llama"))
    blind = replace(calibration, held_out=calibration.held_out[:0])
    chooser = Chooser(model, find_sites(model), blind, 256, lambda stage, done, total: None)
    settled = chooser.settle(MlaConfig(budget=0.5))
    assert settled.config.metric_mix == choose.USUAL_MIX and settled.excess is None
    assert "usual" in settled.notes[0]
    with pytest.raises(MlaPassError, match="held-out text"):
        chooser.settle(MlaConfig(max_loss=0.1))
    with pytest.raises(MlaPassError, match="cache_dtype auto needs .* give a type instead"):
        chooser.settle(MlaConfig(cache_dtype="auto"))


def test_what_cannot_be_tried_out_is_known_before(chooser: Chooser, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.can_probe(chooser.model, chooser.sites)
    assert not probe.can_probe(chooser.model, [replace(site, dtype="bfloat16") for site in chooser.sites])
    monkeypatch.setattr(probe, "LARGEST_BYTES", 10_000)  # less than two layers' projections take
    settled = chooser.settle(MlaConfig(budget=0.5, layers="even"))
    assert settled.config.metric_mix == choose.USUAL_MIX and settled.excess is None
    assert chooser.settle(MlaConfig(budget=0.5, metric_mix=0.0)).config.metric_mix == 0.0


def test_statistics_survive_the_disk(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "s.safetensors")
    back = Calibration.load(tmp_path / "s.safetensors")
    assert back.metric == "output" and np.array_equal(back.held_out, calibration.held_out)
    for ours, theirs in zip(back.sites, calibration.sites, strict=True):
        assert ours.tokens == theirs.tokens
        for name in ("mean", "covariance", "metric", "distance"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert ours.sample is not None and theirs.sample is not None
        np.testing.assert_array_equal(ours.sample.query, theirs.sample.query)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_statistics_of_another_model_or_file_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(MlaPassError, match="calibrate this model anew"):
        mla_pass.convert(exported("llama_mha"), MlaConfig(), calibration=calibration)
    with pytest.raises(MlaPassError, match="cannot read calibration statistics"):
        Calibration.load(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    calibration.save(cut)
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises(MlaPassError, match="cannot read calibration statistics"):
        Calibration.load(cut)
    with pytest.raises(MlaPassError, match="cannot write"):
        calibration.save(tmp_path / "no" / "such.safetensors")


def test_fisher_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "find_spec", lambda name: None)
    assert passes.chosen_metric(MlaConfig()) == "output"
    with pytest.raises(MlaPassError, match="needs torch"):
        passes.chosen_metric(MlaConfig(metric="fisher"))


def test_fisher_conversion_tells_its_loss(ids: np.ndarray) -> None:
    result = mla_pass.convert(exported("llama"), MlaConfig(**SMALL, budget=0.75, metric="fisher"), calibrate=ids)
    assert result.calibration.metric == "fisher" and result.config.metric_mix in choose.MIXES
    assert any("Excess loss on" in note for note in result.report.notes)
    exact = mla_pass.convert(exported("llama"), MlaConfig(budget=1.0), calibration=result.calibration)
    assert max(layer.output_error or 0.0 for layer in exact.report.layers) < 1e-9
