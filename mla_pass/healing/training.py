"""The loop of a healing run: windows in a shuffled order, steps, held-out losses, and states to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mla_pass.errors import MlaPassError
from mla_pass.healing.config import HELD_OUT, HealConfig, Measurement
from mla_pass.healing.distill import Distillation
from mla_pass.healing.optimizer import Optimizer
from mla_pass.healing.state import SavedState

PARTS = 10
"""A run is measured at its start and after each of so many parts."""
SAVE_SECONDS = 60.0
WARM_UP = 5
"""Steps over which the learning rate rises; from there it falls with what is left of the budget."""
PIECE_TOKENS = 16384
"""Tokens side by side on a GPU. On a CPU one window at a time is as fast, and takes the least memory."""

Progress = Callable[[str, int, int], None]


@dataclass
class Course:
    """What a run has done so far; goes into every state."""

    step: int = 0
    seconds: float = 0.0
    """Of this run and of those it resumed."""
    losses: list[float] = field(default_factory=list)
    """Mean KL over each step's windows, before the step."""
    measured: list[Measurement] = field(default_factory=list)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made, among other things."""
        measured = [Measurement(**one) for one in record["measured"]]
        return cls(record["step"], record["seconds"], list(record["losses"]), measured)


class Training:
    """One run over token ids; after an interruption another one goes on from its state, to the same result."""

    def __init__(
        self, distillation: Distillation, windows: np.ndarray, config: HealConfig, saved: SavedState,
        progress: Progress,
    ) -> None:  # fmt: skip
        """`windows` [n, context]: the last `HELD_OUT` are never trained on."""
        self.distillation, self.config, self.saved, self.progress = distillation, config, saved, progress
        self.windows = torch.from_numpy(windows)
        self.aims = [distillation.aim(window[None]) for window in self.windows[-HELD_OUT:]]
        self.optimizer = Optimizer(distillation.parameters, distillation.staggered)
        self.course = Course()
        self._whole = True

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Go on from a state that `save` wrote."""
        self.course = Course.from_json(record)
        self.optimizer.steps = self.course.step
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(tensors[name])

    def run(self) -> None:
        """Train until the budget is spent.

        A KeyboardInterrupt saves the last whole step before it goes on. Raises MlaPassError when the loss diverges.
        """
        began = last = time.monotonic()
        earlier = self.course.seconds
        try:
            while self.done() < 1:
                self._step()
                self.course.seconds = earlier + time.monotonic() - began
                self._report()
                if time.monotonic() - last > SAVE_SECONDS:
                    self.save()
                    last = time.monotonic()
            self.save()  # should writing the result fail, all is here
        except KeyboardInterrupt:
            if self._whole:  # else the state of a minute ago has to do
                self.save()
            raise

    def done(self) -> float:
        """How much of the budget is spent, 0 to 1."""
        if self.config.tokens is None:
            return min(1.0, self.course.seconds / (60 * self.config.minutes))
        return min(1.0, self.course.step * self.config.step_tokens / self.config.tokens)

    def measure(self) -> float:
        """The held-out loss as it is now; goes into the course."""
        held_out = self.windows[-HELD_OUT:]
        losses = [self.distillation.divergence(ids[None], aim) for ids, aim in zip(held_out, self.aims, strict=True)]
        loss = sum(losses) / len(losses)
        tokens = self.course.step * self.config.step_tokens
        self.course.measured.append(Measurement(self.course.step, tokens, self.done(), loss))
        return loss

    @property
    def held_out_tokens(self) -> int:
        """Tokens that `measure` compares at."""
        return HELD_OUT * self.config.context

    def save(self) -> None:
        """Put a state on disk."""
        self.saved.save(self._tensors(), asdict(self.course))

    def _step(self) -> None:
        """One batch, one update; `_whole` is false while weights and course do not fit together."""
        batch = self._batch(self.course.step)
        pieces = batch.split(1 if self.distillation.device == "cpu" else max(1, PIECE_TOKENS // batch.shape[1]))
        loss = sum(self.distillation.backward(piece, len(piece) / len(batch)) * len(piece) for piece in pieces)
        loss /= len(batch)
        if not math.isfinite(loss):
            self.saved.remove()
            raise MlaPassError(
                f"the loss of step {self.course.step} is {loss}: healing diverged; use a learning rate below "
                f"{self.config.lr:g}"
            )
        lr = self._rate()
        self._whole = False
        self.optimizer.step(lr)
        self.course.step += 1
        self.course.losses.append(loss)
        self._whole = True

    def _rate(self) -> float:
        """Rises for a few steps, then falls to zero. Loss is quadratic near its minimum: the way is as its root."""
        distance = self.course.measured[0].loss ** 0.5
        return self.config.lr * distance * min(1.0, (self.course.step + 1) / WARM_UP) * (1 - self.done())

    def _batch(self, step: int) -> Tensor:
        """Token ids [batch, context]: every window once in an order of its own, then again in another."""
        windows = self.windows[:-HELD_OUT]
        chosen = []
        for number in range(step * self.config.batch, (step + 1) * self.config.batch):
            epoch, place = divmod(number, len(windows))
            chosen.append(int(np.random.default_rng((self.config.seed, epoch)).permutation(len(windows))[place]))
        return windows[chosen]

    def _report(self) -> None:
        """Measure at the end of each part but the last, and tell how far the run is."""
        last, done = self.course.measured[-1], self.done()
        if int(PARTS * last.done) < int(PARTS * done) < PARTS:
            self.measure()
            last = self.course.measured[-1]
        part = min(PARTS - 1, int(PARTS * done))
        percent = min(100, int(100 * (PARTS * done - part)))
        self.progress(f"healing, part {part + 1} of {PARTS}, held-out KL {last.loss:.4f}", percent, 100)

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"weight/{name}": weight for name, weight in self.distillation.parameters.items()}
        return weights | self.optimizer.state
