"""Random nodes of `tests.native_cases` as calls of ``mla_pass::latent_attention``, and what is right for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mla_pass.pytorch import operator
from mla_pass.storage import CODED
from tests.native_cases import FLOAT32_ERROR, ROUNDING, STORING, Case, Drawn, as_numbers

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPERANDS = (
    "query", "row", "past_latent", "past_rope", "cos", "sin", "position_ids", "total_length", "mask", "query_map",
    "key_up", "key_mean", "value_up",
)  # fmt: skip
"""Of the torch operator, which has one mask in place of a padding_mask and a bias."""


@dataclass
class Call:
    """One call: its operands in the operator's order, and its attributes."""

    drawn: Drawn
    attributes: str
    operands: list[Tensor | None]

    def __call__(self) -> Tensor:
        return operator.latent_attention(*self.operands, self.attributes)

    def __getitem__(self, name: str) -> Any:
        return self.operands[OPERANDS.index(name)]

    def __setitem__(self, name: str, value: Tensor | None) -> None:
        self.operands[OPERANDS.index(name)] = value

    def to(self, device: Any) -> Call:
        """A copy with memory of its own."""
        moved = [None if x is None else x.to(device, copy=True) for x in self.operands]
        return Call(self.drawn, self.attributes, moved)

    def as_node(self) -> tuple[dict[str, Any], list[Tensor | None]]:
        """Attributes and operands in the order of `mla_pass.onnx.body.INPUTS`, the mask as a bias."""
        mask = self["mask"]
        bias = mask if mask is None or mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf)
        bias = None if bias is None else bias.to(self["query"].dtype)
        attributes = {**json.loads(self.attributes), "causal": int(mask is None)}
        return attributes, [*self.operands[:8], None, bias, *self.operands[9:]]


def call_of(case: Case, *, wider: int = 0, masked: bool = False) -> Call:
    """On the CPU. A mask is given, causality and window in it, where a case has padding, a bias, or is not causal, and
    where asked for; `wider`: its columns behind the filled rows, which hide nothing.

    The tables reach further than the cache.
    """
    drawn = Drawn(case)
    angle = np.outer(np.arange(case.total + case.spare + 9), drawn.theta)
    feeds = drawn.feeds() | {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    v = drawn.variant
    there = {"query_map": case.query_map, "key_up": case.key_up, "key_mean": case.key_up, "value_up": case.value_up}
    operands = [
        as_torch(feeds[name]) if name != "mask" and there.get(name, True) else None for name in OPERANDS
    ]  # fmt: skip
    names = (
        "num_heads", "kv_groups", "rank", "key_rank", "value_offset", "rope_dim", "nope_dim", "split", "band_index",
        "band_block", "band_a0", "band_a1", "scale", "softcap",
    )  # fmt: skip
    attributes = {name: getattr(v, name) for name in names} | {
        "rope_index": [int(x) for x in drawn.weights.rope_index], "local_window_size": v.window or -1, "causal": 1,
        "shared_buffer": 1,
    }  # fmt: skip
    call = Call(drawn, json.dumps(attributes), operands)
    if case.padding or case.bias or not case.causal or wider or masked:
        call["mask"] = mask_of(drawn, wider)
    return call


def mask_of(drawn: Drawn, wider: int) -> Tensor:
    """[B, 1 or H, S, T + wider], boolean or to be added as the case has no bias or has one."""
    c = drawn.case
    heads = c.heads if "h" in c.bias else 1
    mask = np.stack([[drawn.keep(b, h) for h in range(heads)] for b in range(c.batch)])
    mask = np.pad(mask, ((0, 0),) * 3 + ((0, wider),), constant_values=0.0 if c.bias else True)
    return torch.from_numpy(mask) if mask.dtype == bool else torch.from_numpy(mask).to(DTYPES[c.dtype])


def as_torch(x: np.ndarray) -> Tensor:
    """A copy of numpy's numbers, bfloat16 among them."""
    x = np.array(x)
    unknown = x.dtype.name == "bfloat16"  # to torch, from numpy
    return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) if unknown else torch.from_numpy(x)


def as_numpy(x: Tensor) -> np.ndarray:
    """The numbers, float64."""
    return x.detach().cpu().double().numpy()


def check(call: Call, context: Tensor, error: float) -> None:
    """The context against the float64 reference over the rows that are stored now, and these against what is right."""
    drawn = call.drawn
    c = drawn.case
    stored = [as_numbers(x.cpu().numpy()) if x.dtype in (torch.int8, torch.uint8) else as_numpy(x) for x in parts(call)]
    cache = np.concatenate([x[:, 0, : c.total] for x in stored], -1)
    right, cuts = drawn.cache(), (slice(0, c.rank), slice(c.rank, None))
    for cut, kind in zip(cuts, c.stored, strict=True):
        want = right[..., cut]
        # An eighth of a number is a float8's step, 1/116 of a segment's largest an int8's; half of it is lost.
        step = {"int8": 1 / 116, "float8": 1 / 8}[kind] / 2 if kind in CODED else STORING[kind]
        atol = (step + STORING[c.dtype] + FLOAT32_ERROR) * np.abs(want).max(initial=1)
        np.testing.assert_allclose(cache[..., cut], want, rtol=0, atol=atol)
    want = drawn.want(cache)
    np.testing.assert_allclose(as_numpy(context), want, rtol=0, atol=error * max(np.abs(want).max(), 1e-3))


def parts(call: Call) -> Sequence[Tensor]:
    """Both tensors of the cache."""
    return call["past_latent"], call["past_rope"]


def through_the_driver(cases: Sequence[dict[str, Any]], wider: int) -> int:
    """Number of calls that come out right where the CUDA driver takes this machine's memory for a device's.

    For a child of `tests.cuda_machine`; cases are fields of `Case` that differ from the default's.
    """
    patches = {"_on_host": lambda _: False, "_has_kernels": lambda _: True, "_current": lambda _: nullcontext((0, 0))}
    with mock.patch.multiple(operator, **patches, _say_that_torch_computes=_not_expected):
        for fields in cases:
            call = call_of(Case(**{**fields, "blocks": tuple(fields["blocks"])}), wider=wider)
            check(call, call(), 8 * ROUNDING[call.drawn.case.dtype])
    return len(cases)


def _not_expected(reason: str) -> None:
    raise AssertionError(f"no kernel took it: {reason}")
