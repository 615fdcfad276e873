"""The text of a healing run: read, or written by the original model, and cut into sequences of one length."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mla_pass.convert import as_token_ids, is_self, read_ids
from mla_pass.errors import MlaPassError
from mla_pass.healing.config import HELD_OUT, HealConfig
from mla_pass.healing.subject import Subject
from mla_pass.onnx.perplexity import cut_windows

SELF_TOKENS = 32768
"""Tokens the model writes for a run of so many minutes; a run of so many tokens gets as many."""


def cut_text(subject: Subject, text: str | Path | np.ndarray, config: HealConfig) -> np.ndarray:
    """Token ids [windows, context] of all the text there is. Raises MlaPassError when it is too short."""
    bos = None
    if isinstance(text, np.ndarray):
        ids = as_token_ids(text, "the array")
    elif is_self(text):
        rows = -(-(config.tokens or SELF_TOKENS) // config.context) + HELD_OUT
        ids = subject.written(rows, config.context).reshape(-1)
    elif not Path(text).is_file():
        raise MlaPassError(f"text {text} does not exist; give a text file, token ids in .npy, or 'self'")
    elif Path(text).suffix == ".npy":
        ids = read_ids(Path(text))
    else:
        ids, bos = subject.tokens(Path(text))
    own, least = config.context - (bos is not None), HELD_OUT + config.batch
    if ids.size < least * own:
        raise MlaPassError(
            f"the text has {ids.size} tokens; {HELD_OUT} held-out windows and a step of {config.batch}, each of {own}, "
            f"need {least * own}: give more text, a smaller batch or a shorter context"
        )
    return cut_windows(ids, ids.size // own, config.context, bos)
