"""Finding attention in a graph: one concern a file, each a step of the walk in `walk.py`."""

if __name__ != "mla_pass.patterns":  # a second copy would make a second copy of every class
    raise ImportError(f"this package imports as mla_pass.patterns, not as {__name__}")

from mla_pass.patterns.walk import find_sites, read_sites

__all__ = ["find_sites", "read_sites"]
