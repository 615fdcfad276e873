"""The memory table of docs/guide.md: computed anew, held against transformers' own configurations and live tensors."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory
from mla_pass.storage import encoded
from mla_retrofit.sizes import read_shape

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"
SHAPES = {model.shape.name: model.shape for model in memory.MODELS}


def test_the_guide_prints_what_is_computed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["memory.py"])
    memory.main()
    assert f"\n\n{capsys.readouterr().out}\n" in GUIDE.read_text()


def test_known_sizes() -> None:
    llama = SHAPES["LLaMA-3-8B"]
    assert llama.layers * llama.width == 64 * 1024
    assert memory.cells(memory.MODELS[0], 128 * 1024)[4] == "8.0 GiB"
    assert memory.cells(memory.MODELS[0], 512 * 1024)[4] == "32.0 GiB"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Mistral-7B", "mistral"), ("Mixtral-8x7B", "mixtral"), ("Gemma-7B", "gemma"), ("Phi-3-mini", "phi3")],
)
def test_shapes_are_those_transformers_has_for_the_model(name: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    assert read_shape(transformers.AutoConfig.for_model(kind), name) == SHAPES[name]  # their defaults are this model


@pytest.mark.parametrize("model", memory.MODELS, ids=lambda model: model.shape.name)
def test_rows_weigh_what_they_take_in_memory(model: memory.Model) -> None:
    for sizes in filter(None, (memory.half(model.shape), memory.asked(model))):
        rank, rope = sizes
        row = encoded(np.ones((1, rank)), "int8").nbytes + np.ones((1, rope), np.float16).nbytes
        assert memory.ROW.bytes(rank, rope) == row
    rank, rope = memory.half(model.shape)
    half = model.shape.width // 2
    assert memory.ROW.bytes(rank, rope) <= half < memory.ROW.bytes(rank + memory.STEP, rope)
