"""What GPUs have, as published; the numbers that `gpu_model` counts against.

Sources, by the letters beside the numbers:

    d  NVIDIA's data sheets and architecture white papers: A100 80GB SXM, L40S, H100 SXM, H200 SXM, B200 (HGX), GeForce
       RTX 5090; CUDA C++ Programming Guide, "Compute Capabilities", for shared memory and registers. Rates of tensor
       cores are the dense ones of 16-bit operands with float32 accumulation, divided by SMs and clock.
    l  Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking", arXiv 2501.12084: mma.sync
       reaches 62 % of the data sheet's rate on an H100, which only wgmma reaches; latencies of mma.sync are about 33
       cycles on an A100 and an H100.
    c  Chips and Cheese, "Nvidia's H100: Funny L2, and Tons of Bandwidth" (2023): an H100 PCIe reads 5.5 to 5.7 TB/s
       out of its second-level cache, 28 bytes a cycle and SM. Taken for the A100 and the SXM cards, too.
    a  assumed: nobody published it where we looked.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One GPU. Rates are of the whole device a second, or of one SM a cycle where they say so."""

    name: str
    capability: tuple[int, int]
    processors: int
    clock: float
    """Cycles a second under load."""
    memory_rate: float
    """Bytes a second, of the data sheet."""
    cache_bytes: int
    """Of the second level."""
    cache_rate: float
    """Bytes a second that SMs read from it."""
    shared_cta: int
    """The most shared memory that one CTA can have."""
    shared_sm: int
    multiply_adds: int
    """16-bit multiply-adds of mma.sync, an SM and cycle."""

    @property
    def architecture(self) -> int:
        return 10 * self.capability[0] + self.capability[1]


def _machine(
    name: str, capability: tuple[int, int], processors: int, clock: float, memory: float, cache_mb: int, cache: float,
    shared_sm: int, multiply_adds: int,
) -> Machine:  # fmt: skip
    """`clock` in GHz, `memory` and `cache` in TB/s, `shared_sm` in KiB: a CTA gets one less."""
    return Machine(
        name, capability, processors, clock * 1e9, memory * 1e12, cache_mb << 20, cache * 1e12, (shared_sm - 1) << 10,
        shared_sm << 10, multiply_adds,
    )  # fmt: skip


MACHINES = (
    #         d                 d      d    d     d      d    cache rate  d    multiply-adds
    _machine("A100 80GB", (8, 0), 108, 1.41, 2.039, 40, 4.3, 164, 1024),  # c; d
    _machine("L40S", (8, 9), 142, 2.52, 0.864, 96, 5.0, 100, 512),  # a; d
    _machine("H100 SXM", (9, 0), 132, 1.83, 3.35, 50, 6.8, 228, 1270),  # c; l, 62 % of 2048
    _machine("H200", (9, 0), 132, 1.83, 4.8, 50, 6.8, 228, 1270),  # c; l
    _machine("B200", (10, 0), 148, 1.85, 8.0, 126, 12.0, 228, 1024),  # a; a, as an A100's SM
    _machine("RTX 5090", (12, 0), 170, 2.41, 1.792, 96, 6.0, 100, 256),  # a; d
)

REGISTERS_SM = 65536  # d, and all that follows
WARPS_SM = {(8, 0): 64, (8, 6): 48, (8, 9): 48, (9, 0): 64, (10, 0): 64, (12, 0): 48}
CTAS_SM = {(8, 0): 32, (8, 6): 16, (8, 9): 24, (9, 0): 32, (10, 0): 32, (12, 0): 24}
SHARED_RESERVED = 1024  # of every CTA
SHARED_RATE = 128  # bytes an SM and cycle
PORT_RATE = 64  # bytes that an SM gets from the second-level cache at the most, a cycle

MEMORY_SHARE = 0.92
"""Of the data sheet's bandwidth that plain copies reach on these cards (a)."""
CACHE_SHARE = 0.7
"""Of the second-level cache that can be counted on: an A100's halves keep copies of each other's lines (a)."""

# Cycles; the first as in l, the others rounded from what such measurements find on these cards (a).
MMA_LATENCY = 33
SHARED_LATENCY = 30
CACHE_LATENCY = 280
MEMORY_LATENCY = 800
LAUNCH_SECONDS = 2.5e-6
"""From the end of one kernel in a CUDA graph to the first useful work of the next: drain, launch, fill (a)."""


@dataclass(frozen=True)
class Figure:
    """What others published of their own decoding attention: theirs, not reproduced."""

    kernel: str
    machine: str
    bytes_per_second: float
    what: str


FIGURES = (
    Figure("FlashMLA", "H800", 3000e9, "512 + 64 numbers, 128 heads"),
    Figure("SGLang cutlass_mla", "B200", 4124e9, "512 + 64 numbers, 128 heads"),
    Figure("FlashInfer MLA", "H100", 2547e9, "512 + 64 numbers"),
)
