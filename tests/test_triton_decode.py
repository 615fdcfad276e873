"""The Triton kernel against the float64 reference and the CPU kernel.

Compiled where there is a CUDA device. Elsewhere its interpreter runs the same tests on the CPU; it is chosen when the
module is first imported, so they run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from mla_pass.errors import Unsupported
from tests.native_cases import FLOAT32_ERROR, ROUNDING, Case, cases, environment, float32_isa, needs_library, replace
from tests.torch_cases import as_numpy, call_of, check, parts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# numpy, which the interpreter computes with, has no bfloat16.
TYPES = ("float32", "float16") if INTERPRETED else ("float32", "float16", "bfloat16")
# Queries, decoded keys, weights and the result are rounded to the model's type, once each; a score's error counts as
# often as the score is large, here at most 8 or so.
ERROR = {name: 8 * error + FLOAT32_ERROR for name, error in ROUNDING.items()}
KINDS = 60
"""Tests below that are marked to need a GPU, at the least: none of them may be lost on the way to the interpreter."""


def test_the_rest_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=290)
    assert ran.returncode == 0, ran.stdout[-4000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) >= KINDS and "skipped" not in ran.stdout, ran.stdout[-500:]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kind", "values", "tile"), [("fp16", 512, 32), ("bf16", 256, 64), ("fp32", 512, 16)])
def test_compiles_for_devices_that_are_not_here(capability: int, kind: str, values: int, tile: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mla_pass.pytorch.triton_decode import _meet

    floats = {"mean", "sums", "tops", "masses"}
    numbers = {"varying", "rope_query", "fine_query", "latent", "rope", "fine", "bias"}

    def type_of(name: str) -> str:
        if name.isupper():
            return "constexpr"
        pointers = {**dict.fromkeys(floats, "*fp32"), **dict.fromkeys(numbers, f"*{kind}"), "filled": "*i64"}
        return pointers.get(name, "fp32" if name in ("scale", "softcap") else "i32")

    constants = {
        "ORDERS": 2, "WINDOW": 100, "CAUSAL": True, "CAPPED": True, "BIASED": True, "ROWS": 16, "TILE": tile,
        "STEP": 32, "VALUES": values,
    }  # fmt: skip
    names = _meet.arg_names
    source = ASTSource(
        _meet, {name: type_of(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert 0 < compiled.metadata.shared <= 99 * 1024  # the least that a device of today has


def triton_context(call: Any, splits: int = 3) -> torch.Tensor:
    from mla_pass.pytorch.triton_decode import latent_attention

    attributes, operands = call.as_node()
    return latent_attention(attributes, operands, splits=splits)


SIMPLE = Case(padding=False, past=150)
CASES = {
    "plain": SIMPLE,
    "first_token": replace(SIMPLE, past=0),
    "prompt": replace(SIMPLE, past=0, new=40),
    "several_tokens": replace(SIMPLE, new=5, batch=2),
    "end_of_a_tile": replace(SIMPLE, past=63),
    "next_tile": replace(SIMPLE, past=64),
    "odd_rank": replace(SIMPLE, rank=37, key_rank=29, value_offset=11, rope_dim=6),
    "no_rope": replace(SIMPLE, rope_dim=0),
    "rope_alone": replace(SIMPLE, still=0),
    "one_group": replace(SIMPLE, groups=1, per_group=7),
    "many_heads": replace(SIMPLE, groups=3, per_group=20, new=2),
    "bands": replace(SIMPLE, past=300, blocks=(64, 64, 256)),
    "bands_order_0": replace(SIMPLE, past=300, blocks=(64, 128), order=0),
    "short_bands": replace(SIMPLE, past=300, blocks=(1, 1, 4, 16, 64, 64, 256)),
    "short_bands_alone": replace(SIMPLE, blocks=(1, 4, 32), still=0, rope_dim=0),
    "block_of_no_whole_tiles": replace(SIMPLE, past=300, blocks=(96, 192)),
    "window": replace(SIMPLE, past=300, window=70, new=3),
    "window_of_one": replace(SIMPLE, window=1),
    "softcap": replace(SIMPLE, softcap=2.0),
    "padding": replace(SIMPLE, padding=True, batch=3, hide_inside=True),
    "bias_of_heads": replace(SIMPLE, bias="bh", batch=2, new=3),
    "shared_bias": replace(SIMPLE, bias="-", batch=2, new=3),
    "sees_later_tokens": replace(SIMPLE, causal=False, new=4),
    "no_maps": replace(SIMPLE, query_map=False, key_up=False, value_up=False),
    "int8": replace(SIMPLE, latent="int8", blocks=(4, 64)),
    "float8": replace(SIMPLE, latent="float8", rope="float8"),
    "mixed": replace(SIMPLE, latent="float16", rope="float16"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", TYPES)
def test_reference_and_kernel_agree(case: Case, dtype: str) -> None:
    call = call_of(replace(case, dtype=dtype)).to(DEVICE)
    check(call, triton_context(call), ERROR[dtype])


@pytest.mark.gpu
@given(cases())
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_node(case: Case) -> None:
    dtype = case.dtype if case.dtype in TYPES else "float16"
    new = min(case.new, 5)
    call = call_of(replace(case, cut=-1.0, shared=True, dtype=dtype, new=new), wider=case.spare).to(DEVICE)
    check(call, triton_context(call), ERROR[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2, 7, 50])
def test_any_number_of_splits_gives_the_same(splits: int) -> None:
    call = call_of(replace(CASES["short_bands"], batch=2))
    right = triton_context(call.to(DEVICE), 1)
    found = triton_context(call.to(DEVICE), splits)
    np.testing.assert_allclose(as_numpy(found), as_numpy(right), rtol=0, atol=1e-5 * float(right.abs().max()))


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["short_bands", "padding", "int8", "softcap"])
def test_the_cpu_kernel_agrees(name: str, dtype: str) -> None:
    call = call_of(replace(CASES[name], dtype=dtype))
    there, here = call.to(DEVICE), call.to("cpu")
    with environment(float32_isa()):
        right = here()
    found = triton_context(there)
    np.testing.assert_allclose(
        as_numpy(found), as_numpy(right), rtol=0, atol=2 * ERROR[dtype] * max(float(right.abs().max()), 1e-3)
    )
    for a, b in zip(parts(there), parts(here), strict=True):
        rows = slice(0, call.drawn.case.total)
        if a.dtype == torch.int8:  # a number half way may go either way
            assert (a[:, :, rows].int().cpu() - b[:, :, rows].int()).abs().max() <= 1
        else:
            torch.testing.assert_close(a[:, :, rows].cpu(), b[:, :, rows], rtol=2 * ROUNDING[dtype] + 1e-6, atol=1e-6)


@pytest.mark.gpu
def test_more_rows_than_there_is_room_for_are_nan_and_not_written() -> None:
    call = call_of(replace(SIMPLE, spare=0)).to(DEVICE)
    call["total_length"] += 1
    before = [x.clone() for x in parts(call)]
    assert triton_context(call).isnan().all()
    for now, then in zip(parts(call), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(Unsupported, match="rows cut behind their latent"):
        triton_context(call_of(replace(SIMPLE, cut=0.5)).to(DEVICE))
