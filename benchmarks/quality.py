"""Loss, cache and speed against the budget, on a real model and real text; ours, each ingredient off, and baselines.

    python benchmarks/quality.py MODEL --text wiki.test.raw --calibrate calib.txt [--budgets 0.75 0.625 0.5 0.375 0.25]
        [--cache-dtypes same int8] [--ablate 0.5 [--only NAME ...]] [--heal 30]
        [--checkpoint FOLDER --baselines transmla care svd] [--stats FILE] [--json]

Protocol: the evaluation text is tokenised from its start without special tokens and cut into windows of `--context`;
every window is independent, the loss is that of all tokens but the first, the same for the original and the converted
models. The excess is the mean difference in nats per token with its paired standard error over windows. Calibration
happens once, on other text, and every choice is made on that. Tokens per second are of greedy decoding behind a prompt
of `--prompt-tokens`, measured in this run; cache bytes are measured on the live tensors.

`--heal` trains each conversion on the calibration text for some minutes (`mla-pass heal`) and measures it again.
`--ablate` converts at that budget with one ingredient of the recipe switched off at a time. Baselines are published
methods, re-implemented in `baselines/`, on the Hugging Face `--checkpoint` that MODEL was exported from, with the same
calibration tokens; their bytes are counted from the row they would cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

import mla_pass
from mla_pass.config import CacheDtype
from mla_pass.onnx.generate import GenerateConfig, generate
from mla_pass.onnx.perplexity import Perplexity, paired, perplexity
from mla_pass.onnx.session import ModelSession
from mla_pass.onnx.text import load_tokenizer
from mla_pass.statistics import Calibration

OURS = "mla_pass"


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
    tokens_per_second: float | None
    method: str = OURS


ABLATIONS: dict[str, dict[str, Any]] = {
    "even layers": {"layers": "even"},
    "order 0": {"block_order": 0},
    "block 16": {"finest_block": 16, "block_order": 1, "attention_flops": 8.0},
    "block 64": {"finest_block": 64},
    "block 256": {"finest_block": 256},
    "rope 8": {"rope_dims": 8},
    "no rotation": {"rope_mode": "extend"},
    "exact rotation": {"finest_block": 1, "block_order": 0, "band_angle": 1e-9, "attention_flops": 1e9},
    "mix 0": {"metric_mix": 0.0},
    "mix 1": {"metric_mix": 1.0},
    "flops 1.5": {"attention_flops": 1.5},
    "flops 3": {"attention_flops": 3.0},
    "flops 8": {"attention_flops": 8.0},
}
"""What is changed in the recipe, one at a time; the metric keeps its chosen mix unless that is what changes. Exact
rotation turns every pair in every row at whatever arithmetic: what is left of the loss is the rank's alone."""


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
    lines = [f"{'':18}{'rank':>6}{'rope':>6}{'cache B/token':>15}{'perplexity':>12}{'excess nats':>20}{'tokens/s':>10}"]
    for row in rows:
        excess = f"{row.excess:.4f}" + ("" if row.stderr is None else f" +- {row.stderr:.4f}")
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
        lines.append(
            f"{row.model:18}{row.rank:>6}{row.rope_dims:>6}{row.cache_bytes_per_token:>15,.0f}{row.perplexity:>12.4f}"
            f"{excess:>20}{speed:>10}"
        )
    return "\n".join(lines)


class Ours:
    """Conversions of one exported model from one calibration, measured against the original."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Measures the original."""
        self.arguments = arguments
        original = mla_pass.session(arguments.model)
        text = arguments.text.read_text(encoding="utf-8")
        self.ids = np.array(load_tokenizer(arguments.model).encode(text), np.int64)
        self.original, self.before = measure("original", original, (0, 0), self.ids, arguments, None)
        known = arguments.stats is not None and arguments.stats.exists()
        self.calibration = Calibration.load(arguments.stats) if known else None
        self.healed: list[Row] = []

    def row(
        self, name: str, method: str = OURS, heal: bool = False, **options: Any
    ) -> tuple[Row, mla_pass.MlaConfig]:  # fmt: skip
        """Convert with `options`, measure; rank and rope dims are means over the layers."""
        print(f"converting: {name}", file=sys.stderr)
        text = {"calibrate_tokens": self.arguments.calibrate_tokens, "calibrate_self": self.arguments.calibrate_self}
        config = mla_pass.MlaConfig(**text, **options)
        calibrate = self.arguments.calibrate if self.arguments.calibrate == "self" else Path(self.arguments.calibrate)
        result = mla_pass.convert(self.arguments.model, config, calibrate=calibrate, calibration=self.calibration)
        if self.calibration is None and self.arguments.stats is not None:
            result.calibration.save(self.arguments.stats)
        self.calibration = result.calibration
        layers = result.report.layers
        size = round(np.mean([layer.rank for layer in layers])), round(np.mean([layer.rope_dims for layer in layers]))
        with tempfile.TemporaryDirectory() as folder:
            converted = mla_pass.session(result.save(Path(folder) / "model"))
            row, _ = measure(name, converted, size, self.ids, self.arguments, self.before)
            print(table([row]), *result.report.notes, sep="\n", file=sys.stderr)
            if heal and self.arguments.heal:
                self.healed.append(replace(self.heal(name, Path(folder), size), method=f"{method} healed"))
        return replace(row, method=method), result.config

    def heal(self, name: str, folder: Path, size: tuple[int, int]) -> Row:
        """Heal the model in `folder` on the calibration text for as long as asked, and measure again."""
        config = mla_pass.HealConfig(minutes=self.arguments.heal, lr=self.arguments.heal_lr)
        clock = time.process_time()
        found = mla_pass.heal(
            self.arguments.model, folder / "model", folder / "healed", text=self.arguments.calibrate, config=config
        )
        minutes = (time.process_time() - clock) / 60
        healed = mla_pass.session(folder / "healed")
        row, _ = measure(f"{name} healed", healed, size, self.ids, self.arguments, self.before)
        print(table([row]), found.text(), f"{minutes:.1f} minutes of CPU", sep="\n", file=sys.stderr)
        return row


def baselines(ours: Ours, names: Sequence[str]) -> Iterator[Row]:
    """Published methods at every budget, in torch, on the same tokens."""
    import torch
    from baselines import METHODS, restore
    from baselines import window_losses as torch_losses
    from transformers import AutoModelForCausalLM

    arguments, tokenizer = ours.arguments, load_tokenizer(ours.arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    calibration = tokenizer.encode(Path(arguments.calibrate).read_text(encoding="utf-8"))[: arguments.calibrate_tokens]
    windows = torch.tensor(calibration).reshape(-1, mla_pass.MlaConfig.calibrate_context)
    text = torch.from_numpy(ours.ids[: arguments.windows * arguments.context].reshape(arguments.windows, -1))
    before = np.array(torch_losses(model, text))
    whole = ours.original.cache_bytes_per_token
    for budget in arguments.budgets:
        for name in names:
            print(f"converting: {name} at {budget:g}", file=sys.stderr)
            made = METHODS[name](model, windows, budget)
            after = np.array(torch_losses(model, text))
            excess = after - before
            share = made.row / full_row(model.config)
            row = Row(
                f"{name} {budget:g}", made.row, 0, whole * share, float(np.exp(after.mean())), float(excess.mean()),
                float(excess.std(ddof=1) / np.sqrt(len(excess))), None, name,
            )  # fmt: skip
            print(table([row]), made.note, sep="\n", file=sys.stderr)
            yield row
            restore(model)


def full_row(config: Any) -> int:
    """Numbers that the original caches per token and layer."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head_dim


def main() -> int:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the exported original")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--calibrate", default="self", help="calibration text, .npy, or self")
    parser.add_argument("--calibrate-tokens", type=int, default=32768)
    parser.add_argument("--calibrate-self", type=float, default=mla_pass.MlaConfig.calibrate_self, metavar="SHARE")
    parser.add_argument("--stats", type=Path, help="calibration statistics: read if there, else written")
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.0, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    parser.add_argument(
        "--cache-dtypes", nargs="+", default=["same"], choices=get_args(CacheDtype),
        help="types of the cached latents to try at every budget, which is in bytes",
    )  # fmt: skip
    parser.add_argument("--ablate", type=float, metavar="BUDGET", help="also each ingredient off, at this budget")
    parser.add_argument("--only", nargs="+", default=list(ABLATIONS), choices=ABLATIONS, help="which of them")
    parser.add_argument("--attention-flops", type=float, default=mla_pass.MlaConfig.attention_flops)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face folder of the model, for --baselines")
    parser.add_argument("--baselines", nargs="+", default=[], choices=("transmla", "care", "svd"))
    parser.add_argument("--heal", type=float, metavar="MINUTES", help="also heal every conversion, so long each")
    parser.add_argument("--heal-lr", type=float, default=mla_pass.HealConfig.lr)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.baselines and (arguments.checkpoint is None or arguments.calibrate == "self"):
        parser.error("--baselines needs --checkpoint and a calibration text")
    ours = Ours(arguments)
    rows = [ours.original]
    flops = {"attention_flops": arguments.attention_flops}
    for budget in arguments.budgets:
        for dtype in arguments.cache_dtypes:
            name = f"{budget:g}" if dtype == "same" else f"{budget:g} {dtype}"
            method = OURS if dtype == "same" else f"{OURS} {dtype}"
            rows.append(ours.row(name, method, heal=True, budget=budget, cache_dtype=dtype, **flops)[0])
    rows += ours.healed
    if arguments.ablate is not None:
        row, config = ours.row(f"all at {arguments.ablate:g}", budget=arguments.ablate, **flops)
        rows.append(row)
        for name in arguments.only:
            options = {"budget": arguments.ablate, **flops, "metric_mix": config.metric_mix, **ABLATIONS[name]}
            rows.append(ours.row(name, "ablation", **options)[0])
    if arguments.baselines:  # they need torch and transformers
        rows += baselines(ours, arguments.baselines)
    print(json.dumps([asdict(row) for row in rows], indent=2) if arguments.json else table(rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except mla_pass.MlaPassError as error:
        sys.exit(f"quality: {error}")
