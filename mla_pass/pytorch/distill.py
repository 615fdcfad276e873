"""How far a model's predictions are from another's, and the gradient of that, for token ids alone.

The loss of a position is KL(original || converted) in nats. Logits are large (tokens times vocabulary) and simple: one
product with a constant matrix at the end. So both models run up to that product, and the rest is done for a few tokens
at a time, each time all the way to the gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from mla_pass.errors import MlaPassError
from mla_pass.onnx.ports import graph_ports
from mla_pass.pytorch.graph import TorchGraph
from mla_pass.pytorch.trainable import constants

LOGITS = 1 << 24
"""Logits of one model that are alive at a time: 64 MiB."""
_POINTWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity"}


class Distillation:
    """A converted model beside its original, ready to be trained in some of its weights."""

    def __init__(
        self, original: ir.Model, converted: ir.Model, trained: Sequence[ir.Value], *,
        staggered: Collection[str] = (), device: str = "cpu",
    ) -> None:  # fmt: skip
        """`trained` are initializers of `converted`; of those that `staggered` names zeros stay.

        Raises MlaPassError as `TorchGraph` does, and when the vocabularies differ.
        """
        self.teacher, self.student = (_Predictor(model, device) for model in (original, converted))
        self.device, self.staggered = device, staggered
        self.teacher.check_vocabulary(self.student)
        self.parameters = {str(value.name): self.student.graph.parameters[str(value.name)] for value in trained}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self._share()

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.student.vocab

    def aim(self, ids: Tensor) -> Tensor:
        """What the original makes of token ids [B, S] before its logits; `divergence` takes it."""
        with torch.no_grad():
            return self.teacher.hidden(ids.to(self.device))

    def divergence(self, ids: Tensor, aim: Tensor) -> float:
        """Mean KL over all positions of token ids [B, S]; no gradient."""
        with torch.no_grad():
            found = self.student.hidden(ids.to(self.device))
            return sum(self._divergence(*pair).sum().item() for pair in self._pieces(aim, found)) / ids.numel()

    def backward(self, ids: Tensor, weight: float = 1.0) -> float:
        """Mean KL over all positions of token ids [B, S]; adds `weight` times its gradient to the parameters'."""
        aim, hidden = self.aim(ids), self.student.hidden(ids.to(self.device))
        leaf = hidden.detach().requires_grad_(True)
        total = 0.0
        for pair in self._pieces(aim, leaf):
            loss = self._divergence(*pair).sum()
            (loss * (weight / ids.numel())).backward()
            total += loss.item()
        hidden.backward(leaf.grad)
        return total / ids.numel()

    def rounded(self, value: ir.Value) -> ir.TensorProtocol:
        """A trained initializer as it is now, in the type it is stored in; from here on the run has that, too."""
        parameter, stored = self.parameters[str(value.name)], value.const_value
        assert stored is not None  # it is an initializer
        with torch.no_grad():
            array = parameter.cpu().numpy().astype(stored.dtype.numpy())
            parameter.copy_(torch.from_numpy(array.astype(np.float32)))
        return ir.tensor(array, name=value.name)

    def _pieces(self, *hidden: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """[B, S, .] -> pieces [1, n, .] of all, in step."""
        flat = [rows.reshape(1, -1, rows.shape[-1]) for rows in hidden]
        size = max(1, LOGITS // self.student.vocab)
        return zip(*(rows.split(size, dim=1) for rows in flat), strict=True)

    def _divergence(self, theirs: Tensor, ours: Tensor) -> Tensor:
        """KL of every position, from what lies before the logits, [1, n, .] each."""
        with torch.no_grad():
            aim = functional.log_softmax(self.teacher.logits(theirs), -1)
        found = functional.log_softmax(self.student.logits(ours), -1)
        return functional.kl_div(found, aim, reduction="none", log_target=True).sum(-1)

    def _share(self) -> None:
        """One tensor for weights that both models have: what was not converted is equal in both."""
        theirs, ours = self.teacher.graph.parameters, self.student.graph.parameters
        for name in theirs.keys() & ours.keys() - self.parameters.keys():
            if theirs[name].shape == ours[name].shape and torch.equal(theirs[name], ours[name]):
                theirs[name] = ours[name]


class _Predictor:
    """One model in two parts: tokens to hidden state, hidden state to logits."""

    def __init__(self, model: ir.Model, device: str) -> None:
        *_, self.output = graph_ports(model.graph)
        self.before = before_logits(model.graph, self.output)
        self.graph = TorchGraph(model, outputs=[self.output], device=device)
        self.vocab = self.logits(self.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device))).shape[-1]

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, S, E] for token ids [B, S]."""
        return self.graph.run(ids, wanted=[self.before])[self.before]

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, n, vocab] for [1, n, E]; every position by itself."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return self.graph.run(ids, wanted=[self.output], given={self.before: hidden})[self.output]

    def check_vocabulary(self, other: _Predictor) -> None:
        if self.vocab != other.vocab:
            raise MlaPassError(
                f"the models' vocabularies have {self.vocab} and {other.vocab} tokens: expected two versions of one "
                "model"
            )


def before_logits(graph: ir.Graph, logits: ir.Value) -> ir.Value:
    """The value whose product with a constant matrix the logits are, up to scaling and capping.

    The logits themselves where they come about otherwise: then all of them are in memory at once.
    """
    constant, value = constants(graph), logits
    while (node := value.producer()) is not None:
        varying = [operand for operand in node.inputs if operand is not None and operand not in constant]
        if len(varying) != 1:
            break
        if node.op_type == "MatMul" and node.inputs[0] is varying[0]:
            return varying[0]
        if node.op_type not in _POINTWISE:
            break
        value = varying[0]
    return logits
