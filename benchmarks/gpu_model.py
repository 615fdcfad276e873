"""How fast a decoding step would be on GPUs that nobody here has: computed from what the launches do, never measured.

    python -m benchmarks.gpu_model                                    # every model, H100 SXM
    python -m benchmarks.gpu_model --machines "A100 80GB" B200 --ranks 256 512 --batches 16 --rows 8192
    python -m benchmarks.gpu_model --models LLaMA-3-8B --ranks 512 --batches 16 --rows 8192 --detail

The launches are the library's own plan (`gpu_plan`), registers what nvcc makes of the kernels (`cuda_resources`;
without nvcc the 128 that their launch bounds allow), devices as published (`gpu_machines`). For every launch are
counted (`gpu_counts`)

    memory          bytes from and to device memory: cached rows once for the tiles of query rows that share them, what
                    `absorb` writes for a wave written and read where the second-level cache does not hold it
    cache           bytes between SMs and second-level cache: the same rows for every tile of query rows, the wave's
                    queries, decoded dims' rows of key_up, states of splits
    shared memory   bytes that matrices are loaded from, and copies write
    tensor cores    multiply-adds of whole mma instructions, padding included
    latency         a CTA's own way through a tile of keys: products that wait for one another, exchanges, barriers, a
                    copy's way
    launches        from the end of a kernel to the next one's work, in a CUDA graph

A launch's CTAs run in rounds of as many as fit on the device; a round takes as long as its scarcest resource does. The
first percent is `attend` alone, which is what others publish of theirs, the second the whole call: both are the cache's
bytes by the data sheet's bandwidth, divided by the expected time. "over GQA" is how many times faster the call is than
reading the original's keys and values as fast as plain copies go. Several machines share a table, a column each.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import cuda_resources
from benchmarks.cuda_resources import Resources
from benchmarks.gpu_counts import Estimate, estimate
from benchmarks.gpu_machines import FIGURES, MACHINES
from benchmarks.gpu_plan import MODELS, ROPE_DIM, Shape

SOURCES = sorted(cuda_resources.SOURCE.parent.iterdir())
KEPT = Path(__file__).parents[1] / "build" / "gpu_model"


def registers_of(architecture: int) -> dict[str, Resources]:
    """What nvcc makes of the kernels as they are now, kept in build/ until they change; empty without nvcc."""
    compiler = cuda_resources.nvcc()
    if compiler is None:
        return {}
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    kept = KEPT / f"{digest}-{architecture}.json"
    if not kept.exists():
        print(f"compiling the kernels for sm_{architecture} ...", file=sys.stderr)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            made = cuda_resources.compile_kernels(compiler, architecture, Path(folder, "kernels.cubin"))
        kept.write_text(json.dumps({name: vars(resources) for name, resources in made.items()}))
    return {name: Resources(**told) for name, told in json.loads(kept.read_text()).items()}


def bands_name(shape: Shape) -> str:
    return f"order {shape.order}, {shape.finest}" if shape.finest else "none"


def table(estimates: Iterable[Estimate]) -> str:
    """Markdown, a row for each, of one GPU."""
    lines = [
        "| model | latent + rope | bands | batch | rows | launches | us | attend | call | over GQA | most time |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in estimates:
        told = (
            *names_of(e.shape), e.launches, f"{e.time.total * 1e6:.0f}", f"{e.attend:.0%}", f"{e.call:.0%}",
            f"{e.gain:.1f}x", e.time.bound(),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, told))} |")
    return "\n".join(lines)


def wide_table(shapes: Sequence[Shape], columns: Sequence[Sequence[Estimate]]) -> str:
    """Markdown, a row for each shape and a column for each GPU: percents of attend and of the call, gain over GQA."""
    machines = [column[0].machine.name for column in columns]
    lines = [
        f"| model | latent + rope | bands | batch | rows | {' | '.join(machines)} |", "|---" * (5 + len(columns)) + "|",
    ]  # fmt: skip
    for shape, *row in zip(shapes, *columns, strict=True):
        cells = [f"{100 * e.attend:.0f} / {100 * e.call:.0f} / {e.gain:.1f}x" for e in row]
        lines.append(f"| {' | '.join(map(str, (*names_of(shape), *cells)))} |")
    return "\n".join(lines)


def names_of(shape: Shape) -> tuple[str, str, str, int, int]:
    return shape.model.name, f"{shape.rank} + {ROPE_DIM}", bands_name(shape), shape.batch, shape.rows


def summary(estimates: Sequence[Estimate], share: float = 0.8) -> str:
    """How many of one GPU's shapes of batch >= 16 reach that share of the bandwidth, and what keeps others from it."""
    large = [e for e in estimates if e.shape.batch >= 16]
    reached = [sum(getattr(e, what) >= share for e in large) for what in ("attend", "call")]
    why = Counter(e.time.bound() for e in large if e.call < share)
    reasons = ", ".join(f"{what} {count}" for what, count in why.most_common())
    return (
        f"{large[0].machine.name}: of {len(large)} shapes of batch 16 and more attend reaches {share:.0%} of the "
        f"bandwidth in {reached[0]}, the call in {reached[1]}; most of the others' time: {reasons or '-'}."
    )


def detail(e: Estimate) -> str:
    """Where a call's time goes, longest first."""
    spent = sorted(e.time.seconds.items(), key=lambda item: -item[1])
    return "\n".join(f"    {kernel:8} {resource:14} {t * 1e6:9.1f} us" for (kernel, resource), t in spent if t > 0)


def published() -> str:
    """Others' figures, as shares of the same bandwidth where the machine is among ours."""
    rates = {machine.name.split()[0]: machine.memory_rate for machine in MACHINES} | {"H800": 3.35e12}
    return "\n".join(
        f"- {figure.kernel} on {figure.machine}: {figure.bytes_per_second / 1e9:.0f} GB/s, "
        f"{figure.bytes_per_second / rates[figure.machine]:.0%} of the data sheet's ({figure.what})"
        for figure in FIGURES
    )


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    models = [model for model in MODELS if model.name in args.models]
    bands = [(0, 0) if name == "none" else tuple(map(int, name.split("/"))) for name in args.bands]
    return [
        Shape(model, rank, batch, rows, order, finest)
        for model, rank, (order, finest), batch, rows in itertools.product(
            models, args.ranks, bands, args.batches, args.rows
        )
    ]


def add_shapes(parser: argparse.ArgumentParser, **usual: Sequence[str | int]) -> None:
    """The options that :func:`shapes_of` reads; `usual` are their values where they are not given."""
    names = [model.name for model in MODELS]
    given = {
        "models": names, "ranks": [128, 256, 384, 512], "bands": ["none", "0/64", "1/64", "1/16"],
        "batches": [1, 16, 64], "rows": [8192, 32768, 131072],
    } | usual  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=names, default=given["models"])
    parser.add_argument("--bands", nargs="+", default=given["bands"], help="none, or order/rows of the finest block")
    for name in ("ranks", "batches", "rows"):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=given[name])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [machine.name for machine in MACHINES]
    parser.add_argument("--machines", nargs="+", choices=names, default=["H100 SXM"])
    add_shapes(parser)
    parser.add_argument("--detail", action="store_true", help="where the time of each goes")
    args = parser.parse_args(arguments)
    shapes, columns = shapes_of(args), []
    print("Computed from counted work and published rates, never measured.\n")
    for machine in (machine for machine in MACHINES if machine.name in args.machines):
        registers = registers_of(machine.architecture)
        columns.append([estimate(shape, machine, registers) for shape in shapes])
    print(table(columns[0]) if len(columns) == 1 else wide_table(shapes, columns), "\n", sep="")
    for estimates in columns:
        if any(e.shape.batch >= 16 for e in estimates):
            print(summary(estimates))
        if args.detail:
            print(*(f"\n{e.machine.name}, {e.shape}\n{detail(e)}" for e in estimates), sep="\n")
    print()
    print(f"Published by others of their own attention kernels, not reproduced:\n\n{published()}")


if __name__ == "__main__":
    main(sys.argv[1:])
