"""Orthogonalised momentum (Muon) for matrices, Adam for vectors, every step sized by the weight that takes it.

Healing has a few dozen steps to move matrices that are nearly right. Adam's step has all of its size in the few
directions that the gradient fills most, and crawls in the others. Making the momentum orthogonal, all its singular
values one, moves every direction at the same pace. And as the weights of one block differ a hundredfold in size (a
latent's columns come sorted by energy), a step is a fraction of the weight's own root mean square, not a number.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MOMENTUM = 0.9
DECAY = 0.95
"""How much of the mean square of a vector's gradient stays a step."""
_SMALLEST = 1e-3
"""A weight of zeros (a bias) moves as if it had this root mean square."""


class Optimizer:
    """Updates weights in place from their ``grad``, which it takes away."""

    def __init__(self, parameters: Mapping[str, Tensor], lr: float) -> None:
        """`lr` is the root mean square of a step relative to that of the weight at the start."""
        self.parameters, self.lr, self.steps = parameters, lr, 0
        with torch.no_grad():
            self.sizes = {name: _rms(weight).clamp_min(_SMALLEST) for name, weight in parameters.items()}
        self.state: dict[str, Tensor] = {}
        """Tensors by ``{what}/{parameter}``: all that a later step needs, with `steps`."""
        for name, weight in parameters.items():
            self.state[f"momentum/{name}"] = torch.zeros_like(weight)
            self.state[f"size/{name}"] = self.sizes[name]
            if weight.ndim < 2:
                self.state[f"square/{name}"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step of `factor` times the learning rate."""
        self.steps += 1
        for name, weight in self.parameters.items():
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                weight.sub_(self._direction(name, gradient) * (factor * self.lr * self.state[f"size/{name}"]))

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        """A step of root mean square one, about."""
        momentum = self.state[f"momentum/{name}"].lerp_(gradient, 1 - MOMENTUM)
        if gradient.ndim < 2:
            square = self.state[f"square/{name}"].lerp_(gradient.square(), 1 - DECAY)
            mean = momentum / (1 - MOMENTUM**self.steps)
            return mean / (square / (1 - DECAY**self.steps)).sqrt().add_(1e-20)
        ahead = momentum.lerp(gradient, 1 - MOMENTUM)
        return orthogonal(ahead) * max(gradient.shape[-2:]) ** 0.5


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """The nearest matrix with all singular values one, roughly (0.7 to 1.2), for each matrix of x [..., a, b].

    Newton-Schulz iteration with the coefficients of Jordan et al. 2024: five products a round and no decomposition.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    for _ in range(rounds):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _rms(x: Tensor) -> Tensor:
    return x.detach().square().mean().sqrt()
