"""Models from and to disk: checked before anything is done with them, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from mla_pass.errors import MlaPassError
from mla_pass.export.layout import DATA_FILE, MODEL_FILE
from mla_pass.onnx.session import model_path

INLINE_BYTES = 256
"""Smaller weights stay in the .onnx file itself."""


def load_model(source: str | Path) -> ir.Model:
    """Read ``source`` (a folder with model.onnx, or an .onnx file); weights stay on disk until they are needed.

    Raises MlaPassError when it is missing, not an ONNX model, or when its external data is missing or cut short.
    """
    path = model_path(source)
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, OSError) as error:
        raise MlaPassError(f"{path} cannot be read as an ONNX model: {first_line(error)}; export it again") from error
    if not list(model.graph):
        raise MlaPassError(f"{path} holds no graph; expected an ONNX model with nodes")
    check_external(path, external_tensors(model))
    return model


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Weights that lie in files beside the model."""
    values = (value.const_value for value in model.graph.initializers.values())
    return [tensor for tensor in values if isinstance(tensor, ir.ExternalTensor)]


def check_external(path: Path, tensors: Iterable[ir.ExternalTensor]) -> None:
    """Every tensor must lie within its file. Raises MlaPassError naming the first that does not."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        file = Path(tensor.path)
        if tensor.path not in sizes:
            if not file.is_file():
                raise MlaPassError(f"{path} keeps its weights in {file}, which does not exist; put it beside the model")
            sizes[str(tensor.path)] = file.stat().st_size
        end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
        if end > sizes[str(tensor.path)]:
            raise MlaPassError(
                f"{file} is cut short: weight {tensor.name!r} ends at byte {end}, the file at "
                f"{sizes[str(tensor.path)]}; copy or export the model again"
            )


def save_model(model: ir.Model, folder: Path) -> None:
    """Write model.onnx and model.onnx.data into an existing folder, one weight at a time."""
    ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=INLINE_BYTES)
