"""What a healing run is asked to do, and what came of it: plain data, at no cost to import."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mla_pass.errors import MlaPassError

FORMAT_VERSION = 1
"""Version of the JSON that `Healing.to_json` writes; raised when a field changes its meaning or goes."""
HELD_OUT = 4
"""Windows at the end of the text that are never trained on."""


@dataclass(frozen=True)
class HealConfig:
    """Options of a healing run. Raises MlaPassError when a value is out of its range."""

    minutes: float = 30.0
    """Budget in minutes, reading the models not included; without meaning if `tokens` is given."""
    tokens: int | None = None
    """Budget in tokens, instead: the same result on every run."""
    context: int = 512
    """Length of the sequences the text is cut into."""
    batch: int = 2
    """Sequences a step."""
    lr: float = 0.005
    """Size of a step relative to the weight that takes it, where the loss is 1 nat; smaller losses take steps smaller
    by their root, and over the run all falls to zero."""
    seed: int = 0
    """Of the order in which the sequences are taken."""

    def __post_init__(self) -> None:
        """Reject values out of range."""
        if not 0 < self.minutes < float("inf"):
            raise MlaPassError(f"minutes must be a positive number; got {self.minutes}")
        if not 0 < self.lr < float("inf"):
            raise MlaPassError(f"lr must be a positive number; got {self.lr}")
        least = {"tokens": 1, "context": 2, "batch": 1, "seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise MlaPassError(f"{name} must be at least {smallest}; got {value}")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.context


@dataclass(frozen=True)
class Measurement:
    """The held-out loss at one point of a run."""

    step: int
    tokens: int
    """Trained on before it."""
    done: float
    """Of the budget, 0 to 1."""
    loss: float
    """KL(original || converted), nats per token."""


@dataclass(frozen=True)
class Healing:
    """What healing did; `before` and `after` are KL(original || converted) on held-out text, nats per token."""

    before: float
    after: float
    held_out_tokens: int
    steps: int
    tokens: int
    seconds: float
    weights: tuple[str, ...]
    """Initializers that were trained."""
    numbers: int
    """Numbers in them."""
    left_out: tuple[str, ...]
    """Weights around the latent attention that were not, and why."""
    notes: tuple[str, ...]
    held_out: tuple[Measurement, ...]
    losses: tuple[float, ...]
    """Mean KL of each step's windows, before its update."""

    def text(self) -> str:
        """A few lines for people."""
        change = f"{self.before:.4f} to {self.after:.4f}"
        lines = [
            f"KL from the original on {self.held_out_tokens:,} held-out tokens went from {change} nats per token",
            f"{self.steps:,} steps over {self.tokens:,} tokens in {self.seconds:,.0f} s changed "
            f"{len(self.weights)} weights of {self.numbers:,} numbers",
        ]
        for title, items in (("Not trained", self.left_out), ("Notes", self.notes)):
            if items:
                lines += ["", f"{title}:", *(f"  - {item}" for item in items)]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file, with the format version."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}
