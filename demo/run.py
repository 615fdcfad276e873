"""From a published checkpoint to a converted model, side by side with the original. `make demo` runs this.

Each step is skipped when its output is already in the cache folder; every number printed is measured in this run.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from smollm2 import checkpoint

import mla_pass
from mla_pass.convert import RECORD
from mla_pass.export.hf import export_hf
from mla_pass.onnx.generate import GenerateConfig, Generation, generate
from mla_pass.onnx.perplexity import Perplexity, paired, perplexity
from mla_pass.onnx.session import ModelSession
from mla_pass.onnx.text import load_tokenizer
from mla_pass.report import Report

HERE = Path(__file__).resolve().parent
PROMPT = "The tide is the rise and fall of the sea. It is caused by"
WINDOWS, CONTEXT = 4, 512


@dataclass(frozen=True)
class Run:
    """What one model did: its continuation of the prompt and its loss on the text."""

    generation: Generation
    perplexity: Perplexity


def main() -> int:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M and compare it with the original.")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="where downloads and models go")
    parser.add_argument("--budget", type=float, default=0.625, help="cache size to aim at, 0 to 1 of the original")
    parser.add_argument("--prompt", default=PROMPT)
    arguments = parser.parse_args()
    try:
        demo(arguments.cache, arguments.budget, arguments.prompt)
    except mla_pass.MlaPassError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def demo(cache: Path, budget: float, prompt: str) -> None:
    """Makes what is missing in `cache`, runs both models and prints the comparison."""
    original, converted = cache / "original", cache / f"converted-{budget:g}"
    if not original.is_dir():
        _say("fetching SmolLM2-135M-Instruct and unpacking its weights")
        source = checkpoint(cache)
        _say("exporting it to ONNX")
        export_hf(source, original)
    if not converted.is_dir():
        _say(f"converting to latent attention at {budget:g} of the cache, on text that the model writes itself")
        result = mla_pass.convert(original, mla_pass.MlaConfig(budget=budget), progress=_progress)
        result.save(converted)
    record = json.loads((converted / RECORD).read_text())
    print(Report.from_json(record["report"]).text(), end="\n\n")
    runs = []
    for folder in (original, converted):
        _say(f"running {folder.name}")
        runs.append(_run(mla_pass.session(folder), prompt))
    print(comparison(prompt, *runs))


def _run(session: ModelSession, prompt: str) -> Run:
    tokens = load_tokenizer(session.folder).encode((HERE / "text.txt").read_text(encoding="utf-8"))
    generation = generate(session, [prompt], GenerateConfig(max_new_tokens=64))
    return Run(generation, perplexity(session, tokens, windows=WINDOWS, context=CONTEXT))


def comparison(prompt: str, original: Run, converted: Run) -> str:
    """Both continuations, and a table of what was measured."""
    before, after = original.generation, converted.generation
    excess, stderr = paired(original.perplexity, converted.perplexity)
    rows = [
        ("", "original", "converted"),
        ("cache, bytes per token", f"{before.cache_bytes_per_token:,.0f}", f"{after.cache_bytes_per_token:,.0f}"),
        ("tokens per second", f"{before.tokens_per_second:.1f}", f"{after.tokens_per_second:.1f}"),
        ("perplexity", f"{original.perplexity.perplexity:.2f}", f"{converted.perplexity.perplexity:.2f}"),
    ]
    table = [f"{name:24}{left:>12}{right:>12}" for name, left, right in rows]
    spread = "" if stderr is None else f" +- {stderr:.4f}"
    return "\n".join(
        [
            f"original:  {prompt}{before.texts[0]}",
            "",
            f"converted: {prompt}{after.texts[0]}",
            "",
            *table,
            f"excess loss {excess:.4f}{spread} nats per token; perplexity and loss are of demo/text.txt, "
            f"{WINDOWS} windows of {CONTEXT} tokens",
        ]
    )


_start = time.perf_counter()
_stage = ""


def _say(what: str) -> None:
    print(f"[{time.perf_counter() - _start:5.0f} s] {what}", file=sys.stderr, flush=True)


def _progress(stage: str, done: int, total: int) -> None:
    global _stage
    if stage != _stage:
        _stage = stage
        _say(f"  {stage}")


if __name__ == "__main__":
    raise SystemExit(main())
