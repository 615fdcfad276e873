"""Folders on disk: written whole or not at all, and the small files that travel with a model.

A model folder holds

    model.onnx, model.onnx.data        the graph and its weights (relative name, so the folder can be moved)
    config.json, generation_config.json, tokenizer files   copied along, from checkpoint to converted model
"""

import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_pass.errors import MlaPassError

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
FORMATS = ("hf", "onnx", "both")
"""What a checkpoint's conversion can write: a checkpoint, an ONNX folder, or a checkpoint with that folder inside."""
MAX_POSITION_KEY = "mla_pass.max_position"
"""The ONNX metadata property that holds the longest position (tokens) a model was made for."""

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "spiece.model",
)
"""File name patterns; what a model folder carries besides the weights is these and CONFIG_FILES."""


def require_free(out: str | Path) -> Path:
    """`out` as a path at which a new folder may be made; a look before the work, not a promise.

    Raises:
        MlaPassError: something other than an empty folder is there already, or the folder above cannot be written.
    """
    path = Path(out)
    if path.is_dir():
        if any(path.iterdir()):
            raise MlaPassError(f"the output folder {path} already holds files: name a new folder or empty this one")
    elif path.exists() or path.is_symlink():
        raise MlaPassError(f"the output {path} exists and is not a folder: name a new folder")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise MlaPassError(f"cannot write the output folder {path}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise MlaPassError(f"cannot write the output folder {path}: no permission to write in {above}")
    return path


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name once the block ends well.

    If the block raises, nothing is left behind. An OSError inside the block is a failed write: catch what reading the
    input raises before it gets here.

    Raises:
        MlaPassError: `out` is taken, cannot be made, or a write failed (no space, no permission).
    """
    path = require_free(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise _write_failure(path, error) from error
    try:
        yield partial
        partial.chmod(0o777 & ~umask())  # mkdtemp made it private
        if path.is_dir():
            path.rmdir()
        partial.rename(path)
    except OSError as error:
        raise _write_failure(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if all went well


def copy_companions(source: Path, target: Path, *, tokenizer: bool = True) -> list[str]:
    """Copy config, generation config and tokenizer files from one model folder to another; returns their names."""
    patterns = CONFIG_FILES + (TOKENIZER_FILES if tokenizer else ())
    names = sorted({file.name for pattern in patterns for file in source.glob(pattern) if file.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model's, and no ONNX model's."""
    return (folder / "config.json").is_file() and not any(folder.glob("*.onnx"))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder carries a tokenizer that `transformers.AutoTokenizer` can read without the network."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    return any((folder / name).is_file() for name in names)


def require_libraries(*names: str, purpose: str, extra: str = "torch") -> None:
    """Raise an MlaPassError that says what to install, if one of these import packages is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MlaPassError(f'{purpose} needs {" and ".join(missing)}: pip install "mla-pass[{extra}]"')


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Mute warnings, transformers' progress bars and the named loggers below ERROR; errors still come out."""
    from transformers.utils import logging as transformers_logging

    targets = [logging.getLogger(name) for name in ("transformers", *loggers)]
    levels = [logger.level for logger in targets]
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        for logger in targets:
            logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(targets, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _write_failure(path: Path, error: OSError) -> MlaPassError:
    reason = error.strerror or str(error)
    return MlaPassError(f"cannot write the output folder {path}: {reason}; nothing was left there, free the space or "
                        "name a folder you can write to")  # fmt: skip


def umask() -> int:
    """The process's file creation mask."""
    current = os.umask(0)
    os.umask(current)
    return current
