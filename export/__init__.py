"""From checkpoints to graphs that the rest of mla_pass reads."""

if __name__ != "mla_pass.export":  # a second copy would make a second copy of every class
    raise ImportError(f"this package imports as mla_pass.export, not as {__name__}")
