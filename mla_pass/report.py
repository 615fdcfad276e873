"""What a conversion did, layer by layer: plain numbers, as a table for people and as JSON for machines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from mla_pass.errors import MlaPassError

FORMAT_VERSION = 1
"""Version of the JSON that `Report.to_json` writes; raised when a field changes its meaning or goes."""


@dataclass(frozen=True)
class LayerReport:
    """One attention block before and after.

    `kept` is the fraction, 0 to 1, of the metric-weighted energy of keys and values that the latent keeps;
    `output_error` the relative error of the attention output on held-out calibration text, None if not measured;
    `cache_*` are bytes per token, `weights_*` numbers in the projections; `note` says what is special here, or "".
    """

    name: str
    heads: int
    kv_groups: int
    head_dim: int
    rank: int
    rope_dims: int
    kept: float
    output_error: float | None
    cache_before: int
    cache_after: int
    weights_before: int
    weights_after: int
    note: str


@dataclass(frozen=True)
class Report:
    """All layers of one model; `refusals` are the blocks left as they were, `dtype` is the model's."""

    layers: tuple[LayerReport, ...]
    refusals: tuple[str, ...]
    dtype: str
    notes: tuple[str, ...]

    @property
    def cache_before(self) -> int:
        """Cache bytes per token of the converted layers, before."""
        return sum(layer.cache_before for layer in self.layers)

    @property
    def cache_after(self) -> int:
        """Cache bytes per token of the converted layers, after."""
        return sum(layer.cache_after for layer in self.layers)

    @property
    def weights_before(self) -> int:
        """Numbers in the attention projections of the converted layers, before."""
        return sum(layer.weights_before for layer in self.layers)

    @property
    def weights_after(self) -> int:
        """Numbers in the attention projections of the converted layers, after."""
        return sum(layer.weights_after for layer in self.layers)

    def worse(self) -> tuple[str, ...]:
        """What this conversion made worse, a sentence each."""
        sentences = []
        if self.cache_after > self.cache_before:
            sentences.append(
                f"The cache grew from {self.cache_before:,} to {self.cache_after:,} bytes per token: "
                "convert with a smaller budget or rank."
            )
        if self.weights_after > self.weights_before:
            growth = f"{self.weights_before:,} to {self.weights_after:,}"
            sentences.append(f"The attention projections grew from {growth} numbers: more memory and work for weights.")
        if self.refusals:
            count = len(self.refusals)
            blocks = "attention block was" if count == 1 else "attention blocks were"
            sentences.append(f"{count} {blocks} not converted and the cache of those stays as it was.")
        return tuple(sentences)

    def text(self, *, would: bool = False) -> str:
        """The report as an aligned table with totals; `would` words it as a plan (for a dry run)."""
        lines = [*_table(_HEADER, [_row(layer) for layer in self.layers]), "", *self._totals(would)]
        for title, items in (("Worse", self.worse()), ("Refused", self.refusals), ("Notes", self.notes)):
            if items:
                lines += ["", f"{title}:", *(f"  - {item}" for item in items)]
        return "\n".join(lines)

    def _totals(self, would: bool) -> list[str]:
        verb = "would go" if would else "went"
        return [
            f"{len(self.layers)} attention blocks of a {self.dtype} model",
            f"cache bytes per token {verb} from {_change(self.cache_before, self.cache_after)}",
            f"attention weights {verb} from {_change(self.weights_before, self.weights_after)} numbers",
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file: the fields of both classes, `totals`, `worse` and the format version."""
        totals = {
            name: getattr(self, name) for name in ("cache_before", "cache_after", "weights_before", "weights_after")
        }
        return {"format_version": FORMAT_VERSION, **asdict(self), "totals": totals, "worse": list(self.worse())}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what :meth:`to_json` wrote. Raises MlaPassError for another format version."""
        if data.get("format_version") != FORMAT_VERSION:
            raise MlaPassError(
                f"report of format version {data.get('format_version')}; this mla_pass reads {FORMAT_VERSION}"
            )
        layers = tuple(LayerReport(**layer) for layer in data["layers"])
        return cls(layers, tuple(data["refusals"]), data["dtype"], tuple(data["notes"]))


_HEADER = ("layer", "heads", "groups", "head dim", "rank", "rope dims", "kept", "output error", "cache B/token",
           "weights", "note")  # fmt: skip


def _row(layer: LayerReport) -> tuple[str, ...]:
    error = "-" if layer.output_error is None else f"{layer.output_error:.2e}"
    return (
        layer.name,
        str(layer.heads),
        str(layer.kv_groups),
        str(layer.head_dim),
        str(layer.rank),
        str(layer.rope_dims),
        f"{layer.kept:.4f}",
        error,
        f"{layer.cache_before:,} -> {layer.cache_after:,}",
        f"{layer.weights_before:,} -> {layer.weights_after:,}",
        layer.note,
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligns columns: the first and the last to the left, numbers to the right."""
    cells = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    left = (0, len(header) - 1)
    lines = []
    for row in cells:
        aligned = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(aligned).rstrip())
    return lines


def _change(before: int, after: int) -> str:
    if before == 0:
        return f"{before:,} to {after:,}"
    return f"{before:,} to {after:,} ({after / before:.1%})"
