"""Tokens per second and peak memory of whole models decoding behind a long past, on ONNX Runtime.

    python -m onnxruntime_genai.models.builder -i CHECKPOINT -o GQA -p fp32 -e cpu
    python benchmarks/end_to_end.py GQA CONVERTED [CONVERTED ...] [--past 4096 8000] [--batch 1 8] [--threads 2]

The first model is what the others are held against: the original as ONNX Runtime runs it fastest, with its caches in
shared buffers (GroupQueryAttention). Each case runs in a process of its own, one model after the other and all of them
`--rounds` times in turns, since the machine's clock moves; what is printed is the median step of the median round. The
past is random numbers: no kernel looks at what they are. Peak memory is of the process, model and cache included.

With `--prompt 2048` the table tells the time of a prompt instead, all its tokens in one run over an empty cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from mla_pass import native
from mla_pass.onnx.ports import CACHED, FLOATS, INTEGERS, CacheTensor
from mla_pass.onnx.session import allocate, host_view


@dataclass(frozen=True)
class Case:
    """One model decoding `steps` tokens a sequence behind `past`, or running a prompt where `past` is 0."""

    model: str
    batch: int
    past: int
    new: int
    """Tokens of a sequence in one run."""
    threads: int
    steps: int
    fused: bool


@dataclass(frozen=True)
class Found:
    """Seconds of a run, and bytes."""

    seconds: float
    peak: int
    cache: int


class Bound:
    """A session whose caches are one buffer each, input and output at once, whatever their names."""

    def __init__(self, session: ort.InferenceSession, caches: list[CacheTensor], case: Case) -> None:
        """Room for the past and for one run: every run writes the same rows again."""
        self.session = session
        self.binding = session.io_binding()
        total, random = case.past + case.new, np.random.default_rng(0)
        self.cache = {tensor: allocate(tensor, case.batch, total) for tensor in caches}
        for tensor, value in self.cache.items():
            rows = host_view(value, tensor.dtype)
            # Small whole numbers are numbers in every type, eight bits too, and no softmax overflows.
            rows[...] = random.integers(0, 3, rows.shape[1:]).astype(tensor.dtype)
            self.binding.bind_ortvalue_input(tensor.past, value)
            self.binding.bind_ortvalue_output(tensor.present, value)
        shape = (case.batch, case.new)
        feeds = {
            "input_ids": random.integers(10, 1000, shape), "attention_mask": np.ones((case.batch, total)),
            "position_ids": np.broadcast_to(np.arange(case.past, total), shape),
        }  # fmt: skip
        tokens = {port.name: INTEGERS[port.type] for port in session.get_inputs() if port.type in INTEGERS}
        self.feeds = {name: np.ascontiguousarray(feeds[name], dtype) for name, dtype in tokens.items()}
        for name, array in self.feeds.items():
            self.binding.bind_cpu_input(name, array)
        (logits,) = (port.name for port in session.get_outputs() if port.type in FLOATS and len(port.shape) == 3)
        self.binding.bind_output(logits, "cpu")

    def seconds(self) -> float:
        """Of one run."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - start


def opened(case: Case) -> ort.InferenceSession:
    """A plain session, with the op library where it is asked for."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = case.threads
    if case.fused:
        options.register_custom_ops_library(native.library_path())
    return ort.InferenceSession(str(Path(case.model) / "model.onnx"), options, providers=["CPUExecutionProvider"])


def caches_of(session: ort.InferenceSession, folder: Path) -> list[CacheTensor]:
    """Its cache tensors. GroupQueryAttention's have a width that only genai_config.json tells."""

    def tail(name: str) -> str:
        return name.partition(".")[2]

    presents = {tail(port.name): port.name for port in session.get_outputs()}
    pasts = [port for port in session.get_inputs() if port.type in CACHED and len(port.shape) == 4]
    path, told = folder / "genai_config.json", None
    if path.exists():
        told = json.loads(path.read_text())["model"]["decoder"]["head_size"]
    return [
        CacheTensor(
            port.name, presents[tail(port.name)], port.shape[1],
            port.shape[3] if isinstance(port.shape[3], int) else told, CACHED[port.type], "shared",
        )
        for port in pasts
    ]  # fmt: skip


def run(case: Case) -> Found:
    """Open the model, warm up, take the median of its runs."""
    session = opened(case)
    bound = Bound(session, caches_of(session, Path(case.model)), case)
    bound.seconds()
    seconds = statistics.median(bound.seconds() for _ in range(case.steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Found(seconds, peak, sum(value.tensor_size_in_bytes() for value in bound.cache.values()))


def elsewhere(case: Case) -> Found:
    """`run` in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Found(**json.loads(done.stdout))


def table(cases: list[Case], rounds: int) -> None:
    """All cases in turns; a line each."""
    found: dict[Case, list[Found]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found[case].append(elsewhere(case))
    first = found[cases[0]]
    for case, all_found in found.items():
        seconds, peak = (statistics.median(getattr(f, name) for f in all_found) for name in ("seconds", "peak"))
        base = statistics.median(f.seconds for f in first)
        tokens = case.batch * case.new / seconds
        name = Path(case.model).name + ("" if case.fused else ", stock operators")
        print(
            f"| {name} | {case.batch} | {case.past or case.new} | {case.threads} | {tokens:.1f} | {base / seconds:.2f} "
            f"| {all_found[0].cache / 2**20:.0f} | {peak / 2**20:.0f} |",
            flush=True,
        )


def has_node(folder: Path, op_type: str) -> bool:
    """Whether the model's graph holds such a node."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return any(node.op_type == op_type for node in model.graph.node)


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="folders, the one to compare with first")
    parser.add_argument("--past", type=int, nargs="+", default=[4096, 8000])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--prompt", type=int, help="time a prompt of so many tokens instead of decoding")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--body", action="store_true", help="converted models as stock operators, too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(asdict(run(Case(**json.loads(arguments.case))))))
        return
    if not arguments.models:
        parser.error("give the model to compare with, and converted ones")
    for folder in arguments.models:
        if not (has_node(folder, "GroupQueryAttention") or has_node(folder, "LatentAttention")):
            parser.error(f"{folder} has neither GroupQueryAttention nor LatentAttention: its cache is no shared buffer")
    print("| model | batch | tokens before | threads | tokens/s | times the first | cache MiB | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    pasts = [(0, arguments.prompt)] if arguments.prompt else [(past, 1) for past in arguments.past]
    for threads in arguments.threads:
        for batch in arguments.batch:
            for past, new in pasts:
                kinds = [(folder, fused) for folder in arguments.models for fused in (True, False)]
                chosen = [(folder, fused) for folder, fused in kinds if fused or arguments.body]
                cases = [Case(str(f), batch, past, new, threads, arguments.steps, fused) for f, fused in chosen]
                table(cases, arguments.rounds)


if __name__ == "__main__":
    main()
