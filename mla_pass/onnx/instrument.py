"""The original graph with each site's query, key and value as extra outputs, ready to run over text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mla_pass.calibrate import Run
from mla_pass.errors import MlaPassError
from mla_pass.onnx.io import external_tensors
from mla_pass.onnx.session import ort_errors
from mla_pass.site import AttentionSite, Branch

# Where external data lies when a model is given as bytes.
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def heads_first(array: np.ndarray, branch: Branch) -> np.ndarray:
    """A branch's value of one sequence, as the graph lays it out with B = 1, as float32 [T, heads, size]."""
    array = array.astype(np.float32)[0]
    if branch.layout == "BHSD":
        array = array.swapaxes(0, 1)
    return array.reshape(array.shape[0] if branch.layout != "BSE" else len(array), branch.heads, branch.head_dim)


def instrument(model: ir.Model, sites: Sequence[AttentionSite]) -> Run:
    """Open a copy of `model` that computes the sites' branches and nothing beyond.

    Raises MlaPassError when ONNX Runtime cannot run it, or when its weights lie in several folders.
    """
    import onnxruntime

    copy = model.clone()
    branches = [branch for site in sites for branch in (site.query, site.key, site.value)]
    wanted = {branch.value.name for branch in branches}
    found = {value.name: value for node in copy.graph for value in node.outputs if value.name in wanted}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(found.values())
    RemoveUnusedNodesPass()(copy)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions
    folders = {str(tensor.base_dir) for tensor in external_tensors(copy)}
    if len(folders) > 1:
        raise MlaPassError(f"the model's weights lie in several folders, {sorted(folders)}; save it to one first")
    for folder in folders:
        options.add_session_config_entry(EXTERNAL_FOLDER, str(Path(folder).resolve()))
    with ort_errors("ONNX Runtime cannot open the model for calibration"):
        session = onnxruntime.InferenceSession(
            ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    names = list(found)
    kinds = {port.name: port for port in session.get_inputs()}

    def forward(ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        feeds = {name: empty_feed(port, ids) for name, port in kinds.items()}
        with ort_errors("ONNX Runtime could not run the model for calibration"):
            values = dict(zip(names, session.run(names, feeds), strict=True))
        arrays = [heads_first(values[branch.value.name], branch) for branch in branches]
        return [(arrays[i], arrays[i + 1], arrays[i + 2]) for i in range(0, len(arrays), 3)]

    return Run(forward)


def empty_feed(port: Any, ids: np.ndarray) -> np.ndarray:
    """What an input of the exported kind gets for one sequence over an empty cache."""
    if len(port.shape) == 4:
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[port.type]
        return np.zeros((1, port.shape[1], 0, port.shape[3]), dtype)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(ids))}
    return feeds[port.name][None].astype(np.int64)
