"""The benchmark for machines with a GPU, as far as it goes without one: what it calls, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_decode
from benchmarks.gpu_decode import Case, grouped_ort, grouped_torch, latent_ort, latent_torch
from benchmarks.gpu_plan import Model, Shape
from mla_pass.native.kernel import Layout, Operand
from tests.native_cases import needs_library

CPU = torch.device("cpu")
TINY = Model("tiny", 4, 2, 32, 1e4)
SHAPES = [Shape(TINY, 48, 2, 96), Shape(TINY, 48, 2, 192, 1, 64)]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@needs_library
class TestCalls:
    @pytest.mark.parametrize("shape", SHAPES, ids=["no bands", "bands"])
    def test_torch_and_onnx_runtime_compute_the_same(self, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = gpu_decode.replace_dtype(shape)
        tensors = gpu_decode.tensors_of(shape, CPU)
        monkeypatch.setattr(gpu_decode, "tensors_of", lambda *_: {name: x.clone() for name, x in tensors.items()})
        first = latent_torch(shape, CPU).call().float().numpy()
        second = latent_ort(shape, CPU).call().copy_outputs_to_cpu()[0].astype(np.float32)
        assert first.shape == (2, 1, TINY.heads * TINY.size) and np.abs(first).max() > 0
        np.testing.assert_allclose(first, second, rtol=0, atol=2e-3 * np.abs(first).max())

    def test_the_node_is_the_shapes(self) -> None:
        """A layout takes the attributes with the inputs, and counts the cache that the table does."""
        shape = SHAPES[1]
        tensors = gpu_decode.tensors_of(shape, CPU)
        pasts = (tensors["past_latent"], tensors["past_rope"])
        assert sum(x.numel() * x.element_size() for x in pasts) == shape.cache_bytes
        assert tensors["total_length"].tolist() == [192] and tensors["position_ids"].tolist() == [[191]] * 2
        Layout(shape.attributes())

    @pytest.mark.parametrize("make", [grouped_torch, grouped_ort])
    def test_attention_over_the_full_cache_reads_what_is_counted(
        self, make: Callable[[Shape, torch.device], Case]
    ) -> None:
        case = make(gpu_decode.replace_dtype(SHAPES[0]), CPU)
        assert case.cache_bytes == 2 * 96 * 2 * 2 * 32 * 2  # B rows, keys and values, G D numbers of 2 bytes
        assert case.call() is not None

    def test_presents_lie_where_pasts_do(self) -> None:
        binding = latent_ort(SHAPES[0], CPU).call()
        context, *presents = binding.get_outputs()
        assert [list(x.shape()) for x in presents] == [[2, 1, 96, 48], [2, 1, 96, 64]]
        assert list(context.shape()) == [2, 1, 128]

    def test_sizes_are_asked_for_before_anything_is_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no kernel takes a shape torch would compute in its place, and that is no time of ours."""
        asked: list[list[Operand | None]] = []

        def asks(_: Layout, operands: list[Operand | None], device: int) -> int:
            asked.append(operands)
            return device

        monkeypatch.setattr(Layout, "cuda_scratch", asks)
        tensors = gpu_decode.tensors_of(SHAPES[0], CPU)
        gpu_decode.check_kernels(SHAPES[0], tensors, torch.device("cuda", 0))
        (operands,) = asked
        assert operands[2] == Operand(tensors["past_latent"].data_ptr(), "bfloat16", (2, 1, 96, 48))


def test_rows_of_the_table() -> None:
    cases = [Case("latent, torch", lambda: None, 10**9, True), Case("GQA, SDPA", lambda: None, 4 * 10**9, True)]
    first, second = gpu_decode.lines(SHAPES[0], cases, {"latent, torch": 1e-3, "GQA, SDPA": 3e-3}, 2e12)
    assert first == "| tiny | 48 + 64 | none | 2 | 96 | latent, torch | 1000.0 | 1000 | 50% | 3.00 |"
    assert second.endswith("| GQA, SDPA | 3000.0 | 1333 | 67% | 1.00 |")
    assert gpu_decode.HEADER.splitlines()[0].count("|") == first.count("|")


def test_medians_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def seconds(call: Callable[[], str], times: int) -> float:
        asked.append(f"{call()}{times}")
        return {"a": 1e-3, "b": 1.0}[call()]

    monkeypatch.setattr(gpu_decode, "seconds", seconds)
    assert gpu_decode.medians({"a": lambda: "a", "b": lambda: "b"}, 2) == {"a": 1e-3, "b": 1.0}
    assert asked == ["a3", "b3", "a20", "b3", "a20", "b3"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("module", ["gpu_decode", "gpu_here"])
def test_without_a_device_one_sentence(module: str) -> None:
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == ""
    assert len(ran.stderr.strip().splitlines()) == 1 and "CUDA device" in ran.stderr


def test_attributes_go_as_text() -> None:
    assert json.loads(json.dumps(SHAPES[1].attributes())) == SHAPES[1].attributes()
