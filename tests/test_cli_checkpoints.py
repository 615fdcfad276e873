"""mla-pass convert of Hugging Face checkpoints: what is written, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from mla_pass.cli import main
from tests.checkpoints import load, source, text

CALIBRATION = ["--calibrate-tokens", "1024", "--calibrate-self", "0", "--metric", "output"]


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    np.save(tmp_path / "ids.npy", text())
    return ["--calibrate", str(tmp_path / "ids.npy"), *CALIBRATION]


def test_a_checkpoint_and_within_it_onnx(tmp_path: Path, ids: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(source("llama")), str(out), "--format", "both", "--json", *ids]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    assert type(load(out)).__name__ == "LatentLlamaForCausalLM"
    assert {"model.onnx", "mla_pass.json"} <= {path.name for path in (out / "onnx").iterdir()}


def test_a_stock_checkpoint(tmp_path: Path, ids: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out, stats = tmp_path / "out", tmp_path / "stats.safetensors"
    asked = ["--format", "deepseek_v3", "--stats", str(stats), *ids]
    assert main(["convert", str(source("llama")), str(out), *asked]) == 0
    assert "deepseek_v3, float32, 32 numbers a token and layer in place of 64" in capsys.readouterr().out
    assert type(load(out)).__name__ == "DeepseekV3ForCausalLM"
    assert stats.is_file()


def test_wrong_requests_are_refused(tmp_path: Path, ids: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["convert", str(tmp_path), out, "--format", "hf"]) == 1
    assert "is no Hugging Face checkpoint; --format hf and --dtype are for one" in capsys.readouterr().err
    assert main(["convert", str(source("qwen3")), out, "--format", "deepseek_v3", *ids]) == 1
    assert "norm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(source("llama")), out, "--format", "deepseek_v3", "--dry-run"])
    assert not (tmp_path / "out").exists()
