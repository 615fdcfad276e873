"""How well a model predicts a text, and text a model writes by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mla_pass.errors import MlaPassError
from mla_pass.onnx.generate import GenerateConfig, generators, next_tokens
from mla_pass.onnx.session import Decoder, ModelSession, as_ids
from mla_pass.onnx.text import special_ids

LOGITS_BYTES = 256 << 20
"""Logits of one run are kept below this; longer windows run in pieces over the cache."""


@dataclass(frozen=True)
class Perplexity:
    """Mean loss of a model on a text, in nats per token."""

    nll: float
    stderr: float | None
    """Standard error of `nll` over the windows; None for a single window."""
    tokens: int
    """Predicted tokens the mean is over."""
    per_window: tuple[float, ...]
    """Mean loss of each window."""

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def perplexity(
    session: ModelSession,
    token_ids: npt.ArrayLike,
    *,
    windows: int = 16,
    context: int = 1024,
    bos: int | None = None,
) -> Perplexity:
    """Mean loss over the first `windows` non-overlapping windows of `context` tokens, each from an empty cache.

    Losses are those of tokens 2..context of a window. With `bos`, a window is that id and context - 1 tokens of the
    text, all of which are predicted. Logits become log-probabilities in float64.
    Raises MlaPassError when the text has fewer tokens than the windows need.
    """
    cut = cut_windows(as_ids(token_ids, session.vocab)[0], windows, context, bos)
    decoder = Decoder(session, 1, context)
    losses = tuple(float(window_losses(decoder, window).mean()) for window in cut)
    return Perplexity(float(np.mean(losses)), _stderr(losses), windows * (context - 1), losses)


def paired(before: Perplexity, after: Perplexity) -> tuple[float, float | None]:
    """Excess loss of `after` over `before`, measured on the same windows: the mean of the differences window by
    window, and the standard error of that mean (None for a single window)."""
    if len(before.per_window) != len(after.per_window) or before.tokens != after.tokens:
        raise MlaPassError(
            f"the two measurements cover {len(before.per_window)} windows ({before.tokens} tokens) and "
            f"{len(after.per_window)} windows ({after.tokens} tokens); expected the same windows for both"
        )
    excess = np.subtract(after.per_window, before.per_window)
    return float(excess.mean()), _stderr(excess)


def cut_windows(token_ids: np.ndarray, windows: int, context: int, bos: int | None) -> np.ndarray:
    """The windows [windows, context] of a text's ids [n]."""
    if windows < 1 or context < 2:
        raise MlaPassError(f"windows is {windows} and context {context}; expected at least 1 window of 2 tokens")
    own = context - (bos is not None)
    if token_ids.size < windows * own:
        raise MlaPassError(
            f"the text has {token_ids.size} tokens; {windows} windows of {own} need {windows * own}: "
            "give a longer text, or fewer or shorter windows"
        )
    cut = token_ids[: windows * own].reshape(windows, own)
    return cut if bos is None else np.concatenate([np.full((windows, 1), bos), cut], axis=1)


def window_losses(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Loss of tokens 2..n of a window [n], each given those before it; float64 [n - 1]. The decoder starts anew."""
    decoder.reset()
    vocab = decoder.session.vocab
    size = max(1, LOGITS_BYTES // (4 * vocab)) if vocab else tokens.size
    losses = []
    for first in range(0, tokens.size - 1, size):
        logits = decoder.forward(tokens[None, first : min(first + size, tokens.size - 1)])[0]
        losses.append(token_losses(logits, tokens[first + 1 : first + 1 + len(logits)]))
    return np.concatenate(losses)


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of each row of logits [n, vocab]; float64 [n]."""
    if not np.isfinite(logits.max(axis=1)).all():  # NaN passes through max; single logits of -inf are in order
        raise MlaPassError("the model's logits are not finite; its weights or its element type are at fault")
    losses = np.empty(len(targets))
    for first in range(0, len(targets), 64):  # float64 of a few rows at a time, not of the whole window
        rows = logits[first : first + 64].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        aimed = rows[np.arange(len(rows)), targets[first : first + 64]]
        losses[first : first + 64] = np.log(np.exp(rows).sum(axis=1)) - aimed
    return losses


def sample_tokens(
    session: ModelSession, count: int, *, length: int = 256, batch: int = 16, seed: int = 0, temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """At least `count` tokens of text that the model writes by itself, int64 [ceil(count / length), length].

    See `sample_rows`. `progress` hears (tokens written, all there are to write).
    """
    if count < 1 or length < 2 or batch < 1:
        raise MlaPassError(
            f"sampling {count} tokens in rows of {length}, {batch} at a time; expected at least 1, 2 and 1"
        )
    if session.max_position is not None and length - 1 > session.max_position:  # told before the work, not amid it
        raise MlaPassError(
            f"rows of {length} tokens need {length - 1} positions; the model has {session.max_position}: "
            "ask for shorter rows"
        )
    return sample_rows(
        lambda rows: Decoder(session, rows, length), -(-count // length), length=length, batch=batch,
        folder=session.folder, vocab=session.vocab, config=GenerateConfig(temperature=temperature, seed=seed),
        progress=progress,
    )  # fmt: skip


class Steps(Protocol):
    """A model that is given one token of every row at a time."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [B, vocab] behind tokens [B]."""


def sample_rows(
    begin: Callable[[int], Steps], rows: int, *, length: int, batch: int, folder: Path, vocab: int | None,
    config: GenerateConfig | None = None, progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """Text that a model writes by itself, int64 [rows, length]; `begin` starts so many rows of it side by side.

    Every row starts with the model's BOS, else its EOS (which stands between texts in training data), else a token
    drawn at random, and runs on past an EOS: another text may follow. Equal arguments give equal rows. `folder` states
    these ids.
    """
    config = config or GenerateConfig(temperature=1.0)
    random = generators(config.seed, rows)
    special = special_ids(folder)
    start = special.bos if special.bos is not None else (special.eos[0] if special.eos else None)
    parts = []
    for first in range(0, rows, batch):
        sources = random[first : first + batch]
        opening = [_any_token(folder, vocab, source) if start is None else start for source in sources]
        told = (lambda new, done=first: progress(done * length + new, rows * length)) if progress else None
        parts.append(_write(begin(len(sources)), np.array(opening), length, config, sources, told))
    return np.concatenate(parts)


def _write(
    model: Steps, opening: np.ndarray, length: int, config: GenerateConfig, random: Sequence[np.random.Generator],
    told: Callable[[int], None] | None,
) -> np.ndarray:  # fmt: skip
    """Rows [batch, length] behind their first tokens; `told` how many tokens there are, after each step."""
    columns = [opening]
    while len(columns) < length:
        columns.append(next_tokens(model.step(columns[-1]), config, random))
        if told is not None:
            told(len(columns) * len(opening))
    return np.stack(columns, axis=1).astype(np.int64)


def _any_token(folder: Path, vocab: int | None, random: np.random.Generator) -> int:
    if vocab is None:
        raise MlaPassError(
            f"{folder} states neither a BOS nor an EOS id nor the vocabulary's size; "
            "add generation_config.json with bos_token_id"
        )
    return int(random.integers(vocab))


def _stderr(values: npt.ArrayLike) -> float | None:
    sample = np.asarray(values)
    return float(sample.std(ddof=1) / math.sqrt(sample.size)) if sample.size > 1 else None
