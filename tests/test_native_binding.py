"""The hand-written binding against the installed ONNX Runtime, and how models, sessions and the library meet."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import mla_pass
from mla_pass import native
from mla_pass.errors import MlaPassError
from mla_pass.onnx.session import CPU, CUDA, session
from tests import latent_toy
from tests.native_cases import (
    Case,
    Drawn,
    check,
    needs_library,
    profile_of,
    run_session,
)
from tests.test_body import build

ROOT = Path(__file__).parents[1]
HEADER = (ROOT / "mla_pass" / "native" / "ort_api.h").read_text()
SLOTS = {name: int(number) for name, number in re.findall(r"using (\w+) = Slot<(\d+),", HEADER)}
VERSION, CUDA_VERSION = (
    int(re.search(rf"{name} = (\d+)", HEADER).group(1))  # type: ignore[union-attr]
    for name in ("kApiVersion", "kScratchVersion")
)
NEWEST = "ParallelFor"
"""The last slot in use; it came with API version 17, and so does every release from 1.17 on have it."""
CUDA_NEWEST = "GetScratchBuffer"
"""The last slot that only kernels on CUDA call; it came with API version 18."""
SOURCES = ("op.cc", "ort_call.h", "ort_node.cc")

pytestmark = needs_library


class Api:
    """The table of the installed ONNX Runtime, called by number as the library calls it."""

    def __init__(self) -> None:
        ort.SessionOptions().register_custom_ops_library(native.library_path())
        table = ctypes.CDLL(native.library_path()).mla_pass_ort_api
        table.restype = ctypes.POINTER(ctypes.c_void_p)
        self.table = table()

    def call(self, name: str, result: object, *arguments: object) -> object:
        kinds = [type(a) if isinstance(a, ctypes._SimpleCData) else ctypes.c_void_p for a in arguments]
        return ctypes.CFUNCTYPE(result, *kinds)(self.table[SLOTS[name]])(*arguments)

    def check(self, name: str, *arguments: object) -> None:
        assert self.call(name, ctypes.c_void_p, *arguments) is None


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


def test_every_slot_is_as_old_as_the_version_asked_for() -> None:
    assert VERSION == 17 and len(SLOTS) > 15 and SLOTS[NEWEST] == 274
    assert CUDA_VERSION == 18 and SLOTS[CUDA_NEWEST] == 277
    assert [name for name, number in SLOTS.items() if number > SLOTS[NEWEST]] == [CUDA_NEWEST]
    assert len(set(SLOTS.values())) == len(SLOTS)


def test_a_status_is_made_read_and_released(api: Api) -> None:
    status = ctypes.c_void_p(api.call("CreateStatus", ctypes.c_void_p, ctypes.c_int(2), ctypes.c_char_p(b"told")))
    assert status.value
    assert api.call("GetErrorMessage", ctypes.c_char_p, status) == b"told"
    api.call("ReleaseStatus", None, status)


def test_domains_are_made(api: Api) -> None:
    domain = ctypes.c_void_p()
    api.check("CreateCustomOpDomain", ctypes.c_char_p(b"some.domain"), ctypes.byref(domain))
    assert domain.value


def test_every_other_slot_is_called_by_the_suite() -> None:
    # The rest takes a kernel's context: tests/test_native.py runs each of them, as long as the operator calls each.
    source = "".join((ROOT / "mla_pass" / "native" / name).read_text() for name in SOURCES)
    assert [name for name in SLOTS if not re.search(rf"<(ort::)?{name}[,>]", source)] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="the operator that asks is built with g++")
def test_what_kernels_on_cuda_ask_of_a_run(tmp_path: Path) -> None:
    # All but memory on a stream, of which the CPU has none.
    library, native_folder = tmp_path / "libprobe.so", ROOT / "mla_pass" / "native"
    flags = ["-std=c++17", "-fPIC", "-shared", f"-I{native_folder}", "-o", str(library)]
    subprocess.run(["g++", *flags, str(ROOT / "tests" / "native" / "probe.cc")], check=True)
    node = onnx.helper.make_node("Probe", ["x"], ["y"], domain="probe")
    x, y = (
        onnx.helper.make_tensor_value_info(name, kind, [3])
        for name, kind in (("x", onnx.TensorProto.FLOAT), ("y", onnx.TensorProto.INT64))
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("probe", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    opened = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    (found,) = opened.run(None, {"x": np.zeros(3, np.float32)})
    assert found.tolist() == [0, 0, 42]


def test_a_session_that_asks_for_cuda_where_there_is_none_has_the_kernels_of_the_cpu() -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    drawn = Drawn(Case(dtype="float16", past=20, blocks=(4, 16)))
    options = ort.SessionOptions()
    options.register_custom_ops_library(native.library_path())
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        opened = ort.InferenceSession(drawn.model().SerializeToString(), options, providers=[CUDA, CPU])
    assert opened.get_providers() == [CPU]
    check(drawn, run_session(opened, drawn.feeds()), drawn.kernel_error())


def two_variants() -> tuple[onnx.ModelProto, Drawn]:
    """A model of two nodes with a function each, told apart by overload, as conversions of uneven layers are."""
    drawn = Drawn(Case(past=20, blocks=(4, 16)))
    model = drawn.model()
    other = build(replace(drawn.variant, softcap=3.0), drawn.weights)
    node, function = other.graph.node[0], other.functions[0]
    node.name, node.overload, function.overload = "second", "v1", "v1"
    node.output[:] = ["context2", "latent2", "rope2"]
    for output in other.graph.output:
        output.name += "2"
    model.graph.node.append(node)
    model.graph.output.extend(other.graph.output)
    model.functions.append(function)
    return model, drawn


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_one_file_runs_fused_with_the_library_and_as_stock_operators_without(level: str, tmp_path: Path) -> None:
    model, drawn = two_variants()
    results = {}
    for library in (True, False):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        if library:
            options.register_custom_ops_library(native.library_path())
        opened = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
        results[library] = run_session(opened, drawn.feeds())
        counts = profile_of(opened)
        assert counts.get("LatentAttention", 0) == (2 if library else 0)
        assert (counts.get("Softmax", 0) >= 2) == (not library)
    for fused, stock in zip(results[True], results[False], strict=True):
        np.testing.assert_allclose(fused, stock, rtol=0, atol=1e-5)
    check(drawn, results[True][:3], 1e-5)
    assert np.abs(results[True][0] - results[True][3]).max() > 1e-3  # the softcap of the second node


def test_a_session_registers_the_library(tmp_path: Path) -> None:
    folder = latent_toy.save(tmp_path, latent_toy.weights())
    assert session(folder, threads=1).fused
    assert session(folder, threads=1, fused=True).fused
    assert not session(folder, threads=1, fused=False).fused


def test_without_the_library_models_run_and_asking_for_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = latent_toy.save(tmp_path, latent_toy.weights())
    monkeypatch.setattr(mla_pass, "__path__", [str(tmp_path)])
    assert native.find_library() is None
    assert not session(folder, threads=1).fused
    with pytest.raises(MlaPassError, match=r"libmla_pass.so is not built; .* install a C\+\+ compiler"):
        session(folder, threads=1, fused=True)


def test_the_documented_lines(tmp_path: Path) -> None:
    model, drawn = two_variants()
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    options = ort.SessionOptions()
    options.register_custom_ops_library(native.library_path())
    opened = ort.InferenceSession(path, options)
    check(drawn, run_session(opened, drawn.feeds())[:3], 1e-5)


def test_kernels_of_an_instruction_set_define_nothing_others_could_call() -> None:
    # A function shared between files compiled for different processors would be kept from any one of them.
    objects = list((ROOT / "build").glob("**/kernels_*.cc.o"))
    if not objects:
        pytest.skip("the library was not built in this checkout")
    for path in objects:
        lines = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        isa = path.name.removeprefix("kernels_").removesuffix(".cc.o")
        foreign = [line for line in lines if re.search(r" [WVu] ", line) and f"mla_pass::{isa}::" not in line]
        assert not [line for line in foreign if "__asan" not in line and "DW.ref" not in line], path


def test_the_library_needs_nothing_but_the_system() -> None:
    ran = subprocess.run(["ldd", native.library_path()], capture_output=True, text=True, check=True)
    names = {Path(line.split()[0]).name.split(".so")[0] for line in ran.stdout.splitlines()}
    system = {"linux-vdso", "libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl"}
    assert {name for name in names if not name.startswith("ld-linux")} <= system
