"""What the launches of a decoding step do, counted, and how long that takes a GPU; see `gpu_model`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.cuda_resources import Resources
from benchmarks.gpu_machines import (
    CACHE_LATENCY,
    CACHE_SHARE,
    CTAS_SM,
    LAUNCH_SECONDS,
    MEMORY_LATENCY,
    MEMORY_SHARE,
    MMA_LATENCY,
    PORT_RATE,
    REGISTERS_SM,
    SHARED_LATENCY,
    SHARED_RATE,
    SHARED_RESERVED,
    WARPS_SM,
    Machine,
)
from benchmarks.gpu_plan import Launch, Shape, launches

WARP = 32
MMA = 16 * 8 * 16
"""Multiply-adds of an instruction."""
MATRICES = 512
"""Bytes that a warp loads with one ldmatrix.x4."""
LAUNCH_BOUND = Resources(128, 0, 0, 0)
"""Registers that every kernel gets at the most, but for attend's of 384 columns and more."""
WIDE_LAUNCH_BOUND = Resources(168, 0, 0, 0)
UNROLLED = 4
"""Iterations of an inner loop that the compiler lays side by side, sharing the latency of their loads (a)."""
DECODED_AHEAD = 2
"""Steps that rows of key_up are read ahead of the products, see attend_decode.cuh."""
EXCHANGE = 340
"""Cycles of a tile's shuffles, exponentials and three barriers (a)."""
PANEL = 1500
"""Cycles in which a CTA of a product makes its left operand (a)."""
PRODUCT_ROWS, PRODUCT_COLUMNS, PRODUCT_STEP = 64, 64, 32
"""As product_shared.h has them."""


@dataclass(frozen=True)
class Load:
    """What one CTA does on the way through one tile: bytes, multiply-adds, and cycles on its own."""

    memory: float
    cache: float
    shared: float
    multiply_adds: float
    cycles: float


@dataclass
class Time:
    """Seconds, by kernel and by the resource that they were spent on."""

    seconds: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def of(self, kernel: str) -> float:
        """A kernel's, launches aside."""
        return sum(t for (name, resource), t in self.seconds.items() if name == kernel and resource != "launches")

    def bound(self) -> str:
        """What most of the time goes to."""
        merged: defaultdict[str, float] = defaultdict(float)
        for (name, resource), seconds in self.seconds.items():
            merged["launches" if resource == "launches" else f"{name}: {resource}"] += seconds
        return max(merged, key=lambda what: merged[what])


def resident(launch: Launch, resources: Resources, machine: Machine) -> int:
    """CTAs that an SM holds at a time. Registers are given to warps by 256."""
    warps = launch.threads // WARP
    registers = warps * -(-resources.registers * WARP // 256) * 256
    shared = launch.shared_bytes + resources.shared_bytes + SHARED_RESERVED
    return min(
        REGISTERS_SM // registers, machine.shared_sm // shared, WARPS_SM[machine.capability] // warps,
        CTAS_SM[machine.capability],
    )  # fmt: skip


def rounds(ctas: int, tiles: int, load: Load, places: int, machine: Machine) -> dict[str, float]:
    """Seconds by resource that a launch's CTAs take which each go through `tiles` tiles."""
    taken: defaultdict[str, float] = defaultdict(float)
    most = places * machine.processors
    for count, active in ((ctas // most, most), (1, ctas % most)):
        if active == 0:
            continue
        an_sm = -(-active // machine.processors)
        ways = {
            "memory": active * load.memory / (machine.memory_rate * MEMORY_SHARE),
            "cache": active * load.cache / min(machine.cache_rate, active * PORT_RATE * machine.clock),
            "shared memory": an_sm * load.shared / SHARED_RATE / machine.clock,
            "tensor cores": an_sm * load.multiply_adds / machine.multiply_adds / machine.clock,
            "latency": load.cycles / machine.clock,
        }
        scarcest = max(ways, key=lambda way: ways[way])
        taken[scarcest] += count * tiles * ways[scarcest]
    return taken


# ---- attend


@dataclass(frozen=True)
class Attend:
    """A launch of `attend`, with what follows from its parameters; see attend.cuh and attend_shared.h."""

    launch: Launch

    def __getattr__(self, name: str) -> int:
        try:
            return self.launch.work[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def sixteens(self) -> int:
        """Groups of 16 query rows that the kernel has room for: four warps each."""
        return self.launch.threads // (4 * WARP)

    @property
    def tiles(self) -> int:
        """Of a CTA: its split's share."""
        return -(-(-(-self.end // self.tile) - self.begin // self.tile) // self.splits)

    @property
    def passes(self) -> int:
        """Sixteen decoded columns each, of all groups that the CTA's rows are of."""
        return (self.columns - self.fine_column) // 16

    def varying_share(self) -> float:
        """Of a block's queries, what falls on one tile."""
        return self.tile / self.block if self.blocks > 1 else 0.0

    def load(self, resources: Resources, machine: Machine) -> Load:
        rows = self.tile * self.row_bytes
        kernel_rows = 16 * self.sixteens
        queries = 2 * self.orders * self.key_width * self.varying_share()
        fine = self.passes * 16 * self.key_rank * 2
        together = min(self.launch.grid[0], resident(self.launch, resources, machine) * machine.processors)
        spilled = 0 if self.wave_is_held(machine) else self.tile_rows * queries
        return Load(
            memory=rows / together + spilled, cache=rows + self.tile_rows * queries + fine,
            shared=MATRICES * self.matrices() + rows + kernel_rows * queries + self.passes * 16 * self.tile * 2,
            multiply_adds=self.multiply_adds(),
            cycles=self.cycles(machine),
        )  # fmt: skip

    def wave_bytes(self) -> int:
        """What `absorb` wrote for this launch."""
        return self.launch.grid[1] * self.blocks * self.orders * self.rows * self.key_width * 2

    def wave_is_held(self, machine: Machine) -> bool:
        return self.blocks == 1 or self.wave_bytes() <= CACHE_SHARE * machine.cache_bytes

    def matrices(self) -> float:
        """Loads of four matrices, 512 bytes each, of a tile."""
        varying, fixed, sixteens_of_keys = self.key_width / 16, self.fixed_width / 16, self.tile / 16
        if self.tile == 64:
            scores = (1 + self.orders) * varying + 2 * fixed
        else:  # eight keys a warp: a load of keys is 32 columns of them
            scores = -(-varying // 2) + self.orders * varying + -(-fixed // 2) + fixed
        values = sixteens_of_keys * (4 + -(-self.value_dim // 16))
        decoded = self.passes * -(-self.key_rank // 16) * sixteens_of_keys
        return self.sixteens * (4 * scores + values) + decoded

    def multiply_adds(self) -> float:
        scores = 4 * (2 if self.tile == 64 else 1) * (self.orders * self.key_width + self.fixed_width) / 16
        values = self.tile / 16 * -(-self.value_dim // 16) * 2
        decoded = 2 * self.passes * -(-self.key_rank // 16) * self.tile / 16
        return MMA * (self.sixteens * (scores + values) + decoded)

    def cycles(self, machine: Machine) -> float:
        """A warp's way through a tile, and a copy's, which is the same way where there is no second buffer."""
        step = MMA_LATENCY + SHARED_LATENCY / UNROLLED
        scores = (self.key_width + self.fixed_width) / 16 * step * self.tile / 64
        issue = 4 * MMA / machine.multiply_adds
        values = self.tile / 16 * (SHARED_LATENCY + max(MMA_LATENCY, -(-self.value_dim // 64) * 2 * issue))
        decoding = max(CACHE_LATENCY / DECODED_AHEAD, 2 * self.tile / 16 * issue)
        decoded = -(-self.passes // (4 * self.sixteens)) * self.key_rank / 16 * decoding
        way = scores + EXCHANGE + values + decoded
        copy = MEMORY_LATENCY + self.tile * self.row_bytes / PORT_RATE
        return max(way, copy) if self.stages == 2 else way + copy

    def time(self, resources: Resources, machine: Machine) -> dict[str, float]:
        places = resident(self.launch, resources, machine)
        taken = rounds(self.launch.ctas, self.tiles, self.load(resources, machine), places, machine)
        begins = -(-self.launch.ctas // (places * machine.processors)) * 2 * MEMORY_LATENCY / machine.clock
        states = self.launch.ctas * self.tile_rows * (self.sum_width + 2) * 4 * (1 + self.resume)
        taken["latency"] = taken.get("latency", 0.0) + begins
        taken["cache"] = taken.get("cache", 0.0) + states / machine.cache_rate
        return taken


# ---- the other kernels


def product_time(
    launch: Launch, depth: int, columns: int, written: float, resources: Resources, machine: Machine,
    *, held: bool = True,
) -> dict[str, float]:  # fmt: skip
    """A kernel made of products: a CTA makes 64 rows of `columns` columns, each a sum over `depth` numbers; all of them
    write `written` bytes, to device memory where the cache does not hold them."""
    squares = -(-columns // PRODUCT_COLUMNS)
    steps = squares * -(-depth // PRODUCT_STEP)
    step_bytes = PRODUCT_COLUMNS * PRODUCT_STEP * 2
    load = Load(
        memory=0 if held else written / launch.ctas, cache=steps * step_bytes + written / launch.ctas,
        # Four warps load two matrices of 16 by 16 of either side, for each 16 numbers of a step.
        shared=steps * (step_bytes + 4 * (PRODUCT_STEP // 16) * 4 * MATRICES) + PRODUCT_ROWS * depth * 2,
        multiply_adds=steps * PRODUCT_ROWS * PRODUCT_COLUMNS * PRODUCT_STEP,
        cycles=steps * (CACHE_LATENCY + 2 * MMA_LATENCY) + PANEL,
    )  # fmt: skip
    return rounds(launch.ctas, 1, load, resident(launch, resources, machine), machine)


def absorb_time(launch: Launch, held: bool, resources: Resources, machine: Machine) -> dict[str, float]:
    w = launch.work
    written = w["rows"] * w["groups"] * w["sequences"] * w["orders"] * w["key_width"] * 2
    columns = -(-w["key_width"] // launch.grid[1])
    return product_time(launch, w["depth"], columns, written, resources, machine, held=held)


def streamed(launch: Launch, machine: Machine) -> dict[str, float]:
    """Kernels that copy: what they read and write comes from the second-level cache."""
    w = launch.work
    moved = {
        "setup": w.get("pairs", 0) * 16,
        "append": 2 * w.get("rows", 0) * w.get("row_bytes", 0),
        "map": w.get("queries", 0) * (2 * w.get("query_dim", 0) + 4 * w.get("width", 0)),
        "fix": w.get("queries", 0) * (4 * w.get("width", 0) + 2 * w.get("out_width", 0)),
        "combine": w.get("rows", 0) * (4 * w.get("splits", 0) * w.get("sum_width", 0) + 2 * w.get("value_dim", 0)),
    }[kind_of(launch)]
    return {"cache": moved / machine.cache_rate}


def kind_of(launch: Launch) -> str:
    return re.sub("_.*", "", launch.kernel)


# ---- a call


def expected(calls: Iterable[Launch], registers: Mapping[str, Resources], machine: Machine) -> Time:
    """The time of these launches, one behind the other. Raises ValueError at a kernel that is not of decoding."""
    time, all_calls = Time(), list(calls)
    held = all(Attend(launch).wave_is_held(machine) for launch in all_calls if kind_of(launch) == "attend")
    for launch in all_calls:
        kind, w = kind_of(launch), launch.work
        wide = re.match(r"attend_b?f16_(384|512)_", launch.kernel)
        resources = registers.get(launch.kernel, WIDE_LAUNCH_BOUND if wide else LAUNCH_BOUND)
        if kind == "attend":
            taken = Attend(launch).time(resources, machine)
        elif kind == "absorb":
            taken = absorb_time(launch, held, resources, machine)
        elif kind == "decode":
            written = w["rows"] * w["value_dim"] * 2
            columns = min(PRODUCT_COLUMNS, w["value_dim"])
            taken = product_time(launch, w["value_rank"], columns, written, resources, machine)
        elif kind in ("setup", "append", "map", "fix", "combine") and not w.get("product"):
            taken = streamed(launch, machine)
        else:
            raise ValueError(f"{launch.kernel} is not counted: only decoding steps without a query map are")
        for resource, seconds in taken.items():
            time.seconds[kind, resource] += seconds
        time.seconds[kind, "launches"] += LAUNCH_SECONDS
    return time


@dataclass(frozen=True)
class Estimate:
    """A shape on a machine: seconds, and shares of the data sheet's bandwidth."""

    shape: Shape
    machine: Machine
    time: Time
    launches: int

    def share(self, seconds: float) -> float:
        return self.shape.cache_bytes / self.machine.memory_rate / seconds

    @property
    def attend(self) -> float:
        return self.share(self.time.of("attend"))

    @property
    def call(self) -> float:
        return self.share(self.time.total)

    @property
    def gain(self) -> float:
        """How many times faster than reading the original's keys and values as fast as the memory can."""
        return self.shape.full_bytes / (self.machine.memory_rate * MEMORY_SHARE) / self.time.total


def estimate(shape: Shape, machine: Machine, registers: Mapping[str, Resources]) -> Estimate:
    planned = launches(shape, machine)
    return Estimate(shape, machine, expected(planned, registers, machine), len(planned))
