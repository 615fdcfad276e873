"""A process in which the op library finds a CUDA driver that is not one: tests/native/cuda/fake_cuda.cc.

The test process itself stays as it is: whatever is to see the driver runs in a child, as a function of a module::

    seen = machine.run("tests.cuda_cases", "one_call", fail="cuInit=100")

whose result, plain data, comes back with the journal of the driver's calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuda_resources
from mla_pass import native
from tests.cuda_build import ROOT, SHIM, SHIM_SOURCES, build

NAME = "libcuda.so.1"
FAKE = SHIM / "fake_cuda.cc"


def require_kernels() -> None:
    """Skips a test where nobody could compile CUDA kernels; where there is an nvcc their absence is a failure."""
    if native.cuda_capabilities():
        return
    nvcc = cuda_resources.nvcc()
    if nvcc is not None:
        pytest.fail(
            f"the op library was built without CUDA kernels although there is {nvcc}; install mla_pass with -C "
            "cmake.define.MLA_PASS_CUDA=ON to see why"
        )
    pytest.skip("the op library was built without CUDA kernels: there was no nvcc")


@dataclass(frozen=True)
class Seen:
    """What came of a child."""

    result: Any
    journal: list[dict[str, Any]]

    def calls(self, name: str) -> list[dict[str, Any]]:
        """Those of one of the driver's functions, in order."""
        return [entry for entry in self.journal if entry["call"] == name]


@dataclass(frozen=True)
class Machine:
    """A folder that holds a libcuda.so.1."""

    folder: Path

    def run(self, module: str, function: str, *, fail: str = "", capability: str = "8.0", **given: Any) -> Seen:
        """Result and journal of ``function(**given)``; `fail` and `capability` as the fake driver takes them."""
        journal = self.folder / "journal"
        journal.unlink(missing_ok=True)
        libraries = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("LD_LIBRARY_PATH"))))
        environment = os.environ | {
            "LD_LIBRARY_PATH": libraries, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "FAKE_CUDA_JOURNAL": str(journal), "FAKE_CUDA_FAIL": fail, "FAKE_CUDA_CAPABILITY": capability,
        }  # fmt: skip
        command = [sys.executable, "-P", "-m", "tests.cuda_machine", module, function, json.dumps(given)]
        ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr[-4000:]
        lines = journal.read_text().splitlines() if journal.exists() else []
        return Seen(json.loads(ran.stdout.splitlines()[-1]), [json.loads(line) for line in lines])


def noting(folder: Path) -> Machine:
    """A machine whose driver notes launches and does nothing else."""
    build(folder, NAME, (FAKE,), shared=True)
    return Machine(folder)


def working(folder: Path) -> Machine:
    """A machine whose driver carries launches out, on the CPU."""
    build(folder, NAME, (FAKE, SHIM / "fake_cuda_runs.cc", *SHIM_SOURCES), shared=True)
    return Machine(folder)


def old(folder: Path) -> Machine:
    """A machine whose driver lacks a function."""
    build(folder, NAME, (FAKE,), shared=True, flags=("-DFAKE_CUDA_OLD",))
    return Machine(folder)


def without_driver(folder: Path) -> Machine:
    """A machine whose libcuda cannot be loaded, whether or not this one has its own."""
    (folder / NAME).write_text("no library\n")
    return Machine(folder)


def main() -> None:
    """In the child."""
    import importlib

    module, function, given = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(given))))


if __name__ == "__main__":
    main()
