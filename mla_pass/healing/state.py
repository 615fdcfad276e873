"""A training run's state on disk, beside the folder it will write: saved whole or not at all, read back exactly."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla_pass.errors import MlaPassError

FORMAT_VERSION = 1
RECORD = "state.json"
WINDOWS = "windows.npy"


@dataclass(frozen=True)
class SavedState:
    """The folder `{out}.heal-state` of one run.

    It holds the run's text, windows.npy, and state.json, which names the file of tensors it belongs to. That file is
    written first and state.json takes the place of its predecessor in one go, so that there is always one whole state.
    """

    folder: Path
    fingerprint: str
    """Digest of all that decides what the run computes; a state of another run is refused."""

    @property
    def exists(self) -> bool:
        """Whether there is a state to resume."""
        return (self.folder / RECORD).is_file()

    def begin(self, windows: np.ndarray) -> None:
        """Make the folder and keep the token ids [windows, context] in it. Raises MlaPassError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            np.save(self.folder / WINDOWS, windows)
        except OSError as error:
            raise self._failure(error) from error

    def save(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Put a state in place of the last. Raises MlaPassError when it cannot be written; the last one stays then."""
        name = f"step-{record['step']}.safetensors"
        written = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, "tensors": name, **record}
        partial = self.folder / f"{RECORD}.partial"
        try:
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, self.folder / name)
            partial.write_text(json.dumps(written))
            os.replace(partial, self.folder / RECORD)
            for old in self.folder.glob("step-*.safetensors"):
                if old.name != name:
                    old.unlink()
        except (OSError, SafetensorError) as error:
            raise self._failure(error) from error

    def load(self) -> tuple[np.ndarray, dict[str, Tensor], dict[str, Any]]:
        """The token ids, the tensors (on the CPU) and the record of the last state.

        Raises MlaPassError when there is none, it cannot be read, or it is of another run.
        """
        if not self.exists:
            raise MlaPassError(f"{self.folder} holds no state, so there is nothing to resume; leave --resume out")
        try:
            record = json.loads((self.folder / RECORD).read_text())
            if record["format_version"] != FORMAT_VERSION or record["fingerprint"] != self.fingerprint:
                raise MlaPassError(
                    f"{self.folder} holds the state of a run over other models, text or options; give the same ones "
                    "to resume it, or remove that folder to start anew"
                )
            return np.load(self.folder / WINDOWS), load_file(self.folder / record["tensors"]), record
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise MlaPassError(f"{self.folder} cannot be read ({error}); remove it to start anew") from error

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _failure(self, error: Exception) -> MlaPassError:
        return MlaPassError(f"cannot write the state of this run to {self.folder}: {error}; free space or name another "
                            "output folder")  # fmt: skip


def state_folder(out: Path) -> Path:
    """Where the state of a run that will write `out` lies."""
    return out.with_name(f"{out.name}.heal-state")
