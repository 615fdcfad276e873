"""The launches that the library plans for a call on a GPU, on a machine that has none.

`cuda_plan.cc` and the library's own files that plan a call are compiled with the host's compiler; a call's sizes and
what a device has go in, kernels, grids, shared memory and the parameters that decide their work come out.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_machines import Machine
from mla_pass.errors import MlaPassError
from mla_pass.fold.bands import Bands, choose_bands, no_bands
from mla_pass.native import kernel
from mla_pass.native.kernel import Operand
from mla_pass.onnx.body import INPUTS

NATIVE = Path(__file__).parents[1] / "mla_pass" / "native"
BAND_ANGLE = 1.0
ROPE_DIM = 64
_ROOM = 64 << 20
_LINE = 1 << 30  # between addresses that nobody reads


@dataclass(frozen=True)
class Model:
    """A model's attention: `heads` query heads share `groups` key heads of `size` numbers, turned to base `theta`."""

    name: str
    heads: int
    groups: int
    size: int
    theta: float


MODELS = (
    Model("LLaMA-3-8B", 32, 8, 128, 5e5),
    Model("Qwen2.5-7B", 28, 4, 128, 1e6),
    Model("LLaMA-2-7B", 32, 32, 128, 1e4),
    Model("SmolLM2-135M", 9, 3, 64, 1e5),
)


@dataclass(frozen=True)
class Shape:
    """A decoding step of one layer: `batch` sequences of `rows` cached rows, of `rank` + 64 16-bit numbers.

    `finest` 0: no bands; else the rows of the finest block, whose turns are followed to `order` 0 or 1. Keys read
    `key_rank` of the latent's columns, all where it is None.
    """

    model: Model
    rank: int
    batch: int
    rows: int
    order: int = 0
    finest: int = 0
    key_rank: int | None = None
    dtype: str = "bfloat16"

    @property
    def row_bytes(self) -> int:
        return 2 * (self.rank + ROPE_DIM)

    @property
    def cache_bytes(self) -> int:
        """What a step has to read."""
        return self.batch * self.rows * self.row_bytes

    @property
    def full_bytes(self) -> int:
        """The same of the original's keys and values."""
        return self.batch * self.rows * 4 * self.model.groups * self.model.size

    def bands(self) -> Bands:
        pairs = self.model.size // 2
        if self.finest == 0:
            return no_bands(pairs)
        theta = self.model.theta ** (-np.arange(pairs) / pairs)
        return choose_bands(theta, finest=self.finest, order=self.order, band_angle=BAND_ANGLE)

    def attributes(self) -> dict[str, Any]:
        bands, model = self.bands(), self.model
        return {
            "num_heads": model.heads, "kv_groups": model.groups, "rank": self.rank,
            "key_rank": self.key_rank or self.rank, "value_offset": 0, "rope_dim": ROPE_DIM, "nope_dim": model.size,
            "split": self.rank, "local_window_size": -1, "causal": 1, "shared_buffer": 1,
            "rope_index": [i % (model.size // 2) for i in range(ROPE_DIM // 2)], "band_index": bands.index.tolist(),
            "band_block": bands.block.tolist(), "band_a0": bands.a0.tolist(), "band_a1": bands.a1.tolist(),
            "scale": model.size**-0.5, "softcap": 0.0,
        }  # fmt: skip

    def dims(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs; the query map is folded into the projections, key_up and value_up are not."""
        model, key_rank = self.model, self.key_rank or self.rank
        return {
            "query": (self.batch, 1, model.heads * (model.size + ROPE_DIM)),
            "row": (self.batch, 1, self.rank + ROPE_DIM),
            "past_latent": (self.batch, 1, self.rows, self.rank),
            "past_rope": (self.batch, 1, self.rows, ROPE_DIM),
            "cos": (self.rows, model.size // 2),
            "sin": (self.rows, model.size // 2),
            "position_ids": (self.batch, 1),
            "total_length": (1,),
            "key_up": (model.groups, model.size, key_rank),
            "key_mean": (model.groups, model.size),
            "value_up": (model.groups, self.rank, model.size),
        }

    def operands(self) -> list[Operand | None]:
        types = dict.fromkeys(("cos", "sin"), "float32") | dict.fromkeys(("position_ids", "total_length"), "int64")
        dims = self.dims()
        return [
            Operand((i + 1) * _LINE, types.get(name, self.dtype), dims[name]) if name in dims else None
            for i, name in enumerate(INPUTS)
        ]


@dataclass(frozen=True)
class Launch:
    """One kernel; `work` are those of its parameters that decide how much it does, by the names in params.h."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    work: Mapping[str, int]

    @property
    def ctas(self) -> int:
        x, y, z = self.grid
        return x * y * z


class _Device(ctypes.Structure):
    _fields_ = (
        ("cache_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("major", "minor", "processors", "shared_bytes")),
    )


@cache
def _library() -> ctypes.CDLL:
    names = ("launches", "parameters", "plan", "tiling")
    native = (*(NATIVE / "cuda" / f"{name}.cc" for name in names), NATIVE / "contract.cc")
    sources = [Path(__file__).with_name("cuda_plan.cc"), *native]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "plan.so")
        command = ["c++", "-O1", "-std=c++17", "-shared", "-fPIC", *map(str, sources), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


@cache
def _text() -> ctypes.Array[ctypes.c_char]:
    """Room for what the library says, the same for all calls: they read it before the next one."""
    return ctypes.create_string_buffer(_ROOM)


def launches(shape: Shape, machine: Machine) -> list[Launch]:
    """What the library would launch, in order. Raises MlaPassError where it would refuse."""
    given, text, attributes = kernel._Attributes(), _text(), shape.attributes()
    lists = [kernel._fill(given, name, kind, attributes) for name, kind in kernel._FIELDS]
    device = _Device(machine.cache_bytes, *machine.capability, machine.processors, machine.shared_cta)
    operands = kernel._packed(shape.operands())
    failed = _library().mla_pass_model_launches(
        ctypes.byref(given), operands, ctypes.byref(device), text, ctypes.c_size_t(_ROOM)
    )
    del lists
    said = text.value.decode()
    if failed:
        raise MlaPassError(said if failed == 1 else f"the launches of {shape} take more than {_ROOM} bytes of text")
    return [launch_of(json.loads(line)) for line in said.splitlines()]


def launch_of(told: Mapping[str, Any]) -> Launch:
    x, y, z = told["grid"]
    return Launch(told["kernel"], (x, y, z), told["threads"], told["shared_bytes"], told["work"])
