"""Published methods that turn grouped-query into latent attention without training, re-implemented as baselines.

Every method takes a Hugging Face model, calibration windows (int64 [n, L]) and a budget (cached numbers per token and
layer as a fraction of the original's 2 * G * D), changes the model in place so that its forward pass computes what the
converted model computes, and tells the exact row it would cache. :func:`restore` undoes it.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .attention import restore
from .calibrate import window_losses
from .care import care
from .convert import Converted
from .svd import svd
from .transmla import transmla

METHODS: dict[str, Callable[[Any, Tensor, float], Converted]] = {"transmla": transmla, "care": care, "svd": svd}

__all__ = ["METHODS", "Converted", "restore", "window_losses"]
