"""One healing run from two models to a folder: the public `mla_pass.heal`.

Only the matrices of the latent attention change; the text needs no labels, as the original model's own predictions are
the aim. Nothing here imports torch before it is known to be installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla_pass.convert import RECORD, is_self
from mla_pass.errors import MlaPassError
from mla_pass.export.layout import is_checkpoint, new_folder, require_free, require_libraries
from mla_pass.healing.config import FORMAT_VERSION, HealConfig, Healing
from mla_pass.onnx.session import as_ids

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from mla_pass.healing.state import SavedState
    from mla_pass.healing.subject import Subject
    from mla_pass.healing.training import Training

HISTORY, PLOT = "heal.json", "heal.svg"
NOTHING_TO_HEAL = 1e-6
"""A divergence, nats per token, that the rounding of float32 logits explains."""
KINDS = {"graph": "an ONNX model", "checkpoint": "a Hugging Face checkpoint", "program": "an exported program"}

Progress = Callable[[str, int, int], None]


def heal(
    original: str | Path | ExportedProgram, converted: str | Path | ExportedProgram, out: str | Path, *,
    text: str | Path | np.ndarray = "self", config: HealConfig | None = None, resume: bool = False,
    device: str = "cpu", progress: Progress | None = None,
) -> Healing:  # fmt: skip
    """Train the latent attention of `converted` towards `original`; write the folder `out`.

    Both are folders of ONNX models, or of Hugging Face checkpoints, or exported programs (in memory, or in files that
    torch.export.save wrote, .pt2); `out` holds one of the same kind, a program as model.pt2. They are left as they are.
    `text`: a text file (the original's tokenizer reads it), token ids in .npy or in an array, or "self": what the
    original model writes. A program takes token ids alone. While a run lasts its state is kept in `{out}.heal-state`;
    with `resume` a run that was interrupted goes on from there. `device`: "cpu", or "cuda" for a GPU that torch can
    use.
    Raises MlaPassError when a request cannot be served and when the held-out loss did not fall; `out` is not written
    then. A KeyboardInterrupt says in its message how to go on.
    """
    require_libraries("torch", "safetensors", purpose="healing")
    from mla_pass.healing.state import SavedState, state_folder

    config, progress, out = config or HealConfig(), progress or (lambda stage, done, total: None), require_free(out)
    check_device(device)
    progress("reading the models", 0, 1)
    subject = open_subject(original, converted, device)
    check_positions(subject.limits, config)
    record = {} if subject.home is None else read_record(subject.home / RECORD)
    saved = SavedState(state_folder(out), fingerprint(subject, text, config))
    progress("reading the models", 1, 1)
    try:
        training = prepare(subject, saved, text, config, resume=resume, device=device, progress=progress)
        healing = train(training, subject)
        healing = write(out, subject, record, healing, config)
    except KeyboardInterrupt as stop:
        if not saved.exists:
            raise
        told = f"the state is in {saved.folder}; the same command with --resume goes on from there"
        raise KeyboardInterrupt(told) from stop
    saved.remove()
    return healing


def open_subject(
    original: str | Path | ExportedProgram, converted: str | Path | ExportedProgram, device: str
) -> Subject:  # fmt: skip
    """Both models, read. Raises MlaPassError when they are not of one kind, or cannot be read."""
    kinds = kind_of(original), kind_of(converted)
    if kinds[0] != kinds[1]:
        raise MlaPassError(
            f"the original is {KINDS[kinds[0]]} and the conversion {KINDS[kinds[1]]}; expected two of one kind"
        )
    if kinds[0] == "program":
        from mla_pass.healing.programs import ProgramSubject

        return ProgramSubject(original, converted, device)
    assert isinstance(original, (str, Path)) and isinstance(converted, (str, Path))  # what kind_of told
    if kinds[0] == "graph":
        from mla_pass.healing.graphs import GraphSubject

        return GraphSubject(Path(original), Path(converted), device)
    require_libraries("transformers", purpose="healing a Hugging Face checkpoint")
    from mla_pass.healing.checkpoints import CheckpointSubject

    return CheckpointSubject(Path(original), Path(converted), device)


def kind_of(model: str | Path | ExportedProgram) -> str:
    """One of `KINDS`. Raises MlaPassError for a path at which nothing is."""
    if not isinstance(model, (str, Path)):
        return "program"
    path = Path(model)
    if not path.exists():
        raise MlaPassError(f"{path} does not exist; expected the folder of a model, or an exported program's .pt2 file")
    if path.suffix == ".pt2":
        return "program"
    return "checkpoint" if is_checkpoint(path) else "graph"


def prepare(
    subject: Subject, saved: SavedState, text: str | Path | np.ndarray, config: HealConfig, *, resume: bool,
    device: str, progress: Progress,
) -> Training:  # fmt: skip
    """A run at its start, or where an interrupted one was. Raises MlaPassError."""
    from mla_pass.healing.distill import Distillation
    from mla_pass.healing.text import cut_text
    from mla_pass.healing.training import Training

    state = saved.load() if resume else None
    if state is None and saved.exists:
        raise MlaPassError(
            f"{saved.folder} holds the state of an unfinished run; --resume goes on with it, or remove that folder"
        )
    distillation = Distillation(subject.teacher, subject.student, subject.trainable, device=device)
    if state is None:
        progress("getting text", 0, 1)
        windows = as_ids(cut_text(subject, text, config), distillation.vocab)
        progress("getting text", 1, 1)
        saved.begin(windows)
    else:
        windows = state[0]
    training = Training(distillation, windows, config, saved, progress)
    if state is not None:
        training.restore(*state[1:])
    return training


def train(training: Training, subject: Subject) -> Healing:
    """Run to the end, round the weights to the types they are stored in, and measure.

    Raises MlaPassError, and gives up the state, when the held-out loss did not fall.
    """
    course, notes, parameters = training.course, list(subject.notes), training.distillation.parameters
    if not course.measured:
        training.measure()
        training.save()
    before = after = course.measured[0].loss
    if before < NOTHING_TO_HEAL:
        notes.append("The models agree to rounding: there was nothing to heal, and the weights are as they were.")
    else:
        training.run()
        settle(subject, parameters)
        after = training.measure()
        if not after < before:
            training.saved.remove()
            raise MlaPassError(
                f"healing took the held-out KL from {before:.4g} to {after:.4g} nats per token, so nothing was "
                "written; use more or other text, or a smaller learning rate"
            )
    return Healing(
        before=before, after=after, held_out_tokens=training.held_out_tokens, steps=course.step,
        tokens=course.step * training.config.step_tokens, seconds=course.seconds,
        weights=subject.trainable.names, numbers=sum(parameter.numel() for parameter in parameters.values()),
        left_out=subject.trainable.left_out, notes=tuple(notes), held_out=tuple(course.measured),
        losses=tuple(course.losses),
    )  # fmt: skip


def settle(subject: Subject, parameters: Mapping[str, Tensor]) -> None:
    """Round trained weights to the types they are stored in."""
    import torch

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(subject.settle(name, parameter))


def write(out: Path, subject: Subject, record: dict[str, Any], healing: Healing, config: HealConfig) -> Healing:
    """Write the folder `out`: the model, its record, the history and its plot; returns the result with more notes."""
    from mla_pass.healing.plot import plot_losses

    with new_folder(out) as folder:
        subject.write(folder)
        places = [(one.tokens, one.loss) for one in healing.held_out]
        told = plot_losses(folder / PLOT, healing.losses, places, config.step_tokens)
        healing = replace(healing, notes=(*healing.notes, *([told] if told else [])))
        short = {name: value for name, value in asdict(healing).items() if name not in ("losses", "held_out")}
        record["healing"] = {"original": subject.origin, "config": asdict(config), **short}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        (folder / HISTORY).write_text(json.dumps(healing.to_json(), indent=2) + "\n")
    return healing


def check_device(device: str) -> None:
    """Raises MlaPassError for a device that torch cannot use here."""
    import torch

    if device not in ("cpu", "cuda"):
        raise MlaPassError(f"device is {device!r}; expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise MlaPassError("torch finds no CUDA device here; install torch's CUDA build, or leave --device out")


def check_positions(limits: Iterable[int], config: HealConfig) -> None:
    """Raises MlaPassError when the sequences are longer than a model's positions reach."""
    for limit in limits:
        if config.context > limit:
            raise MlaPassError(f"context is {config.context}; the model has {limit} positions: give it no more")


def fingerprint(subject: Subject, text: str | Path | np.ndarray, config: HealConfig) -> str:
    """A digest of everything that a run's result follows from."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, asdict(config)]).encode())
    if isinstance(text, np.ndarray):
        digest.update(np.ascontiguousarray(text).tobytes())
        parts = subject.sources()
    else:
        parts = (*subject.sources(), b"self" if is_self(text) else Path(text))
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
            continue
        try:
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise MlaPassError(f"{part} cannot be read: {error.strerror}") from error
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
