"""What calibration learns about one site, and all that folding needs to know of the data; to disk and back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mla_pass.errors import MlaPassError

FORMAT_VERSION = 2
Metric = Literal["output", "fisher"]


@dataclass(frozen=True)
class SiteSample:
    """Held-out activations of one sequence: query [T, H, D], key [T, G, D], value [T, G, V], before rotation."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class SiteStatistics:
    """Moments of y = [k; v], the N = G*(D + V) numbers a GQA cache keeps per token; k before rotation, after any norm.

    `metric` [N, N] and `covariance` [N, N] are such that an error R (y - mean) of the cached rows costs about
    tr(metric R covariance R^T) / 2: in nats per token with the Fisher metric, else squared and relative to what the
    block puts out. Tokens count in them by how much depends on them, and so they do in `mean` [N]. `distance` [L]:
    share of the attention that falls on keys that many rows back; sums to 1. `tokens`: how many were seen. All
    float64. `sample`: tokens that none of these have seen.
    """

    tokens: int
    mean: np.ndarray
    covariance: np.ndarray
    metric: np.ndarray
    distance: np.ndarray
    sample: SiteSample | None = None


@dataclass(frozen=True)
class Calibration:
    """All sites of one model, and text to try conversions on: `held_out` [n, T] token ids that none of the moments has
    seen, and as many that they have, `seen` [n, T]. The last `written` of those held out the model wrote itself."""

    sites: tuple[SiteStatistics, ...]
    held_out: np.ndarray
    seen: np.ndarray
    metric: Metric
    written: int = 0

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all. Raises MlaPassError when that fails."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        arrays: dict[str, np.ndarray] = {"held_out": self.held_out, "seen": self.seen}
        for i, site in enumerate(self.sites):
            arrays |= {f"{i}.{name}": np.ascontiguousarray(getattr(site, name)) for name in _MOMENTS}
            arrays[f"{i}.tokens"] = np.array(site.tokens)
            if site.sample is not None:
                parts = ((f.name, getattr(site.sample, f.name)) for f in fields(SiteSample))
                arrays |= {f"{i}.sample.{name}": np.ascontiguousarray(array) for name, array in parts}
        about = {
            "format_version": FORMAT_VERSION,
            "metric": self.metric,
            "sites": len(self.sites),
            "written": self.written,
        }
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(arrays, partial, {"mla_pass.statistics": json.dumps(about)})
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise MlaPassError(f"cannot write the statistics to {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote. Raises MlaPassError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                about = json.loads((file.metadata() or {}).get("mla_pass.statistics", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise MlaPassError(f"cannot read calibration statistics from {path}: {error}") from error
        if about.get("format_version") != FORMAT_VERSION:
            raise MlaPassError(
                f"{path} holds no calibration statistics of format version {FORMAT_VERSION}; make them with --stats"
            )
        try:
            sites = tuple(_site(arrays, i) for i in range(about["sites"]))
            return cls(sites, arrays["held_out"], arrays["seen"], about["metric"], about["written"])
        except KeyError as error:
            raise MlaPassError(f"{path} is incomplete: {error} is missing; calibrate anew") from error


_MOMENTS = ("mean", "covariance", "metric", "distance")


def _site(arrays: dict[str, Any], i: int) -> SiteStatistics:
    sample = None
    if f"{i}.sample.query" in arrays:
        sample = SiteSample(*(arrays[f"{i}.sample.{f.name}"] for f in fields(SiteSample)))
    moments = {name: arrays[f"{i}.{name}"] for name in _MOMENTS}
    return SiteStatistics(tokens=int(arrays[f"{i}.tokens"]), sample=sample, **moments)
