"""Text from a model, original or converted: prompts in, sampled tokens out, with the time and the bytes it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_pass.errors import MlaPassError
from mla_pass.onnx.session import Decoder, ModelSession, as_ids
from mla_pass.onnx.text import TextStream, Tokenizer, has_tokenizer, load_tokenizer, special_ids

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
OnToken = Callable[[int, str], None]


@dataclass(frozen=True)
class GenerateConfig:
    """How to pick tokens and when to stop."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy. Otherwise logits are divided by it before the softmax."""
    top_k: int = 0
    """Choose among this many best tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the best tokens that together have at least this probability (after `top_k`)."""
    seed: int = 0
    """Every row draws from a stream of its own, made from the seed and the row's number."""
    prefill_chunk: int | None = None
    """Tokens of the prompt to run at a time; None: all at once. Smaller takes less memory for the prompt's logits."""
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        wrong = [
            text
            for text, ok in (
                (f"max_new_tokens is {self.max_new_tokens}; expected at least 1", self.max_new_tokens >= 1),
                (f"temperature is {self.temperature}; expected 0 (greedy) or more", 0 <= self.temperature < np.inf),
                (f"top_k is {self.top_k}; expected 0 (all) or more", self.top_k >= 0),
                (f"top_p is {self.top_p}; expected more than 0 and at most 1", 0 < self.top_p <= 1),
                (f"seed is {self.seed}; expected 0 or more", self.seed >= 0),
                (
                    f"prefill_chunk is {self.prefill_chunk}; expected at least 1, or None",
                    self.prefill_chunk is None or self.prefill_chunk >= 1,
                ),
            )
            if not ok
        ]
        if wrong:
            raise MlaPassError("; ".join(wrong))


@dataclass(frozen=True)
class Generation:
    """What was generated, per prompt, and what it took."""

    texts: tuple[str, ...]
    """New text of each prompt, without special tokens; empty where the folder has no tokenizer."""
    token_ids: tuple[tuple[int, ...], ...]
    """New tokens of each prompt, the EOS that ended it included."""
    prefill_seconds: float
    """Running the prompts, up to the logits of the first new token."""
    decode_seconds: float
    """Running and picking every token after the first; time inside `on_token` is left out."""
    tokens_per_second: float
    """New tokens of all rows after each one's first, over `decode_seconds`; 0 when there were none."""
    cache_bytes_per_token: float
    """Measured on the live cache tensors at the end: their bytes over the rows they hold and the batch."""
    prompt_tokens: int
    """Tokens of all prompts, padding left out."""
    new_tokens: int
    """Tokens of all `token_ids`."""


def generate(
    session: ModelSession, prompts: Prompts, config: GenerateConfig | None = None, *, on_token: OnToken | None = None
) -> Generation:
    """Continue each prompt, a text or a list of token ids.

    Prompts run as one batch, padded on the left. A text is framed by its tokenizer's own special tokens (a BOS where
    the tokenizer adds one). A row stops at the EOS ids of generation_config.json or config.json.
    `on_token(row, piece)` gets each piece of text as soon as its characters are whole.
    Raises MlaPassError for an empty prompt, text without a tokenizer, or more positions than the model has.
    """
    config = config or GenerateConfig()
    tokenizer = load_tokenizer(session.folder) if on_token or has_tokenizer(session.folder) else None
    rows = _token_rows(session, prompts, tokenizer)
    longest = max(map(len, rows))
    _check_positions(session, longest, config.max_new_tokens)
    ids, mask = pad_left(rows)
    decoder = Decoder(session, len(rows), longest + config.max_new_tokens)
    clock = time.perf_counter()
    logits = decoder.prefill(ids, mask, config.prefill_chunk)
    prefill_seconds = time.perf_counter() - clock
    eos = special_ids(session.folder).eos if config.stop_at_eos else ()
    new, decode_seconds = _decode(decoder, logits, config, eos, _Streams(on_token, tokenizer, len(rows)))
    count = sum(map(len, new))
    return Generation(
        texts=tuple(tokenizer.decode(row) for row in new) if tokenizer else (),
        token_ids=tuple(map(tuple, new)),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        tokens_per_second=(count - len(rows)) / decode_seconds if decode_seconds else 0.0,
        cache_bytes_per_token=decoder.cache_bytes_per_token(),
        prompt_tokens=sum(map(len, rows)),
        new_tokens=count,
    )


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array [B, S] with zeros before the shorter ones, and the attention mask [B, S]."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    return ids, mask


def generators(seed: int, rows: int) -> list[np.random.Generator]:
    """One random stream a row, so that what a row draws does not hang on the other rows."""
    return [np.random.default_rng([seed, row]) for row in range(rows)]


def next_tokens(logits: np.ndarray, config: GenerateConfig, random: Sequence[np.random.Generator]) -> np.ndarray:
    """Pick a token for each row of logits [B, vocab]; int64 [B]."""
    if np.isnan(logits).any():
        raise MlaPassError("the model's logits are not numbers (NaN); its weights or its element type are at fault")
    if config.temperature == 0:
        return logits.argmax(axis=-1)
    return np.array([_draw(row, config, source) for row, source in zip(logits, random, strict=True)])


def _draw(logits: np.ndarray, config: GenerateConfig, random: np.random.Generator) -> int:
    kept = np.arange(logits.size)
    if 0 < config.top_k < logits.size:
        kept = np.sort(np.argpartition(-logits, config.top_k - 1)[: config.top_k])
    scores = logits[kept].astype(np.float64) / config.temperature
    weights = np.exp(scores - scores.max())
    if config.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        order = order[before < config.top_p * weights.sum()]
        kept, weights = kept[order], weights[order]
    ladder = np.cumsum(weights)
    return int(kept[np.searchsorted(ladder, random.random() * ladder[-1], side="right")])


def _decode(
    decoder: Decoder, logits: np.ndarray, config: GenerateConfig, eos: Sequence[int], streams: _Streams
) -> tuple[list[list[int]], float]:
    """Token lists of each row, and the seconds after the first tokens."""
    new: list[list[int]] = [[] for _ in range(decoder.batch)]
    running = set(range(decoder.batch))
    random = generators(config.seed, decoder.batch)
    picked, seconds = next_tokens(logits, config, random), 0.0
    for left in reversed(range(config.max_new_tokens)):
        for row in sorted(running):
            new[row].append(int(picked[row]))
            streams.feed(row, new[row][-1])
            if picked[row] in eos:
                running.remove(row)
        if not running or not left:
            break
        clock = time.perf_counter()
        picked = next_tokens(decoder.step(picked), config, random)  # rows at their end go along, unread
        seconds += time.perf_counter() - clock
    streams.finish()
    return new, seconds


class _Streams:
    """One TextStream a row, told to a callback; without a callback, nothing."""

    def __init__(self, on_token: OnToken | None, tokenizer: Tokenizer | None, rows: int) -> None:
        self._tell = on_token
        self._rows = [TextStream(tokenizer) for _ in range(rows)] if on_token and tokenizer else []

    def feed(self, row: int, token: int) -> None:
        if self._rows:
            self._say(row, self._rows[row].feed(token))

    def finish(self) -> None:
        for row, stream in enumerate(self._rows):
            self._say(row, stream.finish())

    def _say(self, row: int, piece: str) -> None:
        if piece and self._tell:
            self._tell(row, piece)


def _token_rows(session: ModelSession, prompts: Prompts, tokenizer: Tokenizer | None) -> list[list[int]]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
    listed: Sequence[Any] = [prompts] if single else prompts
    if len(listed) == 0:
        raise MlaPassError("no prompts were given; expected at least one")
    rows = []
    for number, prompt in enumerate(listed):
        if isinstance(prompt, str):
            tokenizer = tokenizer or load_tokenizer(session.folder)  # raises: says what is missing
            prompt = tokenizer.encode(prompt, special=True)
        if len(prompt) == 0:
            raise MlaPassError(f"prompt {number} has no tokens; expected some text or at least one token id")
        rows.append(as_ids(prompt, session.vocab)[0].tolist())
    return rows


def _check_positions(session: ModelSession, prompt: int, new: int) -> None:
    limit = session.max_position
    if limit is not None and prompt + new - 1 > limit:  # the last new token is never fed back
        raise MlaPassError(
            f"a prompt of {prompt} tokens and {new} new ones need {prompt + new - 1} positions; the model has {limit}: "
            "shorten the prompt or ask for fewer tokens"
        )
