"""How far apart the next-token distributions of two models are on the same tokens."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mla_pass.errors import MlaPassError
from mla_pass.onnx.session import ModelSession


@dataclass(frozen=True)
class Agreement:
    """`kl` is the mean Kullback-Leibler divergence D(original || converted) in nats per token, `top1` the fraction of
    positions where both name the same likeliest token, `largest_difference` that between two logits, anywhere."""

    kl: float
    top1: float
    largest_difference: float
    tokens: int

    def text(self) -> str:
        """One aligned line a number."""
        return (
            f"tokens compared          {self.tokens}\n"
            f"KL, nats per token       {self.kl:.3e}\n"
            f"same likeliest token     {self.top1:.2%}\n"
            f"largest logit difference {self.largest_difference:.3e}"
        )


def verify(
    original: ModelSession, converted: ModelSession, token_ids: npt.ArrayLike, *, context: int = 256
) -> Agreement:
    """Run both models over `token_ids` [N], cut into independent windows of `context`, and compare every position.

    Raises MlaPassError when there are no tokens or the vocabularies differ in size.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.size == 0 or context < 1:
        raise MlaPassError(f"token ids of shape {ids.shape} in windows of {context}: expected at least one token")
    kl, same, largest = 0.0, 0, 0.0
    for start in range(0, ids.size, context):
        window = ids[None, start : start + context]
        ours, theirs = converted.logits(window)[0], original.logits(window)[0]
        if ours.shape != theirs.shape:
            sizes = f"{theirs.shape[-1]} and {ours.shape[-1]}"
            raise MlaPassError(f"the models' vocabularies have {sizes} tokens: expected two versions of one model")
        log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
        kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        largest = max(largest, float(np.abs(ours - theirs).max()))
    return Agreement(kl / ids.size, same / ids.size, largest, ids.size)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
