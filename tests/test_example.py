"""The C++ example makes the same tokens as the Python generator.

No package on the index carries ONNX Runtime's C++ headers: ONNXRUNTIME_INCLUDE names the folder that holds
onnxruntime_cxx_api.h (of 1.17 or newer), as in the archives of ONNX Runtime's releases. The library linked is that of
the installed wheel.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import mla_pass
from mla_pass import MlaConfig
from tests.families import exported
from tests.native_cases import needs_library
from tests.test_convert import SMALL, ids_file
from tests.test_genai import PROMPT, greedy

HEADERS = os.environ.get("ONNXRUNTIME_INCLUDE")
pytestmark = pytest.mark.skipif(not HEADERS, reason="ONNXRUNTIME_INCLUDE names no folder of ONNX Runtime's C++ headers")
SOURCE = Path(__file__).parents[1] / "examples" / "generate.cc"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    (library,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", str(HEADERS)]
    link = ["-L", folder, "-lonnxruntime", f"-Wl,-rpath,{folder}", "-o", folder / "generate"]
    subprocess.run(["c++", *flags, SOURCE, *link], check=True)
    return folder / "generate"


@needs_library
@pytest.mark.parametrize("bundle", [True, False])
def test_same_tokens(program: Path, bundle: bool, tmp_path: Path) -> None:
    config = MlaConfig(**SMALL, budget=0.6)
    result = mla_pass.convert(exported("llama"), config, calibrate=ids_file(tmp_path))
    folder = result.save(tmp_path / "out", bundle=bundle)
    command = [program, folder, "20", *map(str, PROMPT)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    want = greedy(folder, np.array([PROMPT]), 20)[0, len(PROMPT) :]
    np.testing.assert_array_equal([int(x) for x in found.split()], want)


def test_a_missing_model(program: Path, tmp_path: Path) -> None:
    found = subprocess.run([program, tmp_path, "3", "1"], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith("generate: ") and "model.onnx" in found.stderr
