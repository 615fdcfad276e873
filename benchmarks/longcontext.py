"""Do converted models still see far? Loss by position, and facts found again in long text.

    python benchmarks/longcontext.py ORIGINAL CONVERTED ... --text book.txt [--context 8192] [--windows 4] [--json]

The folders are ONNX models as `mla-pass export` and `mla-pass convert` write them, and all see the same tokens.

Loss: the text is tokenised from its start without special tokens and cut into windows of `--context`; each is
independent. The excess over the original is the mean difference in nats per token over the positions of a bucket, its
standard error over windows.

Needles: a pass key of five digits is told at some depth of a prompt whose filler comes from the same text (from behind
the windows where it is long enough), and asked for at the end. Found means that every digit is the likeliest token when
the digits before it are given, which is what greedy decoding needs. The log-probability is that of the whole answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

import mla_pass
from mla_pass.onnx.perplexity import cut_windows, token_losses, window_losses
from mla_pass.onnx.session import Decoder, ModelSession
from mla_pass.onnx.text import Tokenizer, load_tokenizer

EDGES = (0, 1024, 2048, 4096, 8192)
TOKENS_AT_ONCE = 512
"""Tokens of a prompt in one run, which bounds the memory of attention."""
OPENING = "There is important information hidden in the following text. Find it and memorize it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Bucket:
    """Mean loss of one model for the tokens at positions first..last - 1 of the windows."""

    model: str
    first: int
    last: int
    loss: float
    excess: float
    """Over the first model, which is the original."""
    stderr: float | None
    """Over windows; None for a single one."""


@dataclass(frozen=True)
class Retrieval:
    """Needles of one length and depth, asked of one model."""

    model: str
    length: int
    depth: float
    needles: int
    found: float
    """Fraction of the needles."""
    logprob: float
    """Mean over needles of the log-probability of the answer, nats."""


@dataclass(frozen=True)
class Prompt:
    """A question whose answer lies in it."""

    ids: np.ndarray
    answer: np.ndarray


def loss_by_position(models: Sequence[ModelSession], windows: np.ndarray) -> list[Bucket]:
    """Buckets for every model over windows [n, context]; the first model is the original."""
    context = windows.shape[1]
    losses = np.empty((len(models), len(windows), context - 1))
    for which, model in enumerate(models):
        decoder = Decoder(model, 1, context)
        for index, window in enumerate(tqdm(windows, desc=str(model.folder), file=sys.stderr)):
            losses[which, index] = window_losses(decoder, window)
    edges = [edge for edge in EDGES if edge < context] + [context]
    names = [str(model.folder) for model in models]
    return [bucket for first, last in pairwise(edges) for bucket in _buckets(names, losses, first, last)]


def _buckets(names: Sequence[str], losses: np.ndarray, first: int, last: int) -> list[Bucket]:
    """`losses` [models, windows, context - 1]: entry i is the loss of the token at position i + 1."""
    means = losses[:, :, max(first - 1, 0) : last - 1].mean(axis=2)
    found = []
    for name, mean in zip(names, means, strict=True):
        excess = mean - means[0]
        stderr = float(excess.std(ddof=1) / len(excess) ** 0.5) if len(excess) > 1 else None
        found.append(Bucket(name, first, last, float(mean.mean()), float(excess.mean()), stderr))
    return found


def prompt(tokenizer: Tokenizer, filler: np.ndarray, length: int, depth: float, key: str) -> Prompt:
    """`length` tokens, answer included: opening, filler with the needle behind `depth` of it, and the question.

    Raises MlaPassError when the length has no room for them or the filler is too short.
    """
    opening, needle, question = (
        tokenizer.encode(text) for text in (OPENING, NEEDLE.format(key=key), QUESTION)
    )  # pieces are encoded one by one, so that nothing but the key and its place changes from prompt to prompt
    answer = tokenizer.encode(f" {key}")
    room = length - sum(map(len, (opening, needle, question, answer)))
    if room < 1 or room > len(filler):
        raise mla_pass.MlaPassError(
            f"a prompt of {length} tokens has room for {room} tokens of filler, and the text has {len(filler)} for it; "
            "ask for other lengths, or give a longer text"
        )
    before = round(depth * room)
    ids = [*opening, *filler[:before], *needle, *filler[before:room], *question]
    return Prompt(np.array(ids, np.int64), np.array(answer, np.int64))


def ask(model: ModelSession, asked: Prompt) -> tuple[bool, float]:
    """Whether each token of the answer is the likeliest, and the log-probability of the answer, given the prompt."""
    decoder = Decoder(model, 1, len(asked.ids) + len(asked.answer))
    rows = [decoder.prefill(asked.ids[None], chunk=TOKENS_AT_ONCE)]
    if len(asked.answer) > 1:
        rows.append(decoder.forward(asked.answer[None, :-1])[0])
    logits = np.concatenate(rows)
    return bool((logits.argmax(axis=1) == asked.answer).all()), -float(token_losses(logits, asked.answer).sum())


def needles(
    models: Sequence[ModelSession], tokenizer: Tokenizer, filler: np.ndarray, arguments: argparse.Namespace
) -> Iterator[Retrieval]:
    """Every length and depth, a line each model. The same keys and fillers for all of them, other ones each needle."""
    random = np.random.default_rng(arguments.seed)
    for length in arguments.lengths:
        for depth in arguments.depths:
            prompts = [_random_prompt(tokenizer, filler, length, depth, random) for _ in range(arguments.needles)]
            for model in models:
                found, logprob = np.mean([ask(model, asked) for asked in prompts], axis=0).tolist()
                yield Retrieval(str(model.folder), length, depth, arguments.needles, found, logprob)


def _random_prompt(
    tokenizer: Tokenizer, filler: np.ndarray, length: int, depth: float, random: np.random.Generator
) -> Prompt:
    start = int(random.integers(max(1, len(filler) - length)))
    return prompt(tokenizer, filler[start:], length, depth, str(random.integers(10000, 100000)))


def loss_table(buckets: Sequence[Bucket]) -> str:
    """The buckets, aligned."""
    wide = max((len(bucket.model) for bucket in buckets), default=0)
    lines = [f"{'positions':>12}  {'':{wide}}{'loss':>10}{'excess nats':>20}"]
    for bucket in buckets:
        place = f"{bucket.first}-{bucket.last}"
        excess = f"{bucket.excess:.4f}" + ("" if bucket.stderr is None else f" +- {bucket.stderr:.4f}")
        lines.append(f"{place:>12}  {bucket.model:{wide}}{bucket.loss:>10.4f}{excess:>20}")
    return "\n".join(lines)


def needle_table(rows: Sequence[Retrieval]) -> str:
    """The needles, aligned: how many were found, and the mean log-probability of the answer."""
    wide = max((len(row.model) for row in rows), default=0)
    lines = [f"{'tokens':>8}{'depth':>7}{'needles':>9}  {'':{wide}}{'found':>8}{'log p':>10}"]
    for row in rows:
        lines.append(
            f"{row.length:>8}{row.depth:>7.0%}{row.needles:>9}  {row.model:{wide}}{row.found:>8.0%}{row.logprob:>10.3f}"
        )
    return "\n".join(lines)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="folder of the exported original")
    parser.add_argument("converted", type=Path, nargs="+", help="folders of converted models")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=4, help="0 leaves the loss by position out")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--depths", type=float, nargs="*", default=[0.1, 0.5, 0.9])
    parser.add_argument("--needles", type=int, default=4, help="for each length and depth; 0 leaves them out")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; its own choice by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(given)


def main() -> int:
    """Command line of this file."""
    arguments = parse()
    models = [
        mla_pass.session(folder, threads=arguments.threads) for folder in (arguments.original, *arguments.converted)
    ]
    tokenizer = load_tokenizer(arguments.original)
    ids = np.array(tokenizer.encode(arguments.text.read_text(encoding="utf-8")), np.int64)
    buckets: list[Bucket] = []
    if arguments.windows:
        buckets = loss_by_position(models, cut_windows(ids, arguments.windows, arguments.context, None))
    rows: list[Retrieval] = []
    if arguments.needles:
        behind = ids[arguments.windows * arguments.context :]
        filler = behind if len(behind) > 2 * max(arguments.lengths, default=0) else ids
        for row in needles(models, tokenizer, filler, arguments):
            rows.append(row)
            print(needle_table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    if arguments.json:
        print(
            json.dumps({"loss": [asdict(row) for row in buckets], "needles": [asdict(row) for row in rows]}, indent=2)
        )
    else:
        print("\n\n".join(text for text in (loss_table(buckets), needle_table(rows)) if "\n" in text))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except mla_pass.MlaPassError as error:
        sys.exit(f"longcontext: {error}")
