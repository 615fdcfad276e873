"""What is asked of a conversion, and everything that can be refused before any work is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import FORMATS, has_tokenizer, quiet, require_free, require_libraries
from mla_pass.export.tracing import DTYPES
from mla_retrofit.sizes import conversion_config, read_shape

FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Request:
    """The guide's words and ours; see `convert_to_mla` for what they mean."""

    model: str
    output_dir: Path | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_mode: str | None = None
    absorb: bool = False
    flash_attn: bool = False
    loaded: bool = True
    """The converted model is wanted in memory, with its tokenizer."""
    dtype: str | None = None
    calibrate: Any = "self"
    budget: float | None = None
    format: str = "hf"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of MlaConfig."""


@dataclass(frozen=True)
class Plan:
    """A request that can be served, as far as one can tell: the model's folder, and the conversion it comes to."""

    folder: Path
    config: MlaConfig


def plan(request: Request) -> Plan:
    """Find the model and settle its sizes. Raises MlaPassError for whatever is asked in vain."""
    for name, value, offered in (("format", request.format, FORMATS), ("dtype", request.dtype, (None, *DTYPES))):
        if value not in offered:
            raise MlaPassError(f"{name} must be one of {', '.join(filter(None, offered))}; got {value!r}")
    if request.format == "onnx" and request.dtype not in (None, "float32"):
        raise MlaPassError(
            f"dtype is of the checkpoint, and the ONNX graph is float32; for a graph in {request.dtype} run "
            f"mla-pass export --dtype {request.dtype}, then mla-pass convert"
        )
    if request.output_dir is not None:
        require_free(request.output_dir)  # saving asks again; here it costs no minutes first
    require_libraries("torch", "transformers", purpose="converting a checkpoint")
    folder, config = read_model(request.model)
    if request.loaded and not has_tokenizer(folder):
        raise MlaPassError(f"{folder} holds no tokenizer to return or to test with; copy the model's files of it there")
    if request.flash_attn:
        require_flash(request.dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch."))
    words = {name: getattr(request, name) for name in ("num_kv_heads", "head_dim", "rope_mode", "absorb", "budget")}
    return Plan(folder, conversion_config(read_shape(config, request.model), **words, **request.options))


def read_model(name: str) -> tuple[Path, Any]:
    """The folder of a model named by path or by hub id, and its configuration. Raises MlaPassError."""
    from transformers import AutoConfig

    from mla_pass.export.tracing import first_line, locate

    with quiet():
        folder = locate(name)
        try:
            return folder, AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise MlaPassError(f"{folder}/config.json cannot be read: {first_line(error)}") from error


def require_flash(dtype: str) -> None:
    """Raise an MlaPassError that names what flash attention lacks here."""
    import torch

    missing = []
    if importlib.util.find_spec("flash_attn") is None:
        missing.append("the package flash-attn (pip install flash-attn)")
    if not torch.cuda.is_available():
        missing.append("a CUDA device")
    if dtype == "float32":
        missing.append("a model of 16 bits (dtype float16 or bfloat16)")
    if missing:
        raise MlaPassError(f"flash attention needs {' and '.join(missing)}, not found here: leave it out, or add that")
