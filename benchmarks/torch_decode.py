"""One decoding step in PyTorch: the original under inductor with its own static cache, and the conversion compiled.

    python benchmarks/torch_decode.py ORIGINAL CONVERTED [--past 2000 8000] [--batch 4] [--steps 8]

ORIGINAL is a Hugging Face folder, CONVERTED what mla-pass convert made of it. Both run the same token behind a cache
that is filled with random rows; steps of the two take turns, and the table tells medians, their ratio, and for each of
them the bytes of its cache (from the storage of its tensors) and the process's peak memory while it decodes (a process
of its own for each).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

CASES = {
    "original, inductor": ("original", "inductor"),
    "LatentCache, mla_pass": ("latent_cache", "mla_pass"),
    "converted, inductor": ("converted", "inductor"),
}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    import mla_pass.pytorch.modeling  # noqa: F401  registers the format

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prepared(kind: str, original: Path, converted: Path, batch: int, rows: int) -> tuple[Any, Any]:
    """A model and an empty static cache of `rows` rows."""
    from transformers import StaticCache

    from mla_pass.pytorch.cache import LatentCache

    model = load(converted if kind == "converted" else original)
    if kind == "original":
        return model, StaticCache(model.config, max_cache_len=rows)
    if kind == "converted":
        return model, model.latent_cache(rows)
    return model, LatentCache.from_pretrained(converted, model=model, max_cache_len=rows)


def fill(model: Any, cache: Any, batch: int, past: int) -> None:
    """Two tokens through the model make the buffers; noise stands for all other rows."""
    with torch.no_grad():
        model(torch.ones(batch, 2, dtype=torch.int64), past_key_values=cache)
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                tensor[:, :, :past].normal_()
            layer.cumulative_length.fill_(past)


def run(case: str, original: Path, converted: Path, past: int, batch: int, steps: int) -> dict[str, float]:
    """Times of one case, alone in this process."""
    kind, backend = CASES[case]
    model, cache = prepared(kind, original, converted, batch, past + steps + 8)
    fill(model, cache, batch, past)
    if backend == "mla_pass":
        from mla_pass.pytorch.backend import mla_pass as backend  # type: ignore[assignment]
    step = torch.compile(model, backend=backend, fullgraph=True)
    token, times = torch.ones(batch, 1, dtype=torch.int64), []
    with torch.no_grad():
        for number in range(steps + 3):
            began = time.perf_counter()
            step(token, past_key_values=cache)
            if number >= 3:
                times.append(time.perf_counter() - began)
    cached = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"step": statistics.median(times), "cache": cached, "peak": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("original", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--past", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="processes a case; their median is told")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run(given.case, given.original, given.converted, given.past[0], given.batch[0], given.steps)))
        return 0
    print(f"{torch.get_num_threads()} threads, float32")
    print(f"{'':24}{'past':>6}{'batch':>6}{'ms/step':>9}{'times':>7}{'cache MB':>10}{'peak MB':>9}")
    for batch in given.batch:
        for past in given.past:
            table(given, past, batch)
    return 0


def table(given: argparse.Namespace, past: int, batch: int) -> None:
    """All cases in turn, several times."""
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(given.repeats):
        for case in CASES:
            command = [
                sys.executable, __file__, str(given.original), str(given.converted), "--case", case,
                "--past", str(past), "--batch", str(batch), "--steps", str(given.steps),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{case}: {done.stderr.strip().splitlines()[-1]}")
            found[case].append(json.loads(done.stdout.strip().splitlines()[-1]))
    first = statistics.median(one["step"] for one in next(iter(found.values())))
    for case, all_of in found.items():
        step, cached, peak = (statistics.median(one[name] for one in all_of) for name in ("step", "cache", "peak"))
        print(f"{case:24}{past:6}{batch:6}{step * 1e3:9.1f}{first / step:7.2f}{cached / 1e6:10.1f}{peak / 1e3:9.0f}")


if __name__ == "__main__":
    sys.exit(main())
