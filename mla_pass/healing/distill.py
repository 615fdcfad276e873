"""How far a model's predictions are from another's, and the gradient of that, for token ids alone.

The loss of a position is KL(original || converted) in nats. Logits are large (tokens times vocabulary) and simple: one
product with a constant matrix at the end. So both models run up to that product, and the rest is done for a few tokens
at a time, each time all the way to the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mla_pass.errors import MlaPassError
from mla_pass.healing.subject import Predictor, Trainable
from mla_pass.view import View

LOGITS = 1 << 24
"""Logits of one model that are alive at a time: 64 MiB."""
PRODUCTS = ("matmul", "gemm")
_POINTWISE = ("add", "sub", "mul", "div", "tanh", "cast", "identity")


class Distillation:
    """A converted model beside its original, ready to be trained in some of its weights."""

    def __init__(self, teacher: Predictor, student: Predictor, trainable: Trainable, *, device: str = "cpu") -> None:
        """`trainable` names parameters of the student. Raises MlaPassError when the vocabularies differ."""
        if teacher.vocab != student.vocab:
            raise MlaPassError(
                f"the models' vocabularies have {teacher.vocab} and {student.vocab} tokens: expected two versions of "
                "one model"
            )
        self.teacher, self.student, self.device, self.staggered = teacher, student, device, trainable.staggered
        self.parameters = {name: student.parameters[name] for name in trainable.names}
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
        theirs, ours = self.teacher.parameters, self.student.parameters
        for name in theirs.keys() & ours.keys() - self.parameters.keys():
            if theirs[name].shape == ours[name].shape and torch.equal(theirs[name], ours[name]):
                theirs[name].data = ours[name].data


def before_logits(view: View, logits: Any) -> Any:
    """The value whose product with a constant matrix the logits are, up to scaling and capping.

    The logits themselves where they come about otherwise: then all of them are in memory at once.
    """
    value = logits
    while True:
        inputs = view.inputs(value)
        varying = [x for x in inputs if x is not None and not view.is_constant(x)]
        if len(varying) != 1:
            return logits
        if view.op(value) in PRODUCTS and inputs[0] is varying[0]:
            return varying[0]
        if view.op(value) not in _POINTWISE:
            return logits
        value = varying[0]
