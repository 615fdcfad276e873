"""What a healing run works on: an original model and its conversion, of whatever kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor


class Predictor(Protocol):
    """One model in two parts: tokens to hidden state, hidden state to logits; differentiable in its `parameters`."""

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Floating-point weights by name, float32. Trained in place."""

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, S, E] for token ids [B, S], all attended, over an empty cache."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, n, vocab] for [1, n, E]; every position by itself."""


@dataclass(frozen=True)
class Trainable:
    """Names of the weights to train, and for each that was found but is not, why."""

    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    staggered: frozenset[str] = frozenset()
    """Those whose zeros must stay: the key_up of each site, which decoding reads no further than them
    (mla_pass/fold/staggered.py). A turn of the latent makes them of any key_up, so nothing is lost by it."""


@dataclass
class Subject(ABC):
    """An original and its conversion."""

    teacher: Predictor
    student: Predictor
    trainable: Trainable
    limits: tuple[int, ...]
    """Positions that each model reaches, where it has a limit."""
    origin: str
    """What a record calls the original."""
    home: Path | None = None
    """Folder of the conversion, with what `convert` noted there; None where it has none."""
    notes: tuple[str, ...] = ()
    """What a user should know of the folder that `write` fills."""

    @abstractmethod
    def sources(self) -> Iterable[Path | bytes]:
        """All that both models are made of, to tell them from others by."""

    @abstractmethod
    def tokens(self, text: Path) -> tuple[np.ndarray, int | None]:
        """Token ids [n] of a text file, and the id that the original's tokenizer puts before every text, if any."""

    @abstractmethod
    def written(self, rows: int, length: int) -> np.ndarray:
        """Text that the original writes by itself, int64 [rows, length]."""

    @abstractmethod
    def settle(self, name: str, weight: Tensor) -> Tensor:
        """A trained weight, rounded to the type it is stored in, as float32; `write` writes it so."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Fill a folder with the healed model and what travels with it, and run it once.

        Raises MlaPassError when the model does not come up, or its logits are not finite.
        """
