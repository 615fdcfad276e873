"""Whether every way to run one conversion says the same: ONNX Runtime, converted checkpoint, LatentCache, compiled.

    mla-pass convert ORIGINAL CONVERTED --format both
    python benchmarks/torch_agree.py ORIGINAL CONVERTED [--steps 200]

Each continues the same prompt greedily by so many tokens. The table tells how many tokens agree with ONNX Runtime's,
the largest difference of the logits along its tokens (relative to the largest logit), and the bytes a token of each
cache takes, from the storage of its tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mla_pass
from mla_pass.onnx.generate import GenerateConfig, generate
from mla_pass.onnx.text import load_tokenizer
from mla_pass.pytorch.backend import mla_pass as backend
from mla_pass.pytorch.cache import LatentCache

PROMPT = "The lighthouse keeper had not spoken to anyone for a month when"


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    import mla_pass.pytorch.modeling  # noqa: F401  registers the format

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_along(model: Any, step: Callable[..., Any], cache: Any, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Logits [steps, vocab] before each of `tokens`, the prompt read by `model` and the rest token by token."""
    with torch.no_grad():
        rows = [model(torch.tensor([prompt]), past_key_values=cache).logits[:, -1]]
        for token in tokens[:-1]:
            rows.append(step(torch.tensor([[token]]), past_key_values=cache).logits[:, -1])
    return torch.cat(rows).numpy()


def bytes_per_token(cache: Any) -> float:
    kept = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    return kept / cache.layers[0].keys.shape[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("original", type=Path)
    parser.add_argument("converted", type=Path, help="written by convert --format both")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    prompt = load_tokenizer(given.original).encode(PROMPT)
    session = mla_pass.session(given.converted / "onnx")
    done = generate(session, [prompt], GenerateConfig(max_new_tokens=given.steps, stop_at_eos=False))
    tokens = list(done.token_ids[0])
    right = session.logits([prompt + tokens[:-1]])[0, len(prompt) - 1 :]
    print(f"{'':34}{'same tokens':>12}{'logits differ':>15}{'cache B/token':>15}")
    print(f"{'ONNX Runtime':34}{len(tokens):>12}{'':>15}{session.bytes_per_token:>15,.0f}")
    rows = len(prompt) + given.steps
    original, converted = load(given.original), load(given.converted)
    for limit in (None, rows):
        kind = "growing" if limit is None else "static"
        caches = {
            "converted checkpoint": (converted, converted, converted.latent_cache(limit)),
            "LatentCache": (original, original, cache_of(given.converted, original, limit)),
            "LatentCache, compiled": (original, compiled(original), cache_of(given.converted, original, limit)),
        }
        for name, (model, step, cache) in caches.items():
            found = logits_along(model, step, cache, prompt, tokens)
            same = int((found.argmax(-1) == np.array(tokens)).sum())
            difference = np.abs(found - right).max() / np.abs(right).max()
            print(f"{f'{name}, {kind}':34}{same:>12}{difference:>15.1e}{bytes_per_token(cache):>15,.0f}", flush=True)
    return 0


def cache_of(folder: Path, model: Any, limit: int | None) -> LatentCache:
    return LatentCache.from_pretrained(folder, model=model, max_cache_len=limit)


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


if __name__ == "__main__":
    sys.exit(main())
