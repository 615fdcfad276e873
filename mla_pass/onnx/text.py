"""Text in, token ids out, and back: the tokenizer that lies in a model's folder, and its special ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_pass.errors import MlaPassError


@dataclass(frozen=True)
class SpecialIds:
    """Ids a model starts and ends a text with, as its folder states them."""

    bos: int | None
    eos: tuple[int, ...]


@dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer, whichever library reads it."""

    encode_with: Callable[[str, bool], list[int]]
    decode_with: Callable[[list[int]], str]
    bos: int | None
    eos: tuple[int, ...]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; with `special`, framed by the tokenizer's own special tokens as for a prompt."""
        return self.encode_with(text, special)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.decode_with([int(token) for token in ids])

    @property
    def leading_bos(self) -> int | None:
        """The id this tokenizer puts before every text by itself, if it is the model's BOS; None if it puts none."""
        framed = self.encode("", special=True)
        return framed[0] if framed and framed[0] == self.bos else None


class TextStream:
    """Turns one sequence's ids into pieces of text as they come; joined, the pieces are the whole text.

    A character may need several tokens (its bytes come apart), and a token's text may depend on the one before it
    (leading spaces). So a piece is the difference between two decodings that start at the same earlier token, and is
    held back while it ends in an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._told: list[int] = []
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        """The text that is certain now; often empty."""
        self._waiting.append(token)
        piece = self._piece()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._told, self._waiting = self._waiting, []
        return piece

    def finish(self) -> str:
        """What was held back, unfinished characters included."""
        piece = self._piece() if self._waiting else ""
        self._told, self._waiting = self._waiting, []
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._told)
        return self._tokenizer.decode(self._told + self._waiting)[len(before) :]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`: tokenizer.json through `tokenizers`, else tokenizer.model through `transformers`.

    Raises MlaPassError when the folder has neither, when a file cannot be read, or the library is not installed.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder)
    if (folder / "tokenizer.model").is_file():
        return _from_transformers(folder)
    raise MlaPassError(
        f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); copy the model's tokenizer files into it, "
        "or give token ids instead of text"
    )


def has_tokenizer(folder: str | Path) -> bool:
    """Whether :func:`load_tokenizer` has something to load."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def special_ids(folder: str | Path) -> SpecialIds:
    """BOS and EOS ids from generation_config.json, else config.json (or its text_config), of a model's folder."""
    found = [_read_json(Path(folder) / name) for name in ("generation_config.json", "config.json")]
    found.append(found[1].get("text_config") or {})
    bos = next((source["bos_token_id"] for source in found if source.get("bos_token_id") is not None), None)
    eos = next((source["eos_token_id"] for source in found if source.get("eos_token_id") is not None), ())
    try:
        return SpecialIds(
            None if bos is None else int(bos), tuple(map(int, eos if isinstance(eos, (list, tuple)) else [eos]))
        )
    except (TypeError, ValueError) as error:
        raise MlaPassError(
            f"{folder}: bos_token_id {bos!r} or eos_token_id {eos!r} is no token id; expected integers"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MlaPassError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MlaPassError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _from_json(folder: Path) -> Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise MlaPassError("reading tokenizer.json needs the tokenizers package: pip install tokenizers") from error
    path = folder / "tokenizer.json"
    try:
        loaded = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MlaPassError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise MlaPassError(f"{path} is no tokenizer that tokenizers {tokenizers.__version__} reads: {error}") from error
    loaded.no_truncation()
    loaded.no_padding()
    special = special_ids(folder)

    def encode(text: str, framed: bool) -> list[int]:
        return list(loaded.encode(text, add_special_tokens=framed).ids)

    def decode(ids: list[int]) -> str:
        return str(loaded.decode(ids, skip_special_tokens=True))

    return Tokenizer(encode, decode, special.bos, special.eos)


def _from_transformers(folder: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MlaPassError(
            f"{folder} has only tokenizer.model, which needs transformers: pip install 'mla-pass[torch]', "
            "or save the tokenizer as tokenizer.json"
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise MlaPassError(f"{folder}: transformers cannot read its tokenizer: {error}") from error
    special = special_ids(folder)

    def encode(text: str, framed: bool) -> list[int]:
        return list(loaded.encode(text, add_special_tokens=framed))

    def decode(ids: list[int]) -> str:
        return str(loaded.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return Tokenizer(encode, decode, special.bos, special.eos)
