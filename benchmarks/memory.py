"""What the caches of the models of docs/guide.md weigh, computed from their configurations.

    python benchmarks/memory.py [--tokens 524288]

The original is counted at one byte a number and no scales, which is the least that 8 bits can take. Latent rows are
counted as they are stored (`mla_pass.storage`): a byte a number of the latent and four scales, two bytes a number of
the rotated part. Two sizes: the widest latent (in steps of 16) whose row takes at most half of the original's bytes,
and the width that the guide's command asks for.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_pass.storage import row_format
from mla_retrofit.sizes import Shape, conversion_config

TOKENS = 512 * 1024
STEP = 16
ROW = row_format("float16", MlaConfig(cache_dtype="int8"))


@dataclass(frozen=True)
class Model:
    """A row of the table: `asked` are the guide's num_kv_heads and head_dim, `claimed` its own table's GB."""

    shape: Shape
    asked: tuple[int, int]
    claimed: tuple[float, float] | None = None


# From config.json: num_hidden_layers, num_key_value_heads, and head_dim or hidden_size / num_attention_heads. All of a
# head rotates. Windows (Mistral-7B-v0.1: 4096, Phi-3: 2047) are not counted: every row is kept.
MODELS = (
    Model(Shape("LLaMA-3-8B", 32, 8, 128, 128), (4, 256), (8.0, 1.0)),
    Model(Shape("Qwen2.5-7B", 28, 4, 128, 128), (4, 256), (6.5, 0.8)),
    Model(Shape("Mistral-7B", 32, 8, 128, 128), (4, 128), (5.5, 0.7)),
    Model(Shape("Mixtral-8x7B", 32, 8, 128, 128), (16, 128), (44.0, 5.5)),
    Model(Shape("Gemma-7B", 28, 16, 256, 256), (4, 256)),
    Model(Shape("Phi-3-mini", 32, 32, 96, 96), (16, 64)),
    Model(Shape("Phi-3-medium", 40, 10, 128, 128), (16, 64)),
)
HEADER = (
    "model", "layers", "kv heads x size", "KiB per token", "original", "MLA, half the bytes", "MLA, the guide's sizes",
    "the guide's table",
)  # fmt: skip


def half(shape: Shape) -> tuple[int, int]:
    """(rank, rope dims) of the widest row of at most half the original's bytes."""
    rope_dims = shape.rope_dims("extend")
    return ROW.rank_within(shape.width // 2, rope_dims) // STEP * STEP, rope_dims


def asked(model: Model) -> tuple[int, int] | None:
    """(rank, rope dims) of the guide's command, or None where that row is too wide for the model."""
    heads, size = model.asked
    try:
        config = conversion_config(model.shape, num_kv_heads=heads, head_dim=size, rope_mode="extend")
    except MlaPassError:
        return None
    assert config.rank is not None and config.rope_dims is not None  # sizes were given
    return config.rank, config.rope_dims


def cells(model: Model, tokens: int) -> tuple[str, ...]:
    """One line of the table."""
    shape = model.shape
    original = shape.layers * shape.width

    def latent(sizes: tuple[int, int] | None) -> str:
        if sizes is None:
            return f"{model.asked[0]} x {model.asked[1]} does not fit"
        row = shape.layers * ROW.bytes(*sizes)
        return f"{gibibytes(row * tokens)} ({row / original:.0%}; {sizes[0]} + {sizes[1]})"

    claim = "-" if model.claimed is None else "{} -> {} GB".format(*model.claimed)
    return (
        shape.name, str(shape.layers), f"{shape.kv_groups} x {shape.head_dim}", f"{original / 1024:g}",
        gibibytes(original * tokens), latent(half(shape)), latent(asked(model)), claim,
    )  # fmt: skip


def gibibytes(count: int) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.1f} GiB"


def table(tokens: int = TOKENS) -> str:
    """The Markdown table."""
    lines = [HEADER, ("---",) * len(HEADER), *(cells(model, tokens) for model in MODELS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    print(table(parser.parse_args().tokens))


if __name__ == "__main__":
    main()
