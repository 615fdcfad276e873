"""The original graph with each site's query, key and value as extra outputs, ready to run over text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mla_pass.calibrate import Run
from mla_pass.errors import MlaPassError
from mla_pass.onnx.cut import constant_array, cut
from mla_pass.onnx.io import external_tensors
from mla_pass.onnx.session import ort_errors
from mla_pass.site import AttentionSite, Branch

# Where external data lies when a model is given as bytes.
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def heads_first(array: np.ndarray, branch: Branch) -> np.ndarray:
    """A branch's value of one sequence, as the graph lays it out with B = 1, as float32 [T, heads, size]."""
    array = array.astype(np.float32)[0]
    if branch.layout == "BHSD":
        array = array.swapaxes(0, 1)
    return array.reshape(len(array), branch.heads, branch.head_dim)


def instrument(model: ir.Model, sites: Sequence[AttentionSite]) -> Run:
    """Open a copy of `model` that computes the sites' branches and nothing beyond.

    Raises MlaPassError when ONNX Runtime cannot run it, or when its weights lie in several folders.
    """
    branches = [branch for site in sites for branch in (site.query, site.key, site.value)]
    if any(site.dtype == "bfloat16" for site in sites):
        run = run_widened(model, [branch.value for branch in branches])
    else:
        run = run_native(model, [str(branch.value.name) for branch in branches])

    def forward(ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        arrays = [heads_first(array, branch) for array, branch in zip(run(ids), branches, strict=True)]
        return [(arrays[i], arrays[i + 1], arrays[i + 2]) for i in range(0, len(arrays), 3)]

    return Run(forward)


def run_native(model: ir.Model, wanted: Sequence[str]) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The graph as it is, its weights read by ONNX Runtime from where they lie."""
    copy = model.clone()
    found = {value.name: value for node in copy.graph for value in node.outputs if value.name in set(wanted)}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(found.values())
    RemoveUnusedNodesPass()(copy)
    folders = {str(tensor.base_dir) for tensor in external_tensors(copy)}
    if len(folders) > 1:
        raise MlaPassError(f"the model's weights lie in several folders, {sorted(folders)}; save it to one first")
    session = open_session(ir.to_proto(copy), folders.pop() if folders else None)
    ports = {port.name: port for port in session.get_inputs()}

    def run(ids: np.ndarray) -> list[np.ndarray]:
        feeds = {
            name: empty_feed(name, port.shape, np.dtype(FLOATS.get(port.type, np.int64)), ids)
            for name, port in ports.items()
        }
        with ort_errors("ONNX Runtime could not run the model for calibration"):
            arrays = dict(zip(found, session.run(list(found), feeds), strict=True))
        return [arrays[name] for name in wanted]

    return run


def run_widened(model: ir.Model, wanted: Sequence[ir.Value]) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The graph in float32, weights widened in memory: ONNX Runtime's CPU has no bfloat16 arithmetic."""
    piece = cut(list(dict.fromkeys(wanted)), (), model.graph.opset_imports)
    session = open_session(piece.proto(), None)
    weights = {str(value.name): constant_array(value).astype(np.float32) for value in piece.weights if is_half(value)}
    weights |= {str(value.name): constant_array(value) for value in piece.weights if not is_half(value)}

    def run(ids: np.ndarray) -> list[np.ndarray]:
        feeds = {
            str(value.name): empty_feed(str(value.name), list(value.shape or ()), np.dtype(np.float32), ids)
            for value in piece.open
        }
        with ort_errors("ONNX Runtime could not run the model for calibration"):
            arrays = dict(zip(piece.outputs, session.run(None, weights | feeds), strict=True))
        return [arrays[value] for value in wanted]

    return run


def is_half(value: ir.Value) -> bool:
    """Whether a constant is stored in half precision."""
    return value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def open_session(proto: onnx.ModelProto, folder: str | None) -> Any:
    """An ONNX Runtime session on the CPU; `folder` holds the model's external data."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions
    if folder is not None:
        options.add_session_config_entry(EXTERNAL_FOLDER, str(Path(folder).resolve()))
    with ort_errors("ONNX Runtime cannot open the model for calibration"):
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def empty_feed(name: str, shape: Sequence[Any], dtype: np.dtype, ids: np.ndarray) -> np.ndarray:
    """What an input of the exported kind gets for one sequence over an empty cache."""
    if len(shape) == 4:
        return np.zeros((1, int(shape[1]), 0, int(shape[3])), dtype)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(ids))}
    if name not in feeds:
        raise MlaPassError(f"graph input {name} is unknown to calibration; expected {', '.join(feeds)} and the caches")
    return feeds[name][None].astype(np.int64)
