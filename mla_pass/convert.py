"""Converting a model, in one call: read, prove, calibrate, fold, rewrite; then save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import onnx_ir as ir

from mla_pass import native
from mla_pass.config import MlaConfig
from mla_pass.errors import MlaPassError
from mla_pass.export.genai import read_about, write_genai_config
from mla_pass.export.layout import MAX_POSITION_KEY, copy_companions, new_folder
from mla_pass.onnx.emit import Conversion
from mla_pass.onnx.io import load_model, save_model
from mla_pass.onnx.paged import interface, require_accepted
from mla_pass.onnx.passes import MlaPass, Progress
from mla_pass.onnx.session import model_path, session
from mla_pass.patterns import find_sites
from mla_pass.report import Report
from mla_pass.site import AttentionSite, Refusal
from mla_pass.statistics import Calibration

if TYPE_CHECKING:
    from torch.export import ExportedProgram

RECORD = "mla_pass.json"
SELF_BATCH = 32
"""Sequences that the model writes side by side: fast, at the memory of that many caches."""


@dataclass(frozen=True)
class Result:
    """A converted model that is not saved yet."""

    model: ir.Model
    report: Report
    config: MlaConfig
    source: Path | None
    """Folder of the original, whose tokenizer and configuration go along."""
    calibration: Calibration
    """What calibration saw; another conversion of the same model can start from it."""
    conversions: tuple[Conversion, ...]
    """Every block with what it was folded to."""

    def save(self, out: str | Path, *, bundle: bool = False) -> Path:
        """Write the folder `out`: the model, what was done to it (mla_pass.json), tokenizer and configuration.

        `bundle` puts the op library beside the model, for machines without mla_pass. The model is opened and run once
        before the folder gets its name, unless it is bfloat16. A paged model, which ONNX Runtime has kernels for on
        CUDA alone, is opened as far as they are needed; what its inputs mean is told in mla_pass.json.
        Raises MlaPassError when `out` is taken or cannot be written, or there is no library to bundle; nothing is left
        behind then.
        """
        paged = self.config.target == "ort-latent"
        if bundle and paged:
            raise MlaPassError("a model for target ort-latent needs no op library; leave bundle out")
        library = Path(native.library_path()) if bundle else None
        with new_folder(out) as folder:
            if library is not None:
                shutil.copy(library, folder / library.name)
            save_model(self.model, folder)
            record = {"config": self.config.to_json(), "report": self.report.to_json()}
            if paged:
                record["interface"] = interface(self.model)
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
            if self.source is not None:
                copy_companions(self.source, folder)
            if self.config.layout == "genai":
                write_genai_config(folder, self.model, None if library is None else library.name)
            if paged:
                require_accepted(model_path(folder))
            # ONNX Runtime's CPU has no bfloat16 arithmetic: such a model is checked where it can run.
            computes = not paged and self.conversions[0].site.dtype != "bfloat16"
            if computes and not np.isfinite(session(folder).logits([[0, 0, 0]])).all():
                raise MlaPassError("the converted model's logits are not finite; nothing was written")
        return Path(out)


@overload
def convert(
    model: str | Path | ir.Model, config: MlaConfig | None = None, *,
    calibrate: str | Path | np.ndarray = "self", calibration: Calibration | None = None,
    progress: Progress | None = None, dtype: str | None = None,
) -> Result: ...  # fmt: skip


@overload
def convert(
    model: ExportedProgram, config: MlaConfig | None = None, *, calibrate: np.ndarray,
    progress: Progress | None = None,
) -> ExportedProgram: ...  # fmt: skip


def convert(
    model: str | Path | ir.Model | ExportedProgram, config: MlaConfig | None = None, *,
    calibrate: str | Path | np.ndarray = "self", calibration: Calibration | None = None,
    progress: Progress | None = None, dtype: str | None = None,
) -> Result | ExportedProgram:  # fmt: skip
    """Convert a GQA model (a folder, an .onnx file, or an onnx_ir model, which is left as it is) to latent attention.

    `calibrate`: text to fit the latents to. "self" lets the model write it; a path is a text file (the folder's
    tokenizer reads it) or token ids in .npy; an array is token ids. The model writes some beside it
    (`MlaConfig.calibrate_self`). An onnx_ir model has no folder: it takes an array, and nothing beside.
    The `calibration` of an earlier Result of the same model stands in for the text, whatever the budget.
    `dtype` is what the model's own cache is of, and the budget counted in, where the graph computes in another type.
    A ``torch.export.ExportedProgram`` with a flat cache (`mla_pass.export.fx.export_fx` makes one) is rewritten as one:
    give `calibrate` token ids; what comes back is a program, see `mla_pass.pytorch.fx_convert.convert_exported`.
    Raises MlaPassError when the model or the request cannot be served.
    """
    config = config or MlaConfig()
    if not isinstance(model, (str, Path, ir.Model)):
        if calibration is not None:
            raise MlaPassError("an exported program is calibrated anew; give calibrate token ids, and no calibration")
        return _convert_program(model, config, calibrate, progress)
    if isinstance(model, ir.Model):
        if not isinstance(calibrate, np.ndarray) and calibration is None:
            raise MlaPassError("a model in memory has no tokenizer; give calibrate an array of token ids")
        source, graph = None, model.clone()
    else:
        source, graph = model_path(model), load_model(model)
    if config.layout == "genai":
        if source is None:
            raise MlaPassError("a model in memory has no config.json, which layout='genai' needs; give a folder")
        read_about(source.parent)  # saving reads it; what it lacks is better told before the work
    stated = graph.metadata_props.get(MAX_POSITION_KEY)
    if stated and int(stated) < config.calibrate_context:
        config = replace(config, calibrate_context=int(stated))
    rewriting = planned(source, config, calibrate=calibrate, calibration=calibration, progress=progress, dtype=dtype)
    rewriting.call(graph)
    assert rewriting.report and rewriting.settled and rewriting.calibration  # call returned
    folder = source.parent if source else None
    return Result(graph, rewriting.report, rewriting.settled, folder, rewriting.calibration, rewriting.conversions)


def _convert_program(
    program: ExportedProgram, config: MlaConfig, calibrate: str | Path | np.ndarray, progress: Progress | None
) -> ExportedProgram:
    """An exported program, which has neither folder nor tokenizer."""
    if type(program).__module__.partition(".")[0] != "torch":
        raise MlaPassError(
            f"cannot convert a {type(program).__name__}; give a folder, an .onnx file, an onnx_ir model or a "
            "torch.export.ExportedProgram"
        )
    if config.target != "mla-pass":
        raise MlaPassError(f"target {config.target} is for ONNX models; export the model to ONNX first")
    from mla_pass.pytorch.fx_convert import convert_exported

    ids: np.ndarray | None = None  # text needs a tokenizer
    if isinstance(calibrate, np.ndarray):
        ids = calibrate
    elif Path(calibrate).suffix == ".npy":
        ids = read_ids(Path(calibrate))
    return convert_exported(program, config, calibrate=ids, progress=progress)


def planned(
    source: Path | None, config: MlaConfig, *, calibrate: str | Path | np.ndarray, calibration: Calibration | None,
    progress: Progress | None, dtype: str | None = None,
) -> MlaPass:
    """The pass over the model file `source` (None: one in memory), with its calibration text; nothing is run yet."""
    told = None if progress is None else partial(progress, "writing calibration text")
    tokens, origin = (no_text, "no text") if calibration else token_source(source, calibrate, config, told)
    beside = None if source is None or is_self(calibrate) else partial(self_written, source, progress=told)
    return MlaPass(
        config, tokens, progress=progress, origin=origin, calibration=calibration,
        written=beside, dtype=dtype,
    )  # fmt: skip


def no_text(count: int) -> np.ndarray:
    """Stands in for calibration text where statistics are given; never called."""
    raise AssertionError(f"{count} tokens of calibration text asked for, though statistics are given")


def explain(model: str | Path) -> list[AttentionSite | Refusal]:
    """Every attention block of a model, in order, as it would be converted or why it would not."""
    return find_sites(load_model(model))


def token_source(
    source: Path | None, calibrate: str | Path | np.ndarray, config: MlaConfig,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Callable[[int], np.ndarray], str]:  # fmt: skip
    """A function that gives (at least, where it can) so many token ids, and a name for where they come from.

    `progress` hears of the tokens that the model writes.
    """
    if isinstance(calibrate, np.ndarray):
        ids = as_token_ids(calibrate, "the array")
        return (lambda count: ids), "the array"
    assert source is not None  # checked by convert
    if is_self(calibrate):
        length = config.calibrate_context
        written = partial(self_written, source, length=length, progress=progress)
        return (lambda count: written(-(-count // length)).reshape(-1)), "the model's own text"
    path = Path(calibrate)
    if not path.is_file():
        raise MlaPassError(f"calibration text {path} does not exist; give a text file, token ids in .npy, or 'self'")
    ids = read_ids(path) if path.suffix == ".npy" else read_text(path, source.parent)
    return (lambda count: ids), str(path)


def is_self(calibrate: str | Path | np.ndarray) -> bool:
    """Whether the model is to write all of the text."""
    return not isinstance(calibrate, np.ndarray) and str(calibrate) == "self"


def self_written(
    source: Path, rows: int, length: int, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Text the model writes by itself from its first token, [rows, length]."""
    from mla_pass.onnx.perplexity import sample_tokens

    return sample_tokens(session(source), rows * length, length=length, batch=SELF_BATCH, progress=progress)


def read_ids(path: Path) -> np.ndarray:
    """Token ids from a .npy file. Raises MlaPassError when it holds something else."""
    try:
        return as_token_ids(np.load(path), str(path))
    except (ValueError, OSError, EOFError) as error:
        raise MlaPassError(f"{path} cannot be read as a .npy array of token ids; save it with numpy.save") from error


def as_token_ids(ids: np.ndarray, origin: str) -> np.ndarray:
    """A flat int64 stream. Raises MlaPassError for anything but integers."""
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        raise MlaPassError(
            f"{origin} holds {ids.dtype} of shape {ids.shape}; expected integers [tokens] or [rows, tokens]"
        )
    return ids.reshape(-1).astype(np.int64)


def read_text(path: Path, folder: Path) -> np.ndarray:
    """Token ids of a text file by the tokenizer in a model's folder."""
    from mla_pass.onnx.text import load_tokenizer

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MlaPassError(f"{path} is not UTF-8 text; give a text file, or token ids in .npy") from error
    return np.array(load_tokenizer(folder).encode(text), np.int64)
