"""Healing: a short training of a converted model's latent attention towards what the original model predicts.

Only the matrices around the LatentAttention nodes change; the text needs no labels, as the original model's own
predictions are the aim. Nothing here imports torch before it is known to be installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from mla_pass.convert import RECORD, as_token_ids, read_ids, read_text, self_written
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import MAX_POSITION_KEY, copy_companions, new_folder, require_free, require_libraries
from mla_pass.onnx.io import external_tensors, load_model, save_model
from mla_pass.onnx.perplexity import cut_windows
from mla_pass.onnx.session import as_ids, model_path, session
from mla_pass.onnx.text import load_tokenizer
from mla_pass.pytorch.healing import FORMAT_VERSION, HELD_OUT, HealConfig, Healing

if TYPE_CHECKING:
    from mla_pass.pytorch.trainable import Trainable
    from mla_pass.pytorch.training import Training

HISTORY, PLOT = "heal.json", "heal.svg"
SELF_TOKENS = 32768
"""Tokens the model writes for a run of so many minutes; a run of so many tokens gets as many."""
NOTHING_TO_HEAL = 1e-6
"""A divergence, nats per token, that the rounding of float32 logits explains."""

Progress = Callable[[str, int, int], None]


def heal(
    original: str | Path, converted: str | Path, out: str | Path, *, text: str | Path | np.ndarray = "self",
    config: HealConfig | None = None, resume: bool = False, device: str = "cpu", progress: Progress | None = None,
) -> Healing:  # fmt: skip
    """Train the latent attention of the folder `converted` towards the folder `original`; write the folder `out`.

    `text`: a text file (the original's tokenizer reads it), token ids in .npy or in an array, or "self": what the
    original model writes. While a run lasts its state is kept in `{out}.heal-state`; with `resume` a run that was
    interrupted goes on from there. `device`: "cpu", or "cuda" for a GPU that torch can use.
    Raises MlaPassError when a request cannot be served and when the held-out loss did not fall; `out` is not written
    then. A KeyboardInterrupt says in its message how to go on.
    """
    require_libraries("torch", "safetensors", purpose="healing")
    from mla_pass.pytorch.checkpoint import Checkpoint, state_folder
    from mla_pass.pytorch.distill import Distillation
    from mla_pass.pytorch.trainable import find_trainable
    from mla_pass.pytorch.training import Training

    config, progress, out = config or HealConfig(), progress or (lambda stage, done, total: None), require_free(out)
    source, target = model_path(original), model_path(converted)
    check_device(device)
    progress("reading the models", 0, 1)
    models = load_model(source), load_model(target)
    check_positions(models, config)
    trainable = find_trainable(models[1])
    checkpoint = Checkpoint(state_folder(out), fingerprint(models, (source, target), text, config))
    state = checkpoint.load() if resume else None
    if state is None and checkpoint.exists:
        raise MlaPassError(
            f"{checkpoint.folder} holds the state of an unfinished run; --resume goes on with it, or remove that folder"
        )
    distillation = Distillation(*models, trainable.values, staggered=trainable.staggered, device=device)
    progress("reading the models", 1, 1)
    if state is None:
        progress("getting text", 0, 1)
        windows = as_ids(cut_text(source, text, config), distillation.vocab)
        progress("getting text", 1, 1)
        checkpoint.begin(windows)
    else:
        windows = state[0]
    try:
        training = Training(distillation, windows, config, checkpoint, progress)
        if state is not None:
            training.restore(*state[1:])
        healing = train(training, trainable)
        healing = write(out, models[1], (source, target), healing, config)
    except KeyboardInterrupt as stop:
        if not checkpoint.exists:
            raise
        told = f"the state is in {checkpoint.folder}; the same command with --resume goes on from there"
        raise KeyboardInterrupt(told) from stop
    checkpoint.remove()
    return healing


def train(training: Training, trainable: Trainable) -> Healing:
    """Run to the end, round the weights to the types they are stored in, put them into their graph, and measure.

    Raises MlaPassError, and gives up the state, when the held-out loss did not fall.
    """
    course, notes = training.course, []
    if not course.measured:
        training.measure()
        training.save()
    before = after = course.measured[0].loss
    if before < NOTHING_TO_HEAL:
        notes.append("The models agree to rounding: there was nothing to heal, and the weights are as they were.")
    else:
        training.run()
        for value in trainable.values:
            value.const_value = training.distillation.rounded(value)
        after = training.measure()
        if not after < before:
            training.checkpoint.remove()
            raise MlaPassError(
                f"healing took the held-out KL from {before:.4g} to {after:.4g} nats per token, so nothing was "
                "written; use more or other text, or a smaller learning rate"
            )
    return Healing(
        before=before, after=after, held_out_tokens=training.held_out_tokens, steps=course.step,
        tokens=course.step * training.config.step_tokens, seconds=course.seconds,
        weights=tuple(str(value.name) for value in trainable.values),
        numbers=sum(parameter.numel() for parameter in training.distillation.parameters.values()),
        left_out=trainable.left_out, notes=tuple(notes), held_out=tuple(course.measured),
        losses=tuple(course.losses),
    )  # fmt: skip


def write(out: Path, model: ir.Model, paths: tuple[Path, Path], healing: Healing, config: HealConfig) -> Healing:
    """Write the folder `out`: the model, its record, the history and its plot; returns the result with more notes.

    `paths` are the .onnx files of the original and the converted model.
    """
    from mla_pass.pytorch.plot import plot_losses

    source, target = paths
    record = read_record(target.parent / RECORD)
    with new_folder(out) as folder:
        save_model(model, folder)
        copy_companions(target.parent, folder)
        places = [(one.tokens, one.loss) for one in healing.held_out]
        told = plot_losses(folder / PLOT, healing.losses, places, config.step_tokens)
        healing = replace(healing, notes=(*healing.notes, *([told] if told else [])))
        short = {name: value for name, value in asdict(healing).items() if name not in ("losses", "held_out")}
        record["healing"] = {"original": str(source.parent), "config": asdict(config), **short}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        (folder / HISTORY).write_text(json.dumps(healing.to_json(), indent=2) + "\n")
        check_runs(folder, model)
    return healing


def check_runs(folder: Path, model: ir.Model) -> None:
    """Open the folder in ONNX Runtime and run it once. Raises MlaPassError when its logits are not finite."""
    kinds = {value.dtype for value in model.graph.outputs}
    # ONNX Runtime's CPU has no bfloat16 arithmetic: such a model is checked where it can run.
    if ir.DataType.BFLOAT16 not in kinds and not np.isfinite(session(folder).logits([[0, 0, 0]])).all():
        raise MlaPassError("the healed model's logits are not finite; nothing was written")


def check_device(device: str) -> None:
    """Raises MlaPassError for a device that torch cannot use here."""
    import torch

    if device not in ("cpu", "cuda"):
        raise MlaPassError(f"device is {device!r}; expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise MlaPassError("torch finds no CUDA device here; install torch's CUDA build, or leave --device out")


def check_positions(models: Iterable[ir.Model], config: HealConfig) -> None:
    """Raises MlaPassError when the sequences are longer than a model's positions reach."""
    for model in models:
        limit = model.metadata_props.get(MAX_POSITION_KEY)
        if limit is not None and config.context > int(limit):
            raise MlaPassError(f"context is {config.context}; the model has {limit} positions: give it no more")


def cut_text(source: Path, text: str | Path | np.ndarray, config: HealConfig) -> np.ndarray:
    """Token ids [windows, context] of all the text there is. Raises MlaPassError when it is too short."""
    bos = None
    if isinstance(text, np.ndarray):
        ids = as_token_ids(text, "the array")
    elif str(text) == "self":
        rows = -(-(config.tokens or SELF_TOKENS) // config.context) + HELD_OUT
        ids = self_written(source, rows, config.context).reshape(-1)
    elif not Path(text).is_file():
        raise MlaPassError(f"text {text} does not exist; give a text file, token ids in .npy, or 'self'")
    elif Path(text).suffix == ".npy":
        ids = read_ids(Path(text))
    else:
        ids, bos = read_text(Path(text), source), load_tokenizer(source.parent).leading_bos
    own, least = config.context - (bos is not None), HELD_OUT + config.batch
    if ids.size < least * own:
        raise MlaPassError(
            f"the text has {ids.size} tokens; {HELD_OUT} held-out windows and a step of {config.batch}, each of {own}, "
            f"need {least * own}: give more text, a smaller batch or a shorter context"
        )
    return cut_windows(ids, ids.size // own, config.context, bos)


def fingerprint(
    models: Iterable[ir.Model], paths: Iterable[Path], text: str | Path | np.ndarray, config: HealConfig
) -> str:
    """A digest of everything that a run's result follows from."""
    files = [*paths, *sorted({Path(tensor.path) for model in models for tensor in external_tensors(model)})]
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, asdict(config)]).encode())
    if isinstance(text, np.ndarray):
        digest.update(np.ascontiguousarray(text).tobytes())
    elif str(text) == "self":
        digest.update(b"self")
    else:
        files.append(Path(text))
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise MlaPassError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """What `convert` noted beside the model; empty where nothing lies."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MlaPassError(f"{path} is not valid JSON ({error}); remove it or convert the model again") from error
    if not isinstance(record, dict):
        raise MlaPassError(f"{path} holds no JSON object; remove it or convert the model again")
    return record
