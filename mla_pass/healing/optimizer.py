"""Whitened momentum for matrices, Adam for vectors; every step is sized by the weight that takes it.

Healing has a few hundred steps for matrices that are nearly right, and their gradients lie along few directions: those
that the hidden state fills most and that the loss feels most. Steps along the gradient move hardly anything else. So
each matrix's gradient G is multiplied from both sides by L^-1/2 and R^-1/2, where L and R are running means of G G^T
and G^T G (Shampoo, Gupta et al. 2018, with the exponents of Anil et al. 2020): all directions move at one pace.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

MOMENTUM = 0.9
STATISTICS = 0.98
"""How much of the running means of squares stays a step."""
REFRESH = 5
"""Steps between two decompositions of the running means."""
DAMPING = 1e-3
"""Added to the eigenvalues, relative to their mean: a direction never seen is no reason for a long step."""
LARGEST = 4096
"""Longer sides of a matrix are left as they are: their square would take more memory than the model."""
_SMALLEST = 1e-3
"""A weight of zeros (a bias) moves as if it had this root mean square."""
_TINY = 1e-30


class Optimizer:
    """Updates weights in place from their ``grad``, which it takes away."""

    def __init__(self, parameters: Mapping[str, Tensor], staggered: Collection[str] = ()) -> None:
        """Weights [..., a, b] are matrices, one by one; vectors are [a]. Of those in `staggered` zeros stay zeros."""
        self.parameters, self.steps = parameters, 0
        self._there = {name: parameters[name].detach() != 0 for name in staggered if name in parameters}
        self.state: dict[str, Tensor] = {}
        """Tensors by ``{what}/{parameter}``: with `steps`, all that a later step needs."""
        for name, weight in parameters.items():
            like = weight.detach()
            self.state[f"size/{name}"] = _rms(like).clamp_min(_SMALLEST)
            self.state[f"momentum/{name}"] = torch.zeros_like(like)
            if weight.ndim < 2:
                self.state[f"square/{name}"] = torch.zeros_like(like)
            for side, length in _sides(weight):
                square = like.new_zeros(*weight.shape[:-2], length, length)
                self.state |= {f"{side}/{name}": square, f"root {side}/{name}": square.clone()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every weight by `lr` times its own root mean square at the start."""
        self.steps += 1
        for name, weight in self.parameters.items():
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                continue
            momentum = self.state[f"momentum/{name}"].lerp_(gradient, 1 - MOMENTUM)
            whiten = self._scaled if weight.ndim < 2 else self._whitened
            weight.sub_(whiten(name, gradient, momentum) * (lr * self.state[f"size/{name}"]))
            if name in self._there:
                weight.mul_(self._there[name])

    def _scaled(self, name: str, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Adam's step: each number by its own root mean square."""
        square = self.state[f"square/{name}"].lerp_(gradient.square(), 1 - STATISTICS)
        mean = momentum / (1 - MOMENTUM**self.steps)
        return mean / (square / (1 - STATISTICS**self.steps)).sqrt().add_(_TINY)

    def _whitened(self, name: str, gradient: Tensor, momentum: Tensor) -> Tensor:
        """L^-1/2 momentum R^-1/2, scaled to a root mean square of one."""
        step = momentum
        for side, _ in _sides(gradient):
            square, root = self.state[f"{side}/{name}"], self.state[f"root {side}/{name}"]
            square.lerp_(gradient @ gradient.mT if side == "left" else gradient.mT @ gradient, 1 - STATISTICS)
            if self.steps <= REFRESH or self.steps % REFRESH == 0:
                root.copy_(inverse_root(square))
            step = root @ step if side == "left" else step @ root
        return step / _rms(step).clamp_min(_TINY)


def inverse_root(x: Tensor) -> Tensor:
    """x^-1/2 of symmetric matrices [..., n, n] without negative eigenvalues, damped."""
    values, vectors = torch.linalg.eigh(x)
    values = values.clamp_min(0)
    values = values + DAMPING * values.mean(-1, keepdim=True) + _TINY
    return (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def _sides(weight: Tensor) -> list[tuple[str, int]]:
    """The sides of a matrix that are whitened, with their lengths; none of a vector."""
    if weight.ndim < 2:
        return []
    return [(side, n) for side, n in zip(("left", "right"), weight.shape[-2:], strict=True) if n <= LARGEST]


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
