"""The `mla-pass` command."""

import argparse
from collections.abc import Sequence

from mla_pass import __version__


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mla-pass")
    parser.add_argument("--version", action="version", version=f"mla-pass {__version__}")
    parser.parse_args(argv)
    return 0
