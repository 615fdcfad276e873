"""What a conversion loses on text that calibration did not see, measured on models that are not saved yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mla_pass.errors import MlaPassError
from mla_pass.onnx.emit import DTYPES
from mla_pass.onnx.instrument import open_session
from mla_pass.onnx.io import external_tensors
from mla_pass.onnx.perplexity import token_losses
from mla_pass.onnx.ports import read_ports
from mla_pass.onnx.session import allocate, ort_errors, value_of
from mla_pass.site import AttentionSite

LARGEST_BYTES = 2_000_000_000
"""Weights that a model in memory can carry beside those in its data file: the limit of its message format."""

NEW_SHARE = 1.5
"""Room for folded query projections, which may be wider than those they replace."""


@dataclass(frozen=True)
class Excess:
    """Mean excess loss in nats per token over the held-out windows, and its paired standard error (None for one)."""

    mean: float
    stderr: float | None

    def __str__(self) -> str:
        spread = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        return f"{self.mean:.4f}{spread} nats per token"


class Probe:
    """The original's loss on windows of text, to hold converted models against."""

    def __init__(self, original: ir.Model, windows: np.ndarray) -> None:
        """`windows` [n, T] token ids. Raises MlaPassError when ONNX Runtime cannot run the model."""
        self.windows = windows
        self.before = window_losses(original, windows)

    def excess(self, converted: ir.Model) -> Excess:
        """How much more the converted model loses."""
        difference = window_losses(converted, self.windows) - self.before
        many = len(difference) > 1
        return Excess(
            float(difference.mean()),
            float(difference.std(ddof=1) / np.sqrt(len(difference))) if many else None,
        )


def can_probe(model: ir.Model, sites: Sequence[AttentionSite]) -> bool:
    """Whether ONNX Runtime's CPU can run conversions of the model from memory: no bfloat16, not too large.

    A conversion carries its new matrices within the message, and they are about as large as those they replace.
    """
    inner = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    )
    made = sum(
        float(np.prod(projection.weight.shape)) * DTYPES[site.dtype].itemsize
        for site in sites
        for projection in (site.query.projection, site.key.projection, site.value.projection, site.output)
    )
    return all(site.dtype != "bfloat16" for site in sites) and inner + NEW_SHARE * made < LARGEST_BYTES


def window_losses(model: ir.Model, windows: np.ndarray) -> np.ndarray:
    """Mean loss of every window [n], each from an empty cache."""
    folders = {str(tensor.base_dir) for tensor in external_tensors(model)}
    if len(folders) > 1:
        raise MlaPassError(f"the model's weights lie in several folders, {sorted(folders)}; save it to one first")
    session = open_session(ir.to_proto(model), folders.pop() if folders else None)
    cache, tokens, logits = read_ports(session.get_inputs(), session.get_outputs())
    length = windows.shape[1] - 1
    feeds = {tensor.past: allocate(tensor, 1, length if tensor.kind == "shared" else 0) for tensor in cache.tensors}
    losses = []
    for window in windows:
        ids = window[None, :-1]
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(length)[None]}
        feeds |= {name: value_of(given[name].astype(dtype)) for name, dtype in tokens.items()}
        with ort_errors("ONNX Runtime could not run the model on held-out text"):
            (found,) = session.run_with_ort_values([logits.name], feeds)
        losses.append(float(token_losses(found.numpy()[0], window[1:]).mean()))
    return np.array(losses)
