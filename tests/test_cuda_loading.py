"""From the entries of the op library to launches of CUDA kernels, on machines without a device (cuda_machine.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla_pass import native
from tests import cuda_machine, fake_ort
from tests.cuda_build import needs_compiler
from tests.cuda_machine import Machine, Seen
from tests.native_cases import ROUNDING, needs_library

HERE = "tests.cuda_cases"
FATBIN = 0xBA55ED50
"""How every fatbin begins."""

pytestmark = [needs_library, needs_compiler]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    cuda_machine.require_kernels()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """One whose driver notes launches."""
    return cuda_machine.noting(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """One whose driver carries launches out on the CPU."""
    return cuda_machine.working(tmp_path_factory.mktemp("runs"))


def error_of(seen: Seen) -> tuple[str, str]:
    return seen.result["kind"], seen.result["error"]


@pytest.fixture(scope="module")
def seen(machine: Machine) -> Seen:
    """One call, on stream 77 of device 1."""
    return machine.run(HERE, "one_call", stream=77, device=1)


class TestACall:
    def test_the_kernels_are_loaded_once_and_all_of_them(self, seen: Seen) -> None:
        assert [load["magic"] for load in seen.calls("cuModuleLoadData")] == [FATBIN]
        names = [call["name"] for call in seen.calls("cuModuleGetFunction")]
        assert len(names) == len(set(names)) and {"setup", "attend_f16_128_16", "decode_bf16"} <= set(names)

    def test_every_launch_is_on_the_stream_and_the_device(self, seen: Seen) -> None:
        launches = seen.calls("cuLaunchKernel")
        assert len(launches) >= 5
        assert {(launch["stream"], launch["device"]) for launch in launches} == {(77, 1)}
        for launch in launches:
            assert min(launch["grid"]) >= 1 and launch["threads"] % 32 == 0

    def test_no_context_stays_behind(self, seen: Seen) -> None:
        assert [call["device"] for call in seen.calls("cuDevicePrimaryCtxRetain")] == [11]
        assert len(seen.calls("cuCtxPushCurrent_v2")) == len(seen.calls("cuCtxPopCurrent_v2")) == 1

    def test_operands_arrive_where_they_belong(self, seen: Seen) -> None:
        given = seen.result["value"]
        (setup,) = (p for p in parameters(seen) if p["call"] == "Setup")
        for name, operand in (("total", "total_length"), ("padding_mask", "padding_mask"), ("cos", "cos"),
                              ("sin", "sin"), ("position_ids", "position_ids")):  # fmt: skip
            assert setup[name] == given[operand]
        assert (setup["bound"], setup["exact"], setup["position_step"]) == (91, 1, 1)
        (append,) = (p for p in parameters(seen) if p["call"] == "Append")
        assert (append["row"], append["capacity"]) == (given["row"], 94)
        pasts = [given["past_latent"], given["past_rope"]]
        assert [part["data"] for part in append["part"]] == pasts
        assert [part["bytes"] for part in append["part"]] == [64, 16]
        attends = [p for p in parameters(seen) if p["call"] == "Attend"]
        assert attends and all([part["data"] for part in p["part"]] == pasts for p in attends)
        (map_,) = (p for p in parameters(seen) if p["call"] == "Map")
        assert (map_["query"], map_["query_map"]) == (given["query"], given["query_map"])
        assert [p["context"] for p in parameters(seen) if p["call"] == "Decode"] == [given["context"]]

    def test_everything_else_lies_in_the_scratch(self, seen: Seen) -> None:
        given = seen.result["value"]
        first, last = given["scratch"], given["scratch"] + given["scratch_bytes"]
        names = ("span", "dims", "varying", "sum", "joined")
        inner = [p[name] for p in parameters(seen) for name in names if name in p]
        assert len(inner) > 5 and all(first <= address < last for address in inner)

    def test_shared_memory_is_asked_for_once_where_it_is_more_than_is_free(self, machine: Machine) -> None:
        seen = machine.run(HERE, "one_call", case={"rank": 512, "key_rank": 512, "rope_dim": 64, "past": 700})
        assert "value" in seen.result
        asked = {call["name"]: call["value"] for call in seen.calls("cuFuncSetAttribute")}
        assert len(asked) == len(seen.calls("cuFuncSetAttribute"))
        most: dict[str, int] = {}
        for launch in seen.calls("cuLaunchKernel"):
            most[launch["name"]] = max(most.get(launch["name"], 0), launch["shared_bytes"])
        assert asked == {name: size for name, size in most.items() if size > 48 << 10} != {}


def parameters(seen: Seen) -> list[dict[str, Any]]:
    return [launch["parameters"] for launch in seen.calls("cuLaunchKernel")]


class TestContexts:
    def test_a_second_call_loads_nothing(self, machine: Machine) -> None:
        seen = machine.run(HERE, "calls_on", devices=[0, 0, 0])
        assert len(seen.calls("cuModuleLoadData")) == len(seen.calls("cuDevicePrimaryCtxRetain")) == 1
        assert len({tuple(p["grid"]) for p in seen.calls("cuLaunchKernel") if p["name"] == "setup"}) == 1
        assert len([p for p in seen.calls("cuLaunchKernel") if p["name"] == "setup"]) == 3

    def test_a_device_is_asked_for_its_sizes_once(self, machine: Machine) -> None:
        once, often = (machine.run(HERE, "calls_on", devices=[0] * n).calls("cuDeviceGetAttribute") for n in (1, 4))
        assert often == once

    def test_every_device_has_kernels_of_its_own(self, machine: Machine) -> None:
        seen = machine.run(HERE, "calls_on", devices=[0, 1, 0, 1])
        assert [load["device"] for load in seen.calls("cuModuleLoadData")] == [0, 1]
        assert [p["device"] for p in seen.calls("cuLaunchKernel") if p["name"] == "setup"] == [0, 1, 0, 1]

    def test_a_context_that_is_current_is_used_if_it_is_the_devices(self, machine: Machine) -> None:
        seen = machine.run(HERE, "another_context")
        # The primary one of device 1, another of it, the primary again from within device 0's, and that one.
        assert [load["device"] for load in seen.calls("cuModuleLoadData")] == [1, 1, 0]
        assert [call["device"] for call in seen.calls("cuDevicePrimaryCtxRetain")] == [11]
        assert len(seen.calls("cuCtxPushCurrent_v2")) == len(seen.calls("cuCtxPopCurrent_v2")) == 2
        assert [p["device"] for p in seen.calls("cuLaunchKernel") if p["name"] == "setup"] == [1, 1, 1, 0]
        assert seen.result == [0, 0]

    def test_threads(self, machine: Machine) -> None:
        seen = machine.run(HERE, "many_threads", count=8)
        assert all("value" in result for result in seen.result) and len(seen.result) == 8
        assert len(seen.calls("cuModuleLoadData")) == len(seen.calls("cuInit")) == 1
        setups = [p["stream"] for p in seen.calls("cuLaunchKernel") if p["name"] == "setup"]
        assert sorted(setups) == [1000 + i for i in range(8)]

    def test_sizes_are_told_without_a_context(self, machine: Machine) -> None:
        seen = machine.run(HERE, "scratch_alone")
        assert seen.result["value"] > 0
        assert {entry["call"] for entry in seen.journal} == {"cuInit", "cuDeviceGetAttribute"}


class TestWhatFails:
    """Each is one sentence; `Unsupported` where another way of computing would do."""

    def test_no_driver(self, tmp_path: Path) -> None:
        machine = cuda_machine.without_driver(tmp_path)
        for function in ("one_call", "scratch_alone", "driver"):
            kind, told = error_of(machine.run(HERE, function))
            assert "no CUDA driver is found (" in told and "file too short" in told
            assert told.endswith("expected libcuda.so.1, which NVIDIA's driver brings")
            assert kind == ("MlaPassError" if function == "driver" else "Unsupported")

    def test_a_driver_that_lacks_a_function(self, tmp_path: Path) -> None:
        kind, told = error_of(cuda_machine.old(tmp_path).run(HERE, "one_call"))
        assert kind == "Unsupported"
        assert "the CUDA driver has no function cuLaunchKernel; expected one that serves CUDA 11 or newer" in told

    def test_a_driver_that_does_not_start(self, machine: Machine) -> None:
        seen = machine.run(HERE, "one_call", fail="cuInit=100")
        kind, told = error_of(seen)
        assert kind == "Unsupported"
        assert "the CUDA driver does not start: cuInit gave CUDA_ERROR_NO_DEVICE (100); expected a device" in told
        assert [entry["call"] for entry in seen.journal] == ["cuInit"]

    @pytest.mark.parametrize(("code", "name"), [(209, "NO_BINARY_FOR_GPU"), (222, "UNSUPPORTED_PTX_VERSION")])
    def test_kernels_that_a_driver_cannot_load(self, machine: Machine, code: int, name: str) -> None:
        seen = machine.run(HERE, "one_call", fail=f"cuModuleLoadData={code}", capability="9.0")
        kind, told = error_of(seen)
        assert kind == "Unsupported"
        assert f"for compute capability {', '.join(native.cuda_capabilities())}, do not load" in told
        assert "on device 0 (Fake 0, 9.0) with a driver of CUDA 12.8" in told
        assert f"CUDA_ERROR_{name} ({code}); expected a driver at least as new as the compiler" in told
        assert len(seen.calls("cuCtxPushCurrent_v2")) == len(seen.calls("cuCtxPopCurrent_v2")) == 1

    def test_loading_is_tried_again(self, machine: Machine) -> None:
        seen = machine.run(HERE, "twice", fail="cuModuleLoadData=2")
        assert len(seen.calls("cuModuleLoadData")) == 2
        for result in seen.result:
            assert result["kind"] == "MlaPassError"
            assert "cuModuleLoadData failed with CUDA_ERROR_OUT_OF_MEMORY (2), loading the kernels" in result["error"]

    def test_a_launch_that_fails(self, machine: Machine) -> None:
        seen = machine.run(HERE, "one_call", fail="cuLaunchKernel=719")
        kind, told = error_of(seen)
        assert kind == "MlaPassError"
        assert "the CUDA driver's cuLaunchKernel failed with CUDA_ERROR_LAUNCH_FAILED (719), launching " in told
        assert len(seen.calls("cuLaunchKernel")) == len(seen.calls("cuCtxPopCurrent_v2")) == 1

    def test_an_error_that_the_driver_cannot_name(self, machine: Machine) -> None:
        kind, told = error_of(machine.run(HERE, "one_call", fail="cuFuncSetAttribute=12345 cuLaunchKernel=12345"))
        assert kind == "MlaPassError" and "failed with an error without a name (12345)" in told

    def test_a_device_that_is_too_old(self, machine: Machine) -> None:
        kind, told = error_of(machine.run(HERE, "scratch_alone", capability="7.5"))
        assert kind == "Unsupported"
        assert "CUDA device 0 (Fake 0) has compute capability 7.5; expected 8.0 or newer" in told

    def test_a_device_that_is_not_there(self, machine: Machine) -> None:
        kind, told = error_of(machine.run(HERE, "one_call", device=2))
        assert kind == "MlaPassError"
        assert "CUDA device 2 does not exist; expected one of the 2 that the driver has, from 0" in told

    def test_a_model_of_another_type(self, machine: Machine) -> None:
        kind, told = error_of(machine.run(HERE, "scratch_alone", case={"dtype": "float32"}))
        assert kind == "Unsupported"
        assert "input query is of ONNX type 1; expected float16 or bfloat16 on a CUDA device" in told

    def test_a_part_of_another_type(self, machine: Machine) -> None:
        kind, told = error_of(machine.run(HERE, "scratch_alone", case={"latent": "bfloat16"}))
        assert kind == "Unsupported" and "input past_latent is of" in told

    def test_less_scratch_than_is_needed(self, machine: Machine) -> None:
        seen = machine.run(HERE, "too_little_scratch")
        kind, told = error_of(seen)
        assert kind == "MlaPassError" and "bytes; expected" in told and seen.calls("cuLaunchKernel") == []

    def test_an_address_that_is_not_aligned(self, machine: Machine) -> None:
        seen = machine.run(HERE, "misaligned")
        kind, told = error_of(seen)
        assert kind == "Unsupported" and seen.calls("cuLaunchKernel") == []
        assert "input query lies at an address that is no multiple of 16" in told


class TestHowMuchIsFilled:
    """The host does not look at total_length: shapes tell T, or the most it can be."""

    @pytest.mark.parametrize(
        ("case", "bound", "exact"),
        [
            ({"padding": True}, 91, 1),
            ({"padding": True, "bias": "b"}, 91, 1),
            ({"padding": False}, 94, 0),
            ({"padding": False, "bias": "b"}, 91, 0),
            ({"padding": False, "blocks": ()}, 94, 0),
        ],
    )
    def test_in_a_shared_buffer(self, machine: Machine, case: dict[str, Any], bound: int, exact: int) -> None:
        seen = machine.run(HERE, "one_call", case=case | {"spare": 3, "blocks": case.get("blocks", ())})
        assert setup_of(seen) == (bound, exact)

    def test_bands_cannot_reach_beyond_the_tables(self, machine: Machine) -> None:
        # They are made for the 91 rows of the case.
        seen = machine.run(HERE, "one_call", case={"padding": False, "spare": 50, "blocks": (4, 16)})
        assert setup_of(seen) == (91, 0)

    def test_onnx_runtime_tells_it_by_a_bias_and_by_a_buffer_that_grows(self, working: Machine) -> None:
        for case in ({"bias": "b"}, {"shared": False}):
            seen = working.run(HERE, "run_by_runtime", case={"dtype": "float16", "padding": False, "past": 31} | case)
            assert setup_of(seen) == (32, 1)

    def test_shapes_that_contradict_each_other(self, machine: Machine) -> None:
        full = (
            "columns, as many as rows are filled; expected 1, the new tokens of query, to 94, the rows of past_latent"
        )
        wrong: list[tuple[dict[str, list[int]], str]] = [
            ({"padding_mask": [2, 95]}, f"input padding_mask has 95 {full}"),
            ({"padding_mask": [2, 0]}, f"input padding_mask has 0 {full}"),
            ({"padding_mask": [182]}, "input padding_mask is int64 [182]; expected [..., total_length]"),
            ({"padding_mask": [1, 91]}, "input padding_mask is int64 [1, 91]; expected int64 [2, 91]"),
            ({"total_length": [2]}, "input total_length is int64 [2]; expected int64 [1]"),
            ({"position_ids": [2, 2]}, "input position_ids is int64 [2, 2]; expected int64 [2, 1]"),
            ({"cos": [50, 7], "sin": [50, 7]}, "input cos is float32 [50, 7]; expected float32 [positions >= 91, rot"),
            ({"past_latent": [2, 1, 0, 32], "past_rope": [2, 1, 0, 8]},
             "the cache is full: input past_latent has room for 0 rows, and query holds 1 new tokens; expected a cap"),
        ]  # fmt: skip
        seen = machine.run(HERE, "scratch_of_each", shapes=[shapes for shapes, _ in wrong])
        for result, (_, told) in zip(seen.result, wrong, strict=True):
            assert result["kind"] == "MlaPassError" and told in result["error"]


def setup_of(seen: Seen) -> tuple[int, int]:
    (setup,) = (p for p in parameters(seen) if p["call"] == "Setup")
    return setup["bound"], setup["exact"]


class TestTheDriver:
    def test_it_is_described(self, machine: Machine) -> None:
        assert machine.run(HERE, "driver").result["value"] == {"version": "12.8", "devices": ["Fake 0", "Fake 1"]}


# Fields of tests/native_cases.py's Case. Each kernel of both types, both forms, and what an operand can be.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("absorbed", {"dtype": "float16", "batch": 2, "past": 90, "blocks": (4, 16)}),
    ("absorbed", {"dtype": "bfloat16", "past": 130, "blocks": (1, 64, 128), "bias": "bh", "padding": False}),
    ("absorbed", {"dtype": "float16", "past": 65, "new": 3, "latent": "int8", "rope": "float8", "per_group": 3}),
    ("expanded", {"dtype": "bfloat16", "batch": 2, "past": 70, "new": 9, "blocks": (2, 64), "window": 40}),
    ("expanded", {"dtype": "float16", "past": 0, "new": 17, "query_map": False, "softcap": 2.0, "cut": 0.5}),
    ("absorbed", {"dtype": "float16", "past": 31, "key_up": False, "value_up": False, "padding": False, "spare": 40}),
]


class TestNumbers:
    @pytest.mark.parametrize(("form", "case"), CASES)
    def test_the_kernels_agree_with_the_reference_and_the_cpu(
        self, working: Machine, form: str, case: dict[str, Any]
    ) -> None:
        apart = working.run(HERE, "numbers", case=case, form=form).result
        assert apart < 8 * ROUNDING[case["dtype"]]

    @pytest.mark.parametrize(("name", "value"), [("total_length", 95), ("total_length", 0), ("position_ids", 1 << 40)])
    def test_what_contradicts_itself_is_no_number(self, working: Machine, name: str, value: int) -> None:
        assert working.run(HERE, "contradiction", name=name, value=value).result


class TestOnnxRuntime:
    """The operator on CUDA memory, by an ONNX Runtime that is tests/fake_ort.py."""

    def test_what_is_registered(self, machine: Machine) -> None:
        described = machine.run(HERE, "operators").result
        assert {op["name"] for op in described} == {"LatentAttention"}
        cpu = [op for op in described if op["provider"] is None]
        cuda = [op for op in described if op["provider"] is not None]
        # The CPU's first, for all: the schema is made of the first, and there is no other way once it is registered.
        assert described == cpu + cuda and len(cpu) == 25 + 16 + 16
        assert {op["provider"] for op in cuda} == {"CUDAExecutionProvider"}
        half, brain, whole, small = 10, 16, 3, 2
        assert sorted(op["types"] for op in cuda) == sorted(
            [model, latent, rope] for model in (half, brain) for latent in (model, whole, small)
            for rope in (model, whole, small)
        )  # fmt: skip
        for op in described:
            assert op["outputs"] == op["types"] and op["memory"] == [0] * 14

    @pytest.mark.parametrize(
        "case",
        [
            {"dtype": "float16", "batch": 2, "past": 90, "blocks": (4, 16)},
            {"dtype": "bfloat16", "past": 31, "new": 2, "shared": False, "latent": "int8", "rope": "float8"},
        ],
    )
    def test_a_run(self, working: Machine, case: dict[str, Any]) -> None:
        seen = working.run(HERE, "run_by_runtime", case=case)
        assert seen.result == {"log": ["stream", "allocator", "scratch", "free", "release"], "left": 0}
        launches = seen.calls("cuLaunchKernel")
        assert {(launch["stream"], launch["device"]) for launch in launches} == {(fake_ort.STREAM, fake_ort.DEVICE)}
        carried = [launch for launch in launches if launch["name"] == "carry"]
        assert len(carried) == (0 if case.get("shared", True) else 2)

    def test_scratch_goes_back_where_a_launch_fails(self, machine: Machine) -> None:
        seen = machine.run(HERE, "refused_by_runtime", changed={}, fail="cuLaunchKernel=719")
        assert "cuLaunchKernel failed with CUDA_ERROR_LAUNCH_FAILED (719)" in seen.result["error"]
        assert seen.result["log"][-2:] == ["free", "release"] and seen.result["left"] == 0

    def test_a_node_that_is_not_right(self, machine: Machine) -> None:
        told = machine.run(HERE, "refused_by_runtime", changed={"kv_groups": 3}).result["error"]
        assert told == "LatentAttention: attribute num_heads is 4; expected a multiple of kv_groups, 3"

    def test_an_older_onnx_runtime(self, machine: Machine) -> None:
        seen = machine.run(HERE, "refused_by_runtime", changed={}, version=17)
        assert "this is ONNX Runtime 1.17; expected 1.18 or newer for kernels on CUDA" in seen.result["error"]
        assert seen.journal == []
