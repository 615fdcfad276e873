"""Tiny models converted once a test session, as checkpoint and as ONNX, from one and the same fold."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.families import FAMILIES, VOCAB, _session_folder, exported

CONTEXT = 64


@dataclass(frozen=True)
class Converted:
    """Folders of one conversion."""

    source: Path
    checkpoint: Path
    onnx: Path

    def original(self) -> Any:
        return load(self.source)

    def model(self) -> Any:
        import mla_pass.pytorch.modeling  # noqa: F401  registers the format

        return load(self.checkpoint)


def load(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from mla_pass.export.layout import quiet

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def text(tokens: int = 2048, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, tokens)


@functools.cache
def source(family: str) -> Path:
    """The family's model as a checkpoint of its own."""
    from mla_pass.export.layout import quiet

    folder = _session_folder() / f"{family}-source"
    with quiet():
        FAMILIES[family]().save_pretrained(folder)
    return folder


def converted(family: str, budget: float = 0.6, dtype: str | None = None, **options: Any) -> Converted:
    """`options` go into MlaConfig; with `dtype` there is a checkpoint of that type alone, and no ONNX.

    Read the folders, never write to them.
    """
    return _converted(family, budget, dtype, tuple(sorted(options.items())))


@functools.cache
def _converted(family: str, budget: float, dtype: str | None, options: tuple[tuple[str, Any], ...]) -> Converted:
    from mla_pass.config import MlaConfig
    from mla_pass.pytorch.convert import convert_checkpoint

    name = "-".join([family, str(budget), str(dtype), *(str(value) for _, value in options)])
    made = Converted(source(family), *(_session_folder() / f"{name}-{kind}" for kind in ("hf", "onnx")))
    config = MlaConfig(**{
        "budget": budget, "calibrate_tokens": 2048, "calibrate_context": CONTEXT, "metric": "output",
        "metric_mix": 0.1, **dict(options),
    })  # fmt: skip
    result = convert_checkpoint(made.source, config, calibrate=text(), exported=exported(family), dtype=dtype)
    result.save(made.checkpoint)
    if dtype is None:
        result.save_onnx(made.onnx)
    return made


def padded(rows: int = 3, length: int = 20) -> tuple[Any, Any, Any]:
    """Token ids, attention mask and positions [rows, length]; each row but the first is padded on its left."""
    import torch

    ids = torch.from_numpy(text(rows * length, seed=1).reshape(rows, length))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 3 + 2 * row] = 0
    return ids, mask, (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
