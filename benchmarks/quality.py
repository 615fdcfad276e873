"""Loss, cache and speed against the budget, on a real model and real text.

    python benchmarks/quality.py MODEL --text wiki.test.raw --calibrate calib.txt [--budgets 1 0.75 0.5 0.25]

Protocol: the evaluation text is tokenised from its start without special tokens and cut into windows of `--context`;
every window is independent, the loss is that of all tokens but the first, the same for the original and the converted
models. The excess is the mean difference in nats per token with its paired standard error over windows. Calibration
happens once, on other text. Tokens per second are of greedy decoding behind a prompt of `--prompt-tokens`, measured in
this run; cache bytes are measured on the live tensors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import mla_pass
from mla_pass.onnx.generate import GenerateConfig, generate
from mla_pass.onnx.perplexity import Perplexity, paired, perplexity
from mla_pass.onnx.session import ModelSession
from mla_pass.onnx.text import load_tokenizer


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    rank: int
    rope_dims: int
    cache_bytes_per_token: float
    perplexity: float
    excess: float
    stderr: float | None
    tokens_per_second: float


def measure(name: str, model: ModelSession, size: tuple[int, int], ids: np.ndarray, arguments: argparse.Namespace,
            before: Perplexity | None) -> tuple[Row, Perplexity]:  # fmt: skip
    """Loss over the windows, then one greedy continuation."""
    loss = perplexity(model, ids, windows=arguments.windows, context=arguments.context)
    prompt = ids[: arguments.prompt_tokens].tolist()
    text = generate(model, [prompt], GenerateConfig(max_new_tokens=arguments.new_tokens, stop_at_eos=False))
    excess, stderr = (0.0, None) if before is None else paired(before, loss)
    row = Row(name, *size, text.cache_bytes_per_token, loss.perplexity, excess, stderr, text.tokens_per_second)
    return row, loss


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned."""
    lines = [f"{'':10}{'rank':>6}{'rope':>6}{'cache B/token':>15}{'perplexity':>12}{'excess nats':>20}{'tokens/s':>10}"]
    for row in rows:
        excess = f"{row.excess:.4f}" + ("" if row.stderr is None else f" +- {row.stderr:.4f}")
        lines.append(
            f"{row.model:10}{row.rank:>6}{row.rope_dims:>6}{row.cache_bytes_per_token:>15,.0f}{row.perplexity:>12.4f}"
            f"{excess:>20}{row.tokens_per_second:>10.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the exported original")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--calibrate", default="self", help="calibration text, .npy, or self")
    parser.add_argument("--calibrate-tokens", type=int, default=32768)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    original = mla_pass.session(arguments.model)
    ids = np.array(load_tokenizer(arguments.model).encode(arguments.text.read_text(encoding="utf-8")), np.int64)
    row, before = measure("original", original, (0, 0), ids, arguments, None)
    rows, statistics = [row], None
    for budget in arguments.budgets:
        print(f"converting at {budget:g}", file=sys.stderr)
        result = mla_pass.convert(
            arguments.model,
            mla_pass.MlaConfig(budget=budget, calibrate_tokens=arguments.calibrate_tokens),
            calibrate=arguments.calibrate,
            statistics=statistics,
        )
        statistics, layer = result.statistics, result.report.layers[0]
        with tempfile.TemporaryDirectory() as folder:
            converted = mla_pass.session(result.save(Path(folder) / "model"))
            size = (layer.rank, layer.rope_dims)
            rows.append(measure(f"{budget:g}", converted, size, ids, arguments, before)[0])
            del converted
        print(table(rows[-1:]), file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows], indent=2) if arguments.json else table(rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except mla_pass.MlaPassError as error:
        sys.exit(f"quality: {error}")
