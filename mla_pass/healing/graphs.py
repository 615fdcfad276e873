"""Healing of an ONNX folder: both graphs as differentiable torch functions, trained initializers back into theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mla_pass.convert import read_text, self_written
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import MAX_POSITION_KEY, copy_companions
from mla_pass.healing.distill import before_logits
from mla_pass.healing.graph_weights import find_trainable
from mla_pass.healing.subject import Subject
from mla_pass.onnx.io import external_tensors, load_model, save_model
from mla_pass.onnx.ports import graph_ports
from mla_pass.onnx.session import model_path, session
from mla_pass.onnx.text import load_tokenizer
from mla_pass.onnx.view import OnnxView
from mla_pass.pytorch.graph import TorchGraph


class GraphSubject(Subject):
    """The .onnx files of an original and a converted model."""

    def __init__(self, original: Path, converted: Path, device: str) -> None:
        """Folders or files. Raises MlaPassError when one cannot be read, or the second is not converted."""
        self._paths = model_path(original), model_path(converted)
        self._models = load_model(self._paths[0]), load_model(self._paths[1])
        trainable = find_trainable(self._models[1])
        teacher, student = (GraphPredictor(model, device) for model in self._models)
        stated = (model.metadata_props.get(MAX_POSITION_KEY) for model in self._models)
        super().__init__(
            teacher, student, trainable, tuple(int(limit) for limit in stated if limit is not None),
            str(self._paths[0].parent), self._paths[1].parent,
        )  # fmt: skip

    def sources(self) -> Iterator[Path]:
        """See `Subject.sources`."""
        yield from self._paths
        yield from sorted({Path(tensor.path) for model in self._models for tensor in external_tensors(model)})

    def tokens(self, text: Path) -> tuple[np.ndarray, int | None]:
        """See `Subject.tokens`."""
        folder = self._paths[0].parent
        return read_text(text, folder), load_tokenizer(folder).leading_bos

    def written(self, rows: int, length: int) -> np.ndarray:
        """See `Subject.written`."""
        return self_written(self._paths[0], rows, length)

    def settle(self, name: str, weight: Tensor) -> Tensor:
        """See `Subject.settle`."""
        value = self._models[1].graph.initializers[name]
        assert value.const_value is not None  # it is an initializer
        array = weight.detach().cpu().numpy().astype(value.const_value.dtype.numpy())
        value.const_value = ir.tensor(array, name=name)
        return torch.from_numpy(array.astype(np.float32))

    def write(self, folder: Path) -> None:
        """See `Subject.write`."""
        model = self._models[1]
        save_model(model, folder)
        copy_companions(self._paths[1].parent, folder)
        kinds = {value.dtype for value in model.graph.outputs}
        # ONNX Runtime's CPU has no bfloat16 arithmetic: such a model is checked where it can run.
        if ir.DataType.BFLOAT16 not in kinds and not np.isfinite(session(folder).logits([[0, 0, 0]])).all():
            raise MlaPassError("the healed model's logits are not finite; nothing was written")


class GraphPredictor:
    """See `mla_pass.healing.subject.Predictor`."""

    def __init__(self, model: ir.Model, device: str = "cpu") -> None:
        """Raises MlaPassError as `TorchGraph` does."""
        *_, self._output = graph_ports(model.graph)
        self._before = before_logits(OnnxView.of(model), self._output)
        self._graph = TorchGraph(model, outputs=[self._output], device=device)
        self.parameters = self._graph.parameters
        self.vocab = self.logits(self.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device))).shape[-1]

    def hidden(self, ids: Tensor) -> Tensor:
        """See `Predictor.hidden`."""
        return self._graph.run(ids, wanted=[self._before])[self._before]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Predictor.logits`."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return self._graph.run(ids, wanted=[self._output], given={self._before: hidden})[self._output]
