"""What `mla-pass env` tells of CUDA."""

from __future__ import annotations

import pytest

from mla_pass import native
from mla_pass.env import environment
from mla_pass.errors import MlaPassError
from mla_pass.native import CudaDriver
from tests.native_cases import needs_library

pytestmark = needs_library


def rows(monkeypatch: pytest.MonkeyPatch, capabilities: tuple[str, ...], driver: CudaDriver | str) -> dict[str, str]:
    """Its lines by their names, where the library and the machine are as given."""

    def found() -> CudaDriver:
        if isinstance(driver, str):
            raise MlaPassError(driver)
        return driver

    monkeypatch.setattr(native, "cuda_capabilities", lambda: capabilities)
    monkeypatch.setattr(native, "cuda_driver", found)
    lines = [line.partition("  ") for line in environment().text().splitlines()]
    return {name: value.strip() for name, _, value in lines}


def test_kernels_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    told = rows(monkeypatch, ("8.0", "9.0"), CudaDriver("12.8", ("NVIDIA H100", "NVIDIA L40S")))
    assert told["CUDA kernels"] == "8.0, 9.0"
    assert told["CUDA driver"] == "CUDA 12.8, NVIDIA H100, NVIDIA L40S"


def test_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    told = rows(monkeypatch, (), "no CUDA driver is found (it is not there)")
    assert told["CUDA kernels"] == "not built: there was no nvcc, CUDA's compiler, when mla_pass was installed"
    assert told["CUDA driver"] == "no CUDA driver is found (it is not there)"


def test_a_driver_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(monkeypatch, (), CudaDriver("13.0", ()))["CUDA driver"] == "CUDA 13.0, no device"


def test_this_machine_is_described_in_full() -> None:
    found = environment()
    assert found.cuda_kernels == native.cuda_capabilities()
    assert found.cuda_driver and "LatentAttention" not in found.cuda_driver
    assert found.to_json()["cuda_driver"] == found.cuda_driver


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_library", lambda: None)
    text = environment().text()
    assert "not built: the op runs as stock ONNX ops" in text and "CUDA" not in text
