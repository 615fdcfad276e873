"""Stages of a long run, told on stderr."""

from __future__ import annotations

import sys
from typing import Any, Self


class Progress:
    """Stages of a long run on stderr: a bar on a terminal, a line a stage elsewhere."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._open(stage, total)
        self._bar.update(done - self._bar.n)

    def _open(self, stage: str, total: int) -> None:
        from tqdm import tqdm

        self._close()
        self._stage = stage
        terminal = sys.stderr.isatty()
        if not terminal:
            print(stage, file=sys.stderr)
        self._bar = tqdm(desc=stage, total=total, file=sys.stderr, disable=not terminal)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
