"""The torch operators on a CUDA device, and without one what of that route can be seen on the CPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mla_pass import native
from mla_pass.errors import MlaPassError, Unsupported
from mla_pass.native.kernel import Layout, Operand
from mla_pass.pytorch import operator
from mla_pass.pytorch.cache import LatentRows, StaticLatentRows
from mla_pass.pytorch.spec import LatentLayer, LayerSpec
from tests import cuda_machine
from tests.cuda_machine import Machine
from tests.native_cases import Case, needs_library, replace
from tests.test_triton_decode import CASES, ERROR, SIMPLE
from tests.torch_cases import DTYPES, OPERANDS, Call, as_numpy, as_torch, call_of, check, parts

FLOAT32 = ERROR["float32"]
HALVES = ("float16", "bfloat16")


# ---- without a device


class Waits(TorchDispatchMode):
    """Raises where a device would have to be waited for, or memory of the host copied to it: no capture allows it."""

    waiting = (
        "_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
        "repeat_interleave.Tensor",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        masks = "index" in name and any(x.dtype == torch.bool for x in _tensors(args[1:]))
        assert not masks and not name.startswith(self.waiting), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def _tensors(args: Any) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


@pytest.fixture
def as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a device that only knows numbers once it got there."""
    monkeypatch.setattr(operator, "_on_host", lambda _: False)
    operator._say_that_torch_computes.cache_clear()


def without_waiting(op: Any, *operands: Any) -> Any:
    """What an operator gives; modes do not see into one that is called as torch calls it."""
    for x in operands:
        if isinstance(x, str):
            operator.settled(x, torch.device("cpu"))  # as a cache does where it starts
    with Waits():
        return op._init_fn(*operands)


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "int": lambda x: int(x[0]), "bool": lambda x: bool(x.any()), "mask": lambda x: x[x > 0], "list": lambda x: x[[0]],
    "nonzero": torch.nonzero,
}  # fmt: skip


@pytest.mark.parametrize("act", WAITING.values(), ids=WAITING)
def test_what_waits_is_seen(act: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), Waits():
        act(torch.arange(3))


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("wider", [0, 2])
def test_torch_on_a_device_equals_the_reference_and_waits_for_nothing(case: Case, wider: int) -> None:
    call = call_of(case, wider=wider)
    check(call, without_waiting(operator.latent_attention, *call.operands, call.attributes), FLOAT32)


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_on_a_device_in_half_precision(dtype: str) -> None:
    call = call_of(replace(CASES["short_bands"], dtype=dtype, batch=2))
    check(call, without_waiting(operator.latent_attention, *call.operands, call.attributes), ERROR[dtype])


def unchanged(call: Call, act: Callable[[], Tensor]) -> Tensor:
    """The context of a call that must not write any row."""
    before = [x.clone() for x in parts(call)]
    context = act()
    for now, then in zip(parts(call), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    return context


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("total", [-3, 0, 2, 157, 10**9])
def test_on_a_device_a_total_out_of_range_is_nan(total: int) -> None:
    call = call_of(replace(SIMPLE, new=3))  # 150 rows and 3, room for 156
    call["total_length"].fill_(total)
    assert unchanged(call, call).isnan().all()


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("position", [-1, 10**6])
def test_on_a_device_a_position_out_of_range_is_nan_in_its_sequence(position: int) -> None:
    call = call_of(replace(SIMPLE, batch=2, new=2))
    right = call.to("cpu")()
    call["position_ids"][1, 0] = position
    before = [x[1].clone() for x in parts(call)]
    context = call()
    assert context[1].isnan().all()
    torch.testing.assert_close(context[0], right[0], rtol=0, atol=0)
    for now, then in zip(parts(call), before, strict=True):
        torch.testing.assert_close(now[1], then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("as_device")
def test_on_a_device_an_eight_bit_row_that_is_not_finite_is_nan() -> None:
    call = call_of(replace(CASES["int8"], batch=2))
    call["row"][1, 0, 3] = torch.inf
    context = call()
    assert context[1].isnan().all() and context[0].isfinite().all()


@pytest.mark.usefixtures("as_device")
def test_a_mask_that_is_narrower_than_the_new_tokens_is_refused() -> None:
    call = call_of(replace(SIMPLE, new=3), masked=True)
    call["mask"] = call["mask"][..., :2]
    with pytest.raises(MlaPassError, match=r"a mask of shape \[1, 1, 3, 2\]"):
        call()


# ---- keys and values for an attention that is not ours


UPDATED = Case(past=20, new=2, batch=2, blocks=(4, 16), rope_dim=4)


def update_of(case: Case, device: Any = "cpu") -> list[Any]:
    """Operands of ``mla_pass::latent_update`` over the cache of a case."""
    call = call_of(case)
    rng, c, dtype = np.random.default_rng(7), case, DTYPES[case.dtype]
    pairs = call["cos"].shape[1]
    assert 2 * pairs <= c.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape) / np.sqrt(shape[-1])).to(dtype)

    told = {**json.loads(call.attributes), "rotary_dim": 2 * pairs, "interleaved": False, "attention_scaling": 1.25}
    numbers = c.groups * (c.head_dim + c.value_dim)
    cache = [x.nan_to_num() if x.is_floating_point() else x for x in parts(call)]
    operands = [
        draw(c.batch, c.groups, c.new, c.head_dim), draw(c.batch, c.groups, c.new, c.value_dim), *cache,
        *(call[name] for name in ("cos", "sin", "position_ids", "total_length")),
        draw(c.rank + c.rope_dim, numbers), draw(c.rank + c.rope_dim),
        *(call[name] for name in ("query_map", "key_up", "key_mean", "value_up")), draw(c.groups, c.value_dim),
    ]  # fmt: skip
    return [*(x.to(device, copy=True) for x in operands), cache[0].shape[2], json.dumps(told)]


@pytest.mark.parametrize("case", [UPDATED, replace(UPDATED, latent="int8", rope="float8"), replace(UPDATED, past=0)])
def test_updates_of_a_device_equal_the_cpus_and_wait_for_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    here, there = update_of(case), update_of(case)
    right = operator.latent_update(*here)
    monkeypatch.setattr(operator, "_on_host", lambda _: False)
    found = without_waiting(operator.latent_update, *there)
    for a, b in zip((*found, *there[2:4]), (*right, *here[2:4]), strict=True):
        torch.testing.assert_close(a, b)
    assert right[0][:, :, : case.total].abs().amin((0, 1, 3)).min() > 0 and not right[0][:, :, case.total :].any()


@pytest.mark.usefixtures("as_device")
def test_an_update_without_room_is_nan_and_writes_nothing() -> None:
    operands = update_of(UPDATED)
    before = [x.clone() for x in operands[2:4]]
    operands[7].fill_(operands[2].shape[2] + 1)
    assert all(x.isnan().all() for x in operator.latent_update(*operands))
    for now, then in zip(operands[2:4], before, strict=True):
        assert torch.equal(now, then)


# ---- what the CUDA kernels are given


class Recorder:
    """In the place of a Layout: keeps what the CUDA kernels are asked for, and lets the CPU kernel compute it."""

    refusal: MlaPassError | None = None

    def __init__(self, attributes: str, causal: bool) -> None:
        self.layout = Layout({**json.loads(attributes), "causal": int(causal)})
        self.calls: list[dict[str, Any]] = []

    def cuda_scratch(self, inputs: list[Operand | None], device: int) -> int:
        if self.refusal is not None:
            raise self.refusal
        return 1000 + device

    def attend_cuda(self, inputs: list[Operand | None], context: Operand, **told: Any) -> None:
        self.calls.append({"inputs": inputs, "context": context, **told})
        self.attend(inputs, context, threads=1)

    def attend(self, inputs: list[Operand | None], context: Operand, threads: int) -> None:
        self.layout.attend(inputs, context, threads)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    """Recorders that were made; device 3 is the current one, and its stream is 77."""
    made: list[Recorder] = []

    def layout(attributes: str, causal: bool) -> Recorder:
        made.append(Recorder(attributes, causal))
        return made[-1]

    monkeypatch.setattr(operator, "_layout", layout)
    monkeypatch.setattr(operator, "_current", lambda _: nullcontext((3, 77)))
    return made  # type: ignore[return-value]


@needs_library
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_are_given_every_operand_where_it_lies(recorder: list[Recorder], masked: bool) -> None:
    call = call_of(replace(CASES["short_bands"], dtype="float16", batch=2), masked=masked)
    _, operands = call.as_node()
    with Waits():
        context = operator._by_cuda(operands, call.attributes, causal=not masked)
    ((told,),) = (made.calls for made in recorder)
    assert told["device"] == 3 and told["stream"] == 77 and told["scratch_bytes"] == 1003 and told["scratch"] != 0
    assert told["context"] == Operand(context.data_ptr(), "float16", tuple(context.shape))
    for given, x in zip(told["inputs"], operands, strict=True):
        assert given == (x if x is None else Operand(x.data_ptr(), str(x.dtype)[6:], tuple(x.shape)))
    assert (told["inputs"][9] is not None) == masked
    check(call, context, ERROR["float16"])


@needs_library
@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("compute", [operator._by_cuda, operator._by_kernel])
def test_a_cache_that_is_a_view_is_written_all_the_same(compute: Callable[..., Tensor]) -> None:
    """Kernels take rows that lie side by side; both the CPU's and the device's."""
    call = call_of(replace(SIMPLE, batch=2))
    for name in ("past_latent", "past_rope"):
        room = torch.zeros(2, 1, call[name].shape[2] + 5, call[name].shape[3])
        room[:, :, :-5] = call[name]
        call[name] = room[:, :, :-5]
        assert not call[name].is_contiguous()
    check(call, compute(call.as_node()[1], call.attributes, causal=True), FLOAT32)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """One whose driver carries launches out on the CPU."""
    cuda_machine.require_kernels()
    return cuda_machine.working(tmp_path_factory.mktemp("runs"))


@needs_library
@pytest.mark.parametrize("wider", [0, 3])
def test_through_a_driver_that_runs_the_kernels_here(machine: Machine, wider: int) -> None:
    """All the way: entry, plan, launches and the kernels themselves, compiled for the CPU."""
    taken = [case for name, case in CASES.items() if name != "mixed"]
    cases = [asdict(replace(case, dtype=dtype)) for case, dtype in zip(taken, cycle(HALVES), strict=False)]
    seen = machine.run("tests.torch_cases", "through_the_driver", cases=cases, wider=wider)
    assert seen.result == len(cases) and len(seen.calls("cuLaunchKernel")) > 5 * len(cases)


def test_a_mask_of_a_static_cache_goes_in_whole_and_never_beyond_the_rows() -> None:
    query, latent = torch.zeros(1, 2, 8), torch.zeros(1, 1, 50, 4)
    widths = {20: 20, 50: 50, 64: 50, 1: 2}  # two tokens: less is refused
    for given, taken in widths.items():
        assert operator.most_columns(torch.ones(1, 1, 2, given), query, latent) == taken


@pytest.mark.usefixtures("as_device")
def test_what_no_kernel_takes_goes_to_torch_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    call = call_of(SIMPLE)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            context = call()
    check(call, context, FLOAT32)
    assert caplog.text.count("torch's own operators compute latent attention on this device") == 1
    assert "there are no kernels for torch's device type cpu" in caplog.text


@needs_library
@pytest.mark.usefixtures("as_device")
def test_unsupported_by_the_kernels_is_not_an_error_and_bad_input_is(
    recorder: list[Recorder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = call_of(SIMPLE)
    monkeypatch.setattr(operator, "_has_kernels", lambda _: True)
    monkeypatch.setattr(Recorder, "refusal", Unsupported("LatentAttention: the model is float32"))
    check(call, call(), FLOAT32)
    assert "on this device, several times slower: LatentAttention: the model is float32" in caplog.text
    assert not any(made.calls for made in recorder)
    monkeypatch.setattr(Recorder, "refusal", MlaPassError("LatentAttention: input row is absent"))
    with pytest.raises(MlaPassError, match="input row is absent"):
        unchanged(call, call)
    monkeypatch.setattr(Recorder, "refusal", None)
    check(call, call(), FLOAT32)
    assert len(recorder[-1].calls) == 1


@pytest.mark.usefixtures("as_device")
def test_without_the_library_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(operator, "_has_kernels", lambda _: True)
    monkeypatch.setattr(native, "find_library", lambda: None)
    call = call_of(SIMPLE)
    check(call, call(), FLOAT32)
    assert "several times slower: the op library is not built" in caplog.text


@pytest.mark.usefixtures("as_device")
def test_tensors_of_two_devices_are_refused() -> None:
    call = call_of(SIMPLE)
    call["key_up"] = call["key_up"].to("meta")
    with pytest.raises(MlaPassError, match="key_up is on meta and query on cpu; expected all tensors on one device"):
        operator.latent_attention._init_fn(*call.operands, call.attributes)


# ---- what torch.compile and the caches see


def test_a_compiler_sees_shapes_and_devices() -> None:
    call = call_of(replace(SIMPLE, batch=2))
    with FakeTensorMode() as mode:
        fakes = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in call.operands]
        context = operator.latent_attention(*fakes, call.attributes)
    case = call.drawn.case
    assert context.device.type == "cuda" and context.dtype == torch.float32 and mode is context.fake_mode
    assert context.shape == (2, 1, case.heads * case.value_dim)


def test_the_operator_does_what_its_schema_says() -> None:
    call = call_of(replace(SIMPLE, padding=True))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator.latent_attention, (*call.operands, call.attributes), test_utils=checks)
    torch.library.opcheck(operator.latent_update, tuple(update_of(UPDATED)), test_utils=checks)


def layer_of(case: Case) -> tuple[Call, LatentLayer]:
    """A block with the numbers of a case; the attention's own maps go with every call."""
    call = call_of(case)
    told = json.loads(call.attributes)
    names = (
        "num_heads", "kv_groups", "rank", "key_rank", "value_offset", "rope_dim", "nope_dim", "rope_index",
        "band_index", "band_block", "band_a0", "band_a1", "scale", "softcap",
    )  # fmt: skip
    spec = LayerSpec(
        name="layer", layer=0, head_dim=case.head_dim, value_dim=case.value_dim, window=case.window,
        theta=tuple(float(x) for x in call.drawn.theta), rotary_dim=2 * len(call.drawn.theta), interleaved=False,
        attention_scaling=1.0, latent_dtype=case.latent, rope_dtype=case.rope, **{name: told[name] for name in names},
    )  # fmt: skip
    return call, LatentLayer(spec, {})


@pytest.mark.parametrize("static", [False, True])
def test_caches_count_where_their_rows_are(static: bool) -> None:
    layer = layer_of(SIMPLE)[1]
    rows = StaticLatentRows(layer, 64, 32) if static else LatentRows(layer, 64)
    rows.start(2, torch.float16, torch.device("meta"))
    total = rows.extend(3)
    rows.keep(total)
    assert total.device.type == "meta" and total.shape == (1,) and total.dtype == torch.int64


@pytest.mark.usefixtures("as_device")
def test_a_step_of_a_static_cache_waits_for_nothing() -> None:
    call, layer = layer_of(replace(SIMPLE, past=0, new=1))
    rows, maps = StaticLatentRows(layer, 64, 32), {name: call[name] for name in OPERANDS[-4:]}
    rows.start(1, torch.float32, torch.device("cpu"))
    with Waits():
        for _ in range(3):
            positions = rows.positions(1)
            rows.attend(call["query"], call["row"], maps, position_ids=positions, mask=None)
    assert int(rows.get_seq_length()) == 3 and positions.tolist() == [[2]]


# ---- on a device


gpu = pytest.mark.gpu


@pytest.fixture
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own operators computing in the kernels' place are a failure."""
    forbid_torch(monkeypatch)


def forbid_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(reason: str) -> None:
        raise AssertionError(f"no kernel took it: {reason}")

    monkeypatch.setattr(operator, "_say_that_torch_computes", fail)


def agree(found: Tensor, right: Tensor, dtype: str) -> None:
    """Two implementations, each as far from the truth as it may be."""
    atol = 2 * ERROR[dtype] * max(float(right.double().abs().max()), 1e-3)
    np.testing.assert_allclose(as_numpy(found), as_numpy(right), rtol=0, atol=atol)


GPU_CASES = {name: case for name, case in CASES.items() if name != "mixed"} | {
    "long": replace(SIMPLE, past=3000, batch=2, blocks=(1, 16, 64, 256, 1024), rank=288, key_rank=288, rope_dim=32),
    "wide": replace(SIMPLE, rank=512, key_rank=512, rope_dim=64, value_dim=128, groups=1, per_group=16),
    "long_prompt": replace(SIMPLE, past=0, new=300, blocks=(4, 64, 128)),
    "prompt_behind_rows": replace(SIMPLE, past=200, new=150, batch=2, padding=True),
    "int8_rope": replace(SIMPLE, latent="int8", rope="int8", rank=35, key_rank=35),
}


@gpu
@pytest.mark.usefixtures("kernels_alone")
@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wider", [0, 3])
def test_kernels_equal_the_reference_and_the_cpu(name: str, dtype: str, wider: int) -> None:
    call = call_of(replace(GPU_CASES[name], dtype=dtype), wider=wider)
    there = call.to("cuda")
    before = [x.data_ptr() for x in parts(there)]
    context = there()
    assert before == [x.data_ptr() for x in parts(there)]  # in place
    check(there, context, ERROR[dtype])
    agree(context, call(), dtype)


@gpu
@pytest.mark.parametrize("name", CASES)
def test_float32_goes_to_torch_and_agrees(name: str) -> None:
    call = call_of(CASES[name])
    there = call.to("cuda")
    context, right = there(), call()
    check(there, context, 1e-3)  # torch may be told to multiply in TF32
    np.testing.assert_allclose(as_numpy(context), as_numpy(right), rtol=0, atol=1e-3 * float(right.abs().max()))


@gpu
@pytest.mark.usefixtures("kernels_alone")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["plain", "short_bands", "several_tokens", "window", "softcap", "odd_rank", "int8"])
def test_triton_and_the_fused_kernels_agree(name: str, dtype: str) -> None:
    pytest.importorskip("triton")
    from mla_pass.pytorch.triton_decode import latent_attention

    call = call_of(replace(CASES[name], dtype=dtype))
    fused, other = call.to("cuda"), call.to("cuda")
    attributes, operands = other.as_node()
    agree(latent_attention(attributes, operands), fused(), dtype)


def step(call: Call, number: int) -> None:
    """Other tokens, one row on, in the memory of those before."""
    c, rng = call.drawn.case, np.random.default_rng(number)
    for name in ("query", "row"):
        call[name].copy_(as_torch(rng.standard_normal(call[name].shape)))
    call["total_length"].fill_(c.total + number)
    call["position_ids"].copy_(as_torch(call.drawn.position[:, c.past :] + number))


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, and what it will have computed after each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@gpu
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
@pytest.mark.parametrize("name", ["short_bands", "int8", "several_tokens", "window"])
@pytest.mark.parametrize("wider", [0, 8])
def test_a_captured_step_is_replayed_while_the_cache_grows(
    name: str, dtype: str, wider: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a mask, and with one as wide as the buffer, which hides nothing behind the filled rows."""
    if dtype != "float32":
        forbid_torch(monkeypatch)
    call = call_of(replace(CASES[name], dtype=dtype, spare=8), wider=wider)
    there = call.to("cuda")
    graph, context = captured(there)
    call()  # its rows, too, are in the cache by now
    for number in range(1, 7):
        step(call, number)
        step(there, number)
        graph.replay()
        agree(context, call(), "float16" if dtype == "float32" else dtype)  # torch may be told to multiply in TF32
    there["total_length"].fill_(10**6)
    graph.replay()
    assert context.isnan().all()


@gpu
def test_a_captured_update_is_replayed() -> None:
    here, there = update_of(UPDATED), update_of(UPDATED, "cuda")
    graph, (keys, values) = captured(lambda: operator.latent_update(*there))
    operator.latent_update(*here)
    for number in range(1, 4):
        for operands in (here, there):
            operands[7].fill_(UPDATED.total + number)
            operands[6].add_(1)
        graph.replay()
        right = operator.latent_update(*here)
        for found, want in zip((keys, values), right, strict=True):
            torch.testing.assert_close(found.cpu(), want, rtol=0, atol=2e-3 * float(want.abs().max()))


@gpu
@pytest.mark.usefixtures("kernels_alone")
def test_other_streams_and_other_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    calls = [call_of(replace(CASES["short_bands"], dtype="float16", seed=i)) for i in range(6)]
    there = [call.to("cuda") for call in calls]
    torch.cuda.synchronize()

    def run(call: Call) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            return call().cpu()

    with ThreadPoolExecutor(3) as pool:
        for call, found in zip(calls, pool.map(run, there), strict=True):
            agree(found, call(), "float16")


@gpu
@pytest.mark.usefixtures("kernels_alone")
def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    call = call_of(replace(CASES["short_bands"], dtype="float16"))
    there = call.to("cuda:1")
    context = there()
    assert context.device.index == 1 and torch.cuda.current_device() == 0
    agree(context, call(), "float16")


@gpu
@pytest.mark.usefixtures("kernels_alone")
def test_compiled_code_calls_the_kernels() -> None:
    call = call_of(replace(CASES["short_bands"], dtype="float16"))
    there, eager = call.to("cuda"), call.to("cuda")

    @torch.compile(fullgraph=True)
    def run(*operands: Any) -> Tensor:
        return operator.latent_attention(*operands, call.attributes) * 2 + 1

    found = run(*there.operands)
    torch.testing.assert_close(found, eager() * 2 + 1, rtol=1e-2, atol=1e-3)
    for a, b in zip(parts(there), parts(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@gpu
@pytest.mark.usefixtures("kernels_alone")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_converted_model_decodes_as_on_the_cpu(mode: str | None) -> None:
    """Static cache, masks as transformers makes them, whole steps compiled, in a CUDA graph with reduce-overhead."""
    from tests.checkpoints import converted, padded

    torch._dynamo.reset()
    made, (ids, mask, positions) = converted("llama"), padded()
    right = logits(made.model().to(torch.float16), "cpu", ids, mask, positions, None)
    model = made.model().to("cuda", torch.float16)
    compiled = torch.compile(model, mode=mode, fullgraph=True) if mode else model
    found = logits(model, "cuda", ids, mask, positions, compiled)
    seen = mask.bool()
    torch.testing.assert_close(found[seen], right[seen], rtol=0, atol=2e-2 * float(right[seen].abs().max()))


def logits(model: Any, device: str, ids: Tensor, mask: Tensor, positions: Tensor, compiled: Any) -> Tensor:
    """Of a prompt and then token by token, float32 on the CPU; the mask is as wide as the cache in every step."""
    rows, prompt, found = 40, 9, []
    mask = torch.nn.functional.pad(mask, (0, rows - mask.shape[1]), value=1)
    ids, mask, positions = (x.to(device) for x in (ids, mask, positions))
    cache = model.latent_cache(rows)
    with torch.no_grad():
        for start, end in ((0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))):
            act = model if start == 0 or compiled is None else compiled
            now = {"input_ids": ids[:, start:end].clone(), "position_ids": positions[:, start:end].clone()}
            found.append(act(attention_mask=mask, past_key_values=cache, **now).logits.float().cpu())
    return torch.cat(found, 1)
