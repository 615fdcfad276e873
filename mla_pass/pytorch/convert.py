"""Hugging Face checkpoint in, Hugging Face checkpoint out: by way of the graph, where blocks are read and proved.

The model is exported, converted as `mla_pass.convert` does, and written as the module that the conversion amounts to.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mla_pass.config import MlaConfig
from mla_pass.convert import RECORD, Progress, Result, convert, planned
from mla_pass.errors import MlaPassError
from mla_pass.export.hf import export_hf
from mla_pass.export.layout import FORMATS, MAX_POSITION_KEY, copy_companions, new_folder, require_free
from mla_pass.export.tracing import DTYPES, locate
from mla_pass.onnx.emit import Conversion
from mla_pass.onnx.io import load_model
from mla_pass.onnx.passes import check_calibration
from mla_pass.onnx.session import model_path
from mla_pass.patterns import find_sites
from mla_pass.pytorch.folder import check, read_config, weight_files, write_cache, write_model
from mla_pass.pytorch.spec import by_layer_number, layer_spec
from mla_pass.report import Report
from mla_pass.site import AttentionSite
from mla_pass.statistics import Calibration

ONNX_FOLDER = "onnx"
if TYPE_CHECKING:
    from mla_pass.pytorch.deepseek import DeepseekReport



@dataclass(frozen=True)
class TorchResult:
    """A converted checkpoint that is not saved yet."""

    source: Path
    result: Result
    conversions: tuple[Conversion, ...]
    """Of the sites of a graph that is as it was, so that their weights can be read."""
    dtype: str
    exported: tempfile.TemporaryDirectory[str]
    """Where that graph lies; it goes when this does."""

    @property
    def report(self) -> Report:
        """What was done."""
        return self.result.report

    @property
    def calibration(self) -> Calibration:
        """What calibration saw."""
        return self.result.calibration

    def save(self, out: str | Path, *, format: str = "hf", bundle: bool = False) -> Path:
        """Write the folder `out`, whole or not at all: ``hf`` a checkpoint, ``onnx`` what `Result.save` writes (with
        `bundle`), ``both`` a checkpoint that has the latter in its folder `ONNX_FOLDER`.

        Raises MlaPassError when `out` is taken or cannot be written, or the model does not come up from it.
        """
        if format not in FORMATS:
            raise MlaPassError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
        if format == "onnx":
            return self.result.save(out, bundle=bundle)
        with new_folder(out) as folder:
            self.write(folder)
            if format == "both":
                self.result.save(folder / ONNX_FOLDER, bundle=bundle)
        return Path(out)

    def write(self, folder: Path) -> None:
        """Fill a folder that is there."""
        from mla_pass.pytorch.modeling import latent_classes

        dtype = getattr(torch, self.dtype)
        positions = int(self.result.model.metadata_props[MAX_POSITION_KEY])
        copy_companions(self.source, folder)
        write_model(self.source, self.conversions, dtype, positions, folder)
        if not any(layer_spec(conversion).still for conversion in self.conversions):
            write_cache(self.conversions, dtype, folder)
        record = {"config": self.result.config.to_json(), "report": self.report.to_json()}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        latent_classes(read_config(self.source)["model_type"])
        check(folder)

    def save_onnx(self, out: str | Path, *, bundle: bool = False) -> Path:
        """Write the same conversion as an ONNX folder; see `Result.save`."""
        return self.save(out, format="onnx", bundle=bundle)


def convert_checkpoint(
    source: str | Path, config: MlaConfig | None = None, *, dtype: str | None = None,
    calibrate: str | Path | np.ndarray = "self", calibration: Calibration | None = None,
    progress: Progress | None = None, exported: str | Path | None = None,
) -> TorchResult:  # fmt: skip
    """Convert the Hugging Face model folder `source`; arguments as `mla_pass.convert` takes them.

    `dtype`: of the weights that are written and of the cache, by default the source's. Every pair of the keys keeps its
    rotation, so that a `LatentCache` can serve the original, unless `config` asks for another rope_mode. `exported` is
    a folder that `export_hf` made of the same checkpoint; without it one is made for the time being.
    Raises MlaPassError when the model or the request cannot be served.
    """
    folder = locate(str(source))
    config = config or MlaConfig()
    if config.target != "mla-pass":
        raise MlaPassError(f"target {config.target} is for ONNX models; run mla-pass export --dtype float16 first")
    if config.partial:
        raise MlaPassError("a checkpoint is converted whole or not at all; leave partial out, or write ONNX")
    if config.rope_mode == "block":
        config = replace(config, turn_all=True)
    told = read_config(folder)
    wanted = dtype or told.get("dtype") or told.get("torch_dtype") or "float32"
    if wanted not in DTYPES:
        raise MlaPassError(f"dtype {wanted!r} is not offered: choose one of {', '.join(DTYPES)}")
    weight_files(folder)  # what is not there is better told before the work
    place = tempfile.TemporaryDirectory(prefix="mla_pass_")
    if exported is None:
        if progress is not None:
            progress("exporting", 0, 1)
        exported = export_hf(folder, Path(place.name) / "onnx")
    result = convert(
        exported, config, calibrate=calibrate, calibration=calibration, progress=progress, dtype=wanted
    )  # fmt: skip
    return TorchResult(folder, result, whole(Path(exported), result), wanted, place)


def convert_to_deepseek(
    source: str | Path, out: str | Path, config: MlaConfig | None = None, *,
    calibrate: str | Path | np.ndarray = "self", calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> tuple[DeepseekReport, Calibration]:  # fmt: skip
    """Convert the Hugging Face model folder `source` to a stock ``deepseek_v3`` folder `out`; see `save_deepseek`.

    Arguments as `mla_pass.convert` takes them; rope_mode is `extend`, whatever `config` says, for nothing else fits.
    Raises MlaPassError when the model or the request cannot be served.
    """
    from mla_pass.pytorch.deepseek import save_deepseek

    require_free(out)
    config = replace(config or MlaConfig(), rope_mode="extend")
    with tempfile.TemporaryDirectory(prefix="mla_pass_") as place:
        if progress is not None:
            progress("exporting", 0, 1)
        exported = model_path(export_hf(source, Path(place) / "onnx"))
        graph = load_model(exported)
        work = planned(exported, config, calibrate=calibrate, calibration=calibration, progress=progress)
        sites, _ = work.readable(graph)
        found = calibration or work.observe(graph, sites)
        check_calibration(found, sites)
        if progress is not None:
            progress("writing and proving the checkpoint", 0, 1)
        return save_deepseek(sites, found.sites, config, source, out), found


def whole(exported: Path, result: Result) -> tuple[Conversion, ...]:
    """The conversions on a fresh reading of the graph: the one that was rewritten has lost what it was read from."""
    sites = {site.name: site for site in find_sites(load_model(exported)) if isinstance(site, AttentionSite)}
    return by_layer_number([replace(c, site=sites[c.site.name]) for c in result.conversions])
